"""One width for all figures, panels below one another, and curves for the interactive charts."""

import re

import pandas as pd
import pytest

from moelab.plotting import figures, interactive
from moelab.plotting.layout import TEXT, WIDTH


def test_panels_stand_below_one_another_at_one_width(tmp_path):
    fig, (top, below) = figures.panels(2, height=(2.0, 3.0))
    top.set_ylabel("a label that is longer than the height of its panel and is wrapped")
    top.set_xticks(range(8), ["a long label"] * 8)
    figures.title(fig, "A title that is far longer than the figure is wide and so takes more than one line of the page")
    fig.draw_without_rendering()
    first, second = (ax.get_window_extent() for ax in (top, below))
    assert first.y0 > second.y1 and abs(first.x0 - second.x0) < 1
    assert "\n" in top.get_ylabel() and "\n" in fig._suptitle.get_text()
    assert top.get_xticklabels()[0].get_rotation() == 40, "labels that would overlap are turned"
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', figures.save(fig, tmp_path / "f").read_text())
    width, height = (float(value) / 72 for value in size.groups())
    assert width == pytest.approx(WIDTH) and height > 5


def test_every_text_reads_on_a_phone(tmp_path):
    fig, (ax,) = figures.panels()
    ax.plot([1, 2], [1, 2], label="one")
    ax.set(xlabel="x", ylabel="y", title="a panel")
    figures.legend_below(ax)
    figures.title(fig, "What it shows")
    text = figures.save(fig, tmp_path / "f").read_text()
    sizes = {float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)}
    shown = 358 / (72 * WIDTH)  # pixels for a point, in a page of 390 pixels with its margins
    assert sizes and min(sizes) >= TEXT and min(sizes) * shown > 11


def test_a_legend_covers_nothing_and_takes_no_room_from_its_panel():
    heights = []
    for arms in (2, 9):
        fig, (ax,) = figures.panels()
        for arm in range(arms):
            ax.plot([1, 2], [arm, arm], label=f"an arm with a long label, number {arm}")
        ax.set(xlabel="a label of the axis", ylabel="loss")
        ax.set_yticks(range(2), ["a long name of a row", "another"])
        fig.draw_without_rendering()
        width = ax.get_window_extent().width
        legend = figures.legend_below(ax)
        fig.draw_without_rendering()
        assert ax.get_window_extent().width > 0.95 * width
        assert legend.get_window_extent().y1 < ax.get_window_extent().y0
        assert legend.get_window_extent().x1 <= fig.bbox.x1 and legend.get_window_extent().y0 >= -1
        heights.append(ax.get_window_extent().height)
    assert heights[1] > 0.9 * heights[0]


@pytest.mark.parametrize(("arms", "bands", "log"), [(3, 3, False), (5, 0, False), (3, 0, True)])
def test_many_curves_and_those_on_a_logarithmic_axis_have_bars_at_their_ends_instead_of_bands(arms, bands, log):
    names = [f"arm {i}" for i in range(arms)]
    points = [(name, seed, n, i + 0.1 * seed) for i, name in enumerate(names) for seed in (0, 1) for n in (1, 2)]
    fig, (ax,) = figures.panels()
    curves = pd.DataFrame(points, columns=["arm", "seed", "tokens", "loss"])
    figures.loss_curves(curves, ax, arms=names, against="Dense", log=log)
    assert sum(c.get_array() is None and len(c.get_paths()[0]) > 4 for c in ax.collections) == bands
    assert len(ax.containers) == (0 if bands else arms) and "Dense" in ax.get_ylabel()


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
    bases = interactive.pack(
        [row | {"arm": row["arm"].replace("MoE-128", "1.3B")} for row in rows()], ["Dense", "1.3B"]
    )
    assert [dashes for *_, dashes in bases.arms.values()] == [(), (4, 1.5)], "arms of one colour"
    assert (found.values, found.against, found.along) == ("loss", "", True)
    differences = interactive.pack([row | {"loss": row["loss"] - 3, "against": "MoE-32"} for row in rows()])
    assert (differences.values, differences.against) == ("gap", "MoE-32")
    budgets = interactive.pack(rows("gap", loss=5.0, per_parameter=20.0))
    assert (budgets.values, budgets.along) == ("gap", False) and budgets.series[0][3] == [2.75, 2.5, 2.25]


@pytest.mark.parametrize(
    "data",
    [
        [],
        [{"arm": "a", "loss": 1}],
        rows("accuracy"),
        rows()[:2],
        [row | {"loss": None} for row in rows()],
        [*rows(width=32), *rows(width=64)],  # of a ladder: two losses of an arm and seed at the same tokens
    ],
)
def test_other_data_have_no_curves(data):
    assert interactive.pack(data) is None
