"""The claims ledger: every claim of the paper, what the results say about it, and a verdict.

Everything is computed from results, the published ones and the user's own. A claim's verdict is that of the largest
scale at which a result judged it; arithmetic and counting are the same at every scale. A claim that no result has
judged is "paper's own numbers disagree" where the paper gives its number twice and differently, "not testable at this
scale" where it needs a larger scale than any that has run, "not judged" where a result has no spread, and "not tested
yet" otherwise.

All verdicts are today's rule's: a result stores the values that it judged, and they are judged again when it is read
(`moelab.design.judging.restate`).

Verdicts are counted by kind (measured, counted, predicted, fitted; "open" without one), claims that share a row of the
paper once (`paper.Claim.same_as`). What counts, and what the pages show, is the verdict that is left when all measured
verdicts together are to be right with 95 % probability (Holm's adjustment, `Entry.adjusted`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moelab import paper
from moelab.design.judging import restate
from moelab.design.verdicts import (
    CANNOT_TELL,
    DISAGREES,
    FEW,
    FEW_SEEDS,
    FEW_SESSIONS,
    KINDS,
    MEASURED,
    NOT_JUDGED,
    NOT_TESTABLE,
    NOT_TESTED,
    NOT_YET,
    SIMULATED,
    UNDECIDED,
    Verdict,
)
from moelab.report.summary import Summary, read_all
from moelab.statistics import ALPHA, holm

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

OPEN = "open"
"""In place of a kind where no result says anything about a claim."""

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
    """What the newest result of one scale that judges a claim says about it; if none does, the newest with a value.

    Attributes:
        scale: the result's scale, or `simulated` for a simulation, whatever scale it ran at.
        ours, low, high, unit, samples, verdict, note, kind, p: see `moelab.design.verdicts.Verdict`.
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
    result: str
    figure: str

    @property
    def judged(self) -> bool:
        """Whether the result had what a verdict needs."""
        return self.verdict not in NOT_JUDGED


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
        adjusted: the same after Holm's adjustment over all measured verdicts, which is what counts; other kinds need
            none.
        p: the adjusted p-value; None where nothing was tested.
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
    p: float | None = None

    @property
    def deciding(self) -> Evidence | None:
        """The evidence that carries the verdict (judged, else of too few samples), else the strongest with a value."""
        judged = [e for e in self.evidence if e.judged]
        few = [e for e in self.evidence if e.verdict in FEW]
        return next(iter(judged or few or [e for e in self.evidence if e.ours is not None]), None)

    @property
    def tested(self) -> bool:
        """Whether its verdict is that of a statistical test, also of one whose runs cannot tell."""
        told = self.verdict == CANNOT_TELL or (self.deciding is not None and self.deciding.p is not None)
        return self.kind == MEASURED and told and self.verdict not in NOT_JUDGED


def ledger(*results: Path) -> list[Entry]:
    """Return an entry for every claim of the paper, in its order; results that cannot be read are passed over.

    Args:
        results: folders of results.
    """
    return entries(read_all(*results)[0])


def of_the_plan(summary: Summary) -> bool:
    """Return whether a result says something about the paper's claims: its models are twins of the paper's.

    At `full` it also needs the settings and, from 0 on, the seeds for which the looks were planned. A student whose
    distillation stops elsewhere than the paper's, at 70 %, is another student.
    """
    given = summary.parameters
    overrides = given.get("overrides") or {}
    if isinstance(overrides, dict) and any(name.startswith("model.") for name in overrides):
        return False
    changed = overrides or given.get("first_seed") or given.get("stop", 0.7) != 0.7
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
            few = evidence.verdict in (FEW_SEEDS, FEW_SESSIONS)
            if before is None or before.ours is None or (evidence.ours is not None and not (few and before.judged)):
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
    """Say how far the measured verdicts can be trusted together.

    Attributes:
        verdicts: how many there are, those that the runs cannot tell included.
        wrong: how many of them a level of 95 % lets be wrong by chance, at most, on average.
        held: verdicts other than undecided.
        standing: how many of those are left after Holm's adjustment.
        withdrawn: ids of the others -> what each says by itself.
    """

    verdicts: int
    wrong: float
    held: int
    standing: int
    withdrawn: dict[str, str]

    @property
    def counts(self) -> str:
        """The note without the claims whose verdicts are withdrawn."""
        return (
            f"{self.verdicts} measured verdicts at 95 %: up to {self.wrong:.2g} expected wrong by chance; "
            f"{self.standing} of {self.held} that decide stand after Holm's adjustment"
        )

    def __str__(self) -> str:
        text = self.counts
        return f"{text}, not {', '.join(self.withdrawn)}" if self.withdrawn else text


