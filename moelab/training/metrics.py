"""Write a run's metrics as JSON lines, one file for training rows and one for validation rows.

A checkpoint records the lengths and SHA-256 of the files (`Metrics.state`). A run that resumes from it first cuts the
files to these lengths, so that they equal those of an uninterrupted run; `missing_rows` checks that the rows are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelab.config import ModelConfig
from moelab.files import read_bytes, sync, write_bytes
from moelab.training.balance import PERCENTILES, max_violation, percentiles, statistics

TRAIN, VALIDATION = "train.jsonl", "validation.jsonl"
_NUMBERS = ("step", "tokens", "time_s", "loss", "bits_per_byte", "tokens_per_s", "lr")
_NESTED = ("by_domain", "by_pair", "balance", "expert_load")


@dataclass
class Window:
    """Sum metrics over the steps since the last metric row; part of checkpoints, so that a resume changes no row."""

    steps: int = 0
    loss: float = 0.0
    routing_loss: float = 0.0
    distill_loss: float = 0.0
    grad_norm: float = 0.0
    max_violation: float = 0.0  # see `moelab.training.balance`
    load: dict[str, list[int]] = field(default_factory=dict)  # layer (from 1) -> tokens that chose each expert
    kept: dict[str, int] = field(default_factory=dict)  # layer -> tokens kept

    def add(
        self, loss: float, routing_loss: float, distill_loss: float, load: dict[str, list[int]], kept: dict[str, int]
    ) -> None:
        """Add one step's losses, load and kept tokens; the caller adds the gradient norm."""
        self.steps += 1
        self.loss += loss
        self.routing_loss += routing_loss
        self.distill_loss += distill_loss
        self.max_violation += max_violation(load)
        for layer, counts in load.items():
            before = self.load.get(layer, [0] * len(counts))
            self.load[layer] = [a + b for a, b in zip(before, counts, strict=True)]
            self.kept[layer] = self.kept.get(layer, 0) + kept[layer]

    def fits(self, model: ModelConfig, steps: int) -> bool:
        """Return whether these are sums over this number of steps of such a model."""
        experts = {str(i + 1): count for i, count in enumerate(model.experts) if count}
        return self.steps == steps and experts == {layer: len(load) for layer, load in self.load.items()}

    def row(self, ranks: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return the means per step, and statistics of the experts' load, as a metric row.

        Args:
            ranks: layer -> ranks over which its experts are distributed; None means one.
        """
        n = max(1, self.steps)
        row: dict[str, Any] = {
            "loss": self.loss / n,
            "routing_loss": self.routing_loss / n,
            "grad_norm": self.grad_norm / n,
        }
        if self.distill_loss:
            row["distill_loss"] = self.distill_loss / n
        if self.load:
            totals = {layer: max(1, sum(load)) for layer, load in self.load.items()}
            row["dropped_share"] = 1 - sum(self.kept.values()) / sum(totals.values())
            row["expert_load"] = {layer: [x / totals[layer] for x in load] for layer, load in self.load.items()}
            row["busiest_expert"] = max(max(load) * len(load) / totals[layer] for layer, load in self.load.items())
            row["max_violation"] = self.max_violation / n
            row |= statistics(self.load, ranks or {})
        return row


class Metrics:
    """Append rows to `<run>/train.jsonl` and `<run>/validation.jsonl`, and optionally to TensorBoard."""

    def __init__(
        self,
        run_dir: Path,
        resume_step: int,
        tensorboard: bool = False,
        recorded: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Drop what the files hold after the checkpoint that the run resumes from.

        Args:
            resume_step: the checkpoint's step; -1 without one.
            recorded: `state` as the checkpoint holds it; None without one.
        """
        self._paths = {name: run_dir / name for name in (TRAIN, VALIDATION)}
        self._sizes, self._hashes = {}, {}
        for name, path in self._paths.items():
            # A crash of the machine may take an empty file with it; `missing_rows` tells of rows that are gone.
            kept = (read_bytes(path) or b"")[: recorded[name]["bytes"]] if recorded else b""
            write_bytes(path, kept, durable=True)
            self._sizes[name], self._hashes[name] = len(kept), hashlib.sha256(kept)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, file: str, row: dict[str, Any]) -> None:
        """Append a row; `file` is TRAIN or VALIDATION, `row` has "step" and JSON values."""
        line = (json.dumps(row) + "\n").encode()
        with open(self._paths[file], "ab") as f:
            f.write(line)
        self._sizes[file] += len(line)
        self._hashes[file].update(line)
        if self._board is not None:
            for name, value in scalars(file, row):
                self._board.add_scalar(name, value, row["step"])

    def state(self) -> dict[str, dict[str, Any]]:
        """Wait until the rows are on the disk; return each file's length and SHA-256, for a checkpoint to record."""
        for path in self._paths.values():
            sync(path)
        return {
            name: {"bytes": self._sizes[name], "sha256": digest.hexdigest()} for name, digest in self._hashes.items()
        }

    def close(self) -> None:
        """Close the TensorBoard writer."""
        if self._board is not None:
            self._board.close()


