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


def save(scores: Sequence[Score], folder: Path, name: str, options: Mapping[str, Any]) -> None:
    """Write `zero-shot-<name>.jsonl`, one line per task, and its provenance.

    Args:
        name: the model's: `REFERENCE`, a run's id or a directory's name.
        options: the evaluation's: limit, batch, dtype, device.
    """
    from moelab.evaluation.models import SMOLLM2

    real = {"model": "SmolLM2-135M-Instruct", "source": str(SMOLLM2)}
    about = real if name == REFERENCE else {"model": name, "source": ""}
    about |= {key: options[key] for key in ("limit", "dtype", "device")}
    lines = [json.dumps({**about, **asdict(score)}) for score in scores]
    write_text(folder / f"zero-shot-{name}.jsonl", "\n".join([*lines, ""]))
    write_json(folder / f"zero-shot-{name}.provenance.json", {"title": _title(about["model"], scores), **provenance()})


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
    seed -1. Tasks whose definition has changed since are left out; for that lm-eval need not be installed.
    """
    from moelab.evaluation.zero_shot import PACKAGED, definition

    files = [root / "benchmarks" / f"zero-shot-{REFERENCE}.jsonl" for root in reversed(paths.all_results())]
    file = next((file for file in files if file.exists()), None)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file else []
    current = [f"{task} {definition(task)['metadata']['version']}" for task in PACKAGED]
    same = [row for row in rows if row["version"].partition(",")[0] in current]
    return zero_shot.scored([{**row, "arm": row["model"], "seed": -1} for row in same])


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
