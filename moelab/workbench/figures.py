"""One look for all figures: a seaborn theme, colours that survive colour blindness, the paper's values always drawn alike.

Every function draws on an axis that it is given and returns it, so that a notebook can go on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import seaborn as sns

from moelab.workbench.claims import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER = {"color": "#444444", "marker": "D"}
"""How a value of the paper is drawn: a dark hollow diamond, everywhere."""

# Okabe and Ito's colours, grey (for the dense base, the first arm) instead of the yellow that is too light on white; dash patterns
# carry the same distinction in print.
_COLORS = ("#6E6E6E", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#0072B2", "#CC79A7", "#000000")
_DASHES = ("", (4, 1.5), (1, 1), (6, 1.5, 1, 1.5), (3, 1), (5, 1, 1, 1, 1, 1), (2, 2), (8, 2))


def theme() -> None:
    """Set the look for all figures that follow."""
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
            "axes.labelsize": 10,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "svg.fonttype": "none",
            "savefig.facecolor": "white",
        },
    )


def colors(arms: Sequence[str]) -> dict[str, str]:
    """Arm -> colour, by position."""
    return {arm: _COLORS[i % len(_COLORS)] for i, arm in enumerate(arms)}


def student(values: pd.Series) -> tuple[float, float]:
    """The 95 % Student interval of a mean, for seaborn's `errorbar`; the value itself when there is one."""
    mean, low, high = interval(list(values))
    return (mean, mean) if len(values) < 2 else (low, high)


def loss_curves(curves: pd.DataFrame, ax: Axes, *, arms: Sequence[str], skip_first: bool = True) -> Axes:
    """Validation loss over tokens, a line an arm: the mean over seeds with its 95 % interval.

    Args:
        curves: `Runs.curves()`: columns arm, seed, tokens, loss.
        skip_first: leave out the untrained model, which would squeeze the rest.
    """
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
        palette=colors(arms),
        dashes=dict(zip(arms, _DASHES, strict=False)),
        errorbar=student,
        err_kws={"alpha": 0.1, "linewidth": 0},
        ax=ax,
    )
    ax.set(xlabel="training tokens (millions)", ylabel="validation loss (nats per token)")
    ax.legend(title=None)
    return ax


def gaps(
    measured: pd.DataFrame,
    ax: Axes,
    *,
    arms: Sequence[str],
    value: str,
    paper: Mapping[str, tuple[float, float, float]],
    of: str = "seeds",
) -> Axes:
    """A row an arm: mean over seeds of `value` with its 95 % interval, each seed as a small dot, the paper's value beside.

    Args:
        measured: columns arm, seed and `value`.
        paper: arm -> (value, low, high) as the paper reports it.
        of: what the values are: seeds, or rounds of a measurement.
    """
    palette = colors(arms)
    labelled = set()

    def once(label: str) -> str:
        return "_" if label in labelled else labelled.add(label) or label

    for row, arm in enumerate(arms):
        values = measured.loc[measured["arm"] == arm, value]
        if len(values):
            low, high = student(values)
            center = values.mean()
            ax.scatter(values, [row] * len(values), s=14, color=palette[arm], alpha=0.5, zorder=2, linewidths=0)
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
            ax.errorbar(
                at,
                row - 0.28,
                xerr=[[at - low], [high - at]],
                fmt=PAPER["marker"],
                color=PAPER["color"],
                markerfacecolor="white",
                capsize=3,
                zorder=3,
                label=once("paper, with the uncertainty of the reading"),
            )
    ax.axvline(0, color="#888888", linewidth=1, zorder=1)
    ax.set_yticks(range(len(arms)), arms)
    ax.set_ylim(len(arms) - 0.4, -0.8)
    return ax


def means(measured: pd.DataFrame, ax: Axes, *, x: str, y: str) -> Axes:
    """A line of means over seeds with 95 % bars, each seed as a small dot. Columns x, y and seed."""
    rows = [(at, part[y].mean(), *student(part[y])) for at, part in measured.groupby(x)]
    ax.scatter(measured[x], measured[y], s=14, color=_COLORS[5], alpha=0.5, linewidths=0)
    if rows:
        at, center, low, high = (list(column) for column in zip(*rows, strict=True))
        bars = [[c - a for c, a in zip(center, low, strict=True)], [b - c for c, b in zip(center, high, strict=True)]]
        ax.errorbar(at, center, yerr=bars, fmt="o-", color=_COLORS[5], capsize=4)
    return ax


def seed_lines(measured: pd.DataFrame, ax: Axes, *, arms: Sequence[str], value: str = "validation_loss") -> Axes:
    """A line a seed across the arms: parallel lines are what pairing takes out. Columns arm, seed and `value`."""
    table = measured.pivot(index="seed", columns="arm", values=value)
    there = [arm for arm in arms if arm in table]
    for _, row in table[there].iterrows():
        ax.plot(range(len(there)), row, marker="o", color=_COLORS[5], alpha=0.6)
    ax.set_xticks(range(len(there)), there)
    ax.set_xlim(-0.3, len(there) - 0.7)
    return ax


def legend_below(ax: Axes, columns: int = 2) -> None:
    """Put an axis's legend under it and its label, where it covers nothing."""
    # The pad is in font sizes, so the distance is the same for a low axis and a high one.
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.6, ncols=columns)
