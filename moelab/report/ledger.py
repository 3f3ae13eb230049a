"""The claims ledger: every claim of the paper, what the published results say about it, and a verdict.

Everything is computed from `results/`. A claim's verdict is that of the largest scale at which a published result
judged it; arithmetic and counting are the same at every scale. A claim that no result has judged is "paper's own
numbers disagree" where the paper gives its number twice and differently, "not testable at this scale" where it needs a
larger scale than any that has run, "not judged: one seed" where a result has no spread, and "not tested yet" otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab import paper
from moelab.paper.verdicts import NO_SPREAD, NOT_TESTABLE, NOT_TESTED, SIMULATED, Verdict
from moelab.report.summary import Summary, read_all

if TYPE_CHECKING:
    from rich.table import Table

DISAGREES = "paper's own numbers disagree"
NOT_YET = "not tested yet"

_BY_STRENGTH = (paper.SCALES[0], "simulated", *paper.SCALES[1:])
"""Scales and simulation, from the weakest evidence to the strongest."""

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
"""Conflicts (`moelab.paper.conflicts`) between two numbers for the claimed quantity; others concern settings."""


def scale_rank(scale: str) -> int:
    """Return 0 for the scale whose evidence is strongest; a scale that this version does not know comes last."""
    return len(_BY_STRENGTH) - 1 - _BY_STRENGTH.index(scale) if scale in _BY_STRENGTH else len(_BY_STRENGTH)


@dataclass(frozen=True)
class Evidence:
    """What the newest result of one scale says about a claim.

    Attributes:
        scale: the result's scale, or `simulated` for a simulation, whatever scale it ran at.
        ours, low, high, unit, samples, verdict, note: see `moelab.paper.verdicts.Verdict`.
        result: the result's folder, relative to the results.
        figure: the figure that shows it, relative to the results; empty if there is none.
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
        """Whether the result had what a verdict needs."""
        return self.verdict not in (NOT_TESTABLE, NOT_TESTED, NO_SPREAD)


_NARROW = ("paper", "ours, 95 % interval", "verdict")
_WIDE = ("where", "paper", "ours, 95 % interval", "at", "verdict", "figure")


@dataclass(frozen=True)
class Entry:
    """A claim in the ledger.

    Attributes:
        claim, experiment, where, statement: id, experiment, place and text of the paper's claim.
        paper: the paper's value with its unit, or its direction.
        testable_at: the smallest scale that can test it.
        conflicts: ids of the paper's contradictions that touch it.
        evidence: one item per scale, the strongest first.
        verdict: of the claim.
    """

    claim: str
    experiment: str
    where: str
    statement: str
    paper: str
    testable_at: str
    conflicts: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    verdict: str

    @property
    def deciding(self) -> Evidence | None:
        """The evidence that carries the verdict, else the strongest that has a value, else None."""
        judged = [e for e in self.evidence if e.judged]
        return next(iter(judged or [e for e in self.evidence if e.ours is not None]), None)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self)


def ledger(results: Path) -> list[Entry]:
    """Return an entry for every claim of the paper, in its order; results that cannot be read are passed over."""
    return entries(read_all(results)[0])


def entries(summaries: Iterable[tuple[str, Summary]]) -> list[Entry]:
    """Return the same from summaries at hand, each with its folder relative to the results."""
    found: dict[str, dict[str, Evidence]] = {}
    for path, summary in sorted(summaries, key=lambda item: item[1].finished):
        for verdict in summary.claims:
            evidence = _evidence(verdict, path, summary)
            by_scale = found.setdefault(verdict.claim, {})
            before = by_scale.get(evidence.scale)
            # A newer result replaces an older one, unless it has no value for this claim.
            if before is None or evidence.ours is not None or before.ours is None:
                by_scale[evidence.scale] = evidence
    return [_entry(claim, found.get(claim.id, {})) for claim in paper.claims()]


def counts(entries: Sequence[Entry]) -> dict[str, int]:
    """Return how many claims have each verdict, the most frequent first."""
    return dict(Counter(entry.verdict for entry in entries).most_common())


def table(entries: Sequence[Entry], width: int) -> Table:
    """Return the ledger as a table `width` characters wide; from 160 on with each claim's place and figure."""
    from rich.markup import escape

    from moelab import terminal

    wide = width >= 160
    view = terminal.table("claim", *(_WIDE if wide else _NARROW))
    view.columns[0].no_wrap = wide
    for entry in entries:
        e = entry.deciding
        ours = "" if e is None or e.ours is None else f"{e.ours:.3g}"
        if e is not None and e.low is not None and e.high is not None and e.samples:
            ours += f" ({e.low:.3g} to {e.high:.3g})"
        at = f"{e.scale}, {e.samples or 'exact'}" if e else ""
        cells = [entry.where, entry.paper, ours, at, entry.verdict, e.figure if e else ""]
        view.add_row(entry.claim, *map(escape, cells if wide else [entry.paper, ours, entry.verdict]))
    return view


def _evidence(verdict: Verdict, path: str, summary: Summary) -> Evidence:
    showing = [figure.name for figure in summary.figures if verdict.claim in figure.claims]
    name = next(iter(showing or [figure.name for figure in summary.figures]), "")
    return Evidence(
        # A simulation says the same at every scale, and is weaker evidence than a measurement at any but the smallest.
        scale="simulated" if verdict.verdict in SIMULATED else summary.scale,
        **{key: getattr(verdict, key) for key in ("ours", "low", "high", "unit", "samples", "verdict", "note")},
        result=path,
        figure=f"{path}/{name}.png" if name else "",
    )


def _entry(claim: paper.Claim, by_scale: dict[str, Evidence]) -> Entry:
    # One seed judges nothing, so it ranks below a smaller scale with several.
    evidence = tuple(sorted(by_scale.values(), key=lambda e: (e.verdict == NO_SPREAD, scale_rank(e.scale))))
    conflicts = tuple(part.split(":")[0].strip() for part in claim.conflict.split("|") if part.strip())
    judged = next((e for e in evidence if e.judged), None)
    if judged:
        verdict = judged.verdict
    elif any(e.verdict == NO_SPREAD for e in evidence):
        verdict = NO_SPREAD
    elif _DISPUTED & set(conflicts):
        verdict = DISAGREES
    elif any(e.verdict == NOT_TESTABLE for e in evidence) or claim.testable_at in ("gpu", "paper"):
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
        evidence,
        verdict,
    )
