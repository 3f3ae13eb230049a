"""The claims ledger: every claim of the paper, what the results say about it, and a verdict.

Everything is computed from results, the published ones and the user's own. A claim's verdict is that of the largest
scale at which a result judged it; arithmetic and counting are the same at every scale. All verdicts are today's rule's:
a result stores the values that it judged, and they are judged again when it is read (`moelab.design.judging.restate`).

Verdicts are counted by kind (measured, counted, simulated, fitted; "open" without one), claims that share a row of the
paper once (`paper.Claim.same_as`). What counts, and what the pages show, is the verdict that is left after adjustment
for the number of tests (`Entry.adjusted`):

- A figure's primary claim is the one without which its other claims say nothing. All primary claims together are to be
  right with 95 % probability (Holm's adjustment). One without a value counts among them, so that no verdict changes
  because another experiment has run.
- A figure's secondary claims are tested only where its primary one holds, those of a figure together (Holm again).
- Timings stand alone: they are about one machine.

Beside every p-value stands a q-value (Benjamini and Hochberg) over all measured tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moelab import paper
from moelab.design import settings
from moelab.design.claim_values import paper_text
from moelab.design.judging import restate
from moelab.design.verdicts import CANNOT_TELL, CANNOT_TEST, DECIDED, HELD, KINDS, MEASURED, Verdict
from moelab.report.summary import Summary, read_all
from moelab.statistics import ALPHA, benjamini_hochberg, holm

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

OPEN = "open"
"""In place of a kind where no result says anything about a claim."""

_BY_STRENGTH = (paper.SCALES[0], "simulated", *paper.SCALES[1:])
"""Scales and simulation, from the weakest evidence to the strongest."""

_DISPUTED = {"dense-equivalent-ratio", "mos-350m-average", "mos-350m-gains"}
_DISPUTED |= {"sc22-8-gpu-bar", "fig11-1t-ratio", "early-10x-headline"}
"""Conflicts (`moelab.paper.conflicts`) between two numbers for the claimed quantity; others concern settings."""


def scale_rank(scale: str) -> int:
    """Return 0 for the scale whose evidence is strongest; a scale that this version does not know comes last."""
    return len(_BY_STRENGTH) - 1 - _BY_STRENGTH.index(scale) if scale in _BY_STRENGTH else len(_BY_STRENGTH)


@dataclass(frozen=True)
class Evidence:
    """What the newest result of one scale that judges a claim says about it; if none does, the newest with a value.

    Attributes:
        scale: the result's scale, or `simulated` for a simulation, whatever scale it ran at.
        ours, low, high, unit, samples, verdict, note, kind, p, judged: see `moelab.design.verdicts.Verdict`.
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
    kind: str
    p: float | None
    judged: bool
    result: str
    figure: str


