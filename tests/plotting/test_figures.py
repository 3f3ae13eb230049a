"""The look that figures share: colours by arm, the paper's marks, titles as in print."""

import numpy as np
import pandas as pd
import pytest

from moelab.experiments import pr_moe, scaling, top2_vs_residual, upcycling, what_survives, zero_shot
from moelab.plotting import figures, ladder, layer
from moelab.plotting.axis import EDGE, LOWEST, Axis


@pytest.fixture
def ax():
    return figures.panels()[1][0]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_an_arm_has_one_colour_in_every_figure():
    shown = ["Top-2", "Upcycled", "Upcycled, top-1, scaled", "MoE-32", "MoE-128", "Grown"]  # of notebook 27
    ways = ["hierarchical", "coordinated", "two bare all-to-alls", "coordinated + hierarchical"]
    every = figures.colors(list(upcycling.ARMS)) | layer.EXCHANGE_COLORS
    every["350M+MoE-128"] = every["MoE-128"]
    for arms in (
        pr_moe.ARMS,
        zero_shot.ARMS,
        top2_vs_residual.ARMS,
        ["MoE-128", "Dense"],
        shown,
        ways,
    ):
        found = figures.colors(list(arms))
        assert list(found) == list(arms) and len(set(found.values())) == len(arms)
        assert {arm: every.setdefault(arm, color) for arm, color in found.items()} == found


def test_a_family_shares_its_colour_and_its_arms_differ_by_marks():
    for arms, families in ((scaling.ARMS, 2), (zero_shot.drawn("full"), 3), (what_survives.ARMS, 6)):
        found = figures.colors(list(arms))
        looks = {(color, figures.ranks(found)[arm]) for arm, color in found.items()}
        assert len(set(found.values())) == families and len(looks) == len(arms)
    assert figures.colors(["Shared", "Shared, fine", "350M"])["Shared, fine"] == figures.colors(["MoE-128"])["MoE-128"]


def test_scores_by_task_show_family_base_and_what_is_real(ax):
    arms = [*zero_shot.drawn("full"), "SmolLM2"]
    score = {"accuracy": 0.3, "standard_error": 0.01, "reference": 0.25, "margin": 0.5}
    table = pd.DataFrame([{"arm": arm, "task": task, **score} for arm in arms for task in ("piqa", "nq")])
    figures.task_scores(table, ax, tasks=["piqa", "nq"], twins=zero_shot.arms("full"))
    drawn = {bars.get_label(): bars.lines[0] for bars in ax.containers}
    looks = {(line.get_color(), line.get_marker()) for line in drawn.values()}
    assert len(looks) == len(arms) and len({color for color, _ in looks}) == 4
    assert [drawn[f"{arm} twin"].get_marker() for arm in ("Dense", "1.3B", "6.7B", "1.3B+MoE-128")] == [
        "o",
        "s",
        "^",
        "s",
    ]
    assert drawn["SmolLM2 (real)"].get_color() == figures.REAL["color"]
    assert "guessing" in [line.get_label() for line in ax.lines]
    figures.task_scores(table, other := figures.panels()[1][0], tasks=["nq"], twins=arms, value="margin")
    assert len(other.containers[0].lines[0].get_xdata()) == 1 and not other.containers[0].has_yerr


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
    assert "paper" in legend(ax)


def test_a_title_is_set_as_in_print_and_left_out_of_svgs_that_stand_below_it(ax, tmp_path):
    title = "-0.050 nats (95 % of -.5, 50%); MoE-128, 2-3, 2026-11-24, x-1"
    figures.title(ax.figure, title)
    (text,) = ax.figure.texts
    shown = text.get_text().replace("\n", " ")
    assert shown == "−0.050 nats (95\u00a0% of −.5, 50\u00a0%); MoE-128, 2-3, 2026-11-24, x-1"
    assert "MoE-128" not in figures.save(ax.figure, tmp_path / "a", title=title).read_text()
    assert "MoE-128" in figures.save(ax.figure, tmp_path / "b").read_text()


