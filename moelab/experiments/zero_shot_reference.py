"""Keep the zero-shot scores of a real model, which show that the code of the experiment `zero-shot` is right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab import paths
from moelab.experiments import zero_shot
from moelab.files import write_json, write_text
from moelab.lazy import pd
from moelab.runs.provenance import provenance

if TYPE_CHECKING:
    from moelab.evaluation.zero_shot import Score

REFERENCE = "smollm2"
"""What `moelab eval` calls the real model that checks the pipeline, see `moelab.evaluation.models`."""


def save(scores: Sequence[Score], folder: Path, name: str, options: Mapping[str, Any]) -> Path:
    """Write `zero-shot-<name>.jsonl`, one line per task, and its provenance beside it; return the former's path.

    Args:
        name: the model's: `REFERENCE`, a run's id or a directory's name.
        options: the evaluation's: limit, batch, dtype, device.
    """
    from moelab.evaluation.models import SMOLLM2

    about = {"model": name, "source": ""}
    if name == REFERENCE:
        about = {"model": "SmolLM2-135M-Instruct", "source": str(SMOLLM2)}
    about |= {key: options[key] for key in ("limit", "dtype", "device")}
    file = folder / f"zero-shot-{name}.jsonl"
    write_text(file, "".join(json.dumps({**about, **asdict(score)}) + "\n" for score in scores))
    write_json(folder / f"zero-shot-{name}.provenance.json", {"title": _title(about["model"], scores), **provenance()})
    return file


def _title(model: str, scores: Sequence[Score]) -> str:
    """Return the scores in one line, those furthest above chance first."""
    parts = [
        f"{s.task.removeprefix('packaged_')} {100 * s.accuracy:.1f} ± {100 * s.standard_error:.1f}"
        for s in sorted(scores, key=lambda s: max(s.chance, s.majority or 0) - s.accuracy)
    ]
    return f"{model} through our zero-shot pipeline, percent: {', '.join(parts)}"


def reference() -> pd.DataFrame:
    """Return scores of a real model, the user's or published ones, computed by the same code, in the form of `scored`.

    The command is `moelab eval smollm2 --limit 200 --out .moelab/results/benchmarks`. The arm is the model's name, the
    seed -1. The frame is empty where there are no such scores, or where the tasks have changed since.
    """
    from moelab.evaluation.zero_shot import PACKAGED, PAPER_TASKS, definition, version

    def unchanged(task: str, stored: str) -> bool:
        """Return whether a packaged task has its stored definition, for which lm-eval need not be installed."""
        own = (
            f"{task} {definition(task)['metadata']['version']}" if task in PACKAGED else version(task).partition(",")[0]
        )
        return stored.partition(",")[0] == own

    columns = {name: column for column, names in PAPER_TASKS.items() for name in names}
    files = [root / "benchmarks" / f"zero-shot-{REFERENCE}.jsonl" for root in reversed(paths.all_results())]
    file = next((file for file in files if file.exists()), None)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file else []
    current = [row for row in rows if unchanged(row["task"], row["version"])]
    made = [{**row, "arm": row["model"], "seed": -1, "paper": columns.get(row["task"], "")} for row in current]
    return zero_shot.scored(made)


def reference_headline(rows: pd.DataFrame) -> str:
    """Return a real model's scores in one line, from `reference`."""
    if not len(rows):
        return (
            "There are no scores of a real model: "
            "`moelab eval smollm2 --limit 200 --out .moelab/results/benchmarks` makes them"
        )
    table = zero_shot.over_chance(rows)
    best = [
        f"{row.task.removeprefix('packaged_')} {100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f} %"
        for row in table[table["sigmas"] > 3].itertuples()
    ]
    return f"{table['arm'].iloc[0]}, a real model, is above knowing nothing on {', '.join(best) or 'no task'}"