@dataclass(frozen=True)
class Entry:
    """A claim in the ledger.

    Attributes:
        claim, experiment, where, statement: id, experiment, place and text of the paper's claim.
        paper: the paper's value with its unit, or its direction.
        testable_at: the smallest scale that can test it.
        conflicts: ids of the paper's contradictions that touch it.
        same_as: id of the claim that states the same, empty if none does.
        evidence: one item per scale, the strongest first.
        kind: what the verdict rests on: one of `moelab.design.verdicts.KINDS`, or `OPEN`.
        verdict: of the claim alone.
        adjusted: the same after adjustment for the number of tests, which is what counts.
        why: why `adjusted` is not `verdict`, why there is no verdict, or what a larger scale lacks.
        p: the adjusted p-value; None where nothing was tested, or where the figure's primary claim does not hold.
        q: the q-value; None where nothing was tested.
    """

    claim: str
    experiment: str
    where: str
    statement: str
    paper: str
    testable_at: str
    conflicts: tuple[str, ...]
    same_as: str
    evidence: tuple[Evidence, ...]
    kind: str
    verdict: str
    adjusted: str
    why: str = ""
    p: float | None = None
    q: float | None = None

    @property
    def deciding(self) -> Evidence | None:
        """The evidence that carries the verdict: judged, else the strongest with a value that could have been."""
        ranked = sorted(self.evidence, key=lambda e: (not e.judged, e.verdict == CANNOT_TEST))
        return next((e for e in ranked if e.judged or e.ours is not None), None)

    @property
    def tested(self) -> bool:
        """Whether its verdict is that of a statistical test."""
        return self.kind == MEASURED and self.deciding is not None and self.deciding.p is not None

    @property
    def tests(self) -> str:
        """Its p-value alone and adjusted, and its q-value, in words: ``p = 0.003, 0.012 adjusted, q = 0.008``."""
        if not self.tested or self.deciding is None or self.deciding.p is None:
            return ""
        adjusted = (
            ""
            if self.p is None or self.p == self.deciding.p
            else f", {_small(self.p)} adjusted".replace("=\N{NO-BREAK SPACE}", "")
        )
        return f"p\N{NO-BREAK SPACE}{_small(self.deciding.p)}{adjusted}" + (
            "" if self.q is None else f", q\N{NO-BREAK SPACE}{_small(self.q)}"
        )


def _small(p: float) -> str:
    """Return ``= 0.017``, or ``< 0.0001``, which break over no line: with no-break spaces, without an exponent."""
    return f"=\N{NO-BREAK SPACE}{p:.2g}" if p >= 1e-4 else "<\N{NO-BREAK SPACE}0.0001"


def ledger(*results: Path) -> list[Entry]:
    """Return an entry for every claim of the paper, in its order; results that cannot be read are passed over.

    Args:
        results: folders of results.
    """
    return entries(read_all(*results)[0])


def of_the_plan(summary: Summary) -> bool:
    """Return whether a result says something about the paper's claims: its models are twins of the paper's.

    At `full` it also needs the settings and the seeds for which the looks were planned: from 0 on, or from the first
    that decides on its base (`settings.FIRST_DECIDING`). A student whose distillation stops elsewhere than the paper's,
    at 70 %, is another student.
    """
    given = summary.parameters
    overrides = given.get("overrides") or {}
    if isinstance(overrides, dict) and any(name.startswith("model.") for name in overrides):
        return False
    first = settings.FIRST_DECIDING.get((summary.scale, given.get("base", settings.BASES[0])), 0)
    changed = overrides or (given.get("first_seed") or 0) not in (0, first) or given.get("stop", 0.7) != 0.7
    return summary.scale != "full" or not changed


def entries(summaries: Iterable[tuple[str, Summary]]) -> list[Entry]:
    """Return the same from summaries at hand, each with its folder relative to the results."""
    by_claim: dict[str, dict[str, Evidence]] = {}
    known = {claim.id: claim for claim in paper.claims()}
    for path, summary in sorted(summaries, key=lambda item: item[1].finished):
        if not of_the_plan(summary):
            continue
        for verdict in summary.claims:
            if verdict.claim not in known:
                continue  # of another version
            evidence = _evidence(known[verdict.claim], verdict, path, summary)
            by_scale = by_claim.setdefault(verdict.claim, {})
            before = by_scale.get(evidence.scale)
            # A newer result replaces an older one, unless it has no value for this claim, or too few samples to judge
            # what the older one judged.
            few = before is not None and before.judged and not evidence.judged
            if before is None or before.ours is None or (evidence.ours is not None and not few):
                by_scale[evidence.scale] = evidence
    return _adjusted([_entry(claim, by_claim.get(claim.id, {})) for claim in paper.claims()])


def distinct(entries: Sequence[Entry]) -> list[Entry]:
    """Return one entry a claim; of rows that share it the first that is judged, else that has a value.

    The row that the others name comes first.
    """
    shared: dict[str, list[Entry]] = {}
    for entry in entries:
        shared.setdefault(entry.same_as or entry.claim, []).append(entry)
    groups = [sorted(group, key=lambda entry: entry.same_as != "") for group in shared.values()]
    return [min(group, key=lambda e: (not (e.deciding and e.deciding.judged), e.kind == OPEN)) for group in groups]


