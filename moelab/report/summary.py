"""The `summary.json` of a published result as typed rows, checked when it is read."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelab import paths
from moelab.config import from_json
from moelab.design import budgets
from moelab.design.verdicts import Verdict
from moelab.files import read_json

SUMMARY = "summary.json"
BASE = "350M"
"""The base of an experiment's models, unless its parameter `base` names another."""

_FILE_NAME = re.compile(r"\w[\w .+=-]*")


def check_file_name(what: str, name: str) -> None:
    """Refuse what is not the plain name of a file or folder: paths, addresses, scripts."""
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{what}: expected the name of a file in the result's folder, got {name!r}")


@dataclass(frozen=True)
class Hardware:
    """The machine of a run or a notebook; fields that a page does not show are left out."""

    cpu: str | None = None
    cores: int | None = None
    gpus: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{len(self.gpus)} x {self.gpus[0]}"
            if self.gpus
            else f"{self.cores} core{'s' * (self.cores != 1)} of {self.cpu}"
        )


@dataclass(frozen=True)
class Provenance:
    """The code, versions and machine behind a number; see `moelab.runs.provenance`.

    A run that several commits or machines have trained has one for each session (`moelab.runs.sessions`).
    """

    commit: str | None = None
    modified: bool | None = None
    python: str = "–"
    versions: dict = field(default_factory=dict)
    hardware: Hardware | None = None
    title: str = ""
    sessions: tuple[Provenance, ...] = ()

    @property
    def short_commit(self) -> str:
        """The first ten digits of the commit, and whether files differed from it."""
        return (self.commit or "none")[:10] + (" with changes" if self.modified else "")


@dataclass(frozen=True)
class FigureRow:
    """A figure of a result: `<name>.svg`, and the file `data` with the numbers that it shows."""

    name: str
    title: str = ""
    caption: str = ""
    claims: tuple[str, ...] = ()
    data: str = ""

    def __post_init__(self) -> None:
        check_file_name("figure's name", self.name)
        if self.data:
            check_file_name(f"data of figure {self.name}", self.data)


@dataclass(frozen=True)
class TableRow:
    """A table of a result; `data` is its file of JSON lines."""

    name: str
    data: str
    title: str = ""
    caption: str = ""

    def __post_init__(self) -> None:
        check_file_name("table's name", self.name)
        check_file_name(f"data of table {self.name}", self.data)


_NUMBERS = {
    *("seed", "tokens", "eval_tokens", "lr", "layers", "hidden"),
    *("parameters", "validation_loss", "validation_tokens", "seconds", "flops_per_token"),
}


@dataclass(frozen=True)
class RunRow:
    """A training run behind a result: its id, the name of its arm, its spec and its result as JSON values.

    Raises:
        ValueError: one line: a part of the spec is no object, or a number that the pages show is none.
    """

    id: str
    label: str
    spec: dict = field(default_factory=dict)
    result: dict = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        parts = {name: self.spec.get(name, {}) for name in ("model", "train", "data")}
        start = self.spec.get("start") or {}
        trunk = start.get("run", {}) if isinstance(start, dict) else {}
        model = trunk.get("model", {}) if isinstance(trunk, dict) else {}
        parts |= {"start": start, "start.run": trunk, "start.run.model": model, "result": self.result}
        for name, part in parts.items():
            if not isinstance(part, dict):
                raise ValueError(f"run {self.id}: {name} must be an object, got {str(part)[:40]}")
            for number in _NUMBERS & part.keys():
                if not isinstance(part[number], int | float):
                    raise ValueError(f"run {self.id}: {number} must be a number, got {str(part[number])[:40]}")

    @property
    def seed(self) -> int:
        """The seed of its training; -1 where the record has none."""
        return self.spec.get("train", {}).get("seed", -1)

    @property
    def is_budget(self) -> bool:
        """Whether it is a budget of another run, as `moelab.design.budgets.is_budget` says of specs."""
        trunk = (self.spec.get("start") or {}).get("run", {})
        name = trunk.get("label") or trunk.get("model", {}).get("name", "")
        return self.label == budgets.label(name, self.spec.get("train", {}).get("tokens", 0))

    @property
    def training(self) -> dict[str, Any]:
        """The fields of `TrainConfig` that tell arms apart: all but the seed and what follows from the peak rate."""
        return {name: value for name, value in self.spec.get("train", {}).items() if name not in ("seed", "min_lr")}

    @property
    def settings(self) -> dict[str, Any]:
        """The same with the fields of model and data, those of their parts by dotted names."""
        return _flat(self.spec.get("model", {})) | _flat(self.spec.get("data", {})) | self.training


def _flat(part: dict[str, Any], before: str = "") -> dict[str, Any]:
    inner = [_flat(value, f"{before}{name}.") for name, value in part.items() if isinstance(value, dict)]
    plain = {f"{before}{name}": value for name, value in part.items() if not isinstance(value, dict)}
    return {name: value for one in (plain, *inner) for name, value in one.items()}


