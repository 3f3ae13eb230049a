"""Zero-shot scores as people look at them: a bar while they are made, a table when they are there, a file for others."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.files import write_json, write_text

if TYPE_CHECKING:
    from moelab.evaluation.zero_shot import Score


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each task, on standard error or in the notebook; gives what `evaluate` calls with (task, done, of all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as bars:
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


def save(scores: Sequence[Score], folder: Path, name: str, options: Mapping[str, Any]) -> Path:
    """Write `zero-shot-<name>.jsonl`, a line a task, and its provenance beside it; returns the former.

    Args:
        name: of the model: one of `moelab.evaluation.models.REFERENCES`, a run's id or a directory's.
        options: of the evaluation: limit, batch, dtype, device.
    """
    from moelab.evaluation.models import REFERENCES
    from moelab.workbench.provenance import provenance

    known = REFERENCES.get(name)
    about = {"model": known.name if known else name, "source": str(known.package) if known else ""}
    about |= {key: options[key] for key in ("limit", "dtype", "device")}
    file = folder / f"zero-shot-{name}.jsonl"
    write_text(file, "".join(json.dumps({**about, **asdict(score)}) + "\n" for score in scores))
    write_json(folder / f"zero-shot-{name}.provenance.json", {"title": title(about["model"], scores), **provenance()})
    return file


def title(model: str, scores: Sequence[Score]) -> str:
    """The scores in a line: those furthest above knowing nothing first."""
    parts = [
        f"{s.task.removeprefix('packaged_')} {100 * s.accuracy:.1f} ± {100 * s.standard_error:.1f}"
        for s in sorted(scores, key=lambda s: max(s.chance, s.majority or 0) - s.accuracy)
    ]
    return f"{model} through our zero-shot pipeline, percent: {', '.join(parts)}"
