"""Draw tables and progress in a terminal, in one style; a pipe or a file has room for every column.

The variable COLUMNS sets the width of tables in both.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from moelab.tables import StackingTable

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
    """Where to print: as wide as COLUMNS or the terminal, `PIPE_WIDTH` characters where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH)


def say(*texts: str, file: TextIO | None = None) -> None:
    """Print each text: in a terminal wrapped at spaces, else on one line, which programs can read.

    Args:
        file: standard output by default.
    """
    file = file or sys.stdout
    width = shutil.get_terminal_size().columns if file.isatty() else None
    for text in texts:
        indent = " " * (len(text) - len(text.lstrip()) + 2)
        if width and len(text) > width:
            text = textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        print(text, file=file, flush=True)


def table(*columns: str, title: str | Text | None = None) -> StackingTable:
    """Return a table whose rows are stacked where a terminal is too narrow for its columns."""
    from moelab.tables import StackingTable

    return StackingTable(*columns, title=title)


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


def counted(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items; show a progress bar while they are worked on."""
    with task_progress() as show:
        for done, item in enumerate(items):
            show(what, done, len(items))
            yield item
        show(what, len(items), len(items))


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


def short(number: float) -> str:
    """``52.3 B``, ``252 k``: a number with three digits and the unit that fits."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def duration(seconds: float | None) -> str:
    """``1 h 05 min``, ``3 min 20 s``, ``12 s``; an ellipsis for None."""
    if seconds is None:
        return "…"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
