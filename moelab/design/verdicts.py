"""The verdicts on the paper's claims: the one table of their words, signs, colours and meanings, and a row of a ledger.

`moelab.design.judging` says when each is given. The ledger, the pages, their glossary and `claims.csv` read this table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moelab.lazy import pd

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

HOLDS = "holds"
LARGER = "holds, but larger"
SMALLER = "holds, but smaller"
FAILS = "does not hold"
CANNOT_TELL = "cannot tell yet"
CANNOT_TEST = "cannot be tested here"


@dataclass(frozen=True)
class Style:
    """Say how verdicts of one class look: `words` of the key, and the colours on light and dark pages."""

    words: str
    light: str = ""
    dark: str = ""


STYLES = {
    "good": Style("holds", "#00558f", "#6fb7f5"),
    "part": Style("holds, but larger or smaller", "#0e6f86", "#7fd6ea"),
    "open": Style("cannot tell yet", "#6b5b12", "#d9c56a"),
    "bad": Style("does not hold", "#b23a00", "#ff9560"),
    "none": Style("cannot be tested here"),  # the colour of secondary text
}
"""Class of verdicts -> its style; the class is that of the pages' style sheet."""


@dataclass(frozen=True)
class Outcome:
    """Describe a verdict: its `sign`, its class in `STYLES`, and its `meaning` for the glossary."""

    sign: str
    style: str
    meaning: str


OUTCOMES = {
    HOLDS: Outcome(
        "✓",
        "good",
        "our 95 % interval (or what we counted or simulated) lies where the paper says: on its side of “no effect”, "
        "within its bounds, or, for two models said to be equal, within a quarter of the gain that the claim is about",
    ),
    LARGER: Outcome("↑", "part", "it holds, and our effect is larger than the paper’s number allows"),
    SMALLER: Outcome("↓", "part", "it holds, and our effect is smaller than the paper’s number allows"),
    FAILS: Outcome(
        "✗",
        "bad",
        "our interval lies on the other side of “no effect”, wholly outside the claimed bounds, or so near to “no "
        "effect” that the difference would not matter",
    ),
    CANNOT_TELL: Outcome("?", "open", "our values allow both, or there are too few of them; the note says which"),
    CANNOT_TEST: Outcome(
        "–",
        "none",
        "our models or machines are too small for the claim, or the paper contradicts itself; the note says which",
    ),
}
"""Verdict -> what it looks like and means, in the order of the tally."""

_UNKNOWN = Outcome("•", "none", "a verdict of another version")

HELD = (HOLDS, LARGER, SMALLER)
DECIDED = (*HELD, FAILS)

MEASURED = "measured"
COUNTED = "counted"
SIMULATED = "simulated"
FITTED = "fitted"
KINDS = (MEASURED, COUNTED, SIMULATED, FITTED)
"""What a verdict rests on: trained or timed; arithmetic; the simulator; the simulator on the bars it was fitted on."""

_FORMER = {
    HOLDS: ("reproduced", "direction only", "equal within the margin only"),
    FAILS: ("not reproduced", "no difference that matters"),
    CANNOT_TELL: (
        *("undecided", "undecided: the runs cannot tell", "not judged: a seed has no value"),
        *("not judged: fewer than three seeds", "not judged: fewer than three timing sessions"),
        *("not tested at this scale", "not tested yet", "within the simulator's error"),
    ),
    CANNOT_TEST: ("not testable at this scale", "paper's own numbers disagree"),
}
_TODAY = {former: today for today, words in _FORMER.items() for former in words} | {"within 15 %": HOLDS}


def today(verdict: str) -> str:
    """Return the word for a verdict that results published before 2026-12-02 call otherwise."""
    word = verdict.removeprefix("simulated: ")
    return _TODAY.get(word, word)


def outcome(verdict: str) -> Outcome:
    """Return what a verdict looks like and means; one of another version has a sign of its own."""
    return OUTCOMES.get(verdict, _UNKNOWN)


