"""Draw a ladder of widths: losses over compute with their laws and a predicted rung, and efficiency leverage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moelab.lazy import np, pd
from moelab.plotting.layout import legend_below
from moelab.plotting.palette import colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BELOW: dict[str, Any] = {"ha": "right", "va": "top"}


def losses(points: pd.DataFrame, curves: pd.DataFrame, predicted: pd.DataFrame, ax: Axes) -> Axes:
    """Draw mean losses over compute, the laws as lines, and the predicted rung; a number at each width's lowest loss.

    Args:
        points: columns arm, width, seed, compute (FLOPs), loss, of the widths that the laws are fitted to.
        curves: the laws: columns arm, width, compute, loss.
        predicted: columns arm, width, compute, value, low, high, measured (NaN where nothing was run).
    """
    arms = list(dict.fromkeys(points["arm"]))
    palette = colors(arms)
    look: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4}
    for width, rung in points.groupby("width"):
        means = rung.groupby(["arm", "compute"], sort=False)["loss"].mean().reset_index()
        for arm in arms:
            part = means[means["arm"] == arm]
            ax.plot(part["compute"], part["loss"], color=palette[arm], **look)
        lowest = means.loc[means["loss"].idxmin()]
        ax.annotate(f"{width}", (lowest["compute"], lowest["loss"]), (-4, -5), textcoords="offset points", **_BELOW)
    for (arm, _), part in curves.groupby(["arm", "width"]):
        ax.plot(part["compute"], part["loss"], color=palette[arm], linewidth=1)
    for arm, part in predicted.groupby("arm", sort=False):
        ax.plot(part["compute"], part["value"], "--", color=palette[arm], linewidth=1)
        ax.fill_between(part["compute"], part["low"], part["high"], color=palette[arm], alpha=0.2, linewidth=0)
        ax.plot(part["compute"], part["measured"], color=palette[arm], markerfacecolor="white", **look)
    for arm in arms:
        ax.plot([], [], "o-", color=palette[arm], markersize=4, label=arm)
    if len(predicted):
        ax.plot([], [], "--", color="#888888", label=f"{predicted['width'].iloc[0]} wide, predicted (95 %)")
        if predicted["measured"].notna().any():
            ax.plot([], [], color="#888888", markerfacecolor="white", label="measured afterwards", **look)
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter("")
    ax.set(xlabel="training compute (FLOPs)", ylabel="validation loss (nats per token)")
    legend_below(ax)
    return ax


def misses(predicted: pd.DataFrame, ax: Axes) -> Axes:
    """Draw measured losses minus predicted ones over tokens, and the predictions' intervals as bars about zero.

    Args:
        predicted: columns arm, tokens, value, low, high, miss (NaN where nothing was run).
    """
    arms = list(dict.fromkeys(predicted["arm"]))
    palette = colors(arms)
    for i, (arm, part) in enumerate(predicted.groupby("arm", sort=False)):
        beside = part["tokens"] / 1e6 * 1.08 ** (i - (len(arms) - 1) / 2)  # bars of arms do not cover each other
        low, high = part["low"] - part["value"], part["high"] - part["value"]
        ax.vlines(beside, low, high, color=palette[arm], linewidth=5, alpha=0.35)
        ax.plot(beside, part["miss"], "o", color=palette[arm], markersize=6, label=arm)
    tokens = sorted(predicted["tokens"].unique())
    ax.plot([], [], color="#888888", linewidth=5, alpha=0.35, label="predicted (95 %)")
    ax.axhline(0, color="#888888", linewidth=1)
    ax.set_xscale("log")
    ax.set_xticks([t / 1e6 for t in tokens], [f"{t / 1e6:.3g}" for t in tokens])
    ax.xaxis.set_minor_formatter("")
    ax.set(xlabel="training tokens (millions)", ylabel="loss minus the prediction (nats)")
    legend_below(ax)
    return ax


def leverage(levers: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the efficiency leverage over compute with its intervals, a line an MoE; hollow: the dense law extrapolated.

    An interval is cut at ten times the largest finite leverage, and at a tenth of the smallest.

    Args:
        levers: columns arm, compute, value, low, high, beyond; of `moelab.experiments.ladder.summary` at one of FLOPs
            and time, and at one number of tokens.
    """
    palette = colors(["Dense", *dict.fromkeys(levers["arm"])])  # as beside it, where the dense arm comes first
    finite = levers.loc[np.isfinite(levers["value"]) & (levers["value"] > 0), "value"]
    bottom, top = (finite.min() / 10, 10 * finite.max()) if len(finite) else (0.1, 10)
    for arm, part in levers.sort_values("compute").groupby("arm", sort=False):
        color = palette[arm]
        ax.plot(part["compute"], part["value"], color=color, linewidth=1)
        # Not error bars: refits of a bad law may all lie on one side of it, so that its interval lacks its value.
        ax.vlines(part["compute"], part["low"].clip(bottom), part["high"].clip(upper=top), color=color, linewidth=1)
        for row in part.itertuples():
            fill = "white" if row.beyond else color
            ax.plot(row.compute, row.value, "o", color=color, markerfacecolor=fill, markersize=6)
    for arm in dict.fromkeys(levers["arm"]):
        ax.plot([], [], "o", color=palette[arm], label=arm)
    if levers["beyond"].any():
        ax.plot([], [], "o", color="#888888", markerfacecolor="white", label="more compute than any dense run had")
    ax.axhline(1, color="#888888", linewidth=1)
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter("")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="the MoE's training compute (FLOPs)", ylabel="dense cost over the MoE's")
    legend_below(ax)
    return ax
