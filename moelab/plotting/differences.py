"""Draw differences of losses over training: the mean over seeds, each point's 95 % interval, and the paper's points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moelab.lazy import pd
from moelab.plotting import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def over_budgets(
    table: pd.DataFrame,
    ax: Axes,
    *,
    arms: Sequence[str],
    reference: str,
    paper: pd.DataFrame,
    label: str,
    of: Sequence[str] = (),
) -> Axes:
    """Draw gaps of final losses over tokens a parameter, on a logarithmic axis.

    Args:
        table: columns arm, per_parameter, gap, a row per seed and budget.
        arms: the arms to draw.
        reference: the arm that the gaps are to.
        paper: columns per_parameter, gap, low, high.
        label: of the paper's points.
        of: all arms of the experiment, for their colours.
    """
    palette = figures.colors(of or arms)
    for i, arm in enumerate(arms):
        part = table[table["arm"] == arm].groupby("per_parameter")["gap"]
        if len(part):
            low, high = zip(*(figures.student(values) for _, values in part), strict=True)
            x = [value * (1 + 0.015 * i) for value in part.groups]  # beside one another, not on one another
            figures.our_points(ax, x, list(part.mean()), list(low), list(high), label=arm, color=palette[arm])
    bounds = (paper["gap"], paper["low"], paper["high"])
    figures.paper_points(ax, paper["per_parameter"], *bounds, line=True, label=label)
    ax.axhline(0, color="#888888", linewidth=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.set(
        xlabel="training tokens for each parameter of the base (without embeddings)",
        ylabel=f"loss minus {reference}'s (nats per token)",
    )
    figures.legend_below(ax, columns=1)
    return ax


def over_shares(
    table: pd.DataFrame,
    ax: Axes,
    *,
    pairs: Sequence[str],
    paper: Mapping[str, pd.DataFrame],
    of: Sequence[str] = (),
) -> Axes:
    """Draw gaps of pairs of arms over the share of the training.

    Args:
        table: columns pair, share, gap, a row per seed and share.
        pairs: what to draw, as ``arm − other``.
        paper: pair -> columns share, gap, low, high; the points get the pair's colour.
        of: all arms of the experiment: a pair then has the colour of its first arm.
    """
    colors = figures.colors(of or pairs)
    palette = {pair: colors[pair.partition(" − ")[0] if of else pair] for pair in pairs}
    for pair in pairs:
        part = table[table["pair"] == pair].groupby("share")["gap"]
        if len(part):
            x, mean = [100 * share for share in part.groups], part.mean()
            low, high = zip(*(figures.student(values) for _, values in part), strict=True)
            ax.plot(x, mean, color=palette[pair], label=pair)
            ax.fill_between(x, low, high, color=palette[pair], alpha=0.15, linewidth=0)
        if pair in paper:
            theirs = paper[pair]
            bounds = (theirs["gap"], theirs["low"], theirs["high"])
            figures.paper_points(ax, 100 * theirs["share"], *bounds, color=palette[pair], label=f"paper: {pair}")
    ax.axhline(0, color="#888888", linewidth=1)
    ax.set(xlabel="share of the training (%)", ylabel="difference of validation losses (nats per token)")
    figures.legend_below(ax, columns=1)
    return ax
