"""The rows of the claims table: each claim of the paper beside what the results say about it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moelab import paper
from moelab.design import power
from moelab.design.judging import restate
from moelab.design.verdicts import COUNTED, FITTED, MEASURED, OUTCOMES, SIMULATED, Verdict, outcome
from moelab.report.ledger import OPEN, Entry, Evidence, distinct
from moelab.report.site.results import Result
from moelab.report.site.template import number, quantity

TRAINED, TIMED = "trained", "timed"
HEADINGS = {
    TRAINED: "Trained here",
    TIMED: "Timed here",
    COUNTED: "Counted: arithmetic",
    SIMULATED: "Simulated",
    FITTED: "Fitted: the simulator’s constants come from these",
    OPEN: "Open",
}
"""Group of claims -> heading. Groups are the ledger's kinds, what was measured split into trained and timed."""


def group(kind: str, claim: paper.Claim) -> str:
    """Return the group of a claim whose verdict is of this kind."""
    return kind if kind != MEASURED else TIMED if claim.timed else TRAINED


def sign(verdict: str) -> tuple[str, str]:
    """Return the sign and the CSS class of a verdict."""
    found = outcome(verdict)
    return found.sign, found.style


def key(group: str, verdict: str) -> str:
    """Return a verdict with its group in front, as pages filter by it: ``trained: holds``."""
    return f"{group}: {verdict}" if group and group != OPEN else verdict


@dataclass(frozen=True)
class TallyItem:
    """How many claims have a verdict in a group; `key` is the verdict with its group."""

    verdict: str
    key: str
    claims: int


def tally(ledger: Sequence[Entry]) -> dict[str, list[TallyItem]]:
    """Return the number of claims with each verdict by group, as the ledger counts: adjusted, shared claims once."""
    counted: dict[str, Counter[str]] = {name: Counter() for name in HEADINGS}
    for entry in distinct(ledger):
        counted[group(entry.kind, paper.claim(entry.claim))][entry.adjusted] += 1
    return {
        name: [TallyItem(v, key(name, v), found[v]) for v in dict.fromkeys((*OUTCOMES, *sorted(found))) if v in found]
        for name, found in counted.items()
        if found
    }


@dataclass(frozen=True)
class ClaimRow:
    """A claim of the paper and what one result says about it.

    Attributes:
        claim: the paper's claim.
        verdict: a key of `moelab.design.verdicts.OUTCOMES`; of a row that decides after adjustment.
        result: the result, None for a claim about which no result says anything.
        scale: the result's scale; empty where there is no result.
        ours, low, high: as in `Verdict`; an infinite bound is None.
        figure: name of the figure that shows it, empty if none does.
        note: how it was compared, what decided, and where it cannot be told yet what it would take alone.
        decides: whether the claim's verdict is taken from this row.
        kind: what the verdict rests on, see `moelab.report.ledger.Entry`; empty for none.
        alone: the verdict before adjustment, where it is another one; else empty.
        tests: its p-value alone, adjusted, and its q-value, in words; empty where nothing was tested.
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
    alone: str = ""
    tests: str = ""

    @property
    def group(self) -> str:
        """One of `HEADINGS`; empty without a kind."""
        return group(self.kind, self.claim)

    @property
    def key(self) -> str:
        """The verdict with its group, by which pages filter."""
        return key(self.group, self.verdict)

    @property
    def paper(self) -> str:
        """The paper's number with its unit, or its bounds, or the side it claims: ``−0.307 nats/token``, ``lower``."""
        claim = self.claim
        if claim.kind == "bound" and claim.direction == "equal" and "quoted text" in claim.how and claim.value_low:
            return f"{number(claim.value_low, claim)} to {quantity(claim.value_high, claim)}"
        return claim.direction if claim.value is None else quantity(claim.value, claim)

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
        return f"{self.result.path}/index.html#{self.figure or f'claim-{self.claim.id}'}" if self.result else ""


def claims_of(result: Result) -> list[ClaimRow]:
    """Return what a result says about the paper's claims; claims that this version does not know are left out."""
    known = {claim.id: claim for claim in paper.claims()}
    said = (restate(known[v.claim], v, result.summary.scale) for v in result.summary.claims if v.claim in known)
    return [_row(known[v.claim], v, result, result.scale, v.text) for v in said]


def all_claims(results: Sequence[Result], ledger: Sequence[Entry]) -> list[ClaimRow]:
    """Return rows for every claim of the ledger of these results, in its order.

    A claim has a row for each scale with a value, the deciding one first, with or without one; else a row without a
    result. The ledger (`moelab.report.ledger`) says which row decides, as for `moelab claims`.
    """
    by_path = {result.path: result for result in results}
    rows = []
    for entry in ledger:
        claim, deciding = paper.claim(entry.claim), entry.deciding
        shown = [e for e in entry.evidence if e is deciding or e.judged or e.ours is not None]
        for e in sorted(shown, key=lambda e: e is not deciding):
            result, figure = by_path[e.result], e.figure.removeprefix(f"{e.result}/").removesuffix(".svg")
            row = _row(claim, e, result, e.scale, e.note, figure)
            if e is deciding:
                note = f"{e.note} {entry.why or _outlook(claim, result, entry)}".strip()
                alone = entry.verdict if entry.adjusted != entry.verdict else ""
                row = replace(row, verdict=entry.adjusted, kind=entry.kind, note=note, alone=alone, decides=True)
                row = replace(row, tests=entry.tests)
            rows.append(row)
        if not shown:
            rows.append(ClaimRow(claim, entry.adjusted, note=entry.why, decides=True))
    return rows


def _outlook(claim: paper.Claim, result: Result, entry: Entry) -> str:
    """Return what it would take to decide a claim that cannot be told yet."""
    stored = next(v for v in result.summary.claims if v.claim == claim.id)
    return power.outlook(claim, replace(restate(claim, stored, result.summary.scale), verdict=entry.adjusted))


def _row(
    claim: paper.Claim, said: Verdict | Evidence, result: Result, scale: str, note: str, figure: str = ""
) -> ClaimRow:
    values = (said.ours, said.low, said.high)
    ours, low, high = (value if value is not None and math.isfinite(value) else None for value in values)
    return ClaimRow(claim, said.verdict, result, scale, ours, low, high, said.samples, note, figure, kind=said.kind)
