"""Draw a ladder of widths: losses over compute with their laws and a predicted rung, and efficiency leverage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moelab.lazy import np, pd
from moelab.plotting.layout import legend_below
from moelab.plotting.palette import colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD*v"  # the fourth width is the predicted one


def losses(points: pd.DataFrame, curves: pd.DataFrame, predicted: pd.DataFrame, ax: Axes) -> Axes:
    """Draw mean losses over compute, the laws as lines, and the predicted rung with its interval.

    Args:
        points: columns arm, width, seed, compute (FLOPs), loss, of the widths that the laws are fitted to.
        curves: the laws: columns arm, width, compute, loss.
        predicted: columns arm, width, compute, value, low, high, measured (NaN where nothing was run).
    """
    arms = list(dict.fromkeys(points["arm"]))
    palette = colors(arms)
    for i, (width, rung) in enumerate(points.groupby("width")):
        means = rung.groupby(["arm", "compute"], sort=False)["loss"].mean().reset_index()
        for arm in arms:
            part = means[means["arm"] == arm]
            label = arm if i == 0 else None
            ax.plot(part["compute"], part["loss"], _MARKERS[i], color=palette[arm], markersize=5, label=label)
        ax.plot([], [], _MARKERS[i], color="black", markerfacecolor="none", label=f"{width} wide")
    for (arm, _), part in curves.groupby(["arm", "width"]):
        ax.plot(part["compute"], part["loss"], color=palette[arm], linewidth=1)
    for arm, part in predicted.groupby("arm", sort=False):
        ax.plot(part["compute"], part["value"], "--", color=palette[arm], linewidth=1)
        ax.fill_between(part["compute"], part["low"], part["high"], color=palette[arm], alpha=0.2, linewidth=0)
        ax.plot(part["compute"], part["measured"], "*", color=palette[arm], markersize=10, markeredgecolor="black")
    if len(predicted):
        width = predicted["width"].iloc[0]
        ax.plot([], [], "--", color="#888888", label=f"{width} wide, predicted (95 %)")
        if predicted["measured"].notna().any():
            ax.plot(
                [], [], "*", color="#888888", markersize=10, markeredgecolor="black", label=f"{width} wide, measured"
            )
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
        ax.plot(beside, part["miss"], "*", color=palette[arm], markersize=10, markeredgecolor="black", label=arm)
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
    """Draw the efficiency leverage over compute with its intervals; hollow where the dense law is extrapolated.

    An interval is cut at ten times the largest finite leverage, and at a tenth of the smallest.

    Args:
        levers: columns arm, width, compute, value, low, high, beyond; of `moelab.experiments.ladder.summary` at one of
            FLOPs and time.
    """
    palette = colors(["Dense", *dict.fromkeys(levers["arm"])])  # as beside it, where the dense arm comes first
    widths = sorted(levers["width"].unique())
    finite = levers.loc[np.isfinite(levers["value"]) & (levers["value"] > 0), "value"]
    bottom, top = (finite.min() / 10, 10 * finite.max()) if len(finite) else (0.1, 10)
    for (arm, width), part in levers.sort_values("compute").groupby(["arm", "width"], sort=False):
        color, marker = palette[arm], _MARKERS[widths.index(width) % len(_MARKERS)]
        ax.plot(part["compute"], part["value"], color=color, linewidth=1)
        # Not error bars: refits of a bad law may all lie on one side of it, so that its interval lacks its value.
        ax.vlines(part["compute"], part["low"].clip(bottom), part["high"].clip(upper=top), color=color, linewidth=1)
        for row in part.itertuples():
            fill, size = "white" if row.beyond else color, 9 if marker == "*" else 6
            ax.plot(row.compute, row.value, marker, color=color, markerfacecolor=fill, markersize=size)
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
