"""The first tour's picture of a layout shows what the engine does."""

import pytest

from moelab.config.parallel import ParallelConfig
from moelab.experiments.start import gpus

PYRAMID = ParallelConfig(data=8, gpus_per_node=4)
SLICED = ParallelConfig(tensor=2, data=4, expert_slicing=2, gpus_per_node=8)


@pytest.mark.parametrize(
    ("layout", "experts", "shown"),
    [
        (PYRAMID, 4, ["0", "1", "2", "3"] * 2),
        (PYRAMID, 16, ["0–1", "2–3"]),
        (SLICED, None, ["copy 0\nslice 0", "copy 0\nslice 1", "copy 1\nslice 0"]),
        (SLICED, 4, ["0\nslice 0", "1\nslice 0", "2\nslice 0", "3\nslice 0", "0\nslice 1"]),  # X ranks apart
    ],
)
def test_ranks_show_their_experts_or_slices(ax, layout, experts, shown):
    gpus(layout, ax, **({"experts": experts} if experts else {}))
    assert [t.get_text() for t in ax.texts][: len(shown)] == shown
    if experts == 16:
        assert ax.get_title("left").endswith("once")
    elif layout is PYRAMID:
        assert ax.get_title("left") == "a layer of 4 experts: all of them twice"
        colors = [patch.get_facecolor() for patch in ax.patches]
        assert len(set(colors)) == 2 and len(set(colors[:4])) == 1, "a colour a whole set"


def test_what_does_not_fit_is_one_line(ax):
    with pytest.raises(ValueError, match=r"^parallel: "):
        gpus(ParallelConfig(data=8), ax, experts=5)
