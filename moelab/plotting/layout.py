"""Lay figures out: one width that reads on a phone and in a card of a page, panels below one another."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moelab.files import write_text
from moelab.plotting import svg
from moelab.plotting.typography import typeset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.text import Text

WIDTH = 4.4
"""Inches of every figure. On a phone of 390 pixels it is drawn 358 wide: a text of `TEXT` points is 11 pixels high."""

TEXT = 10.0
"""Points of the smallest text in a figure."""

HEIGHT = 2.8
"""Inches of a panel with its labels, without legend and title."""

_LINE = 0.2
"""Inches of a line of text."""

_CHARACTERS = {"title": 46, "ylabel": 30}
"""Characters in a line of each."""

_LETTER = 0.082
"""Inches of a letter, on average."""


def panels(
    count: int = 1, *, height: float | Sequence[float] = HEIGHT, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
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
    """Put a legend below an axis and its labels, where it covers nothing; the figure becomes as much higher.

    Call it when the axis has its labels.

    Args:
        columns: of the legend; 0 takes two where its labels are short.
        of: the panels whose marks it explains, each label once; by default the axis itself.
    """
    from matplotlib.transforms import blended_transform_factory

    marks: dict[str, Any] = {}
    for one in of or [ax]:
        for mark, label in zip(*one.get_legend_handles_labels(), strict=True):
            marks.setdefault(label, mark)
    columns = columns or (2 if max(map(len, marks), default=0) <= 21 else 1)
    figure: Any = ax.get_figure()
    _fit(figure, [ax])
    below = _below(ax)
    turned = max(0.0, below - 0.75)
    figure.set_figheight(figure.get_figheight() + _LINE * math.ceil(len(marks) / columns) + turned)
    return ax.legend(
        marks.values(),
        [textwrap.fill(label, _CHARACTERS["title"] // columns) for label in marks],
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        # Centred on the figure: centred on an axis that has long names at its left, it would make that axis narrower.
        bbox_transform=blended_transform_factory(figure.transFigure, ax.transAxes),
        borderaxespad=0.4 + below * 72 / TEXT,  # in font sizes: the same distance for a low axis and a high one
        ncols=columns,
        columnspacing=1.2,
        handlelength=1.6,
    )


def name_rows(ax: Axes, names: Sequence[str], *, above: float = 0.3) -> None:
    """Write the names of rows, the first on top, above their marks, where they take no width from the axis."""
    for row, name in enumerate(names):
        ax.annotate(name, (0, row - above), xycoords=("axes fraction", "data"), va="bottom")
    ax.set_yticks([])
    ax.set_ylim(len(names) - 0.6, -above - 0.55)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="y", visible=False)


def title(fig: Figure, text: str) -> Figure:
    """Write the title above the figure, and fit the labels of its axes to its width; call it last."""
    _fit(fig, fig.axes)
    lines = wrapped(typeset(text), _CHARACTERS["title"])
    fig.suptitle(lines, x=0.01, ha="left", fontsize=11)
    fig.set_figheight(fig.get_figheight() + _LINE * len(lines.splitlines()))
    return fig


def _fit(figure: Any, axes: Sequence[Axes]) -> None:
    """Wrap the labels of axes to the figure's width, and turn those of a horizontal axis that would overlap."""
    from matplotlib.ticker import AutoLocator, MaxNLocator

    for ax in axes:
        ax.set_ylabel(wrapped(ax.get_ylabel(), _CHARACTERS["ylabel"]))
        for place in ("left", "center"):
            ax.set_title(wrapped(ax.get_title(loc=place), _CHARACTERS["title"]), loc=place)
        if isinstance(locator := ax.xaxis.get_major_locator(), AutoLocator | MaxNLocator):
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=getattr(locator, "_integer", False)))
    figure.draw_without_rendering()  # once for all axes: it takes a tenth of a second and more
    for ax in axes:
        box = ax.get_window_extent()
        center = (box.x0 + box.x1) / 2
        room = 2 * min(center - figure.bbox.x0, figure.bbox.x1 - center) / figure.dpi
        ax.set_xlabel(wrapped(ax.get_xlabel(), max(20, int(room / _LETTER))))
        ticks = _ticks(ax)
        boxes = [one.get_window_extent() for one in ticks]
        if any(left.x1 + 2 > right.x0 for left, right in zip(boxes, boxes[1:], strict=False)):
            for one in ticks:
                one.set(rotation=40, ha="right", rotation_mode="anchor")


def _ticks(ax: Axes) -> list[Text]:
    return [one for one in ax.get_xticklabels() if one.get_text() and one.get_visible()]


def _below(ax: Axes) -> float:
    """Return the inches that ticks and label take below an axis."""
    figure: Any = ax.get_figure()
    figure.draw_without_rendering()
    labels = [one.get_window_extent() for one in (*_ticks(ax), ax.xaxis.label) if one.get_text()]
    return (ax.get_window_extent().y0 - min((one.y0 for one in labels), default=ax.get_window_extent().y0)) / figure.dpi


def wrapped(text: str, characters: int) -> str:
    """Return a text in lines of so many characters; names with hyphens stay whole."""
    return "\n".join(textwrap.wrap(text, characters, break_on_hyphens=False)) if text else text


def save(fig: Figure, path: Path, *, title: str = "") -> Path:
    """Save a figure as `<path>.svg`, for light and dark pages (`moelab.plotting.svg`); return its path.

    Args:
        path: without suffix.
        title: the title that a page shows above the figure; the file then leaves out the figure's own.
    """
    file, text = path.with_name(f"{path.name}.svg"), io.StringIO()
    heading = cast(Any, fig)._suptitle if title else None
    if heading is None:
        fig.savefig(text, format="svg", metadata={"Date": None})
    else:
        height, shown = fig.get_figheight(), heading.get_text()
        fig.set_figheight(height - _LINE * len(shown.splitlines()))
        heading.set_text("")
        fig.savefig(text, format="svg", metadata={"Date": None})
        heading.set_text(shown)
        fig.set_figheight(height)
    write_text(file, svg.themed(text.getvalue()))
    return file