def counts(entries: Sequence[Entry]) -> dict[str, dict[str, int]]:
    """Return how many claims have each adjusted verdict, the most frequent first, by kind; shared claims count once."""
    every = distinct(entries)
    by_kind = {kind: Counter(e.adjusted for e in every if e.kind == kind) for kind in (*KINDS, OPEN)}
    return {kind: dict(verdicts.most_common()) for kind, verdicts in by_kind.items() if verdicts}


@dataclass(frozen=True)
class Family:
    """Say how the tests of the measured claims came out together.

    Attributes:
        tests: how many there are.
        primaries: primary claims, those without a value included.
        held, failed: how many of them hold, and do not, after Holm's adjustment.
        withdrawn: ids of claims that adjustment leaves undecided -> what each says alone.
    """

    tests: int
    primaries: int
    held: int
    failed: int
    withdrawn: dict[str, str]

    def __str__(self) -> str:
        return (
            f"{self.tests} tests of measured values. Of the {self.primaries} primary claims, one a figure, {self.held} "
            f"hold and {self.failed} do not after Holm’s adjustment, which keeps the chance that any of these is wrong "
            "below 5 %; a figure’s other claims are tested only where its primary one holds"
        )


def family(entries: Sequence[Entry]) -> Family:
    """Return the note on all measured verdicts together."""
    tested = [entry for entry in distinct(entries) if entry.tested]
    primary = [entry.adjusted for entry in entries if paper.claim(entry.claim).role == paper.PRIMARY]
    withdrawn = {entry.claim: entry.verdict for entry in tested if entry.adjusted != entry.verdict}
    held, failed = sum(verdict in HELD for verdict in primary), sum(verdict in DECIDED for verdict in primary)
    return Family(len(tested), len(primary), held, failed - held, withdrawn)


def _adjusted(entries: list[Entry]) -> list[Entry]:
    """Return the entries with `adjusted`, `why`, `p` and `q`."""
    alone = {e.claim: e.deciding.p for e in entries if e.tested and e.deciding and e.deciding.p is not None}
    counted = [e.claim for e in distinct(entries) if e.claim in alone]
    q_values = dict(zip(counted, benjamini_hochberg([alone[id] for id in counted]), strict=True))
    found = {entry.claim: replace(entry, p=alone.get(entry.claim), q=q_values.get(entry.claim)) for entry in entries}

    def adjust(claims: Sequence[paper.Claim], what: str) -> None:
        for claim, p in zip(claims, holm([alone.get(c.id, 1.0) for c in claims]), strict=True):
            if claim.id not in alone:
                continue
            entry = found[claim.id] = replace(found[claim.id], p=p)
            if entry.verdict in DECIDED and p >= ALPHA:
                why = (
                    f"Its p-value is {alone[claim.id]:.2g} and, adjusted for {what}, {p:.2g}; it must be below {ALPHA}."
                )
                found[claim.id] = replace(entry, adjusted=CANNOT_TELL, why=why)

    primaries = [claim for claim in paper.claims() if claim.role == paper.PRIMARY]
    adjust(primaries, f"the {len(primaries)} primary claims")
    for primary in primaries:
        others = [c for c in paper.claims() if c.role == paper.SECONDARY and c.family == primary.family]
        if found[primary.id].adjusted in HELD:
            adjust(others, f"the {len(others)} further claims of {primary.family}")
            continue
        why = f"It is tested only where the primary claim of {primary.family} holds: {primary.statement}"
        for entry in (found[claim.id] for claim in others):
            if entry.tested:
                found[entry.claim] = entry = replace(entry, p=None)
            if entry.tested and entry.verdict in DECIDED:
                found[entry.claim] = replace(entry, adjusted=CANNOT_TELL, why=why)
    return list(found.values())


