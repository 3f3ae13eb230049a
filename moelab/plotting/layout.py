"""Lay figures out: one width that reads on a phone and in a card of a page, panels below one another."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moelab.files import write_text
from moelab.plotting import svg
from moelab.plotting.typography import typeset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

WIDTH = 4.4
"""Inches of every figure. On a phone of 390 pixels it is drawn 358 wide: a text of `TEXT` points is 11 pixels high."""

TEXT = 10.0
"""Points of the smallest text in a figure."""

HEIGHT = 2.8
"""Inches of a panel with its labels, without legend and title."""

_LINE = 0.2
"""Inches of a line of text."""

_CHARACTERS = {"title": 46, "xlabel": 40, "ylabel": 30}
"""Characters in a line of each."""


def panels(count: int = 1, *, height: float | Sequence[float] = HEIGHT, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, which stand below one another.

    Args:
        height: inches of a panel, or of each of them.
        sharex: the panels share the horizontal axis, and the last one has its labels.
    """
    from matplotlib import pyplot as plt

    heights = [height] * count if isinstance(height, int | float) else list(height)
    fig, axes = plt.subplots(
        len(heights),
        1,
        figsize=(WIDTH, sum(heights)),
        height_ratios=heights,
        sharex=sharex,
        squeeze=False,
        layout="constrained",
    )
    return fig, list(axes[:, 0])


def legend_below(ax: Axes, columns: int = 0, *, of: Sequence[Axes] = ()) -> Legend:
    """Put a legend below an axis, where it covers nothing; the figure becomes as much higher.

    Args:
        columns: of the legend; 0 takes two where its labels are short.
        of: the panels whose marks it explains, each label once; by default the axis itself.
    """
    marks = {label: mark for one in (of or [ax]) for mark, label in zip(*one.get_legend_handles_labels(), strict=True)}
    columns = columns or (2 if max(map(len, marks), default=0) <= 21 else 1)
    lines = 1 + len(wrapped(ax.get_xlabel(), "xlabel").splitlines())
    figure = ax.get_figure()
    figure.set_figheight(figure.get_figheight() + _LINE * math.ceil(len(marks) / columns))
    # The pad is in font sizes, so that the distance is the same for a low axis and a high one.
    return ax.legend(
        marks.values(),
        [textwrap.fill(label, _CHARACTERS["title"] // columns) for label in marks],
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=0.8 + 1.45 * lines,
        ncols=columns,
        columnspacing=1.2,
        handlelength=1.6,
    )


def title(fig: Figure, text: str) -> Figure:
    """Write the title above the figure, and wrap its labels to its width; call it last.

    Labels of a horizontal axis that would overlap are turned.
    """
    from matplotlib.ticker import AutoLocator, MaxNLocator

    for ax in fig.axes:
        ax.set_xlabel(wrapped(ax.get_xlabel(), "xlabel"))
        ax.set_ylabel(wrapped(ax.get_ylabel(), "ylabel"))
        for place in ("left", "center"):
            ax.set_title(wrapped(ax.get_title(loc=place), "title"), loc=place)
        if isinstance(ax.xaxis.get_major_locator(), AutoLocator | MaxNLocator):
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=getattr(ax.xaxis.get_major_locator(), "_integer", False)))
    fig.draw_without_rendering()
    for ax in fig.axes:
        boxes = [one.get_window_extent() for one in ax.get_xticklabels() if one.get_text() and one.get_visible()]
        if any(left.x1 + 2 > right.x0 for left, right in zip(boxes, boxes[1:], strict=False)):
            for one in ax.get_xticklabels():
                one.set(rotation=40, ha="right", rotation_mode="anchor")
    lines = wrapped(typeset(text), "title")
    fig.suptitle(lines, x=0.01, ha="left", fontsize=11)
    fig.set_figheight(fig.get_figheight() + _LINE * len(lines.splitlines()))
    return fig


def wrapped(text: str, what: str) -> str:
    """Return a text in lines that fit a figure as `what`: title, xlabel or ylabel."""
    return "\n".join(textwrap.wrap(text, _CHARACTERS[what])) if text else text


def save(fig: Figure, path: Path, *, title: str = "") -> Path:
    """Save a figure as `<path>.svg`, for light and dark pages (`moelab.plotting.svg`); return its path.

    Args:
        path: without suffix.
        title: the title that a page shows above the figure. Where the figure's own title is the same, the file leaves
            it out.
    """
    file, text = path.with_name(f"{path.name}.svg"), io.StringIO()
    heading = fig._suptitle if title and fig._suptitle is not None else None
    if heading is not None and heading.get_text().split() == typeset(title).split():
        rest, shown = fig.get_figheight(), heading.get_text()
        fig.set_figheight(rest - _LINE * len(shown.splitlines()))
        heading.set_text("")
        fig.savefig(text, format="svg", metadata={"Date": None})
        heading.set_text(shown)
        fig.set_figheight(rest)
    else:
        fig.savefig(text, format="svg", metadata={"Date": None})
    write_text(file, svg.themed(text.getvalue()))
    return file