def scalars(file: str, row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield TensorBoard's (name, value) pairs of a row.

    They are the row's numbers, such as `train/loss`, and for each layer the statistics of `moelab.training.balance`,
    such as `balance/layer4/dead_experts`, and percentiles of the experts' load: `expert_load/layer4/p90` is the load
    that 90 % of layer 4's experts do not exceed, relative to a uniform load. `by_domain/plays` is the validation loss
    of a domain, `by_pair/repeated` that of targets that copying would give, see `moelab.data.batches.pairs`.
    """
    for key, value in row.items():
        if key not in ("step", "time_s") and isinstance(value, int | float):
            yield f"{Path(file).stem}/{key}", value
    for what in ("by_domain", "by_pair"):
        for name, part in row.get(what, {}).items():
            yield f"{what}/{name}", part["loss"]
    for layer, balance in row.get("balance", {}).items():
        for name, value in balance.items():
            yield f"balance/layer{layer}/{name}", value
    loads = {layer: percentiles(load) for layer, load in row.get("expert_load", {}).items()}
    for layer, values in row.get("load_percentiles", loads).items():  # older rows have only loads, records' only these
        for percent, value in zip(PERCENTILES, values, strict=True):
            yield f"expert_load/layer{layer}/p{percent}", value


def missing_rows(run_dir: Path, recorded: Mapping[str, Mapping[str, Any]] | None) -> str | None:
    """Return one line about metrics that a checkpoint counts on and that are gone or changed; None when they are whole.

    Args:
        run_dir: the run's directory.
        recorded: `Metrics.state` as the checkpoint holds it; None for one of an earlier version.
    """
    if recorded is None:
        return f"the checkpoints in {run_dir} are of an earlier version"
    for name in (TRAIN, VALIDATION):
        path = run_dir / name
        size = recorded[name]["bytes"]
        kept = (read_bytes(path) or b"")[:size]
        if len(kept) < size:
            return f"{path} has {len(kept)} bytes, {size} were written before the checkpoint"
        if hashlib.sha256(kept).hexdigest() != recorded[name]["sha256"]:
            return f"{path}: rows written before the checkpoint have changed (SHA-256)"
    return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all rows of a JSON-lines file, in order; none if the file does not exist. A torn last line is left out.

    Raises:
        ValueError: one line naming the file and the line: see `parse_rows`.
    """
    return parse_rows(read_bytes(path) or b"", str(path))


def parse_rows(data: bytes, where: str) -> list[dict[str, Any]]:
    """Return the rows of JSON lines, in order. A torn last line is left out.

    Raises:
        ValueError: one line naming the file and the line: a line before the last is no JSON, or a line is no row.
    """
    rows = []
    lines = data.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise ValueError(f"{where}: line {number} of {len(lines)} is damaged (no JSON)") from None
            continue
        if not isinstance(row, dict) or type(row.get("step")) is not int or any(map(_is_odd, row.items())):
            raise ValueError(f"{where}: line {number} of {len(lines)} is damaged (no row of metrics)")
        rows.append(row)
    return rows


def _is_odd(item: tuple[str, Any]) -> bool:
    """Return whether a value is of another type than rows have: numbers, and objects of numbers by layer or domain."""
    name, value = item
    kinds = dict if name in _NESTED else int | float | dict if name not in _NUMBERS else int | float
    return not isinstance(value, kinds)
