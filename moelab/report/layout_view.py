"""Draw a layout: which GPU holds which experts, slices and copies.

layout = ParallelConfig(data=64)
layout_view.gpus(layout, ax)              # everything outside the experts
layout_view.gpus(layout, ax, experts=32)  # a layer of 32 experts
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moelab.config.parallel import ParallelConfig
from moelab.plotting import placement

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def gpus(layout: ParallelConfig, ax: Axes, *, experts: int = 0) -> Axes:
    """Draw a square per GPU and a row per node. The GPUs of one colour hold one whole copy together.

    Args:
        experts: number of experts of the layer to show; 0 shows the weights outside the experts (copies for data
            parallelism, cut into tensor slices).

    Raises:
        ValueError: the layout cannot hold that many experts; one line with what is allowed.
    """
    held_by = layout.experts(experts) if experts else None
    cells = []
    for rank in range(layout.ranks):
        if held_by is None:
            copy, slice_ = divmod(rank, layout.tensor)
            text = f"copy {copy}" + (f"\nslice {slice_}" if layout.tensor > 1 else "")
            cells.append((text, copy if layout.tensor > 1 else 0))
        else:
            held, at = held_by.local_experts(rank), held_by.position(rank)
            text = f"{held[0]}" if len(held) == 1 else f"{held[0]}–{held[-1]}"
            cells.append((text + (f"\nslice {at.slice}" if held_by.slices > 1 else ""), at.replica))
    placement.squares(cells, ax, per_row=layout.ranks_per_node)
    ax.set_title(_title(layout, experts))
    return ax


def _title(layout: ParallelConfig, experts: int) -> str:
    if not experts:
        copies = (
            f"{layout.data} whole copies" if layout.tensor == 1 else f"{layout.data} copies in {layout.tensor} slices"
        )
        return f"outside the experts: {copies}"
    held_by = layout.experts(experts)
    times = {1: "once", 2: "twice"}.get(held_by.replicas, f"{held_by.replicas} times")
    sliced = f", each in {held_by.slices} slices" if held_by.slices > 1 else ""
    return f"a layer of {experts} experts: all of them {times}{sliced}"
