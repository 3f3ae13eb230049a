"""Figures for phones, and curves for the interactive charts."""

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from moelab.plotting import figures, interactive
from moelab.plotting.narrow import WIDTH, narrowed


@pytest.fixture(autouse=True)
def closed():
    plt.close("all")  # of other files' tests
    yield
    plt.close("all")


def test_panels_stand_below_one_another_and_the_figure_stays():
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    left.errorbar([1, 2], [1, 2], yerr=0.1, label="one")
    left.set_title("a title that is far too long for the width of a phone and so is wrapped", loc="left")
    left.legend(loc="upper right")
    before = [ax.get_position().bounds for ax in fig.axes]
    small = narrowed(fig)
    assert small is not fig and plt.get_fignums() == [fig.number], "a notebook does not show the copy"
    small.draw_without_rendering()
    top, below = (ax.get_window_extent() for ax in small.axes)
    assert small.get_figwidth() == WIDTH and top.y0 > below.y1 and abs(top.x0 - below.x0) < 1
    assert all(label.get_visible() for label in small.axes[1].get_yticklabels())
    assert "\n" in small.axes[0].get_title(loc="left")
    legend = small.axes[0].get_legend()
    assert legend.get_window_extent().y1 < top.y0, "below its panel"
    assert [ax.get_position().bounds for ax in fig.axes] == before and fig.get_figwidth() == 11


def test_a_long_legend_does_not_take_the_height_of_its_panel():
    heights = []
    for arms in (2, 9):
        fig, ax = plt.subplots(figsize=(10, 4.6))
        for arm in range(arms):
            ax.plot([1, 2], [arm, arm], label=f"an arm with a long label, number {arm}")
        ax.set_ylabel("loss minus Dense's (nats per token)")
        ax.legend()
        small = narrowed(fig)
        small.draw_without_rendering()
        heights.append(small.axes[0].get_window_extent().height)
    assert heights[1] > 0.9 * heights[0]


def test_labels_that_would_overlap_are_turned():
    fig, ax = plt.subplots(figsize=(10, 3))
    ax.set_xticks(range(8), ["a long label"] * 8)
    assert narrowed(fig).axes[0].get_xticklabels()[0].get_rotation() == 40


def test_a_figure_with_axes_outside_a_grid_is_not_laid_out_again(tmp_path):
    fig, ax = plt.subplots()
    fig.add_axes((0.1, 0.1, 0.2, 0.2))
    assert narrowed(fig) is None
    assert [path.name for path in figures.save(fig, tmp_path / "f")] == ["f.png", "f.svg", "f-dark.svg"]


def rows(column="loss", **others):
    return [
        {"arm": arm, "seed": seed, "tokens": tokens, column: 3 - i - tokens / 4, **others}
        for i, arm in enumerate(("MoE-128", "Dense"))
        for seed in (0, 1)
        for tokens in (0, 1, 2, 3)
    ]


def test_curves_are_packed_by_arm_and_seed():
    found = interactive.pack(rows(), ["Dense", "MoE-128"])
    assert list(found.arms) == ["Dense", "MoE-128"] and found.grids == [[1, 2, 3]], "without the untrained model"
    assert found.series[0] == ("MoE-128", 0, 0, [2.75, 2.5, 2.25]) and len(found.series) == 4
    assert found.arms["Dense"][0] == figures.colors(["Dense"])["Dense"] != found.arms["Dense"][1]
    assert (found.values, found.along) == ("loss", True)
    assert interactive.pack([row | {"loss": row["loss"] - 3} for row in rows()]).values == "gap", "differences"


def test_budgets_are_final_losses_and_their_gap_counts():
    found = interactive.pack(rows("gap", loss=5.0, per_parameter=20.0))
    assert (found.values, found.along) == ("gap", False) and found.series[0][3] == [2.75, 2.5, 2.25]


@pytest.mark.parametrize(
    "data", [[], [{"arm": "a", "loss": 1}], rows("accuracy"), rows()[:2], [row | {"loss": None} for row in rows()]]
)
def test_other_data_have_no_curves(data):
    assert interactive.pack(data) is None
