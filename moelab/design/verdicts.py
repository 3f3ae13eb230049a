"""The verdicts on the paper's claims: the one table of their words, signs, colours and meanings, and a row of a ledger.

`moelab.design.judging` says when each is given. The ledger, the pages, their glossary and `claims.csv` read this table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moelab.lazy import pd

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

REPRODUCED = "reproduced"
DIRECTION = "direction only"
EQUAL = "equal within the margin only"
UNDECIDED = "undecided"
CANNOT_TELL = "undecided: the runs cannot tell"
NO_DIFFERENCE = "no difference that matters"
NOT_REPRODUCED = "not reproduced"
INCOMPLETE = "not judged: a seed has no value"
FEW_SEEDS = "not judged: fewer than three seeds"
FEW_SESSIONS = "not judged: fewer than three timing sessions"
NOT_TESTED = "not tested at this scale"
NOT_TESTABLE = "not testable at this scale"
DISAGREES = "paper's own numbers disagree"
NOT_YET = "not tested yet"

# A simulation has no seeds and measures nothing: its verdicts say so.
SIMULATED_HOLDS = "simulated: holds"
SIMULATED_WITHIN = "simulated: within 15 %"
SIMULATED_DIRECTION = "simulated: direction only"
SIMULATED_CLOSE = "simulated: within the simulator's error"
SIMULATED_FAILS = "simulated: does not hold"


@dataclass(frozen=True)
class Style:
    """Say how verdicts of one class look: `words` of the key, and the colours on light and dark pages."""

    words: str
    light: str = ""
    dark: str = ""


STYLES = {
    "good": Style("ours, as the paper says", "#00558f", "#6fb7f5"),
    "part": Style("in direction, or within the margin, only", "#0e6f86", "#7fd6ea"),
    "open": Style("undecided", "#6b5b12", "#d9c56a"),
    "bad": Style("contradicts the paper, or shows no difference that matters", "#b23a00", "#ff9560"),
    "none": Style("not judged"),  # the colour of secondary text
}
"""Class of verdicts -> its style; the class is that of the pages' style sheet."""


@dataclass(frozen=True)
class Outcome:
    """Describe a verdict: its `sign`, its class in `STYLES`, and its `meaning` for the glossary."""

    sign: str
    style: str
    meaning: str


OUTCOMES = {
    REPRODUCED: Outcome(
        "✓",
        "good",
        "the interval excludes “no effect” on the paper’s side, our mean lies in the paper’s range, and the interval "
        "is narrower than half the paper’s effect or lies wholly in the range. An order: our mean is at least the "
        "smallest effect of interest. An equality: the arms differ by less than the margin, and by the paper’s number "
        "if its text has one",
    ),
    SIMULATED_HOLDS: Outcome("✓", "good", "the simulator’s value keeps the limit, or has the order"),
    SIMULATED_WITHIN: Outcome("✓", "good", "the simulator’s value lies within 15 % of the paper’s"),
    DIRECTION: Outcome(
        "↗",
        "part",
        "the interval excludes “no effect” on the paper’s side, but does not show the paper’s size of effect; the "
        "claim’s note says why",
    ),
    EQUAL: Outcome(
        "↗",
        "part",
        "two arms are equal within the margin, but the paper’s number for their difference is not shown",
    ),
    SIMULATED_DIRECTION: Outcome("↗", "part", "the simulator’s value lies on the paper’s side, but not within 15 %"),
    UNDECIDED: Outcome("?", "open", "the interval allows both"),
    CANNOT_TELL: Outcome(
        "?",
        "open",
        "whether two arms are equal cannot be told, because the arms that must differ do not differ in these runs",
    ),
    SIMULATED_CLOSE: Outcome("?", "open", "an order of two simulated values that are less than 5 % apart"),
    NO_DIFFERENCE: Outcome(
        "≈",
        "bad",
        "the paper claims an order, and the interval lies within the smallest effect of interest on either side of “no "
        "effect”: if there is a difference here, it is too small to matter",
    ),
    NOT_REPRODUCED: Outcome("✗", "bad", "the interval shows the contrary of the claim, or lies wholly short of it"),
    SIMULATED_FAILS: Outcome("✗", "bad", "the simulator’s value breaks the limit, or lies on the other side"),
    DISAGREES: Outcome("≠", "open", "the paper gives this number twice and differently, and no result judges it"),
    INCOMPLETE: Outcome(
        "×",
        "none",
        "a seed has no result in one of the arms, one that is no number, or curves that never cross; the note names it",
    ),
    FEW_SEEDS: Outcome("×", "none", "one or two seeds do not tell an effect from chance"),
    FEW_SESSIONS: Outcome("×", "none", "the rounds of one session share a process, so sessions are the samples"),
    NOT_TESTED: Outcome("–", "none", "the result has no value for the claim"),
    NOT_TESTABLE: Outcome(
        "–",
        "none",
        "our models are too small, or trained on too small a share of the paper’s tokens, for the claim; the value is "
        "shown without a verdict",
    ),
    NOT_YET: Outcome("–", "none", "no result says anything about the claim"),
}
"""Verdict -> what it looks like and means, in the order of the tally."""