def test_differences_over_budgets_and_shares(ax):
    ours = [{"arm": "MoE", "per_parameter": 10.0 * n, "loss": -0.1 * n - 0.01 * s} for n in (1, 2) for s in (0, 1)]
    paper = pd.DataFrame({"per_parameter": [10, 20], "gap": [-0.1, -0.2], "low": [-0.2, -0.3], "high": [0, -0.1]})
    how = {"along": "per_parameter", "log": True, "against": "Dense", "paper": {"MoE (Fig 1)": paper}}
    figures.loss_curves(pd.DataFrame(ours), ax, arms=["MoE", "missing"], **how)
    assert legend(ax) == ["MoE", "paper: MoE (Fig 1)"] and ax.get_xscale() == "log" and len(ax.containers) == 2
    assert ax.get_ylabel().startswith("loss minus Dense’s") and "parameter" in ax.get_xlabel()
    ax.clear()
    ours = [{"arm": arm, "share": share, "loss": -share} for arm in "MN" for share in (0.5, 1.0)]
    paper = pd.DataFrame({"share": [0.5], "gap": [-0.1], "low": [-0.2], "high": [0.0]})
    figures.loss_curves(pd.DataFrame(ours), ax, arms=["M", "N"], of=["D", "M", "N"], along="share", paper={"M": paper})
    color = figures.colors(["D", "M", "N"])
    drawn = {line.get_label(): line for line in ax.lines}
    assert [drawn[arm].get_color() for arm in "MN"] == [color["M"], color["N"]]
    assert list(drawn["M"].get_xdata()) == [50, 100]
    assert sorted(legend(ax)) == ["M", "N", "paper: M"] and ax.get_ylabel().startswith("difference of validation")
    theirs = next(line for line in ax.lines if line.get_marker() == figures.PAPER["marker"])
    assert list(theirs.get_xdata()) == [50] and theirs.get_color() == color["M"]
    assert 0 in [line.get_ydata()[0] for line in ax.lines], "no difference"
    two = pd.DataFrame([{"arm": "M", "seed": 0, "tokens": 1, "loss": loss} for loss in (1.0, 2.0)])
    with pytest.raises(ValueError, match=r"^arm 'M' has several runs of a seed; give each"):
        figures.loss_curves(two, ax, arms=["M"])


def test_an_interval_below_zero_ends_at_the_axis_that_rows_of_a_page_share():
    axis = Axis.of_multiples("times the paper's", [-0.4, 0.9, 3.0])
    assert 0 < axis.low < LOWEST and axis.percent(-0.4) == EDGE < axis.percent(1.0) < axis.percent(3.0)
    assert all(LOWEST <= tick for tick in axis.ticks) and "svg" in axis.ruler()


def test_misses_stand_beside_their_predictions_intervals(ax):
    rows = [["Dense", 4e6, 3.0, 2.9, 3.2, 0.1], ["Dense", 8e6, 2.5, 2.4, 2.6, np.nan], ["MoE", 4e6, 2.8, 2.7, 2.9, 0.2]]
    ladder.misses(pd.DataFrame(rows, columns=["arm", "tokens", "value", "low", "high", "miss"]), ax)
    bars = [bar[:, 1].tolist() for part in ax.collections for bar in part.get_segments()]
    assert np.allclose(bars, [[-0.1, 0.2], [-0.1, 0.1], [-0.1, 0.1]])
    dots = {line.get_label(): line for line in ax.lines if line.get_marker() == "o"}
    assert np.allclose(dots["Dense"].get_ydata(), [0.1, np.nan], equal_nan=True) and dots["MoE"].get_ydata() == [0.2]
    assert dots["Dense"].get_xdata()[0] < 4 < dots["MoE"].get_xdata()[0], "side by side"
    assert legend(ax) == ["Dense", "MoE", "predicted (95 %)"]


def test_an_interval_of_leverage_may_lack_its_value_and_may_be_endless(ax):
    rows = [["PR-MoE", 1e12, 0.5, 0.0, 0.4], ["PR-MoE", 2e12, 1.0, 0.8, np.inf], ["MoE-128", 4e12, np.inf, 2.0, np.inf]]
    levers = pd.DataFrame(rows, columns=["arm", "compute", "value", "low", "high"]).assign(beyond=False)
    ladder.leverage(levers, ax)
    bars = [bar[:, 1].tolist() for part in ax.collections for bar in part.get_segments()]
    assert bars == [[0.05, 0.4], [0.8, 10.0], [2.0, 10.0]], "cut at a tenth and ten times the finite values"