def listing(entries: Sequence[Entry]) -> Group:
    """Return the claims for a terminal of any width, by what their verdicts rest on: statement, values, verdict."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[Text | Padding] = []
    for kind in (*KINDS, OPEN):
        of_kind = [entry for entry in entries if entry.kind == kind]
        if of_kind:
            parts.append(Text(f"\n{kind}", "bold underline"))
        for entry in of_kind:
            parts += [Text(entry.statement), *(Padding(line, (0, 0, 0, 2)) for line in _described(entry))]
    return Group(*parts)


def _described(entry: Entry) -> tuple[Text, Text]:
    from rich.text import Text

    e = entry.deciding
    values = Text(f"paper {entry.paper}")
    if e is not None and e.ours is not None:
        values.append(f" · ours {e.ours:.3g}")
        if e.low is not None and e.high is not None and e.samples:
            values.append(f" ({e.low:.3g} to {e.high:.3g})")
    values.append(f" · {entry.adjusted}", "bold")
    if entry.adjusted != entry.verdict:
        values.append(f" ({entry.verdict} alone, before adjustment)")
    if entry.tests:
        values.append(f" · {entry.tests}")
    at = f" · {e.scale}, {f'n = {e.samples}' if e.samples else 'exact'}" if e else ""
    return values, Text(f"{entry.claim} · {entry.where}{at}", "dim")


_COPIED = ("ours", "low", "high", "unit", "samples", "verdict", "kind", "p", "judged")


def _evidence(claim: paper.Claim, stored: Verdict, path: str, summary: Summary) -> Evidence:
    verdict = restate(claim, stored, summary.scale)
    showing = [figure.name for figure in summary.figures if verdict.claim in figure.claims]
    name = next(iter(showing or [figure.name for figure in summary.figures]), "")
    return Evidence(
        # A simulation says the same at every scale, and is weaker evidence than a measurement at any but the smallest.
        scale="simulated" if verdict.simulated else summary.scale,
        **{key: getattr(verdict, key) for key in _COPIED},
        note=verdict.text,
        result=path,
        figure=f"{path}/{name}.svg" if name else "",
    )


def _entry(claim: paper.Claim, by_scale: dict[str, Evidence]) -> Entry:
    # What judges nothing ranks below a smaller scale that judges, and above one that cannot.
    evidence = tuple(
        sorted(by_scale.values(), key=lambda e: (not e.judged, e.verdict == CANNOT_TEST, scale_rank(e.scale)))
    )
    conflicts = tuple(part.split(":")[0].strip() for part in claim.conflict.split("|") if part.strip())
    able = next((e for e in evidence if e.verdict != CANNOT_TEST), None)
    verdict, why = CANNOT_TELL, "No result says anything about it yet."
    if able is not None:
        verdict, why = able.verdict, "" if able.ours is not None else able.note
        larger = next((e for e in evidence if scale_rank(e.scale) < scale_rank(able.scale) and e.ours is None), None)
        if able.ours is not None and larger is not None and larger.verdict == CANNOT_TELL:
            why = f"At {larger.scale}: {larger.note}"
    elif _DISPUTED & set(conflicts):
        verdict, why = CANNOT_TEST, "The paper gives its number twice and differently, and no result judges it."
    elif evidence or claim.testable_at in ("gpu", "paper") or claim.from_share:
        verdict = CANNOT_TEST
        why = f"It needs the scale {claim.testable_at}."
        if evidence:
            why = "" if evidence[0].ours is not None else evidence[0].note
        elif claim.from_share:
            why = f"It needs runs of {claim.from_share:.0%} of the paper's training."
    said = (claim.id, claim.experiment, claim.where, claim.statement, paper_text(claim), claim.testable_at)
    kind = able.kind if able is not None and able.kind else OPEN
    return Entry(*said, conflicts, claim.same_as, evidence, kind, verdict, adjusted=verdict, why=why)
