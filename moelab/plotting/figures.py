"""Draw all figures in one style: a seaborn theme, colours safe for colour blindness, one mark for the paper's values.

    figures.theme()
    fig, (ax,) = figures.panels()
    figures.our_points(ax, x, ours, low, high, label="ours")
    figures.paper_points(ax, x, theirs)
    ax.set(xlabel="GPUs", ylabel="latency (ms per token)")
    figures.legend_below(ax)
    figures.title(fig, "Twice the GPUs take 0.6 times the latency")
    figures.save(fig, Path("latency"))                  # latency.svg

Every function draws on an axis that it is given and returns it, so that a notebook can add to it. All figures are as
wide as `layout.WIDTH`, with their panels below one another. `Publication.figure` calls `title` and `save`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from moelab.plotting.layout import HEIGHT, TEXT, WIDTH, legend_below, name_rows, panels
from moelab.plotting.layout import save as save  # for those who import this module, as `panels`
from moelab.plotting.layout import title as title
from moelab.plotting.palette import DASHES, OURS, colors, ranks
from moelab.statistics import ALPHA, interval, ratio_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = {"color": "#444444", "marker": "D"}
"""How a value of the paper is drawn: a dark hollow diamond, everywhere."""
REAL: dict[str, Any] = {"color": "#000000", "marker": "*", "markersize": 8}
"""How a value of a real model, which is no twin, is drawn."""
_MARKERS = "os^vP"
"""Of arms of one colour."""


def theme() -> None:
    """Set the style of all figures drawn afterwards."""
    import seaborn as sns  # not on every machine that runs benchmarks

    sns.set_theme(
        context="notebook",
        style="ticks",
        rc={
            "figure.figsize": (WIDTH, HEIGHT),
            "figure.dpi": 110,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.35,
            "font.size": TEXT,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.titlepad": 8,
            "axes.labelsize": TEXT,
            "lines.linewidth": 1.4,
            "lines.markersize": 5,
            "legend.fontsize": TEXT,
            "legend.title_fontsize": TEXT,
            "legend.frameon": False,
            "xtick.labelsize": TEXT,
            "ytick.labelsize": TEXT,
            "svg.fonttype": "none",
            "svg.hashsalt": "moelab",  # the same figure is the same file
            "savefig.facecolor": "white",
        },
    )


def student(values: pd.Series, alpha: float = ALPHA) -> tuple[float, float]:
    """Return the 95 % Student interval of the mean, for seaborn's `errorbar`; of a single value, that value twice.

    Args:
        alpha: the chance that it misses the mean; of a planned look at a comparison it is `sequential.level`.
    """
    mean, low, high = interval(list(values), alpha)
    return (mean, mean) if len(values) < 2 else (low, high)


BANDS = 3
"""Curves that have their interval as a band; more bands cover one another, and each curve has a bar at its end."""


ALONG = {
    "tokens": (1e-6, "training tokens (millions)"),
    "share": (100.0, "share of the training (%)"),
    "per_parameter": (1.0, "training tokens for each parameter of the base (without embeddings)"),
}
"""Column over which losses are drawn -> by what its values are multiplied, and the label of the axis."""


def loss_curves(
    curves: pd.DataFrame,
    ax: Axes,
    *,
    arms: Sequence[str],
    of: Sequence[str] = (),
    skip_first: bool = True,
    against: str = "",
    along: str = "tokens",
    log: bool = False,
    paper: Mapping[str, pd.DataFrame] | None = None,
) -> Axes:
    """Draw validation loss over training, one line per arm: the mean over seeds with the 95 % interval of each point.

    That interval takes each point by itself: it is not the wider one of planned looks, by which claims are judged.

    Args:
        curves: `Runs.curves()`: columns arm, seed, tokens (or `along`), loss.
        arms: the arms to draw, in the order of the legend.
        of: all arms of the experiment, where only some are drawn: each keeps its colour and, over tokens, its dashes.
        skip_first: leave out the untrained model, whose loss would compress the rest of the axis.
        against: the arm whose loss is subtracted, for curves of differences.
        along: one of `ALONG`; `per_parameter` is for final losses of runs of several lengths, each with a bar.
        log: draw on a logarithmic axis, where curves have a bar at their end and no band.
        paper: of curves of differences, label -> columns `along`, gap, low, high; an arm's name gives its colour.

    Raises:
        ValueError: one line: runs of an arm and seed that differ have the same label.
    """
    palette, every = colors(of or arms), list(of or arms)
    shown = curves[curves[along] > 0] if skip_first else curves
    (unit, xlabel), runs = ALONG[along], along == "per_parameter"
    end = unit * shown[along].max()
    for i, arm in enumerate(arms):
        of_arm = shown[shown["arm"] == arm]
        if "seed" in of_arm and of_arm.duplicated(["seed", along]).any():
            raise ValueError(f"arm {arm!r} has several runs of a seed; give each of their specs a separate label")
        part = of_arm.groupby(along)["loss"]
        if not len(part):
            continue
        x, means = [unit * at for at in part.groups], list(part.mean())
        low, high = zip(*(student(values) for _, values in part), strict=True)
        if runs:
            apart = [at * (1 + 0.015 * i) for at in x]  # beside one another, not on one another
            our_points(ax, apart, means, low, high, label=arm, color=palette[arm])
            continue
        dash = DASHES[every.index(arm) % len(DASHES)]
        ax.plot(x, means, color=palette[arm], dashes=dash or (None, None), label=arm)
        if len(arms) <= BANDS and not log:
            ax.fill_between(x, low, high, color=palette[arm], alpha=0.12, linewidth=0)
        elif low[-1] < high[-1]:
            at = max(x[-1], end) + end * (0.06 if log else 0.015) * (i + 1)
            bars = _around(means[-1:], low[-1:], high[-1:])
            ax.errorbar([at], means[-1:], yerr=bars, fmt=".", color=palette[arm], capsize=2)
    for label, theirs in (paper or {}).items():
        bounds, color = (theirs["gap"], theirs["low"], theirs["high"]), palette.get(label, PAPER["color"])
        paper_points(ax, unit * theirs[along], *bounds, color=color, label=f"paper: {label}", line=runs)
    if against or paper is not None:
        ax.axhline(0, color="#888888", linewidth=1)
    if log:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    plain = "validation loss" if paper is None else "difference of validation losses"
    what = f"loss minus {against}’s" if against else plain
    ax.set(xlabel=xlabel, ylabel=f"{what} (nats per token)")
    legend_below(ax)
    return ax


def our_points(
    ax: Axes,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    *,
    label: str = "ours",
    color: str = OURS,
    line: bool = True,
    marker: str = "o",
) -> Axes:
    """Draw our values: filled dots, joined by a line, with their intervals.

    Args:
        low, high: bounds of the interval of each value; None for values without spread (arithmetic, a model).
        line: join the dots.
        marker: matplotlib's sign for a dot's shape.
    """
    bars = None if low is None or high is None else _around(y, low, high)
    ax.errorbar(x, y, yerr=bars, fmt=f"{marker}-" if line else marker, color=color, capsize=3, zorder=3, label=label)
    return ax


def paper_points(
    ax: Axes,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    *,
    label: str = "paper",
    color: str = PAPER["color"],
    line: bool = False,
    across: bool = False,
) -> Axes:
    """Draw values of the paper: hollow diamonds in every figure, with the uncertainty of the reading where it is known.

    Args:
        low, high: bounds of each reading.
        color: an arm's own colour where several arms of the paper share the axis.
        line: join the diamonds, for a curve of the paper.
        across: the values are on the x axis, as in `gaps`.
    """
    bars = None if low is None or high is None else _around(x if across else y, low, high)
    ax.errorbar(
        x,
        y,
        xerr=bars if across else None,
        yerr=None if across else bars,
        fmt=PAPER["marker"],
        linestyle="--" if line else "none",
        color=color,
        markerfacecolor="white",
        capsize=3,
        zorder=3,
        label=label,
    )
    return ax


def paper_bound(ax: Axes, value: float, *, label: str = "paper", across: bool = False) -> Axes:
    """Draw a number of the paper for the whole axis, such as a limit: a dashed line with the paper's diamond.

    Args:
        across: the value is on the x axis.
    """
    draw = ax.axvline if across else ax.axhline
    draw(
        value,
        color=PAPER["color"],
        linewidth=1.2,
        linestyle=(0, (5, 3)),
        marker=PAPER["marker"],
        markevery=[1],
        markerfacecolor="white",
        clip_on=False,
        label=label,
    )
    return ax


def _around(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """Return bounds as distances from the values, as `errorbar` takes them."""
    return [[v - a for v, a in zip(values, low, strict=True)], [b - v for v, b in zip(values, high, strict=True)]]


DIFFERENCE = "difference of final validation losses (nats per token); left of 0 the first is better"

LONG = 18
"""Characters of a row's name from which on the names stand above the rows."""


