"""Draw all figures in one style: a seaborn theme, colours safe for colour blindness, one mark for the paper's values.

    figures.theme()
    fig, ax = plt.subplots()
    figures.our_points(ax, x, ours, low, high, label="ours")
    figures.paper_points(ax, x, theirs)
    ax.set(xlabel="GPUs", ylabel="latency (ms per token)")
    figures.title(fig, "Twice the GPUs take 0.6 times the latency")
    figures.save(fig, Path("latency"))                  # latency.png, latency.svg, latency-dark.svg

Every function draws on an axis that it is given and returns it, so that a notebook can add to it. `Publication.figure`
saves a figure by `save`.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from moelab.files import write_text
from moelab.plotting import svg
from moelab.plotting.palette import COLORS as _COLORS
from moelab.plotting.palette import DASHES as _DASHES
from moelab.plotting.palette import colors
from moelab.plotting.typography import typeset
from moelab.statistics import ALPHA, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = {"color": "#444444", "marker": "D"}
"""How a value of the paper is drawn: a dark hollow diamond, everywhere."""


def theme() -> None:
    """Set the style of all figures drawn afterwards."""
    import seaborn as sns  # not on every machine that runs benchmarks

    sns.set_theme(
        context="notebook",
        style="ticks",
        rc={
            "figure.figsize": (10, 4.4),
            "figure.dpi": 96,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.35,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.titlepad": 10,
            "axes.labelsize": 11,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "svg.fonttype": "none",
            "svg.hashsalt": "moelab",  # the same figure is the same file
            "savefig.facecolor": "white",
        },
    )


def title(fig: Figure, text: str) -> Figure:
    """Write the title above the figure, wrapped to its width; call it last, because it lays the figure out again."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width = int(fig.get_figwidth() * 11)
    lines = textwrap.wrap(typeset(text), width)
    fig.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=12)
    if not isinstance(fig.get_layout_engine(), ConstrainedLayoutEngine):
        fig.tight_layout()
    return fig


def save(fig: Figure, path: Path, *, title: str = "") -> list[Path]:
    """Save a figure as PNG (160 dots per inch) and as SVG for light and dark pages; return the paths.

    The files are `<path>.png`, `<path>.svg`, `<path>-dark.svg`, and `<path>-narrow.svg` and `<path>-narrow-dark.svg`
    for phones, unless the figure cannot be laid out again (`moelab.plotting.narrow`).

    Args:
        path: without suffix.
        title: the title that a page shows above the figure. Where the figure's own title is the same, the SVGs leave it
            out; the PNG, which is used without a page, keeps it.
    """
    from moelab.plotting.narrow import narrowed

    png = path.with_name(f"{path.name}.png")
    fig.savefig(png, dpi=160, bbox_inches="tight")
    saved = [png, *_save_svg(fig, path, title)]
    if (small := narrowed(fig)) is not None:
        saved += _save_svg(small, path.with_name(f"{path.name}-narrow"), title)
    return saved


def _save_svg(fig: Figure, path: Path, title: str) -> list[Path]:
    heading = [t for t in fig.texts if title and t.get_text().split() == typeset(title).split()]
    for artist in heading:
        artist.set_visible(False)
    text = io.StringIO()
    fig.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    for artist in heading:
        artist.set_visible(True)
    light, dark = (path.with_name(path.name + end) for end in (".svg", "-dark.svg"))
    write_text(light, text.getvalue())
    write_text(dark, svg.dark(text.getvalue()))
    return [light, dark]


def student(values: pd.Series, alpha: float = ALPHA) -> tuple[float, float]:
    """Return the 95 % Student interval of the mean, for seaborn's `errorbar`; of a single value, that value twice.

    Args:
        alpha: the chance that it misses the mean; of a planned look at a comparison it is `sequential.level`.
    """
    mean, low, high = interval(list(values), alpha)
    return (mean, mean) if len(values) < 2 else (low, high)


def loss_curves(
    curves: pd.DataFrame, ax: Axes, *, arms: Sequence[str], of: Sequence[str] = (), skip_first: bool = True
) -> Axes:
    """Draw validation loss over tokens, one line per arm: the mean over seeds with its 95 % interval.

    Args:
        curves: `Runs.curves()`: columns arm, seed, tokens, loss.
        arms: the arms to draw, in the order of the legend.
        of: all arms of the experiment, where only some are drawn: each keeps its colour and its dashes.
        skip_first: leave out the untrained model, whose loss would compress the rest of the axis.
    """
    import seaborn as sns

    shown = curves[curves["tokens"] > 0] if skip_first else curves
    shown = shown.assign(millions=shown["tokens"] / 1e6)
    sns.lineplot(
        shown,
        x="millions",
        y="loss",
        hue="arm",
        style="arm",
        hue_order=list(arms),
        style_order=list(arms),
        palette=colors(of or arms),
        dashes={arm: _DASHES[i % len(_DASHES)] for i, arm in enumerate(of or arms)},
        errorbar=student,
        err_kws={"alpha": 0.1, "linewidth": 0},
        ax=ax,
    )
    ax.set(xlabel="training tokens (millions)", ylabel="validation loss (nats per token)")
    ax.legend(title=None)
    return ax


