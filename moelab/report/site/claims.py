"""The rows of the claims table: each claim of the paper beside what the results say about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moelab import paper
from moelab.paper.verdicts import (
    CANNOT_TELL,
    COUNTED,
    DIRECTION,
    FITTED,
    MEASURED,
    NO_SPREAD,
    NOT_REPRODUCED,
    NOT_TESTABLE,
    NOT_TESTED,
    ONE_SESSION,
    PREDICTED,
    REPRODUCED,
    SIMULATED_DIRECTION,
    SIMULATED_FAILS,
    SIMULATED_HOLDS,
    SIMULATED_WITHIN,
    UNDECIDED,
    restate,
)
from moelab.report.ledger import DISAGREES, NOT_YET, OPEN, Entry
from moelab.report.site.order import position
from moelab.report.site.results import Result
from moelab.report.site.template import number, quantity

VERDICTS = {
    REPRODUCED: ("✓", "good"),
    SIMULATED_HOLDS: ("✓", "good"),
    SIMULATED_WITHIN: ("✓", "good"),
    DIRECTION: ("↗", "part"),
    SIMULATED_DIRECTION: ("↗", "part"),
    UNDECIDED: ("?", "open"),
    CANNOT_TELL: ("?", "open"),
    NOT_REPRODUCED: ("✗", "bad"),
    SIMULATED_FAILS: ("✗", "bad"),
    DISAGREES: ("≠", "open"),
    NO_SPREAD: ("1", "none"),
    ONE_SESSION: ("1", "none"),
    NOT_TESTED: ("–", "none"),
    NOT_TESTABLE: ("–", "none"),
    NOT_YET: ("–", "none"),
}
"""Verdict -> sign and CSS class, in the order of the tally."""

HEADINGS = {
    MEASURED: "Measured here: trained or timed",
    COUNTED: "Counted: arithmetic",
    PREDICTED: "Predicted by the simulator",
    FITTED: "Fitted: the simulator's constants come from these numbers",
    OPEN: "Open",
}
"""Kind of verdict -> heading of its counts."""


def sign(verdict: str) -> tuple[str, str]:
    """Return the sign and the CSS class of a verdict."""
    return VERDICTS.get(verdict, ("•", "none"))


def key(kind: str, verdict: str) -> str:
    """Return a verdict with its kind in front, as pages filter by it: ``measured: reproduced``."""
    return f"{kind}: {verdict.removeprefix('simulated: ')}" if kind and kind != OPEN else verdict


@dataclass(frozen=True)
class TallyItem:
    """How many claims have a verdict of a kind; `label` is the verdict without its kind, `key` with it."""

    verdict: str
    label: str
    key: str
    claims: int


def tally(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, list[TallyItem]]]:
    """Return the verdicts that `moelab.report.ledger.counts` counted, under a heading for each kind."""
    return [
        (
            HEADINGS[kind],
            [
                TallyItem(v, v.removeprefix("simulated: "), key(kind, v), counts[kind][v])
                for v in dict.fromkeys((*VERDICTS, *sorted(counts[kind])))
                if v in counts[kind]
            ],
        )
        for kind in HEADINGS
        if counts.get(kind)
    ]


@dataclass(frozen=True)
class ClaimRow:
    """A claim of the paper and what one result says about it.

    Attributes:
        claim: the paper's claim.
        verdict: one of `moelab.paper.verdicts` or `moelab.report.ledger`.
        result: the result, None for a claim about which no result says anything.
        scale: the result's scale; empty where there is no result.
        ours, low, high: as in `Verdict`; an infinite bound is None.
        figure: name of the figure that shows it, empty if none does.
        decides: whether the claim's verdict is taken from this row.
        kind: what the verdict rests on, see `moelab.report.ledger.Entry`; empty for none.
        adjusted: the verdict after Holm's adjustment over all measured ones, where it is another one; else empty.
    """

    claim: paper.Claim
    verdict: str
    result: Result | None = None
    scale: str = ""
    ours: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    note: str = ""
    figure: str = ""
    decides: bool = False
    kind: str = ""
    adjusted: str = ""

    @property
    def key(self) -> str:
        """The verdict with its kind, by which pages filter."""
        return key(self.kind, self.verdict)

    @property
    def paper(self) -> str:
        """The paper's number with its unit, or the side it claims: ``−0.307 nats/token``, ``lower``."""
        return self.claim.direction if self.claim.value is None else quantity(self.claim.value, self.claim)

    @property
    def interval(self) -> str:
        """Our interval as text: ``exact`` for arithmetic, a dash where there is none."""
        if self.low is None or self.high is None:
            return "–"
        if self.samples == 0:
            return "exact"
        return f"{number(self.low, self.claim)} to {number(self.high, self.claim)}"

    @property
    def search_text(self) -> str:
        """The text that the page's search looks through."""
        c = self.claim
        return " ".join((c.id, c.statement, c.where, c.experiment, self.experiment, c.quantity, self.key)).lower()

    @property
    def experiment(self) -> str:
        """The result's experiment, else the one under which the paper's claim is listed."""
        return self.result.experiment if self.result else self.claim.experiment

    @property
    def link(self) -> str:
        """The result's page, at the figure that shows this claim."""
        return f"{self.result.path}/index.html#{self.figure or 'claims'}" if self.result else ""


def claims_of(result: Result) -> list[ClaimRow]:
    """Return what a result says about the paper's claims; claims that this version does not know are left out."""
    known = {claim.id: claim for claim in paper.claims()}
    return [
        ClaimRow(
            known[v.claim],
            v.verdict,
            result,
            result.scale,
            *(_finite(value) for value in (v.ours, v.low, v.high)),
            samples=v.samples,
            note=v.note,
            kind=v.kind,
        )
        for v in (restate(known[v.claim], v) for v in result.summary.claims if v.claim in known)
    ]


def all_claims(results: Sequence[Result], ledger: Sequence[Entry]) -> list[ClaimRow]:
    """Return rows for every claim of the ledger of these results, in the order of the paper's figures.

    A claim has a row for each scale with a value, the deciding one first, or one row without a result. The ledger
    (`moelab.report.ledger`) says which row decides, as for `moelab claims`.
    """
    by_path = {result.path: result for result in results}
    rows = []
    for entry in ledger:
        claim, deciding = paper.claim(entry.claim), entry.deciding
        shown = [e for e in entry.evidence if e.judged or e.ours is not None]
        for e in sorted(shown, key=lambda e: e is not deciding):
            row = ClaimRow(
                claim,
                entry.verdict if e is deciding else e.verdict,
                by_path[e.result],
                e.scale,
                *(_finite(value) for value in (e.ours, e.low, e.high)),
                e.samples,
                e.note,
                e.figure.removeprefix(f"{e.result}/").removesuffix(".png"),
                decides=e is deciding,
                kind=entry.kind if e is deciding else e.kind,
                adjusted=entry.adjusted if e is deciding and entry.adjusted != entry.verdict else "",
            )
            rows.append(row)
        if not shown:
            rows.append(ClaimRow(claim, entry.verdict, decides=True))
    return sorted(rows, key=lambda row: position(row.claim.where))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
