"""Draw tables and progress in a terminal, in one style; a pipe or a file has room for every column."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

T = TypeVar("T")

PIPE_WIDTH = 200
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Return a text that only prints: control characters, which a terminal would obey, become question marks."""
    return _CONTROL.sub("?", text)


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's text; the exception's name where it has none."""
    return next((line for line in str(error).strip().splitlines()), type(error).__name__)


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


def working(what: str) -> AbstractContextManager[object]:
    """Show on standard error, in a terminal, that this goes on while the context lasts."""
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(plain(f"{what} …")))


def announced(cases: Sequence[T], name: Callable[[T], str]) -> Iterator[T]:
    """Yield cases that take long; print before each its name and, from the second on, about how long the rest takes."""
    started = time.monotonic()
    for i, case in enumerate(cases):
        left = f", about {duration((time.monotonic() - started) / i * (len(cases) - i))} left" if i else ""
        print(f"{name(case)} ({i + 1} of {len(cases)}{left})", flush=True)
        yield case


def duration(seconds: float | None) -> str:
    """``1 h 05 min``, ``3 min 20 s``, ``12 s``; an ellipsis for None."""
    if seconds is None:
        return "…"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
