"""Write a run's metrics as JSON lines, one file for training rows and one for validation rows.

A run that resumes at step n first removes the rows after step n and an incomplete last line, so that the files equal
those of an uninterrupted run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moelab.files import write_text

TRAIN, VALIDATION = "train.jsonl", "validation.jsonl"
PERCENTILES = (0, 10, 50, 90, 100)
"""Percentiles of the experts' load that TensorBoard shows."""


class Metrics:
    """Append rows to `<run>/train.jsonl` and `<run>/validation.jsonl`, and optionally to TensorBoard."""

    def __init__(self, run_dir: Path, resume_step: int, tensorboard: bool = False) -> None:
        self._paths = {name: run_dir / name for name in (TRAIN, VALIDATION)}
        for path in self._paths.values():
            rows = [row for row in read_rows(path) if row["step"] <= resume_step]
            write_text(path, "".join(_line(row) for row in rows))
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, file: str, row: dict[str, Any]) -> None:
        """Append a row of JSON values, which include "step"; `file` is TRAIN or VALIDATION."""
        with open(self._paths[file], "a") as f:
            f.write(_line(row))
        if self._board is not None:
            for name, value in scalars(file, row):
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Close the TensorBoard writer."""
        if self._board is not None:
            self._board.close()


def scalars(file: str, row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield TensorBoard's (name, value) pairs of a row.

    They are the row's numbers, such as `train/loss`, and for each layer percentiles of the experts' load:
    `expert_load/layer4/p90` is the load that 90 % of layer 4's experts do not exceed, relative to a uniform load.
    """
    for key, value in row.items():
        if key not in ("step", "time_s") and isinstance(value, int | float):
            yield f"{Path(file).stem}/{key}", value
    for layer, load in row.get("expert_load", {}).items():
        ordered = sorted(load)
        for percent in PERCENTILES:
            yield f"expert_load/layer{layer}/p{percent}", ordered[round(percent / 100 * (len(load) - 1))] * len(load)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all complete rows of a JSON-lines file, in order; an empty list if the file does not exist."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # an incomplete line of a killed process; the rows after it are written again
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