_UNKNOWN = Outcome("•", "none", "a verdict of another version")

SIMULATED = (SIMULATED_WITHIN, SIMULATED_HOLDS, SIMULATED_DIRECTION, SIMULATED_CLOSE, SIMULATED_FAILS)
FEW = (FEW_SEEDS, FEW_SESSIONS, INCOMPLETE)
NOT_JUDGED = (*FEW, NOT_TESTED, NOT_TESTABLE)

MEASURED = "measured"
COUNTED = "counted"
PREDICTED = "predicted"
FITTED = "fitted"
KINDS = (MEASURED, COUNTED, PREDICTED, FITTED)
"""What a verdict rests on: trained or timed; arithmetic; the simulator; the simulator on the bars it was fitted on."""


def outcome(verdict: str) -> Outcome:
    """Return what a verdict looks like and means; one of another version has a sign of its own."""
    return OUTCOMES.get(verdict, _UNKNOWN)


@dataclass(frozen=True)
class Verdict:
    """Hold one claim and how it was judged, with the values, so that a later rule can judge them again.

    Attributes:
        claim, statement, where: the paper's.
        paper: the paper's value with its unit, as text.
        ours, low, high: our mean and its 95 % interval (of a plan with several looks: the repeated one), None where
            there is none.
        unit: of `ours`.
        samples: seeds (for timings: sessions) behind it; 0 for arithmetic.
        verdict: a key of `OUTCOMES`.
        note: how it was compared.
        kind: one of `KINDS`; empty without a value of ours, and in summaries from before there were kinds.
        p: two-sided p-value, adjusted for the plan's looks, of the hypothesis that the verdict rejects ("no effect",
            "at the bound", "at the margin"); None where nothing was tested.
        why: what decided, by the rule.
        values: per seed, or per session the median of its rounds; empty in older summaries.
        gain: per seed, the gain by which an equality is measured.
        within: standard error of a session's median from its rounds.
        share: of the paper's training that the runs reach, see `moelab.design.comparison.share_of_training`.
        number: False where these runs cannot show the paper's number, only its direction.
        looks: the plan, see `moelab.design.sequential`.
        missing: seeds that have no value, by name.
        other: the verdict on the same comparison at other settings, with which this one must agree to decide.
    """

    claim: str
    statement: str
    where: str
    paper: str
    ours: float | None
    low: float | None
    high: float | None
    unit: str
    samples: int
    verdict: str
    note: str = ""
    kind: str = ""
    p: float | None = None
    why: str = ""
    values: tuple[float, ...] = ()
    gain: tuple[float, ...] = ()
    within: float = 0.0
    share: float | None = None
    number: bool = True
    looks: tuple[int, ...] = ()
    missing: tuple[str, ...] = ()
    other: Verdict | None = None

    @property
    def text(self) -> str:
        """How it was compared, and what decided."""
        return f"{self.note} {self.why}".strip()


def table(verdicts: Sequence[Verdict]) -> Styler:
    """Return verdicts as a table for a notebook: the interval where any has one, the notes where any has one."""
    frame = pd.DataFrame(verdicts).assign(note=[verdict.text for verdict in verdicts])
    columns = ["statement", "where", "paper", "ours", "low", "high", "samples", "unit", "kind", "verdict", "note"]
    measured = frame["low"].notna().any()
    left_out = ("unit",) if measured else ("low", "high", "samples")
    shown = [c for c in columns if c not in left_out and (c != "note" or frame["note"].any())]
    return frame[shown].style.format(precision=3, na_rep="–").hide(axis="index")