def family(entries: Sequence[Entry]) -> Family:
    """Return the note on all measured verdicts together."""
    tested = [entry for entry in distinct(entries) if entry.tested]
    held = [entry for entry in tested if entry.verdict not in (UNDECIDED, CANNOT_TELL)]
    withdrawn = {entry.claim: entry.verdict for entry in held if entry.adjusted == UNDECIDED}
    return Family(len(tested), ALPHA * len(tested), len(held), len(held) - len(withdrawn), withdrawn)


def _adjusted(entries: list[Entry]) -> list[Entry]:
    """Return the entries with `adjusted` and `p`. A row that shares its claim is adjusted as the row that counts."""
    tested = [entry for entry in distinct(entries) if entry.tested]
    alone = [1.0 if e.deciding is None or e.deciding.p is None else e.deciding.p for e in tested]
    p_values = dict(zip((e.same_as or e.claim for e in tested), holm(alone), strict=True))

    def adjusted(entry: Entry) -> Entry:
        p = p_values.get(entry.same_as or entry.claim) if entry.tested else None
        lost = p is not None and p >= ALPHA and entry.verdict != CANNOT_TELL
        return replace(entry, adjusted=UNDECIDED if lost else entry.verdict, p=p)

    return [adjusted(entry) for entry in entries]


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
        values.append(f" ({entry.verdict} alone, before Holm's adjustment)")
    at = f" · {e.scale}, {f'n = {e.samples}' if e.samples else 'exact'}" if e else ""
    return values, Text(f"{entry.claim} · {entry.where}{at}", "dim")


_COPIED = ("ours", "low", "high", "unit", "samples", "verdict", "kind", "p")


def _evidence(claim: paper.Claim, stored: Verdict, path: str, summary: Summary) -> Evidence:
    verdict = restate(claim, stored, summary.scale)
    showing = [figure.name for figure in summary.figures if verdict.claim in figure.claims]
    name = next(iter(showing or [figure.name for figure in summary.figures]), "")
    return Evidence(
        # A simulation says the same at every scale, and is weaker evidence than a measurement at any but the smallest.
        scale="simulated" if verdict.verdict in SIMULATED else summary.scale,
        **{key: getattr(verdict, key) for key in _COPIED},
        note=verdict.text,
        result=path,
        figure=f"{path}/{name}.svg" if name else "",
    )


def _entry(claim: paper.Claim, by_scale: dict[str, Evidence]) -> Entry:
    # What judges nothing for want of samples ranks below a smaller scale with several.
    evidence = tuple(sorted(by_scale.values(), key=lambda e: (e.verdict in FEW, scale_rank(e.scale))))
    conflicts = tuple(part.split(":")[0].strip() for part in claim.conflict.split("|") if part.strip())
    judged = next((e for e in evidence if e.judged), None) or next((e for e in evidence if e.verdict in FEW), None)
    kind = judged.kind if judged else OPEN
    if judged:
        verdict = judged.verdict
    elif _DISPUTED & set(conflicts):
        verdict = DISAGREES
    elif any(e.verdict == NOT_TESTED for e in evidence):  # runs that could test it have no value
        verdict = NOT_YET
    elif claim.testable_at in ("gpu", "paper") or claim.from_share:
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
        claim.same_as,
        evidence,
        kind,
        verdict,
        adjusted=verdict,
    )
