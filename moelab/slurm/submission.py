"""Record what was submitted: a folder per submission, whose `submission.json` names its jobs and their runs.

    .moelab/submissions/<time>-<name>-<µs>/submission.json      runs and notebooks with their job ids
                                             12_submission.sh   the batch script of job (array) 12
                                             12_0_0_log.out     output of the driver of array task 12_0
                                             notebook-0.json    outcome of a notebook; its log is notebook-0.out

The other files are submitit's. A job loads the callable that it runs from ``*_submitted.pkl``; moelab never reads
``*_result.pkl``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from moelab import paths
from moelab.config import from_json
from moelab.files import read_json, write_json
from moelab.report.sweep import Sweep

T = TypeVar("T")


@dataclass
class Part:
    """Describe one job of a submission: an array of runs, or a notebook.

    Attributes:
        name: ``runs-0`` or ``notebook-0``.
        job: the id of the job or array; None until it is queued.
        runs: run ids in the order of the array; for a notebook, those it waits for and shows.
        values: parameters of the notebook; None for runs.
    """

    name: str
    job: str | None
    runs: list[str]
    values: dict[str, Any] | None = None


@dataclass
class Submission:
    """Record what one call of `submit` queued.

    Attributes:
        id: name of its folder, which begins with the time (UTC).
        experiment, profile: names of the experiment and of the cluster profile.
        snapshot: folder of the code that its jobs run; None for the installed package.
        cluster: "slurm", or "local" for processes of one machine.
        publish: whether its notebooks go into the published results instead of the user's own.
        sweep: the sweep whose points its notebooks are, with all of its points; None where it is no sweep.
    """

    id: str
    experiment: str
    profile: str
    snapshot: str | None
    parts: list[Part] = field(default_factory=list)
    cluster: Literal["slurm", "local"] = "slurm"
    publish: bool = False
    sweep: Sweep | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of the submission's files."""
        return root() / self.id

    def write(self) -> None:
        """Write the record to its folder."""
        write_json(self.folder / "submission.json", asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record.

        Raises:
            ValueError: one line; the file is not a record.
        """
        try:
            record = from_json(cls, read_json(path), "submission", known=True)
            if record.id != path.parent.name:
                raise ValueError(f"it is of submission {record.id!r}")
            return record
        except ValueError as error:
            raise ValueError(f"{path}: not the record of a submission ({error})") from None


@dataclass(frozen=True)
class Unreadable:
    """Name a submission whose record cannot be read, and the error."""

    id: str
    error: str


def root() -> Path:
    """Return the folder of all submissions."""
    return paths.home() / "submissions"


def records() -> Iterator[Submission | Unreadable]:
    """Yield all submissions, newest first."""
    for path in sorted(root().glob("*/submission.json"), reverse=True):
        try:
            yield Submission.read(path)
        except (ValueError, OSError) as error:
            yield Unreadable(path.parent.name, str(error))


def submissions() -> list[Submission]:
    """Return the submissions that can be read, newest first."""
    return [record for record in records() if isinstance(record, Submission)]


CANCELLED = "cancelled"
"""The outcome's error of a notebook that `moelab cancel` took out of the queue."""


@dataclass(frozen=True)
class Outcome:
    """Say how a notebook ended.

    Attributes:
        result: the folder of what it published; empty where it failed.
        missing: ids of the runs without a result.
        error: one line, where it failed.
    """

    result: str = ""
    missing: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Progress:
    """Count the cells that a notebook has executed, of all."""

    cell: int = 0
    cells: int = 0


def outcome(folder: Path, part: str) -> Outcome | None:
    """Return how a notebook ended; None before its end. ValueError, one line, for a file that does not say so."""
    return _read(Outcome, folder / f"{part}.json")


def outcomes(
    records: Sequence[Submission], experiment: str, values: Mapping[str, Any]
) -> Iterator[tuple[Part, Outcome]]:
    """Yield how the notebooks with these parameters ended, in the order of the submissions; without unreadable ones."""
    for record in records:
        for part in record.parts:
            if record.experiment == experiment and part.values == values:
                with contextlib.suppress(ValueError):  # an outcome cut short counts as none
                    if ended := outcome(record.folder, part.name):
                        yield part, ended


def results(experiment: str, points: Sequence[Mapping[str, Any]]) -> list[Path | None]:
    """Return the newest result of the notebook with each of these parameters, None where there is none."""
    known = submissions()
    return [
        next((path for _, e in outcomes(known, experiment, p) if e.result and (path := Path(e.result)).exists()), None)
        for p in points
    ]


def set_outcome(folder: Path, part: str, outcome: Outcome) -> None:
    """Write how a notebook ended."""
    write_json(folder / f"{part}.json", asdict(outcome))


def progress(folder: Path, part: str) -> Progress:
    """Return how far a notebook is; ValueError as for `outcome`."""
    return _read(Progress, folder / f"{part}.progress.json") or Progress()


def _read(cls: type[T], path: Path) -> T | None:
    record = read_json(path)
    return None if record is None else from_json(cls, record, str(path), known=True)
