"""The look that figures share: colours by arm, the paper's marks, titles as in print."""

import matplotlib
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from moelab.experiments import pr_moe, scaling, top2_vs_residual, upcycling, zero_shot
from moelab.plotting import figures, layer

matplotlib.use("Agg")


@pytest.fixture
def ax():
    with matplotlib.rc_context():
        figures.theme()
        fig, (ax,) = figures.panels()
        yield ax
        plt.close(fig)


def test_an_arm_has_one_colour_in_every_figure():
    whole = figures.colors(list(pr_moe.ARMS))
    for arms in (list(zero_shot.ARMS), list(top2_vs_residual.ARMS), ["MoE-128", "Dense"]):
        some = figures.colors(arms)
        assert list(some) == arms
        assert all(some[arm] == whole[arm] for arm in arms if arm in whole)
    assert figures.colors(list(scaling.ARMS))["350M+MoE-128"] == whole["MoE-128"]
    for arms in (pr_moe.ARMS, top2_vs_residual.ARMS, scaling.ARMS):
        assert len(set(figures.colors(list(arms)).values())) == len(arms)


def test_arms_that_share_a_figure_keep_their_colours_where_all_arms_are_drawn():
    shown = ["Top-2", "Upcycled", "Upcycled, top-1, scaled", "MoE-32", "MoE-128", "Grown"]  # of notebook 27
    whole = figures.colors(list(upcycling.ARMS))
    assert figures.colors(shown) == {arm: whole[arm] for arm in shown}
    assert len({whole[arm] for arm in shown}) == len(shown)
    ways = figures.colors(["hierarchical", "coordinated", "two bare all-to-alls", "coordinated + hierarchical"])
    assert len(set(ways.values())) == 4
    assert all(ways[way] == color for way, color in layer.EXCHANGE_COLORS.items() if way != "flat")


def test_every_value_of_the_paper_is_a_hollow_diamond(ax):
    figures.paper_points(ax, [1], [1])
    figures.paper_points(ax, [1, 2], [2, 3], line=True, color="#0072B2")
    figures.paper_bound(ax, 4, label="paper: at most 4")
    lines = [line for line in ax.lines if line.get_marker() == figures.PAPER["marker"]]
    assert len(lines) == 3 and {line.get_markerfacecolor() for line in lines} == {"white"}
    assert lines[-1].get_label() == "paper: at most 4"


def test_seeds_stand_below_their_mean_and_the_paper_above(ax):
    table = pd.DataFrame({"arm": ["a"] * 3, "seed": [0, 1, 2], "gap": [0.0, 0.1, 0.2]})
    figures.gaps(table, ax, arms=["a"], value="gap", paper={"a": (0.3, 0.3, 0.3)})
    (dots,) = ax.collections[:1]
    assert dots.get_offsets()[:, 1].tolist() == pytest.approx([0.22] * 3), "rows count downwards"
    (paper,) = (line for line in ax.lines if line.get_marker() == figures.PAPER["marker"])
    assert paper.get_ydata()[0] < 0
    ax.legend()
    assert "paper" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_a_title_is_set_as_in_print_and_left_out_of_svgs_that_stand_below_it(ax, tmp_path):
    title = "Ours ends -0.05 nats away (95 % interval), 50% smaller"
    figures.title(ax.figure, title)
    (text,) = ax.figure.texts
    assert text.get_text().replace("\n", " ") == "Ours ends −0.05 nats away (95\u00a0% interval), 50\u00a0% smaller"
    figures.save(ax.figure, tmp_path / "a", title=title)
    assert "nats away" not in (tmp_path / "a.svg").read_text()
    figures.save(ax.figure, tmp_path / "b")
    assert "nats away" in (tmp_path / "b.svg").read_text()
