"""A table for terminals of any width: where its columns do not fit, its rows are stacked.

A word, a number or a range of numbers is never broken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

KEPT = 20
"""Characters up to which a cell stands on one line; a longer one is wrapped at spaces."""
GAP = 2
"""Characters between two columns: one of padding, one where a vertical line would stand."""

INDENT = 2
"""Characters before the lines of a stacked row below its first."""


class StackingTable(Table):
    """Draw a table without vertical lines or, where the width is too small, each row over several lines."""

    def __init__(self, *columns: str, title: str | Text | None = None) -> None:
        super().__init__(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for column in columns:
            self.add_column(column, overflow="fold")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """Yield the table if it fits into `options.max_width` characters, else its title and its stacked rows."""
        cells = [[_text(console, cell) for cell in column.cells] for column in self.columns]
        heads = [_text(console, column.header) for column in self.columns]
        least, most = [], []
        for head, column in zip(heads, cells, strict=True):
            least.append(max([*map(len, head.plain.split()), *(_least(cell.plain) for cell in column), 1]))
            most.append(max([head.cell_len, *(cell.cell_len for cell in column), 1]))
        room = options.max_width - sum(least) - GAP * len(least) - 1
        if room < 0:
            if self.title:
                yield _text(console, self.title)
            yield from _stacked(heads, cells, options.max_width)
            return
        # The columns that want least more get it first.
        order = sorted(range(len(least)), key=lambda i: most[i] - least[i])
        for place, i in enumerate(order):
            more = min(most[i] - least[i], room // (len(order) - place))
            self.columns[i].width, room = least[i] + more, room - more
        yield from super().__rich_console__(console, options)


def _text(console: Console, cell: Any) -> Text:
    return cell.copy() if isinstance(cell, Text) else console.render_str(str(cell), highlight=False)


def _least(cell: str) -> int:
    """Return the characters that a cell needs on a line."""
    return len(cell) if len(cell) <= KEPT else max(KEPT, *map(len, cell.split()))


def _stacked(heads: Sequence[Text], cells: Sequence[Sequence[Text]], width: int) -> Iterator[Text | Padding]:
    """Yield each row as its first cell and, below, the others with their headings; a pair is not torn apart."""
    for first, *others in zip(*cells, strict=True):
        first.stylize("bold")
        yield first
        line = Text()
        for head, cell in zip(heads[1:], others, strict=True):
            if not cell.plain:
                continue
            item = Text.assemble((f"{head.plain} ", "dim"), cell) if head.plain else cell
            if line and INDENT + len(line) + 3 + len(item) > width:
                yield Padding(line, (0, 0, 0, INDENT))
                line = Text()
            line = line + (Text(" · ") if line else Text()) + item
        if line:
            yield Padding(line, (0, 0, 0, INDENT))
