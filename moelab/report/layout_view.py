"""Draw a layout: which GPU holds which experts, slices and copies.

layout = ParallelConfig(data=64)
layout_view.gpus(layout, ax)              # everything outside the experts
layout_view.gpus(layout, ax, experts=32)  # a layer of 32 experts
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.patches import Rectangle

from moelab.config.parallel import ParallelConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Light enough for dark text on top, in print too.
_FILLS = ("#CFE6F5", "#FBE3B5", "#CDEBDF", "#F3D3E4", "#E3E3E3", "#F6CFBB", "#B9D7EA", "#E9DDF2")


def gpus(layout: ParallelConfig, ax: Axes, *, experts: int = 0) -> Axes:
    """Draw a square per GPU and a row per node. The GPUs of one colour hold one whole copy together.

    Args:
        experts: number of experts of the layer to show; 0 shows the weights outside the experts (copies for data
            parallelism, cut into tensor slices).

    Raises:
        ValueError: the layout cannot hold that many experts; one line with what is allowed.
    """
    placement = layout.experts(experts) if experts else None
    G = layout.ranks_per_node
    for rank in range(layout.ranks):
        node, column = divmod(rank, G)
        if placement is None:
            copy, slice_ = divmod(rank, layout.tensor)
            text = f"copy {copy}" + (f"\nslice {slice_}" if layout.tensor > 1 else "")
            color = copy if layout.tensor > 1 else 0
        else:
            held, at = placement.local_experts(rank), placement.position(rank)
            text = f"{held[0]}" if len(held) == 1 else f"{held[0]}–{held[-1]}"
            text += f"\nslice {at.slice}" if placement.slices > 1 else ""
            color = at.replica
        ax.add_patch(Rectangle((column, node), 0.92, 0.86, color=_FILLS[color % len(_FILLS)], linewidth=0))
        ax.text(column + 0.46, node + 0.43, text, ha="center", va="center", fontsize=7, color="#222222")
    ax.set(xlim=(-0.1, G), ylim=(layout.nodes, -0.1), xlabel="GPU of a node", ylabel="node")
    ax.set_xticks([i + 0.46 for i in range(G)], range(G))
    ax.set_yticks([i + 0.43 for i in range(layout.nodes)], range(layout.nodes))
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set_title(_title(layout, experts))
    return ax


def _title(layout: ParallelConfig, experts: int) -> str:
    if not experts:
        copies = (
            f"{layout.data} whole copies" if layout.tensor == 1 else f"{layout.data} copies in {layout.tensor} slices"
        )
        return f"outside the experts: {copies}"
    placement = layout.experts(experts)
    times = {1: "once", 2: "twice"}.get(placement.replicas, f"{placement.replicas} times")
    sliced = f", each in {placement.slices} slices" if placement.slices > 1 else ""
    return f"a layer of {experts} experts: all of them {times}{sliced}"