VALUE, GAIN = "value", "gain"
"""Names of samples that are no arm's: values that each belong to a seed or a session, and in results published before
2026-12-02, for an equality, the gain of the same seeds."""

Samples = dict[str, dict[int, float]]
"""Arm, by the paper's name, or `VALUE` -> seed or session -> value."""


@dataclass(frozen=True)
class Verdict:
    """Hold one claim and how it was judged, with the values, so that a later rule can judge them again.

    Attributes:
        claim, statement, where: the paper's.
        paper: the paper's value with its unit, as text.
        ours, low, high: our mean and its 95 % interval (of a plan with several looks: the repeated one), None where
            there is none.
        unit: of `ours`.
        samples: seeds (for timings: sessions) behind it, of several arms those of the smallest; 0 for arithmetic.
        verdict: a key of `OUTCOMES`.
        note: how it was compared.
        kind: one of `KINDS`; empty without a value of ours.
        p: two-sided p-value, adjusted for the plan's looks, of the hypothesis that the verdict rejects ("no effect",
            "at the bound", "at the margin"); None where nothing was tested.
        why: what decided, or why nothing could.
        size: how our effect compares with the paper's number, of a claim that holds and has one.
        arms: the samples that decide, and those of seeds before `decides_from`.
        within: standard error of a session's median from its rounds.
        share: of the paper's training that the runs reach, see `moelab.design.comparison.share_of_training`.
        looks: the plan, see `moelab.design.sequential`.
        decides_from: the first seed that decides.
        missing: seeds that have no value, by name.
        censored: seeds whose value is only known to be larger than the one given.
        uncopied: as `arms`, the losses on tokens that cannot be copied from the context: a second measure, which
            decides nothing; empty where it was not measured.
        other: the verdict on the same comparison at other settings, with which this one must agree to decide.
        values, gain: where results published before 2026-12-02 have the samples; they become `arms`.
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
    size: str = ""
    arms: Samples = field(default_factory=dict)
    within: float = 0.0
    share: float | None = None
    looks: tuple[int, ...] = ()
    decides_from: int = 0
    missing: tuple[str, ...] = ()
    censored: tuple[int, ...] = ()
    uncopied: Samples = field(default_factory=dict)
    other: Verdict | None = None
    values: tuple[float, ...] = ()
    gain: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        named = {VALUE: self.values, GAIN: self.gain}
        former: Samples = {name: dict(enumerate(values)) for name, values in named.items() if values}
        kind = SIMULATED if self.kind == "predicted" else self.kind
        changed = {"verdict": today(self.verdict), "kind": kind, "arms": self.arms or former, "values": (), "gain": ()}
        for name, value in changed.items():
            object.__setattr__(self, name, value)

    @property
    def simulated(self) -> bool:
        """Whether it rests on the simulator."""
        return self.kind in (SIMULATED, FITTED)

    @property
    def judged(self) -> bool:
        """Whether there was what a verdict needs: enough values, of large enough models."""
        able = self.ours is not None and self.verdict != CANNOT_TEST
        return able and (self.kind != MEASURED or self.p is not None)

    @property
    def text(self) -> str:
        """How it was compared, what decided, and the size of the effect."""
        return " ".join(text for text in (self.note, self.why, self.size) if text)


def table(verdicts: Sequence[Verdict]) -> Styler:
    """Return verdicts as a table for a notebook: the interval where any has one, the notes where any has one."""
    frame = pd.DataFrame(verdicts).assign(note=[verdict.text for verdict in verdicts])
    columns = ["statement", "where", "paper", "ours", "low", "high", "samples", "unit", "kind", "verdict", "note"]
    measured = frame["low"].notna().any()
    left_out = ("unit",) if measured else ("low", "high", "samples")
    shown = [c for c in columns if c not in left_out and (c != "note" or frame["note"].any())]
    return frame[shown].style.format(precision=3, na_rep="–").hide(axis="index")