def gaps(
    results: pd.DataFrame,
    ax: Axes,
    *,
    arms: Sequence[str],
    value: str,
    paper: Mapping[str, tuple[float, float, float]],
    of: str = "seeds",
    alpha: float = ALPHA,
    color: str = "",
    ratio: bool = False,
) -> Axes:
    """Draw a row per arm: the mean of `value` over seeds with its 95 % interval, each seed, and the paper's value.

    Args:
        results: columns arm, seed and `value`.
        paper: arm -> (value, low, high) as the paper reports it.
        of: the word for a value in the legend: seeds, or rounds of a measurement.
        alpha: see `student`.
        color: of all rows, where they are no arms but differences, or parts of one.
        ratio: values are ratios: their geometric mean on a logarithmic axis, on which a line marks 1 instead of 0.
    """
    palette = dict.fromkeys(arms, color) if color else colors(arms)
    over = " over all looks" if alpha < ALPHA else ""
    for row, arm in enumerate(arms):
        values = results.loc[results["arm"] == arm, value]
        if len(values):
            center, low, high = ratio_interval(values, alpha) if ratio else (values.mean(), *student(values, alpha))
            # Under the interval, which would hide them.
            ax.scatter(values, [row + 0.22] * len(values), s=18, color=palette[arm], alpha=0.7, zorder=2, linewidths=0)
            ax.errorbar(
                center,
                row,
                xerr=[[center - low], [high - center]],
                fmt="o",
                color=palette[arm],
                capsize=4,
                markersize=6,
                zorder=3,
                label="ours" if len(values) == 1 else f"ours: mean of {len(values)} {of}, 95 % interval{over}",
            )
        if arm in paper:
            at, low, high = paper[arm]
            label = "paper" if low == at == high else "paper, with the uncertainty of the reading"
            paper_points(ax, [at], [row - 0.28], [low], [high], label=label, across=True)
    if ratio:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
    ax.axvline(1 if ratio else 0, color="#888888", linewidth=1, zorder=1)
    if max(map(len, arms)) > LONG:
        name_rows(ax, arms, above=0.42 if paper else 0.3)  # clear of the paper's points
    else:
        ax.set_yticks(range(len(arms)), arms)
        ax.set_ylim(len(arms) - 0.4, -0.8)
    return ax


