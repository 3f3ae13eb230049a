"""Judge claims of the paper by our measurements, our arithmetic or our simulations.

The interval is the 95 % Student interval of the mean over seeds (paired differences where the claim compares two arms),
or over sessions for timings. One seed, or one session, has no spread and gets no verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moelab.paper.claims import SCALES, Claim
from moelab.statistics import interval, p_value

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

REPRODUCED = "reproduced"
DIRECTION = "direction only"
EQUAL = "equal within the margin only"  # an equality with a number, which the interval does not show
NOT_REPRODUCED = "not reproduced"
UNDECIDED = "undecided"  # the interval allows both
CANNOT_TELL = "undecided: the runs cannot tell"  # the sensitivity check of an equality did not pass, or there is none
NO_SPREAD = "not judged: one seed"
ONE_SESSION = "not judged: one timing session"
NOT_TESTED = "not tested at this scale"
NOT_TESTABLE = "not testable at this scale"
NOT_JUDGED = (NO_SPREAD, ONE_SESSION, NOT_TESTED, NOT_TESTABLE)

# A simulation has no seeds and measures nothing: its verdicts say so.
SIMULATED_WITHIN = "simulated: within 15 %"
SIMULATED_HOLDS = "simulated: holds"
SIMULATED_DIRECTION = "simulated: direction only"
SIMULATED_CLOSE = "simulated: within the simulator's error"  # an order of two values that are too close
SIMULATED_FAILS = "simulated: does not hold"
SIMULATED = (SIMULATED_WITHIN, SIMULATED_HOLDS, SIMULATED_DIRECTION, SIMULATED_CLOSE, SIMULATED_FAILS)

MEASURED = "measured"
COUNTED = "counted"
PREDICTED = "predicted"
FITTED = "fitted"
KINDS = (MEASURED, COUNTED, PREDICTED, FITTED)
"""What a verdict rests on: trained or timed; arithmetic; the simulator; the simulator on the bars it was fitted on."""

LEVEL = 0.05
"""Chance that a 95 % interval misses the true mean."""

TOLERANCE = 0.15
"""Share of the paper's value by which a simulated one may differ and still count as within it."""

APART = 0.05
"""Share by which two simulated values must differ before their order counts: the simulator's latencies are predicted
with a median error of more than that, much of it common to both."""

MARGIN = 0.25
"""Two arms are equal if they differ by less than this share of the gain at hand: who equals the better of two arms
keeps at least three quarters of what that arm gains. A convention, not tuned to a result."""

NARROW = 0.5
"""An interval must be narrower than this share of the paper's effect before overlap with the paper's number counts."""


def testable(claim: Claim, scale: str) -> bool:
    """Return whether training runs of a scale can test a claim at all."""
    return claim.testable_at in SCALES and SCALES.index(scale) >= SCALES.index(claim.testable_at)


@dataclass(frozen=True)
class Gain:
    """Hold the gain by which an equality is measured; it is also the check that the runs can tell arms apart.

    Attributes:
        what: which arm gains over which, such as "MoE-128 over Dense".
        values: per seed, positive where it gains, in the order and unit of the values that are judged.
    """

    what: str
    values: Sequence[float]


