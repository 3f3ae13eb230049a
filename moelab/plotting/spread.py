"""Draw how far seeds end apart, when their copying begins, and what their attention heads are for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from moelab.plotting.figures import name_rows
from moelab.plotting.palette import COLORS, OURS, colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {"spread": "all tokens", "repeated": "copyable tokens", "changed": "changed tokens", "new": "new tokens"}
"""Column of `moelab.experiments.seeds.spreads` -> its name in figures."""
_MARKS = ((OURS, "o", 60), (COLORS[4], "^", 30), (COLORS[3], "s", 24), (COLORS[2], "v", 30))


def seed_lines(results: pd.DataFrame, ax: Axes, *, arms: Sequence[str]) -> Axes:
    """Draw a line per seed across the arms; pairing by seed removes what the lines have in common.

    Args:
        results: columns arm, seed and validation_loss.
    """
    table = results.pivot(index="seed", columns="arm", values="validation_loss")
    there = [arm for arm in arms if arm in table]
    for _, row in table[there].iterrows():
        ax.plot(range(len(there)), row, marker="o", color=OURS, alpha=0.6)
    ax.set_xticks(range(len(there)), there)
    ax.set_xlim(-0.3, len(there) - 0.7)
    return ax


def onsets(table: pd.DataFrame, ax: Axes, *, limit: float) -> Axes:
    """Draw when each seed begins to copy, a row per arm; a seed that never does stands at the right edge.

    Args:
        table: from `moelab.experiments.seeds.study`.
        limit: share of a whole training before which copying is to begin.
    """
    arms = list(dict.fromkeys(table["arm"]))
    x = (100 * table["onset"]).fillna(100)
    ax.scatter(x, [arms.index(arm) for arm in table["arm"]], s=22, alpha=0.75, color=OURS)
    ax.axvline(100 * limit, color="#888888", linewidth=1, linestyle=":")
    ax.set(xlabel=f"copying begins (% of a whole training; dotted: {100 * limit:.0f} %)", xlim=(0, None))
    name_rows(ax, arms)
    return ax


def deviations(spreads: pd.DataFrame, ax: Axes, *, limit: float) -> Axes:
    """Draw the standard deviation over seeds of the final loss on all tokens and on each kind, a row per judged arm.

    Args:
        spreads: from `moelab.experiments.seeds.spreads`.
        limit: of the loss on all tokens.
    """
    judged = spreads[spreads["passes"].notna()]
    for (column, name), (color, marker, size) in zip(KINDS.items(), _MARKS, strict=True):
        ax.scatter(judged[column], range(len(judged)), s=size, marker=marker, color=color, label=name)
    ax.axvline(limit, color="#888888", linewidth=1, linestyle=":")
    ax.set(xlabel=f"standard deviation over seeds (nats per token; dotted: {limit:g})", xscale="log")
    name_rows(ax, [f"{arm} ({seeds:.0f})" for arm, seeds in zip(judged["arm"], judged["seeds"], strict=True)])
    return ax


def head_roles(effects: pd.DataFrame, ax: Axes) -> Axes:
    """Draw what each attention head is for: rise of the loss without it, of copyable against new tokens.

    Args:
        effects: from `moelab.experiments.seeds.heads`.
    """
    palette = colors(list(dict.fromkeys(effects["arm"])))
    for arm, part in effects.groupby("arm", sort=False):
        ax.scatter(part["new"], part["repeated"], s=24, alpha=0.75, color=palette[arm], label=arm)
    ends = effects["new"].max()
    ax.plot([0, ends], [0, ends], color="#888888", linewidth=1, linestyle=":")
    ax.set(
        xlabel="rise of the loss on new tokens without the head (nats)",
        ylabel="rise on copyable tokens (nats)",
    )
    return ax
