"""The runs of one request, as tidy tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moelab.config import DataConfig
from moelab.lazy import pd
from moelab.runs.store import Run

BROKEN_DOWN = 0.05
"""Nats above its lowest validation loss at which a run that ends there is named (`Runs.broken_down`)."""


class NoResult(RuntimeError):
    """An arm has no result of any seed; the message is one line with the reason of the first run that failed.

    Attributes:
        runs: all runs that were asked for.
    """

    def __init__(self, message: str, runs: Runs) -> None:
        super().__init__(message)
        self.runs = runs


class Runs(tuple[Run, ...]):
    """The runs of one `lab.run`, in the order of the specs; `+` joins those of several."""

    def __add__(self, other: Any) -> Runs:
        return Runs((*self, *other))

    @property
    def seeds(self) -> int:
        """How many seeds have a finished run."""
        return len({run.spec.train.seed for run in self.finished})

    @property
    def finished(self) -> Runs:
        """Runs that have a result."""
        return Runs(run for run in self if run.finished)

    @property
    def missing(self) -> Runs:
        """Runs without a result; `status.reason` and `log_tail()` say why."""
        return Runs(run for run in self if not run.finished)

    @property
    def broken_down(self) -> list[str]:
        """A line for each finished run that ends far above the lowest loss of its validations, say after a divergence.

        Such a run counts like any other: leaving it out would choose seeds by their results.
        """
        lines: dict[str, str] = {}
        for run in self.finished:
            rows = run.rows("validation.jsonl")
            if len(rows) and (rise := rows["loss"].iloc[-1] - rows["loss"].min()) > BROKEN_DOWN:
                lowest = rows.loc[rows["loss"].idxmin()]
                line = (
                    f"{run.spec.title}, seed {run.spec.train.seed}: {rise:.2f} nats, lowest after "
                    f"{lowest['tokens'] / rows['tokens'].iloc[-1]:.0%} of its training"
                )
                lines.setdefault(run.spec.id, line)  # a run may stand for its own and for the shared rate
        return list(lines.values())

    def require_results(self, before: Sequence[Run] = (), *, every_arm: bool = True) -> None:
        """Check that every arm, the runs of one title, has a result of at least one seed, and that texts are the same.

        Args:
            before: all runs that were trained; the failure of a teacher or trunk is the reason of those that need it.
            every_arm: False is content with a result of one arm.

        Raises:
            NoResult: one line: how many runs have no result, and why the first of them failed.
            ValueError: one line: a text of the user's has changed between two runs.
        """
        self.require_same_texts()
        there = {run.spec.title for run in self.finished}
        empty = [run for run in self.missing if run.spec.title not in there]
        if not empty or (there and not every_arm):
            return
        causes = [run for run in (*before, *empty) if not run.finished]
        first = next((run for run in causes if run.status.state == "failed"), causes[0])
        raise NoResult(
            f"{len(self.missing)} of {len(self)} runs: {first.why_missing()} "
            f"({first.spec.title}, seed {first.spec.train.seed}; {first.path / 'log.txt'})",
            self,
        )

    def require_same_texts(self, now: Callable[[DataConfig], str] | None = None) -> None:
        """Refuse finished runs on a text of the user's that has changed between them: their ids have its name alone.

        Args:
            now: returns the fingerprint that a text has now; with it, runs to come are refused, too, and finished ones
                on a folder that has other texts now.

        Raises:
            ValueError: one line: the two runs, or the one.
        """
        first: dict[DataConfig, tuple[str, Run]] = {}
        for run in (run for run in self.finished if run.spec.data.corpus.startswith(("folder:", "hf:"))):
            try:
                text = run.result.get("data_fingerprint")
            except ValueError:  # a damaged result is told where it is read
                continue
            before, other = first.setdefault(replace(run.spec.data, context=1), (text, run)) if text else (text, run)
            if text != before:
                raise _changed(other, run)
        if now is None:
            return
        to_come = {replace(run.spec.data, context=1): run for run in reversed(self.missing)}
        for data, (before, other) in first.items():
            there = Path(data.corpus.removeprefix("folder:")).is_dir()  # results outlive a folder that is gone
            if before and (there or data in to_come) and now(other.spec.data) != before:
                raise _changed(other, to_come.get(data, other))

    def explain_missing(self) -> str:
        """One line for each run without a result, and the end of its log; empty when there is none."""
        texts = []
        for run in self.missing:
            status = run.status
            texts.append(
                f"{run.spec.title}, seed {run.spec.train.seed}: {status.state}: {status.reason} "
                f"({run.path / 'log.txt'})"
            )
            if tail := run.log_tail(4):
                texts.append("    " + tail.replace("\n", "\n    "))
        return "\n".join(texts)

    def final(self) -> pd.DataFrame:
        """Return one row per finished run: arm, seed, losses (nats per token), bits per byte, sizes, FLOPs.

        `unrepeated_loss` is the validation loss on targets whose pair (the token before and itself) did not occur
        earlier in the sequence, so that copying does not give them; NaN in older results. Not the runs' time, which
        depends on what else their machines did.
        """
        losses = ("tokens", "steps", "validation_loss", "bits_per_byte", "unigram_loss")
        sizes = ("parameters", "active_parameters", "flops_per_token")
        rows = []
        for run in self.finished:
            spec, r = run.spec, run.result
            others = _unrepeated(r.get("validation_by_pair", {}))
            named = [spec.title, str(spec.model), spec.train.seed, spec.id]
            rows.append([*named, *(r[k] for k in losses), others, *(r[k] for k in sizes)])
        return pd.DataFrame(rows, columns=["arm", "model", "seed", "run", *losses, "unrepeated_loss", *sizes])

    def curves(self, file: str = "validation.jsonl") -> pd.DataFrame:
        """Rows of `validation.jsonl` (or `train.jsonl`) of all runs, with columns arm and seed in front."""
        frames = []
        for run in self:
            frame = run.rows(file)
            if len(frame):
                frame.insert(0, "seed", run.spec.train.seed)
                frame.insert(0, "arm", run.spec.title)
                frames.append(frame)
        if not frames:
            return pd.DataFrame(columns=["arm", "seed", "step", "tokens", "loss"])
        return pd.concat(frames, ignore_index=True)


def _unrepeated(by_pair: Mapping[str, Mapping[str, float]]) -> float:
    """Return the loss over all kinds of targets but repeated ones (`moelab.data.batches.pairs`), NaN without any."""
    others = [part for kind, part in by_pair.items() if kind != "repeated"]
    share = sum(part["share"] for part in others)
    return sum(part["share"] * part["loss"] for part in others) / share if share else math.nan


def _changed(other: Run, run: Run) -> ValueError:
    which, since = f"runs {other.spec.id} and {run.spec.id}", "between them"
    if other is run:
        which, since = f"run {run.spec.id}", "since it was trained"
    return ValueError(
        f"{which}: the text {run.spec.data.corpus} has changed {since}; remove the runs on the old one from "
        f"{run.path.parent} and run again"
    )