@dataclass(frozen=True)
class Verdict:
    """Hold one claim and how it was judged.

    Attributes:
        claim, statement, where: the paper's.
        paper: the paper's value with its unit, as text.
        ours, low, high: our mean and 95 % interval, None where there is none.
        unit: of `ours`.
        samples: seeds (for timings: sessions) behind it; 0 for arithmetic.
        verdict: one of this module's constants.
        note: one line, how it was compared.
        kind: one of `KINDS`; empty without a value of ours, and in summaries from before there were kinds.
        p: two-sided p-value of the hypothesis that the verdict rejects ("no effect", "at the bound", "at the margin");
            None where nothing was tested.
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


def judge(
    claim: Claim,
    values: Sequence[float],
    *,
    gain: Gain | None = None,
    note: str = "",
    exact: bool = False,
    scale: str | None = None,
) -> Verdict:
    """Return the verdict on a claim.

    - ordering: reproduced when the interval lies on the claimed side of zero, not reproduced when on the other side.
    - difference, ratio: reproduced when the interval lies on the claimed side of "no effect" and either lies wholly in
      the paper's range (its reading uncertainty, or all beyond "more than x"), or meets it and is narrower than
      `NARROW` of the paper's effect; else direction only when it lies on the claimed side. A claim of "more
      than x" is also not reproduced when the interval includes "no effect" and lies wholly short of x.
    - bound: reproduced when the interval keeps the bound, not reproduced when it lies wholly outside. Claimed *at* a
      number: within `TOLERANCE` of it.
    - equal: reproduced when the difference is less than `MARGIN` of the gain either way, not reproduced when it is
      more. Both are intervals of difference -+ margin x gain, seed by seed, so the gain's own spread counts. The runs
      cannot tell unless the gain's interval lies above zero. Where the paper's text has a number, too, it must be shown
      as that of a difference (wholly in the range, or meeting it and narrow); else equal within the margin only.

    Args:
        values: per seed, what the claim's `quantity` compares: left - right, or left / right for a ratio.
        gain: for an equality; without one the runs cannot tell.
        exact: the values are arithmetic, without spread.
        scale: the experiment's; a claim that needs a larger one is shown with our values but not judged. None judges in
            any case.

    Raises:
        ValueError: the gain has another number of seeds than the values.
    """
    if not values:
        untestable = scale and not testable(claim, scale)
        return _verdict(claim, None, None, None, 0, NOT_TESTABLE if untestable else NOT_TESTED, note)
    mean, low, high = interval(values)
    n, one = len(values), len(values) < 2
    if scale and not testable(claim, scale):
        return _verdict(claim, mean, None if one else low, None if one else high, n, NOT_TESTABLE, note, MEASURED)
    if exact:
        return _verdict(claim, mean, mean, mean, 0, _rule(claim, mean, mean), note, COUNTED)
    if one:
        return _verdict(claim, mean, None, None, 1, NO_SPREAD, note, MEASURED)
    if claim.direction == "equal" and claim.kind != "bound":
        found, p, how = _equality(claim, values, gain)
        return _verdict(claim, mean, low, high, n, found, f"{note} {how}".strip(), MEASURED, p)
    p, found = _p(claim, low, high, n), _rule(claim, low, high)
    if found == DIRECTION:
        note = f"{note} {_not_shown(claim, low, high)}".strip()
    return _verdict(claim, mean, low, high, n, found, note, MEASURED, p)


def judge_timing(
    claim: Claim, sessions: Sequence[Sequence[float]], *, note: str = "", scale: str | None = None
) -> Verdict:
    """Return the verdict on a claim about measured times, from the sessions' medians.

    Rounds of one session share a process and the state of its machine: they are no independent samples. One session is
    shown as one sample, its note names the spread of its rounds.

    Args:
        sessions: per session (a process of its own), the claim's ratio round by round.
        note, scale: as for `judge`.
    """
    timed = [session for session in sessions if session]
    spread = ", ".join(f"{min(s):.3g} to {max(s):.3g} over {len(s)} rounds" for s in timed)
    if timed:
        note = f"{note} Spread within {'the one session' if len(timed) == 1 else 'each session'}: {spread}.".strip()
    found = judge(claim, [statistics.median(s) for s in timed], note=note, scale=scale)
    return replace(found, verdict=ONE_SESSION) if found.verdict == NO_SPREAD else found


def restate(claim: Claim, old: Verdict) -> Verdict:
    """Return a stored verdict of an earlier version by today's rules, from its stored interval; others as they are.

    Equalities were stored without a sensitivity check, so the runs cannot tell. Timings were judged over rounds: one
    session.
    """
    if old.kind or old.ours is None:
        return old
    if old.verdict in SIMULATED:
        return replace(old, kind=FITTED if "fitted on" in old.note else PREDICTED)
    if old.low is not None and old.low == old.high and not old.samples:
        return replace(old, kind=COUNTED)
    old = replace(old, kind=MEASURED)
    if old.verdict in NOT_JUDGED or old.low is None or old.high is None or old.samples < 2:
        return old
    if claim.timed:
        note = f"{old.note} 95 % interval over {old.samples} rounds: {old.low:.3g} to {old.high:.3g}.".strip()
        return replace(old, verdict=ONE_SESSION, low=None, high=None, samples=1, note=note)
    if claim.direction == "equal" and claim.kind != "bound":
        return replace(old, verdict=CANNOT_TELL, note=f"{old.note} No sensitivity check was stored.".strip())
    p = _p(claim, old.low, old.high, old.samples)
    return replace(old, verdict=_rule(claim, old.low, old.high), p=p)


def judge_simulated(
    claim: Claim, ours: float | None, *, against: float | None = None, note: str = "", fitted: bool = False
) -> Verdict:
    """Return the verdict of a simulation, which has no seeds and no spread.

    A number is within 15 % of the paper's value (or range), else only its direction holds or not. Limits hold or do
    not. An ordering does where the two values are `APART`, else it is within the simulator's error.

    Args:
        ours: None where it is not simulated.
        against: for an ordering, the value of its right side; `ours` is left - right.
        fitted: the constants of the simulator were fitted on this number.

    Raises:
        ValueError: an ordering without `against`.
    """
    if ours is None:
        return judge(claim, [], note=note)
    neutral = 1.0 if claim.kind == "ratio" else 0.0
    lower = claim.direction == "lower"
    directed = ours < neutral if lower else ours > neutral
    if claim.kind == "bound" and claim.direction != "equal":
        found = SIMULATED_HOLDS if (ours <= claim.value if lower else ours >= claim.value) else SIMULATED_FAILS
    elif claim.kind == "ordering" or claim.value is None:
        if not against:
            raise ValueError(f"{claim.id}: the order of simulated values needs the value of the right side")
        apart = abs(ours / against)
        found = SIMULATED_CLOSE if apart < APART else SIMULATED_HOLDS if directed else SIMULATED_FAILS
        note = f"{note} {100 * apart:.2g} % apart; an order counts from {100 * APART:g} %.".strip()
    else:
        low = claim.value if claim.value_low is None else claim.value_low
        high = claim.value if claim.value_high is None else claim.value_high
        within = low * (1 - TOLERANCE) <= ours <= high * (1 + TOLERANCE)
        found = SIMULATED_WITHIN if within else SIMULATED_DIRECTION if directed else SIMULATED_FAILS
    how = "Simulated, from bars the constants were fitted on." if fitted else "Simulated, predicted."
    return _verdict(claim, ours, None, None, 0, found, f"{how} {note}".strip(), FITTED if fitted else PREDICTED)


def table(verdicts: Sequence[Verdict]) -> Styler:
    """Return verdicts as a table for a notebook: the interval where any has one, the notes where any has one."""
    import pandas as pd

    frame = pd.DataFrame(verdicts)
    columns = ["statement", "where", "paper", "ours", "low", "high", "samples", "unit", "kind", "verdict", "note"]
    measured = frame["low"].notna().any()
    left_out = ("unit",) if measured else ("low", "high", "samples")
    shown = [c for c in columns if c not in left_out and (c != "note" or frame["note"].any())]
    return frame[shown].style.format(precision=3, na_rep="–").hide(axis="index")


def _neutral(claim: Claim) -> float:
    """Return what "no effect" is for a claim."""
    return 1.0 if claim.kind == "ratio" else 0.0


def _p(claim: Claim, low: float, high: float, samples: int) -> float | None:
    """Return the p-value of what `_rule` tests: no effect, or a mean at the bound; None for a bound at a number."""
    if claim.kind != "bound" or claim.value is None:
        tested = _neutral(claim) if claim.value is None or not _short_of_bound(claim, low, high) else claim.value
        return p_value(low, high, samples, tested)
    return None if claim.direction == "equal" else p_value(low, high, samples, claim.value)


def _rule(claim: Claim, low: float, high: float) -> str:
    """Return the verdict that an interval allows, for all but equalities of two arms."""
    paper_low, paper_high = _range(claim)
    meets = low <= paper_high and high >= paper_low
    inside = paper_low <= low and high <= paper_high
    if claim.kind == "bound" or claim.direction == "equal":
        return REPRODUCED if inside else UNDECIDED if meets else NOT_REPRODUCED
    neutral, lower = _neutral(claim), claim.direction == "lower"
    if (low > neutral) if lower else (high < neutral):
        return NOT_REPRODUCED
    if not ((high < neutral) if lower else (low > neutral)):
        return NOT_REPRODUCED if _short_of_bound(claim, low, high) else UNDECIDED
    if claim.kind == "ordering" or claim.value is None:
        return REPRODUCED
    return REPRODUCED if _shows_number(claim, low, high) else DIRECTION


def _short_of_bound(claim: Claim, low: float, high: float) -> bool:
    """Return whether the paper says "more than x" and an interval includes "no effect" and lies wholly short of x."""
    paper_low, paper_high = _range(claim)
    open_range = math.isinf(paper_low) or math.isinf(paper_high)
    return open_range and low <= _neutral(claim) <= high and (high < paper_low or low > paper_high)


def _shows_number(claim: Claim, low: float, high: float) -> bool:
    """Return whether an interval lies wholly in the paper's range, or meets it and is narrow."""
    paper_low, paper_high = _range(claim)
    narrow = high - low < NARROW * abs(claim.value - _neutral(claim))
    return (paper_low <= low and high <= paper_high) or (narrow and low <= paper_high and high >= paper_low)


