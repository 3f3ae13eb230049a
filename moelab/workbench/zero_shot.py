"""Zero-shot scores as people look at them: a bar while they are made, a table when they are there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moelab.evaluation.zero_shot import Score


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each task, on standard error or in the notebook; gives what `evaluate` calls with (task, done, of all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        rows: dict[str, int] = {}

        def show(task: str, done: int, total: int) -> None:
            row = rows.setdefault(task, -1)
            if row < 0:
                row = rows[task] = bars.add_task(task, total=total)
            bars.update(row, completed=done, total=total)

        yield show


def show(scores: Sequence[Score]) -> None:
    """Print scores as a table."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    view = Table(
        "task", "accuracy %", "chance %", "always %", "n", "bits/byte", "cut", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    for s in scores:
        view.add_row(
            s.task + ("*" if s.stand_in else ""),
            f"{100 * s.accuracy:.1f} ± {100 * s.standard_error:.1f}",
            f"{100 * s.chance:.1f}",
            "–" if s.majority is None else f"{100 * s.majority:.1f}",
            str(s.n),
            f"{s.bits_per_byte:.3f}",
            "–" if s.cut is None else f"{s.cut / s.requests:.0%}",
        )
    console = Console()
    console.print(view)
    console.print(
        "±: one standard error over the items. Always: always giving the commonest right answer's place. Bits per byte: of the right answers, given "
        "their questions. Cut: requests whose context lost its beginning, because the model's is shorter. *: stands in for the paper's data set."
    )
