"""The ledger: every claim of the paper, what the published results say about it, and a verdict. Computed from `results/`, nothing typed.

A claim's verdict is that of the largest scale at which a published result judged it; arithmetic and counting are the same at every scale. A claim that no
result has judged is "paper's own numbers disagree" where the paper gives its number twice and differently, "not testable at this scale" where it
needs more than what has run, "not judged: one seed" where a result has no spread, and "not tested yet" otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab import paper
from moelab.files import read_json
from moelab.paper.verdicts import NO_SPREAD, NOT_TESTABLE, NOT_TESTED, SIMULATED
from moelab.report.publication import SUMMARY

if TYPE_CHECKING:
    from rich.table import Table

DISAGREES = "paper's own numbers disagree"
NOT_YET = "not tested yet"

SCALES = (paper.SCALES[0], "simulated", *paper.SCALES[1:])
"""From the least to the most telling."""

_DISPUTED = frozenset(
    (
        "dense-equivalent-ratio",
        "mos-350m-average",
        "mos-350m-gains",
        "sc22-8-gpu-bar",
        "fig11-1t-ratio",
        "early-10x-headline",
    )
)
"""Conflicts (`moelab.paper.conflicts`) between two numbers for the quantity that is claimed; the others are about settings, names or shapes."""


@dataclass(frozen=True)
class Finding:
    """What the newest result of one scale says about a claim.

    Attributes:
        scale: of the result.
        ours, low, high, unit, samples, verdict, note: see `moelab.paper.verdicts.Verdict`.
        result: its folder, relative to the results.
        figure: the figure that shows it, relative to the results; empty if it has none.
    """

    scale: str
    ours: float | None
    low: float | None
    high: float | None
    unit: str
    samples: int
    verdict: str
    note: str
    result: str
    figure: str

    @property
    def judged(self) -> bool:
        return self.verdict not in (NOT_TESTABLE, NOT_TESTED, NO_SPREAD)


_NARROW = ("paper", "ours, 95 % interval", "verdict")
_WIDE = ("where", "paper", "ours, 95 % interval", "at", "verdict", "figure")


@dataclass(frozen=True)
class Entry:
    """A claim in the ledger.

    Attributes:
        claim, experiment, where, statement: the paper's.
        paper: the paper's value with its unit, or its direction.
        testable_at: the smallest scale that can test it.
        conflicts: contradictions of the paper that touch it.
        findings: one a scale, the most telling first.
        verdict: of the claim.
    """

    claim: str
    experiment: str
    where: str
    statement: str
    paper: str
    testable_at: str
    conflicts: tuple[str, ...]
    findings: tuple[Finding, ...]
    verdict: str

    @property
    def finding(self) -> Finding | None:
        """The finding that carries the verdict, else the most telling one with a value."""
        judged = [f for f in self.findings if f.judged]
        return next(iter(judged or [f for f in self.findings if f.ours is not None]), None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ledger(results: Path) -> list[Entry]:
    """Every claim of the paper, in its order, with what the results below `results` say."""
    files = results.glob(f"*/*/*/{SUMMARY}")
    return entries([(file.parent.relative_to(results).as_posix(), read_json(file)) for file in files])


def entries(summaries: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Entry]:
    """The same from summaries at hand, each with its folder relative to the results."""
    found: dict[str, dict[str, Finding]] = {}
    for path, summary in sorted(summaries, key=lambda item: item[1]["finished"]):
        for record in summary["claims"]:
            finding = _finding(record, path, summary)
            before = found.setdefault(record["claim"], {}).get(finding.scale)
            # A newer result replaces an older one, unless it has nothing to say about this claim.
            if before is None or finding.ours is not None or before.ours is None:
                found[record["claim"]][finding.scale] = finding
    return [_entry(claim, found.get(claim.id, {})) for claim in paper.claims()]


def counts(entries: Sequence[Entry]) -> dict[str, int]:
    """Verdict -> claims, most frequent first."""
    return dict(Counter(entry.verdict for entry in entries).most_common())


def table(entries: Sequence[Entry], width: int) -> Table:
    """The ledger as a table for a terminal that many characters wide; where the claim and the figure are found only if there is room."""
    from moelab import terminal

    wide = width >= 160
    view = terminal.table("claim", *(_WIDE if wide else _NARROW))
    view.columns[0].no_wrap = wide
    for entry in entries:
        f = entry.finding
        ours = "" if f is None or f.ours is None else f"{f.ours:.3g}"
        if f is not None and f.low is not None and f.samples:
            ours += f" ({f.low:.3g} to {f.high:.3g})"
        at = f"{f.scale}, {f.samples or 'exact'}" if f else ""
        cells = [entry.where, entry.paper, ours, at, entry.verdict, f.figure if f else ""]
        view.add_row(entry.claim, *(cells if wide else [entry.paper, ours, entry.verdict]))
    return view


def _finding(record: Mapping[str, Any], path: str, summary: Mapping[str, Any]) -> Finding:
    shown = [f["name"] for f in summary["figures"] if record["claim"] in f.get("claims", ())]
    name = record.get("figure") or next(iter(shown or [f["name"] for f in summary["figures"]]), "")
    return Finding(
        # A simulation says the same at every scale, and less than a measurement at any but the smallest.
        scale="simulated" if record["verdict"] in SIMULATED else summary["scale"],
        **{key: record[key] for key in ("ours", "low", "high", "unit", "samples", "verdict", "note")},
        result=path,
        figure=f"{path}/{name}.png" if name else "",
    )


def _entry(claim: paper.Claim, found: dict[str, Finding]) -> Entry:
    # One seed judges nothing: it does not stand before a smaller scale with several.
    findings = tuple(sorted(found.values(), key=lambda f: (f.verdict == NO_SPREAD, -SCALES.index(f.scale))))
    conflicts = tuple(part.split(":")[0].strip() for part in claim.conflict.split("|") if part.strip())
    judged = next((f for f in findings if f.judged), None)
    if judged:
        verdict = judged.verdict
    elif any(f.verdict == NO_SPREAD for f in findings):
        verdict = NO_SPREAD
    elif _DISPUTED & set(conflicts):
        verdict = DISAGREES
    elif any(f.verdict == NOT_TESTABLE for f in findings) or claim.testable_at in ("gpu", "paper"):
        verdict = NOT_TESTABLE
    else:
        verdict = NOT_YET
    value = claim.direction if claim.value is None else f"{claim.value:g} {claim.unit}".strip()
    return Entry(
        claim.id,
        claim.experiment,
        claim.where,
        claim.statement,
        value,
        claim.testable_at,
        conflicts,
        findings,
        verdict,
    )
