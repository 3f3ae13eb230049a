"""Draw a law of the twins, carried to the routed models of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moelab.lazy import np, pd
from moelab.plotting.layout import legend_below
from moelab.plotting.palette import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def factors(
    twins: pd.DataFrame, law: Mapping[int, tuple[float, float, float]], outside: pd.DataFrame, ax: Axes
) -> Axes:
    """Draw over the parameters of the base what experts are worth as a factor of dense parameters.

    Args:
        twins: columns parameters, experts, times, of the twins that the law is fitted to.
        law: experts -> factor, low, high; the same at every size. They are the numbers of experts that are drawn.
        outside: columns parameters, experts, times, of the models that were predicted.
    """
    span = (twins["parameters"].min() / 1.6, outside["parameters"].max() * 1.6)
    for i, (experts, (value, low, high)) in enumerate(law.items()):
        color = COLORS[(5, 2, 4, 6, 3)[i % 5]]
        ax.plot(span, [value] * 2, color=color, linewidth=1.4)
        ax.fill_between(span, low, high, color=color, alpha=0.15, linewidth=0)
        ours, theirs = (table[table["experts"] == experts] for table in (twins, outside))
        ax.plot(ours["parameters"], ours["times"], "s", color=color, markersize=7)
        ax.plot(theirs["parameters"], theirs["times"], "o", color=color, markeredgecolor="white", markersize=7)
        ax.plot([], [], "-", color=color, linewidth=3, label=f"{experts} experts")
    for marker, label in (("s", "our twins (fitted)"), ("o", "Clark et al. (predicted)")):
        ax.plot([], [], marker, color="#444444", label=label)
    ax.set_xscale("log")
    ax.set_yscale("log", base=2)
    ax.set_xlim(*span)
    at = np.array([1e5, 1e6, 1e7, 1e8, 1e9])
    ax.set_xticks(at, ["0.1M", "1M", "10M", "100M", "1B"])
    ax.xaxis.set_minor_formatter("")
    ax.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    ax.set(xlabel="parameters of the base, without embeddings", ylabel="dense model of the same loss: times the base")
    legend_below(ax, columns=2)
    return ax
