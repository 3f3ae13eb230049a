"""Show zero-shot scores as a table and save them as a file with provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.files import write_json, write_text

if TYPE_CHECKING:
    from moelab.evaluation.zero_shot import Score


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
        "±: one standard error over the items. Always: accuracy of always choosing the place that is right most often. "
        "Bits per byte: of the right answers, given their questions. Cut: share of requests whose beginning was cut "
        "off to fit the model's context. *: stands in for the paper's data set."
    )


def save(scores: Sequence[Score], folder: Path, name: str, options: Mapping[str, Any]) -> Path:
    """Write `zero-shot-<name>.jsonl`, one line per task, and its provenance beside it; return the former's path.

    Args:
        name: the model's: one of `moelab.evaluation.models.REFERENCES`, a run's id or a directory's name.
        options: the evaluation's: limit, batch, dtype, device.
    """
    from moelab.evaluation.models import REFERENCES
    from moelab.runs.provenance import provenance

    known = REFERENCES.get(name)
    about = {"model": known.name if known else name, "source": str(known.package) if known else ""}
    about |= {key: options[key] for key in ("limit", "dtype", "device")}
    file = folder / f"zero-shot-{name}.jsonl"
    write_text(file, "".join(json.dumps({**about, **asdict(score)}) + "\n" for score in scores))
    write_json(folder / f"zero-shot-{name}.provenance.json", {"title": title(about["model"], scores), **provenance()})
    return file


def title(model: str, scores: Sequence[Score]) -> str:
    """Return the scores in one line, those furthest above chance first."""
    parts = [
        f"{s.task.removeprefix('packaged_')} {100 * s.accuracy:.1f} ± {100 * s.standard_error:.1f}"
        for s in sorted(scores, key=lambda s: max(s.chance, s.majority or 0) - s.accuracy)
    ]
    return f"{model} through our zero-shot pipeline, percent: {', '.join(parts)}"
