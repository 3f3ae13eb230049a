"""Draw what happens in one MoE layer: messages and time of its exchanges, latency of its kernels.

Every function draws on axes that it is given; the columns that it reads are in its docstring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from moelab.plotting import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXCHANGE_COLORS = figures.colors(["flat", "hierarchical", "coordinated"])


def exchange_counts(counted: pd.DataFrame, messages: Axes, volume: Axes) -> None:
    """Draw messages over ranks, and rows over those of the flat exchange: formulas as lines, counts as dots.

    Args:
        counted: from `moelab.experiments.all_to_all.counts`.
    """
    worlds = sorted(counted["ranks"].unique())
    flat = counted[counted["way"] == "flat"].set_index("ranks")
    for way, color in EXCHANGE_COLORS.items():
        there = counted[counted["way"] == way].set_index("ranks")
        there = there[there["messages"] > 0]
        messages.plot(there.index, there["formula_messages"], color=color, label=f"{way}, the paper’s formula")
        messages.plot(there.index, there["messages"], "o", color=color, label=f"{way}, counted")
        out = (there["rows"] + there["gathered_rows"]) / flat["rows"]
        expected = (there["formula_rows"] + there["formula_gathered_rows"]) / flat["formula_rows"]
        volume.plot(there.index, expected[there.index], color=color)
        volume.plot(there.index, out[there.index], "o", color=color)
    messages.set(yscale="log", ylabel="messages a rank")
    volume.set(ylabel="rows that leave a rank, over flat", ylim=(0, 2.1))
    messages.yaxis.set_major_formatter("{x:g}")
    for ax in (messages, volume):
        ax.set(xscale="log", xlabel="ranks")
        ax.set_xticks(worlds, [str(p) for p in worlds])
        ax.minorticks_off()
    figures.legend_below(volume, columns=1, of=[messages])


def exchange_times(predicted: pd.DataFrame, axes: Sequence[Axes]) -> None:
    """Draw the time of each exchange over that of the flat one, a panel for each size.

    Args:
        predicted: columns as in `moelab.simulate.all_to_alls.times`.
        axes: one for each size.
    """
    for ax, (size, part) in zip(axes, predicted.groupby("bytes"), strict=True):
        for way, color in EXCHANGE_COLORS.items():
            there = part[part["way"] == way]
            ax.plot(there["ranks"], there["ratio"], "o-", color=color, label=way)
        ax.set(xscale="log", xlabel="GPUs", title=f"{size // 1024} KiB a GPU", ylim=(0, None))
        ax.set_xticks(sorted(part["ranks"].unique()), [str(p) for p in sorted(part["ranks"].unique())])
        ax.minorticks_off()
        ax.set_ylabel("time / flat, simulated")
    figures.legend_below(axes[-1], columns=3)


def kernel_speedups(whole: pd.DataFrame, ax: Axes, *, bound: float) -> Axes:
    """Draw the baseline's time over ours by experts, a line for each number of tokens, and the paper's bound.

    Args:
        whole: columns tokens, experts, ratio; one row per session. Drawn are means with 95 % intervals.
        bound: the ratio that the paper says is exceeded.
    """
    experts = sorted(whole["experts"].unique())
    tokens = sorted(whole["tokens"].unique())
    palette = figures.colors(["", *map(str, tokens)])
    for i, S in enumerate(tokens):
        part = whole[whole["tokens"] == S].groupby("experts")["ratio"]
        bounds = [figures.student(values) for _, values in part]
        at = [experts.index(E) + (i - (len(tokens) - 1) / 2) * 0.06 for E in part.groups]
        # An interval may reach below zero, where a logarithmic axis ends.
        low = [max(least, mean / 10) for (least, _), mean in zip(bounds, part.mean(), strict=True)]
        high = [most for _, most in bounds]
        figures.our_points(ax, at, list(part.mean()), low, high, label=f"{S} tokens", color=palette[str(S)])
    figures.paper_bound(ax, bound, label=f"paper: over {bound:g}")
    ax.axhline(1, color="#888888", linewidth=1)
    ax.set(xlabel="experts", ylabel="baseline's time over ours", yscale="log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xticks(range(len(experts)), [str(E) for E in experts])
    figures.legend_below(ax)
    return ax


def kernel_breakdown(table: pd.DataFrame, axes: Sequence[Axes]) -> None:
    """Draw median milliseconds as stacked bars, a panel for each number of tokens with its own scale.

    Args:
        table: index tokens, experts, candidate; columns gate, dispatch, combine.
    """
    names = ["gate", "dispatch", "combine"]
    palette = figures.colors(["", *names])
    panels = sorted(table.index.unique("tokens"))
    for ax, tokens in zip(axes, panels, strict=True):
        shown = table.loc[tokens].sort_index(level=["experts", "candidate"], ascending=[True, False])
        labels = [f"{candidate.split()[0]}, {experts}" for experts, candidate in shown.index]
        left = [0.0] * len(shown)
        for name in names:
            ax.barh(labels, shown[name], left=left, color=palette[name], label=name)
            left = [a + b for a, b in zip(left, shown[name], strict=True)]
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_title(f"{tokens} tokens")
        ax.set(xlabel="ms", ylabel="form, experts")
    figures.legend_below(axes[-1], columns=3)