def our_points(
    ax: Axes,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    *,
    label: str = "ours",
    color: str = _COLORS[5],
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
        **{"xerr" if across else "yerr": bars},
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
    """Draw a number that the paper gives for the whole axis, such as a limit: a dashed line with the paper's diamond.

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


def gaps(
    results: pd.DataFrame,
    ax: Axes,
    *,
    arms: Sequence[str],
    value: str,
    paper: Mapping[str, tuple[float, float, float]],
    of: str = "seeds",
    alpha: float = ALPHA,
) -> Axes:
    """Draw a row per arm: the mean of `value` over seeds with its 95 % interval, each seed, and the paper's value.

    Args:
        results: columns arm, seed and `value`.
        paper: arm -> (value, low, high) as the paper reports it.
        of: the word for a value in the legend: seeds, or rounds of a measurement.
        alpha: see `student`.
    """
    palette = colors(arms)
    labelled = set()

    def once(label: str) -> str:
        return "_" if label in labelled else labelled.add(label) or label

    for row, arm in enumerate(arms):
        values = results.loc[results["arm"] == arm, value]
        if len(values):
            low, high = student(values, alpha)
            center = values.mean()
            # Under the interval, which would hide them.
            ax.scatter(values, [row + 0.22] * len(values), s=18, color=palette[arm], alpha=0.7, zorder=2, linewidths=0)
            ax.errorbar(
                center,
                row,
                xerr=[[center - low], [high - center]],
                fmt="o",
                color=palette[arm],
                capsize=4,
                markersize=8,
                zorder=3,
                label=once("ours" if len(values) == 1 else f"ours: mean of {len(values)} {of}, 95 % interval"),
            )
        if arm in paper:
            at, low, high = paper[arm]
            label = once("paper" if low == at == high else "paper, with the uncertainty of the reading")
            paper_points(ax, [at], [row - 0.28], [low], [high], label=label, across=True)
    ax.axvline(0, color="#888888", linewidth=1, zorder=1)
    ax.set_yticks(range(len(arms)), arms)
    ax.set_ylim(len(arms) - 0.4, -0.8)
    return ax


def means(results: pd.DataFrame, ax: Axes, *, x: str, y: str) -> Axes:
    """Draw a line of means over seeds with 95 % bars, and each seed as a small dot. Columns x, y and seed."""
    rows = [(at, part[y].mean(), *student(part[y])) for at, part in results.groupby(x)]
    ax.scatter(results[x], results[y], s=14, color=_COLORS[5], alpha=0.5, linewidths=0)
    if rows:
        at, center, low, high = (list(column) for column in zip(*rows, strict=True))
        bars = [[c - a for c, a in zip(center, low, strict=True)], [b - c for c, b in zip(center, high, strict=True)]]
        ax.errorbar(at, center, yerr=bars, fmt="o-", color=_COLORS[5], capsize=4)
    return ax


def seed_lines(results: pd.DataFrame, ax: Axes, *, arms: Sequence[str], value: str = "validation_loss") -> Axes:
    """Draw a line per seed across the arms; pairing by seed removes what the lines have in common.

    Args:
        results: columns arm, seed and `value`.
    """
    table = results.pivot(index="seed", columns="arm", values=value)
    there = [arm for arm in arms if arm in table]
    for _, row in table[there].iterrows():
        ax.plot(range(len(there)), row, marker="o", color=_COLORS[5], alpha=0.6)
    ax.set_xticks(range(len(there)), there)
    ax.set_xlim(-0.3, len(there) - 0.7)
    return ax


def task_scores(
    table: pd.DataFrame, ax: Axes, *, tasks: Sequence[str], colors: Mapping[str, str], twins: Sequence[str]
) -> Axes:
    """Draw the accuracy of each arm on each task with the 95 % interval of its items, and that of guessing as dashes.

    Args:
        table: columns arm, task, accuracy, standard_error and reference (what guessing reaches).
        colors: arm -> colour.
        twins: arms that are twins; the others are real models.
    """
    arms = list(dict.fromkeys(table["arm"]))
    for i, arm in enumerate(arms):
        part = table[table["arm"] == arm].set_index("task").reindex(tasks)
        places = [at + (i - (len(arms) - 1) / 2) * 0.22 for at in range(len(tasks))]
        marker, label = ("o", f"{arm} twin") if arm in twins else ("s", f"{arm} (real)")
        error = 100 * 1.96 * part["standard_error"]
        ax.errorbar(places, 100 * part["accuracy"], yerr=error, fmt=marker, capsize=3, color=colors[arm], label=label)
    for at, reference in enumerate(table.drop_duplicates("task").set_index("task").loc[list(tasks), "reference"]):
        ax.plot([at - 0.4, at + 0.4], [100 * reference] * 2, "k--", lw=1, label="guessing" if at == 0 else None)
    ax.set(ylabel="accuracy (%)", ylim=(-4, 100))
    legend_below(ax)
    return ax


def legend_below(ax: Axes, columns: int = 2) -> None:
    """Put an axis's legend below its label, where it covers nothing."""
    # The pad is in font sizes, so the distance is the same for a low axis and a high one.
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.6, ncols=columns)
