"""Lay a figure out again for a phone: its panels below one another, legends below their panels, long texts wrapped."""

from __future__ import annotations

import math
import pickle
import textwrap
from typing import TYPE_CHECKING

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import AutoLocator, MaxNLocator

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

WIDTH = 4.4
"""Inches: at 390 pixels a text of ten points is eleven pixels high."""

_LINE = 46
"""Characters in a line of that width."""


def narrowed(fig: Figure) -> Figure | None:
    """Return a copy of a figure `WIDTH` inches wide; the figure itself stays as it is.

    None for a figure that cannot be copied, or whose axes do not all stand in a grid.
    """
    try:
        copy: Figure = pickle.loads(pickle.dumps(fig))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    plt.close(copy)  # unpickling registers it, and a notebook would show it
    panels: dict[tuple[int, int, int], list[Axes]] = {}
    for ax in copy.axes:
        if (place := ax.get_subplotspec()) is None or not ax.get_visible():
            return None
        panels.setdefault((id(place.get_gridspec()), place.num1, place.num2), []).append(ax)
    if not panels:
        return None
    heights = [max(2.2, axes[0].get_position().height * fig.get_figheight()) for axes in panels.values()]
    copy.set_layout_engine("constrained")
    copy.set_size_inches(WIDTH, sum(heights) + 1.0 * len(heights))
    grid = copy.add_gridspec(len(panels), 1, height_ratios=heights)
    rows = 0
    for row, axes in enumerate(panels.values()):
        for ax in axes:
            ax.set_subplotspec(grid[row])
            _relabel(ax)
        for ax in axes:
            if (legend := ax.get_legend()) is not None:
                rows += max(0, _below(legend, ax) - 2)
    for legend in list(copy.legends):
        rows += max(0, _below(legend, copy) - 2)
    copy.set_figheight(copy.get_figheight() + 0.18 * rows)  # else a long legend leaves the axes too little
    for text in copy.texts:
        text.set_text(_wrapped(text.get_text()))
    if copy._suptitle is not None:
        copy._suptitle.set_text(_wrapped(copy._suptitle.get_text()))
    for axes in panels.values():
        _thin(axes[0], copy)
    return copy


def _wrapped(text: str) -> str:
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, _LINE) or [""])


def _relabel(ax: Axes) -> None:
    """Wrap titles and labels, and show the labels of shared axes on every panel."""
    ax.tick_params(labelsize=9)
    if ax.get_shared_y_axes().get_siblings(ax)[1:]:
        ax.tick_params(labelleft=True)
    if ax.get_shared_x_axes().get_siblings(ax)[1:]:
        ax.tick_params(labelbottom=True)
    for place in ("left", "center"):
        if title := ax.get_title(loc=place):
            ax.set_title(_wrapped(title), loc=place)
    ax.set_xlabel(_wrapped(ax.get_xlabel()))
    ax.set_ylabel("\n".join(textwrap.wrap(ax.get_ylabel(), 34)))


def _below(legend: Legend, owner: Axes | Figure) -> int:
    """Draw a legend again below its panel or figure, where it covers nothing, and return its rows."""
    handles, labels = list(legend.legend_handles), [text.get_text() for text in legend.get_texts()]
    if not handles:
        return 0
    title = legend.get_title().get_text() or None
    columns = 2 if max(map(len, labels)) <= 22 else 1
    look = {"title": title, "ncols": columns, "fontsize": 9}
    count = math.ceil(len(labels) / columns)
    legend.remove()
    if not isinstance(owner, Axes):
        owner.legend(handles, labels, loc="outside lower center", **look)
        return count
    # What was drawn, such as dots with error bars, not its mark in the old legend.
    drawn = {label: handle for handle, label in zip(*owner.get_legend_handles_labels(), strict=True)}
    handles = [drawn.get(label, handle) for label, handle in zip(labels, handles, strict=True)]
    pad = 3.0 + 1.7 * len(owner.get_xlabel().splitlines())
    owner.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=pad, **look)
    return count


def _thin(ax: Axes, fig: Figure) -> None:
    """Turn or drop labels of the x axis that would overlap."""
    if isinstance(ax.xaxis.get_major_locator(), AutoLocator | MaxNLocator):
        ax.xaxis.set_major_locator(MaxNLocator(5))
    fig.draw_without_rendering()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text() and label.get_visible()]
    if any(left.x1 + 2 > right.x0 for left, right in zip(boxes, boxes[1:], strict=False)):
        for label in ax.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