@dataclass(frozen=True)
class MeasurementRow:
    """A measurement that the notebook made or read back; `measured` is when, UTC."""

    id: str
    measured: str
    seconds: float
    read_back: bool
    provenance: Provenance = field(default_factory=Provenance)


@dataclass(frozen=True)
class Summary:
    """A published result.

    Attributes:
        title: the main finding, one sentence.
        finished: when, UTC, as ``2026-11-24T18:43:00Z``.
        notebook_seconds, training_seconds: time of the notebook, and of the training runs behind it; a trunk's part
            counts once.
        missing: ids of runs that the notebook asked for and that have no result.
        broken_down: a line for each run that ends far above its lowest validation loss (`Runs.broken_down`).
    """

    experiment: str
    scale: str
    title: str
    finished: str
    parameters: dict = field(default_factory=dict)
    notebook_seconds: float | None = None
    training_seconds: float | None = None
    seeds: tuple[int, ...] = ()
    hardware: Hardware | None = None
    figures: tuple[FigureRow, ...] = ()
    tables: tuple[TableRow, ...] = ()
    claims: tuple[Verdict, ...] = ()
    missing: tuple[str, ...] = ()
    broken_down: tuple[str, ...] = ()
    runs: tuple[RunRow, ...] = ()
    measurements: tuple[MeasurementRow, ...] = ()
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def other_base(self) -> str:
        """The base of its models, where it is not the 350M of most experiments; else empty."""
        base = str(self.parameters.get("base", BASE))
        return base if base != BASE else ""


def parse(record: Any) -> Summary:
    """Return the summary that a JSON value holds.

    Raises:
        ValueError: one line: a field is missing or has the wrong type, or a file name is none.
    """
    return from_json(Summary, record, "summary", known=True)


def find_results(*roots: Path) -> dict[str, Path]:
    """Return the folders of all results below some folders, by their path relative to it, with slashes, in its order.

    Of two results with the same relative path, which are copies of one, the first counts.
    """
    folders: dict[str, Path] = {}
    for root in roots:
        for file in root.glob(f"*/*/*/{SUMMARY}"):
            if not file.parent.name.startswith("."):  # being moved into place
                folders.setdefault(file.parent.relative_to(root).as_posix(), file.parent)
    return dict(sorted(folders.items()))


def read_all(*roots: Path) -> tuple[list[tuple[str, Summary]], list[str]]:
    """Return the summaries of all results below some folders, and one line for each that cannot be read.

    Returns:
        Pairs of a result's relative path, see `find_results`, and its summary; by path.
    """
    summaries: list[tuple[str, Summary]] = []
    unreadable: list[str] = []
    for path, folder in find_results(*roots).items():
        try:
            summaries.append((path, parse(read_json(folder / SUMMARY))))
        except (ValueError, OSError, RecursionError) as error:
            unreadable.append(unreadable_line(folder / SUMMARY, folder.parents[2], error))
    return summaries, unreadable


def unreadable_line(file: Path, root: Path, error: BaseException) -> str:
    """Return one line that says which file below `root` cannot be read, and why."""
    reason = (str(error) or type(error).__name__).splitlines()[0].removeprefix(f"{file}: ")
    return f"{file.relative_to(root).as_posix()}: {reason}"


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines.

    Raises:
        ValueError: one line: a line is no JSON object.
    """
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():  # pandas writes one for an empty table
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number}: expected an object, got {line[:40]}")
        rows.append(row)
    return rows


APART = 0.02
"""Nats per token by which the final losses of one run differ at most on two kinds of processor: see docs/extend.md."""


def compared(summary: Mapping[str, Any]) -> str:
    """Return in one line the final loss of a run beside its published one; empty where no run is published.

    Of several runs it is the one whose losses are farthest apart.
    """
    theirs: dict[str, Any] = {}
    for folder in find_results(paths.results()).values():
        if folder.parts[-3] == summary["experiment"]:
            with contextlib.suppress(ValueError, OSError):  # the pages name a damaged result
                theirs |= {run["id"]: run for run in read_json(folder / SUMMARY).get("runs", [])}
    both = [(run, theirs[run["id"]]) for run in summary["runs"] if run["id"] in theirs]
    losses = [(*(one["result"].get("validation_loss") for one in pair), *pair) for pair in both]
    known = [found for found in losses if None not in found[:2]]
    if not known:
        return ""
    ours, published, run, other = max(known, key=lambda found: abs(found[0] - found[1]))
    cpus = [(one["provenance"].get("hardware") or {}).get("cpu") for one in (run, other)]
    where = "the same processor" if cpus[0] == cpus[1] else f"another processor (expected within {APART})"
    farthest = f"; the farthest apart of {len(known)} runs" if len(known) > 1 else ""
    name = f"{run['label']}, seed {run['spec']['train']['seed']}"
    return f"{name}: published {published:.3f}, yours {ours:.3f} nats per token, {where}{farthest}"
