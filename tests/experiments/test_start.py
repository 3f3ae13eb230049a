"""The first tour's picture of a layout shows what the engine does."""

import matplotlib
import pytest
from matplotlib import pyplot as plt

from moelab.config.parallel import ParallelConfig
from moelab.experiments.start import gpus
from moelab.plotting import figures

matplotlib.use("Agg")


@pytest.fixture
def ax():
    """An axis in the notebooks' theme, which puts titles left."""
    with matplotlib.rc_context():
        figures.theme()
        fig, ax = plt.subplots()
        yield ax
        plt.close(fig)


def texts(ax) -> list[str]:
    return [t.get_text() for t in ax.texts]


class TestLayout:
    def test_a_pyramid_on_eight_ranks(self, ax):
        layout = ParallelConfig(data=8, gpus_per_node=4)
        gpus(layout, ax, experts=4)
        assert texts(ax) == ["0", "1", "2", "3"] * 2
        assert ax.get_title("left") == "a layer of 4 experts: all of them twice"
        colors = [patch.get_facecolor() for patch in ax.patches]
        assert len(set(colors)) == 2 and len(set(colors[:4])) == 1, "a colour a whole set"
        ax.clear()
        gpus(layout, ax, experts=16)
        assert texts(ax)[:2] == ["0–1", "2–3"] and ax.get_title("left").endswith("once")

    def test_slices(self, ax):
        layout = ParallelConfig(tensor=2, data=4, expert_slicing=2, gpus_per_node=8)
        gpus(layout, ax)
        assert texts(ax)[:3] == ["copy 0\nslice 0", "copy 0\nslice 1", "copy 1\nslice 0"]
        ax.clear()
        gpus(layout, ax, experts=4)
        assert texts(ax)[0] == "0\nslice 0" and texts(ax)[4] == "0\nslice 1", "slices of an expert sit X ranks apart"

    def test_what_does_not_fit_is_one_line(self, ax):
        with pytest.raises(ValueError, match=r"^parallel: "):
            gpus(ParallelConfig(data=8), ax, experts=5)