def differences(table: pd.DataFrame, *, alpha: float = ALPHA) -> Figure:
    """Draw differences of final losses as `gaps`, and once more on tokens that cannot be copied where that is known.

    Args:
        table: of `moelab.design.comparison.pairs`.
    """
    arms = list(dict.fromkeys(table["arm"]))
    names = {"gap": "on all tokens", "unrepeated": "on tokens that cannot be copied"}
    there = {column: name for column, name in names.items() if column in table and table[column].notna().any()}
    fig, axes = panels(len(there), height=0.45 * len(arms) + 0.8, sharex=True)
    for ax, (column, name) in zip(axes, there.items(), strict=True):
        gaps(table.dropna(subset=[column]), ax, arms=arms, value=column, paper={}, alpha=alpha, color=OURS)
        ax.set_title(name)
    axes[-1].set_xlabel(DIFFERENCE)
    legend_below(axes[-1])
    return fig


def in_panels(
    table: pd.DataFrame,
    *,
    panel: str = "pair",
    value: str = "gap",
    label: str = DIFFERENCE,
    ratio: bool = False,
    sharex: bool = False,
) -> Figure:
    """Draw `gaps` in a panel for each `panel`, a row for each arm: differences by domain, costs to an equal loss.

    Args:
        table: columns `panel`, arm, seed and `value`, and the paper's values of a row as paper, where it has some.
        label: of the axis.
        ratio: see `gaps`.
        sharex: as of `panels`; always where there are values of the paper.
    """
    parts = dict(list(table.groupby(panel, sort=False)))
    row = 0.4 if "paper" in table else 0.36 if table["arm"].str.len().max() > LONG else 0.22
    heights = [row * part["arm"].nunique() + 0.8 for part in parts.values()]
    fig, axes = panels(len(parts), height=heights, sharex=sharex or "paper" in table)
    for ax, (name, part) in zip(axes, parts.items(), strict=True):
        theirs = part.dropna(subset="paper").groupby("arm")["paper"].first() if "paper" in part else {}
        paper = {arm: (at, at, at) for arm, at in theirs.items()}
        arms = list(part["arm"].unique())
        gaps(part, ax, arms=arms, value=value, paper=paper, color=OURS, ratio=ratio)
        ax.set_title(name)
    axes[-1].set_xlabel(label)
    legend_below(axes[-1])
    return fig


