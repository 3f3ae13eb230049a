"""Draw tables and progress bars in a terminal, in one style; a pipe or a file has room for every column."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 200
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Return a text that only prints: control characters, which a terminal would obey, become question marks."""
    return _CONTROL.sub("?", text)


def console() -> Console:
    """Where to print: as wide as the terminal, `PIPE_WIDTH` characters where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def table(*columns: str, title: str | None = None) -> Table:
    """Return a table without vertical lines, for narrow terminals; text that does not fit is wrapped, not cut."""
    from rich import box
    from rich.table import Table

    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        view.add_column(column, overflow="fold")
    return view


@contextlib.contextmanager
def task_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar per task, on standard error or in the notebook; yield a function of (task, done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as bars:
        rows: dict[str, TaskID] = {}

        def show(task: str, done: int, total: int) -> None:
            if task not in rows:
                rows[task] = bars.add_task(task, total=total)
            bars.update(rows[task], completed=done, total=total)

        yield show
