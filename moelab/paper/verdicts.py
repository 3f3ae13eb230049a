"""Judge claims of the paper by our measurements or simulations.

The interval is the 95 % Student interval of the mean over seeds (paired differences where the claim compares two arms).
One seed has no spread and gets no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moelab.paper.claims import SCALES, Claim
from moelab.statistics import interval

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

REPRODUCED = "reproduced"
DIRECTION = "direction only"
NOT_REPRODUCED = "not reproduced"
UNDECIDED = "undecided"  # the interval allows both
NO_SPREAD = "not judged: one seed"
NOT_TESTED = "not tested at this scale"
NOT_TESTABLE = "not testable at this scale"

# A simulation has no seeds and measures nothing: its verdicts say so.
SIMULATED_WITHIN = "simulated: within 15 %"
SIMULATED_HOLDS = "simulated: holds"
SIMULATED_DIRECTION = "simulated: direction only"
SIMULATED_FAILS = "simulated: does not hold"
SIMULATED = (SIMULATED_WITHIN, SIMULATED_HOLDS, SIMULATED_DIRECTION, SIMULATED_FAILS)

TOLERANCE = 0.15
"""Share of the paper's value by which a simulated one may differ and still count as within it."""

SAME = 0.02
"""Nats a token within which two losses count as the same when the paper says so without a number: twice the 0.01 that
it calls a match (Fig 4)."""


def testable(claim: Claim, scale: str) -> bool:
    """Return whether training runs of a scale can test a claim at all."""
    return claim.testable_at in SCALES and SCALES.index(scale) >= SCALES.index(claim.testable_at)


@dataclass(frozen=True)
class Verdict:
    """Hold one claim and how it was judged.

    Attributes:
        claim, statement, where: the paper's.
        paper: the paper's value with its unit, as text.
        ours, low, high: our mean and 95 % interval, None where there is none.
        unit: of `ours`.
        samples: seeds behind it; 0 for arithmetic.
        verdict: one of this module's constants.
        note: one line, how it was compared.
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


def judge(
    claim: Claim, values: Sequence[float], *, note: str = "", exact: bool = False, scale: str | None = None
) -> Verdict:
    """Return the verdict on a claim.

    - ordering: reproduced when the interval lies on the claimed side of zero, not reproduced when on the other side.
    - difference, ratio: reproduced when our interval meets the paper's range (its reading uncertainty, or half a unit
      of the last printed digit), else direction only when it lies on the claimed side.
    - a difference claimed to be about nothing (direction "equal"): reproduced when our interval lies within twice the
      paper's value, or within `SAME` where it gives none.

    Args:
        values: per seed, what the claim's `quantity` compares: left - right, or left / right for a ratio.
        exact: the values are arithmetic, without spread.
        scale: the experiment's; a claim that needs a larger one is shown with our values but not judged. None judges in
            any case.
    """
    if scale and not testable(claim, scale):
        mean, low, high = interval(values) if values else (None, None, None)
        one = len(values) < 2
        return _verdict(claim, mean, None if one else low, None if one else high, len(values), NOT_TESTABLE, note)
    if not values:
        return _verdict(claim, None, None, None, 0, NOT_TESTED, note)
    mean, low, high = interval(values)
    if exact:
        low = high = mean
    elif len(values) < 2:
        return _verdict(claim, mean, None, None, 1, NO_SPREAD, note)
    return _verdict(claim, mean, low, high, 0 if exact else len(values), _rule(claim, low, high), note)


def judge_simulated(claim: Claim, ours: float | None, *, note: str = "", fitted: bool = False) -> Verdict:
    """Return the verdict of a simulation, which has no seeds and no spread.

    A number is within 15 % of the paper's value (or range), else only its direction holds or not. Limits and orderings
    hold or do not.

    Args:
        ours: None where it is not simulated.
        fitted: the constants of the simulator were fitted on this number.
    """
    if ours is None:
        return judge(claim, [], note=note)
    neutral = 1.0 if claim.kind == "ratio" else 0.0
    lower = claim.direction == "lower"
    directed = ours < neutral if lower else ours > neutral
    if claim.kind == "bound" and claim.direction != "equal":
        found = SIMULATED_HOLDS if (ours <= claim.value if lower else ours >= claim.value) else SIMULATED_FAILS
    elif claim.kind == "ordering" or claim.value is None:
        found = SIMULATED_HOLDS if directed else SIMULATED_FAILS
    else:
        low = claim.value if claim.value_low is None else claim.value_low
        high = claim.value if claim.value_high is None else claim.value_high
        within = low * (1 - TOLERANCE) <= ours <= high * (1 + TOLERANCE)
        found = SIMULATED_WITHIN if within else SIMULATED_DIRECTION if directed else SIMULATED_FAILS
    how = "Simulated, from bars the constants were fitted on." if fitted else "Simulated, predicted."
    return _verdict(claim, ours, None, None, 0, found, f"{how} {note}".strip())


def table(verdicts: Sequence[Verdict]) -> Styler:
    """Return verdicts as a table for a notebook: the interval where any has one, the notes where any has one."""
    import pandas as pd

    frame = pd.DataFrame(verdicts)
    columns = ["statement", "where", "paper", "ours", "low", "high", "samples", "unit", "verdict", "note"]
    measured = frame["low"].notna().any()
    left_out = ("unit",) if measured else ("low", "high", "samples")
    shown = [c for c in columns if c not in left_out and (c != "note" or frame["note"].any())]
    return frame[shown].style.format(precision=3, na_rep="–").hide(axis="index")


def _rule(claim: Claim, low: float, high: float) -> str:
    neutral = 1.0 if claim.kind == "ratio" else 0.0
    right_side = (high < neutral) if claim.direction == "lower" else (low > neutral)
    wrong_side = (low > neutral) if claim.direction == "lower" else (high < neutral)
    if claim.direction == "equal":
        margin = SAME if claim.value is None else 2 * abs(claim.value - neutral)
        if -margin <= low - neutral and high - neutral <= margin:
            return REPRODUCED
        return NOT_REPRODUCED if low - neutral > margin or high - neutral < -margin else UNDECIDED
    if claim.kind != "ordering" and claim.value is not None:
        paper_low, paper_high = _range(claim)
        if low <= paper_high and high >= paper_low:
            return REPRODUCED
        if right_side:
            return DIRECTION
    elif right_side:
        return REPRODUCED
    return NOT_REPRODUCED if wrong_side else UNDECIDED


def _range(claim: Claim) -> tuple[float, float]:
    """Return the paper's range: as read, open on the side it leaves empty; the value alone if it gives no bound."""
    if claim.value_low is None and claim.value_high is None:
        return claim.value, claim.value
    return (
        -math.inf if claim.value_low is None else claim.value_low,
        math.inf if claim.value_high is None else claim.value_high,
    )


def _verdict(
    claim: Claim, ours: float | None, low: float | None, high: float | None, samples: int, verdict: str, note: str
) -> Verdict:
    if claim.value is None:
        paper = claim.direction
    else:
        paper = f"{claim.value:g} {claim.unit}".strip()
    return Verdict(claim.id, claim.statement, claim.where, paper, ours, low, high, claim.unit, samples, verdict, note)