def means(results: pd.DataFrame, ax: Axes, *, x: str, y: str) -> Axes:
    """Draw a line of means over seeds with 95 % bars, and each seed as a small dot. Columns x, y and seed."""
    rows = [(at, part[y].mean(), *student(part[y])) for at, part in results.groupby(x)]
    ax.scatter(results[x], results[y], s=14, color=OURS, alpha=0.5, linewidths=0)
    if rows:
        at, center, low, high = (list(column) for column in zip(*rows, strict=True))
        ax.errorbar(at, center, yerr=_around(center, low, high), fmt="o-", color=OURS, capsize=4)
    return ax


def task_scores(
    table: pd.DataFrame, ax: Axes, *, tasks: Sequence[str], twins: Sequence[str], value: str = "accuracy"
) -> Axes:
    """Draw the scores of each arm on each task side by side: its family's colour, and a marker for each of the family.

    Args:
        table: columns arm, task and `value`, a row for each dot; of accuracies also standard_error, drawn as 95 %
            interval of the items, and reference (what guessing reaches), drawn as dashes.
        twins: arms that are twins; the others are real models.
    """
    arms = list(dict.fromkeys(table["arm"]))
    palette = colors([arm for arm in arms if arm in twins])
    twin: dict[str, dict[str, Any]] = {
        arm: {"color": palette[arm], "marker": _MARKERS[rank]} for arm, rank in ranks(palette).items()
    }
    unit, accuracy = (100, True) if value == "accuracy" else (1, False)
    for i, arm in enumerate(arms):
        part = table[(table["arm"] == arm) & table["task"].isin(tasks)]
        places = [tasks.index(task) + (i - (len(arms) - 1) / 2) * min(0.22, 0.85 / len(arms)) for task in part["task"]]
        error = 1.96 * unit * part["standard_error"] if accuracy else None
        look = twin.get(arm, REAL) | {"label": f"{arm} {'twin' if arm in twin else '(real)'}"}
        ax.errorbar(places, unit * part[value], yerr=error, linestyle="", capsize=2, elinewidth=1, **look)
    if accuracy:
        for at, reference in enumerate(table.drop_duplicates("task").set_index("task").loc[list(tasks), "reference"]):
            ends, label = ([at - 0.45, at + 0.45], "guessing" if at == 0 else None)
            ax.plot(ends, [100 * reference] * 2, "--", color="#888888", linewidth=1.2, label=label)
        ax.set(ylabel="accuracy (%)", ylim=(-4, 100))
    ax.set_xlim(-0.6, len(tasks) - 0.4)
    ax.set_xticks(range(len(tasks)), [task.removeprefix("packaged_") for task in tasks])
    return ax