def _equality(claim: Claim, values: Sequence[float], gain: Gain | None) -> tuple[str, float | None, str]:
    """Return the verdict on two arms being equal, its p-value, and how it was found; see `judge`."""
    if gain is None or not gain.values:
        return CANNOT_TELL, None, "No sensitivity check in these runs."
    if len(gain.values) != len(values):
        raise ValueError(f"{claim.id}: {len(values)} values, but the gain of {len(gain.values)} seeds ({gain.what})")
    n, (mean, low, high) = len(values), interval(gain.values)
    measured = f"{gain.what} gains {mean:.3g} ({low:.3g} to {high:.3g})."
    if low <= 0:
        return CANNOT_TELL, None, f"Sensitivity check not passed: {measured}"
    p_gain = p_value(low, high, n)
    differences = [value - _neutral(claim) for value in values]
    over, under = (
        interval([d + side * MARGIN * g for d, g in zip(differences, gain.values, strict=True)])[1:] for side in (-1, 1)
    )  # the difference beyond the upper margin, and beyond the lower one
    p_over, p_under = p_value(*over, n), p_value(*under, n)
    margin = f"{100 * MARGIN:g} % of the gain ({MARGIN * mean:.2g}{_unit(claim)}): {measured}"
    if over[1] < 0 < under[0]:
        equal, p = f"Equal within {margin}", max(p_over, p_under, p_gain)
        # A number that is not quoted is our difference of two of the paper's values, and no part of the claim.
        stated = claim.value is not None and "quoted text" in claim.how
        if not stated or _shows_number(claim, *interval(values)[1:]):
            return REPRODUCED, p, equal
        return EQUAL, p, f"{equal} The paper's {claim.value:g} is not shown: too wide an interval, or one beside it."
    if over[0] > 0 or under[1] < 0:
        return NOT_REPRODUCED, max(p_over if over[0] > 0 else p_under, p_gain), f"Margin: {margin}"
    return UNDECIDED, max(p_over, p_under, p_gain), f"Margin: {margin}"


