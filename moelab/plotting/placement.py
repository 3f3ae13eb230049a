"""Draw what stands where: probabilities and choices of a gate, tokens and domains of experts, squares of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moelab.lazy import np, pd
from moelab.plotting.layout import legend_below, name_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT, DROPPED, CHOSEN, CHOSEN_BY = "#0072B2", "#D55E00", "#D55E00", "#0072B2"

# Light enough for dark text on top, in print too.
_FILLS = ("#CFE6F5", "#FBE3B5", "#CDEBDF", "#F3D3E4", "#E3E3E3", "#F6CFBB", "#B9D7EA", "#E9DDF2")


def heatmap(
    probability_SE: np.ndarray, expert_SK: np.ndarray, tokens: Sequence[str], ax: Axes, *, top: float | None = None
) -> Axes:
    """Draw a gate's probabilities, one column per token and one row per expert; a ring marks the chosen expert.

    Args:
        top: the probability drawn in the darkest blue, for figures to be compared; by default the highest one.
    """
    shown = probability_SE.T
    image = ax.imshow(shown, aspect="auto", cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
    for expert_S in expert_SK.T:
        ax.plot(
            range(len(expert_S)),
            expert_S,
            "o",
            markersize=6,
            markeredgewidth=1.4,
            markerfacecolor="none",
            color=CHOSEN,
            clip_on=False,
        )
    ax.set_xticks(range(len(tokens)), tokens, rotation=90, family="monospace")
    ax.set_yticks(range(0, len(shown), max(1, len(shown) // 8)))
    ax.set(ylabel="expert")
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, label="gate’s probability", pad=0.01)
    return ax


def loads(kept: Sequence[int], asked: Sequence[int], ax: Axes, *, limit: int) -> Axes:
    """Draw the tokens that each expert keeps and drops, against its capacity `limit`."""
    experts = range(len(kept))
    ax.bar(experts, kept, color=KEPT, label="kept")
    over = [a - k for a, k in zip(asked, kept, strict=True)]
    ax.bar(experts, over, bottom=kept, color=DROPPED, hatch="///", edgecolor="white", label="dropped")
    ax.axhline(limit, color="#444444", linestyle="--", linewidth=1, label=f"capacity {limit}")
    share, slots = 1 - sum(kept) / sum(asked), len(kept) * limit
    ax.set(
        xlabel="expert",
        ylabel="tokens",
        title=f"{share:.0%} of {sum(asked):,} choices dropped, {1 - sum(kept) / slots:.0%} of {slots:,} slots empty",
    )
    ax.set_xticks(experts)
    legend_below(ax, columns=3)
    return ax


def favourites(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw for each domain the expert that it prefers most, and what the other domains give that expert.

    Args:
        table: from `moelab.experiments.specialisation.favourites`.
    """
    names = list(dict.fromkeys(table["favours"]))
    rows = table["favours"].map(names.index)
    own = table["domain"] == table["favours"]
    look: dict[str, Any] = {"linestyle": "none", "clip_on": False}
    ax.plot(table["times"][~own], rows[~own], "|", color="#888888", markersize=8, label="the other domains", **look)
    ax.plot(table["times"][own], rows[own], "o", color=CHOSEN_BY, markersize=6, label="the domain itself", **look)
    ax.axvline(1, color="#888888", linewidth=1)
    numbers = table[own].set_index("favours")
    labels = [f"{name}: expert {numbers['expert'][name]} of layer {numbers['layer'][name]}" for name in names]
    name_rows(ax, labels, above=0.22)
    ax.set(xlabel="times an even share of its choices (line: 1)", xlim=(0, None))
    legend_below(ax)
    return ax


def squares(cells: Sequence[tuple[str, int]], ax: Axes, *, per_row: int) -> Axes:
    """Draw a square per GPU and a row per node.

    Args:
        cells: the text and the number of the colour of each GPU.
        per_row: GPUs of a node.
    """
    from matplotlib.patches import Rectangle

    rows = -(-len(cells) // per_row)
    for at, (text, color) in enumerate(cells):
        row, column = divmod(at, per_row)
        ax.add_patch(Rectangle((column, row), 0.92, 0.86, color=_FILLS[color % len(_FILLS)], linewidth=0))
        ax.text(column + 0.46, row + 0.43, text, ha="center", va="center", color="#222222")
    ax.set(xlim=(-0.1, per_row), ylim=(rows, -0.1), xlabel="GPU of a node", ylabel="node")
    ax.set_xticks([i + 0.46 for i in range(per_row)], list(map(str, range(per_row))))
    ax.set_yticks([i + 0.43 for i in range(rows)], list(map(str, range(rows))))
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return ax
