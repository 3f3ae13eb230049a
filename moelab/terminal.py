"""Tables in a terminal, alike everywhere; a pipe or a file has room for every column."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 200


def console() -> Console:
    """Where to print: as wide as the terminal, `PIPE_WIDTH` characters where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def table(*columns: str, title: str | None = None) -> Table:
    """A table without vertical lines, which leave a narrow terminal no room; text that does not fit its column goes on below, uncut."""
    from rich import box
    from rich.table import Table

    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        view.add_column(column, overflow="fold")
    return view
