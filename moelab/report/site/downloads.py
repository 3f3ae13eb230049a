"""Collect what can be downloaded: all claims as one CSV, and the list of runs."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.paper import claim
from moelab.report.ledger import Entry
from moelab.report.site.claims import ClaimRow
from moelab.report.site.digest import to_csv
from moelab.report.site.results import Result
from moelab.report.summary import RunRow
from moelab.runs import records

CLAIMS = "claims.csv"

_COLUMNS = (
    *("claim", "experiment", "where", "statement", "paper", "ours", "low", "high", "unit", "samples", "scale"),
    *("kind", "role", "verdict", "adjusted", "p", "q", "same_as", "note", "result"),
)


def claims_csv(ledger: Sequence[Entry], rows: Sequence[ClaimRow]) -> str:
    """Return a row for every claim: the paper's value, ours with its interval, the verdict and what would decide it."""
    notes = {row.claim.id: row.note for row in rows if row.decides}
    return to_csv(
        [
            {name: getattr(entry, name, getattr(entry.deciding, name, "")) for name in _COLUMNS}
            | {"role": claim(entry.claim).role, "p": getattr(entry.deciding, "p", ""), "note": notes[entry.claim]}
            for entry in ledger
        ]
    )


@dataclass(frozen=True)
class PackedRun:
    """A run whose numbers `moelab runs export` packed.

    Attributes:
        id: the run's.
        pack: the file with the runs of its model.
        label, seed, result: its arm, its seed and its numbers, as a result that uses it says, else as its record does.
        results: those that use it.
    """

    id: str
    pack: str
    label: str
    seed: int
    result: Mapping[str, Any]
    results: Sequence[Result]


def packed_runs(root: Path, results: Sequence[Result]) -> list[PackedRun]:
    """Return the runs in `runs/` below the results, by id; damaged records are left out."""
    users: dict[str, list[Result]] = {}
    rows: dict[str, RunRow] = {}
    for result in results:
        for run in {run.id: run for run in reversed(result.summary.runs)}.values():  # one may have two labels
            users.setdefault(run.id, []).append(result)
            rows.setdefault(run.id, run)
    found = []
    for archive in records.archives_in(root / "runs"):
        if row := rows.get(archive.stem):
            label, seed, numbers = row.label, row.seed, row.result
        else:
            try:
                spec, numbers = records.glance(archive)
            except ValueError:  # `moelab runs import` names it
                continue
            label, seed = spec.label, spec.train.seed
        file = Path(archive.root.filename or "") if isinstance(archive, zipfile.Path) else archive
        pack = file.relative_to(root).as_posix()
        found.append(PackedRun(archive.stem, pack, label, seed, numbers, users.get(archive.stem, [])))
    once = {run.id: run for run in reversed(found)}  # one may be in a pack of the user's own, too
    return sorted(once.values(), key=lambda run: run.id)