def _not_shown(claim: Claim, low: float, high: float) -> str:
    """Return why an interval on the claimed side does not show the paper's number."""
    paper_low, paper_high = _range(claim)
    if low <= paper_high and high >= paper_low:
        return f"The paper's {claim.value:g} is not shown: the interval includes it, but is too wide."
    return f"The paper's {claim.value:g} is not shown: it lies outside the interval."


def _unit(claim: Claim) -> str:
    """Return the unit of a claim's differences with a space in front; empty for a ratio."""
    return " nats" if "loss" in claim.quantity else f" {claim.unit}" if claim.unit not in ("", "x") else ""


def _range(claim: Claim) -> tuple[float, float]:
    """Return the paper's range: as read, open on the side it leaves empty; the value alone if it gives no range.

    A bound is open on the side that keeps it; claimed at a number, it is `TOLERANCE` wide on either side.
    """
    value = _neutral(claim) if claim.value is None else claim.value
    if claim.kind == "bound" and claim.direction != "equal":
        return (-math.inf, value) if claim.direction == "lower" else (value, math.inf)
    if claim.kind == "bound":
        wide = TOLERANCE * abs(value)
        return (claim.value_low or value) - wide, (claim.value_high or value) + wide
    if claim.value_low is None and claim.value_high is None:
        return value, value
    return (
        -math.inf if claim.value_low is None else claim.value_low,
        math.inf if claim.value_high is None else claim.value_high,
    )


def _verdict(
    claim: Claim,
    ours: float | None,
    low: float | None,
    high: float | None,
    samples: int,
    verdict: str,
    note: str,
    kind: str = "",
    p: float | None = None,
) -> Verdict:
    if claim.value is None:
        paper = claim.direction
    else:
        paper = f"{claim.value:g} {claim.unit}".strip()
    return Verdict(
        claim.id, claim.statement, claim.where, paper, ours, low, high, claim.unit, samples, verdict, note, kind, p
    )
