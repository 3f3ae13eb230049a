"""Judge claims of the paper by our measurements or our arithmetic, and stored verdicts of all kinds again.

Everything measured is judged by one interval, the 95 % Student interval of the mean over seeds (paired differences
where the claim compares two arms) or over sessions for timings; in a plan with several looks it is the repeated
interval of the look (`moelab.design.sequential`). Fewer than three seeds or sessions get no verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moelab.design import sequential, stated
from moelab.design.simulated import simulated
from moelab.design.verdicts import (
    CANNOT_TELL,
    COUNTED,
    DIRECTION,
    EQUAL,
    FEW_SEEDS,
    FEW_SESSIONS,
    INCOMPLETE,
    MEASURED,
    NO_DIFFERENCE,
    NOT_JUDGED,
    NOT_REPRODUCED,
    NOT_TESTABLE,
    NOT_TESTED,
    REPRODUCED,
    SIMULATED,
    UNDECIDED,
    Verdict,
)
from moelab.paper.claims import SCALES, Claim
from moelab.statistics import Estimate

MIN_SAMPLES = 3
"""Fewer seeds, or sessions, judge nothing: the interval of two is 13 standard errors wide either way."""

MARGIN = 0.25
"""Two arms are equal if they differ by less than this share of the gain that the claim is about: who equals the better
of two arms keeps at least three quarters of what that arm gains. A convention, not tuned to a result."""

NARROW = 0.5
"""An interval must be narrower than this share of the paper's effect, or lie in the paper's range, before our mean
counts as the paper's number."""

END = 0.9
"""Runs that reach this share of the paper's training show the number of its end."""


def can_test(claim: Claim, scale: str | None, share: float | None) -> bool:
    """Return whether runs can test a claim at all: by their scale, and by the share of the paper's training they reach.

    Without a scale every size will do. Without a share no run is long enough, unless there is no scale either.
    """
    if scale is None:
        return claim.from_share is None or share is None or share >= claim.from_share
    large = claim.testable_at in SCALES and scale in SCALES and SCALES.index(scale) >= SCALES.index(claim.testable_at)
    return large and (claim.from_share is None or (share or 0.0) >= claim.from_share)


def judge(
    claim: Claim,
    values: Sequence[float],
    *,
    gain: Sequence[float] = (),
    note: str = "",
    exact: bool = False,
    scale: str | None = None,
    share: float | None = None,
    number: bool = True,
    looks: Sequence[int] = (),
    missing: Sequence[str] = (),
    within: float = 0.0,
) -> Verdict:
    """Return the verdict on a claim.

    - ordering: no difference that matters when the interval lies within the claim's smallest effect of interest on
      either side of zero; reproduced when it lies on the claimed side of zero and our mean is at least that effect,
      else direction only; not reproduced when it lies on the other side.
    - difference, ratio: reproduced when the interval lies on the claimed side of "no effect", our mean lies in the
      paper's range (its reading uncertainty, or all beyond "more than x", or within `TOLERANCE` of its value where it
      has no range) and the interval is narrower than `NARROW` of the paper's effect or lies wholly in the range; else
      direction only when it lies on the claimed side. A claim of "more than x" is also not reproduced when the interval
      includes "no effect" and lies wholly short of x. The number of the end of the paper's training needs runs that
      reach `END` of it.
    - bound: reproduced when the interval keeps the bound, not reproduced when it lies wholly outside. Claimed *at* a
      number: within `TOLERANCE` of it.
    - equal: reproduced when the difference is less than `MARGIN` of the gain that the claim is about either way, not
      reproduced when it is more. Both are intervals of difference -+ margin x gain, seed by seed, so the gain's own
      spread counts. The runs cannot tell unless the gain's interval lies above zero. Where the paper's text has a
      number, too, our mean must lie in its range and the interval be as narrow as for a difference; else equal within
      the margin only. It is an equivalence test (two one-sided tests, each at 2.5 %).

    With a plan, the values up to its last look decide; further ones wait for the next.

    Args:
        values: per seed, what the claim's `quantity` compares: left - right, or left / right for a ratio.
        gain: for an equality, per seed: what `claim.gain_of` gains over `claim.gain_over`, positive where it gains.
        exact: the values are arithmetic, without spread.
        scale: the experiment's; a claim that needs a larger one is shown with our values but not judged. None judges in
            any case.
        share: of the paper's training that the runs reach, None where that is not known.
        number: False where these runs cannot show the paper's number, only its direction.
        looks: the plan of the comparison.
        missing: names of seeds that have no value. With one of them, or a value that is NaN, nothing is judged.
        within: standard error of each value by itself, for timings.

    Raises:
        ValueError: the gain has another number of seeds than the values.
    """
    values, gain = [float(v) for v in values], tuple(float(g) for g in gain)
    if gain and len(gain) != len(values):
        raise ValueError(f"{claim.id}: {len(values)} values, but the gain of {len(gain)} seeds")
    lost = [f"value {i + 1}" for i, pair in enumerate(zip(values, gain or values, strict=True)) if not _finite(*pair)]
    kept: dict[str, Any] = {
        "share": share,
        "number": number,
        "looks": tuple(looks),
        "within": within,
        "missing": (*missing, *lost),
    }
    if not lost:
        kept |= {"values": () if exact else tuple(values), "gain": gain}
    there = [v for v in values if _finite(v)]
    estimate, able = Estimate.of(there, within) if there else None, can_test(claim, scale, share)
    if exact and estimate and able:
        counted = stated.row(
            claim, estimate, _rule(claim, *[estimate.mean] * 3, exact=True), note, kept | {"kind": COUNTED}
        )
        return replace(counted, low=estimate.mean, high=estimate.mean, samples=0)
    if estimate is None and not kept["missing"]:
        return stated.row(claim, None, NOT_TESTED if able else NOT_TESTABLE, note, kept)
    return _measured(claim, estimate, note, kept, able)


def _finite(*values: float) -> bool:
    return all(math.isfinite(v) for v in values)


def judge_timing(
    claim: Claim,
    sessions: Sequence[Sequence[float]],
    *,
    note: str = "",
    scale: str | None = None,
    number: bool = True,
) -> Verdict:
    """Return the verdict on a claim about measured times, from the sessions' medians.

    Rounds of one session share a process and the state of its machine: they are no independent samples. But medians of
    a few sessions may lie closer together by chance than their rounds allow, so the interval takes the standard error
    that a session's median has by its rounds where that is greater than the spread between sessions.

    Args:
        sessions: per session (a process of its own), the claim's ratio round by round.
        note, scale, number: as for `judge`.
    """
    timed = [[float(ratio) for ratio in session] for session in sessions if len(session)]
    spread = ", ".join(f"{min(s):.3g} to {max(s):.3g} over {len(s)} rounds" for s in timed)
    if timed:
        note = f"{note} Spread within {'the one session' if len(timed) == 1 else 'each session'}: {spread}.".strip()
    # The variance of a median is pi / 2 times that of a mean, for normal samples.
    variances = [math.pi / 2 * statistics.variance(s) / len(s) for s in timed if len(s) > 1 and _finite(*s)]
    within = math.sqrt(statistics.fmean(variances)) if variances else 0.0
    medians = [statistics.median(s) if _finite(*s) else math.nan for s in timed]
    return judge(claim, medians, note=note, scale=scale, number=number, within=within)


def agreed(own: Verdict, other: Verdict) -> Verdict:
    """Return a measured verdict, or "undecided" where the same comparison at other settings contradicts it.

    Where one of the two shows less than the other (the direction, or equality within the margin only), that is the
    verdict. Without a verdict at the other settings there is none. Both are kept, so that a later rule judges both
    again. Together they are as sure as the less sure of them.

    Args:
        other: its note says in a few words which settings those are, such as "At one shared rate". With the same values
            it is the same comparison.
    """
    if own.kind != MEASURED or own.verdict in NOT_JUDGED:
        return own
    if own.values and (own.values, own.gain) == (other.values, other.gain):
        return replace(own, other=other)
    if other.ours is None:
        why = f"{own.why} {other.note} there are no values.".strip()
        return replace(own, verdict=INCOMPLETE, p=None, why=why, other=other)
    less = next((v for v in (DIRECTION, EQUAL) if {own.verdict, other.verdict} == {REPRODUCED, v}), UNDECIDED)
    agree = own.verdict if own.verdict == other.verdict else INCOMPLETE if other.verdict in NOT_JUDGED else less
    why = f"{own.why} {other.note}: {other.ours:+.3g}{f' {own.unit}' if own.unit else ''}, {other.verdict}.".strip()
    return replace(
        own,
        verdict=agree,
        p=own.p if own.p is None or other.p is None else max(own.p, other.p),
        why=why,
        other=other,
    )


def restate(claim: Claim, stored: Verdict, scale: str | None = None) -> Verdict:
    """Return a stored verdict by today's rule, from the values that it stores; one without values as it is.

    Args:
        scale: of the result; it decides about verdicts that were "not testable" there.
    """
    if stored.other is not None:
        return agreed(restate(claim, replace(stored, other=None), scale), restate(claim, stored.other, scale))
    if stored.ours is not None and stored.kind == COUNTED:
        return replace(stored, verdict=_rule(claim, *[stored.ours] * 3, exact=True))
    if stored.ours is not None and stored.verdict in SIMULATED and claim.kind != "ordering":
        return replace(stored, verdict=simulated(claim, stored.ours))
    if not stored.values:
        return stored
    names = ("values", "gain", "within", "share", "number", "looks", "missing")
    kept = {name: getattr(stored, name) for name in names}
    able = can_test(claim, scale if stored.verdict == NOT_TESTABLE or claim.from_share else None, stored.share)
    return _measured(claim, Estimate.of(stored.values, stored.within), stored.note, kept, able)


def _measured(claim: Claim, estimate: Estimate | None, note: str, stored: dict[str, Any], able: bool) -> Verdict:
    """Return the verdict on a measured mean; `stored` holds what the verdict keeps of `judge`'s arguments."""
    stored = stored | {"kind": MEASURED}
    share, looks, missing = stored["share"], stored["looks"], stored["missing"]
    if not able:
        why = ""
        if claim.from_share and share is not None and share < claim.from_share:
            why = (
                f"The claim holds from {claim.from_share:.0%} of the paper's training on; these runs reach {share:.0%}."
            )
        return stated.row(claim, estimate, NOT_TESTABLE, note, stored | {"why": why})
    if missing or estimate is None:
        return stated.row(
            claim, estimate, INCOMPLETE, note, stored | {"why": f"Without a value: {', '.join(missing)}."}
        )
    n = max((look for look in looks if look <= estimate.samples), default=0 if looks else estimate.samples)
    if n < MIN_SAMPLES:
        why = f"The first look is at {looks[0]} seeds." if looks and looks[0] > MIN_SAMPLES else ""
        return stated.row(claim, estimate, FEW_SESSIONS if claim.timed else FEW_SEEDS, note, stored | {"why": why})
    if n < estimate.samples:  # further seeds count at the next planned look: each look more is a chance to be wrong
        after = f"Judged by the first {n} of {estimate.samples} seeds, the last planned look."
        judged = stored | {"values": stored["values"][:n], "gain": stored["gain"][:n]}
        estimate = Estimate.of(judged["values"], stored["within"])
    else:
        after, judged = "", stored
    level = sequential.level(estimate.samples, looks)
    if claim.direction == "equal" and claim.kind != "bound":
        of, p, why = _equality(claim, estimate, judged, level)
    else:
        low, high = estimate.interval(level)
        of = _rule(claim, estimate.mean, low, high, number=stored["number"] and not _late(claim, share))
        p = _p(claim, estimate, low, high, of)
        why = _why(claim, estimate, low, high, of, stored["number"], share)
    p = None if p is None else sequential.repeated_p(p, estimate.samples, looks)
    why = " ".join(text for text in (why, after, _progress(claim, estimate, judged, of)) if text)
    return stated.row(claim, estimate, of, note, stored | {"p": p, "why": why})


def _rule(claim: Claim, mean: float, low: float, high: float, *, number: bool = True, exact: bool = False) -> str:
    """Return the verdict that a mean and its interval allow, for all but equalities of two arms."""
    if claim.kind == "bound" or claim.direction == "equal":
        paper_low, paper_high = stated.paper_range(claim, exact)
        inside, meets = paper_low <= low and high <= paper_high, low <= paper_high and high >= paper_low
        return REPRODUCED if inside else UNDECIDED if meets else NOT_REPRODUCED
    no_effect, lower = stated.neutral(claim), claim.direction == "lower"
    if claim.smallest and no_effect - claim.smallest < low and high < no_effect + claim.smallest:
        return NO_DIFFERENCE
    if (low > no_effect) if lower else (high < no_effect):
        return NOT_REPRODUCED
    if not ((high < no_effect) if lower else (low > no_effect)):
        return NOT_REPRODUCED if stated.short_of_bound(claim, low, high) else UNDECIDED
    if claim.value is None:
        return REPRODUCED if abs(mean - no_effect) >= (claim.smallest or 0.0) else DIRECTION
    return REPRODUCED if number and not _short(claim, mean, low, high, exact=exact) else DIRECTION


def _p(claim: Claim, estimate: Estimate, low: float, high: float, of: str) -> float | None:
    """Return the p-value of what `_rule` tests: no effect, an effect that matters, a bound, or a range."""
    if claim.kind == "bound" and claim.direction == "equal":  # inside the range or outside: the nearer end decides
        return max(estimate.p(end) for end in stated.paper_range(claim))
    if claim.kind == "bound":
        return None if claim.value is None else estimate.p(claim.value)
    if of == NO_DIFFERENCE and claim.smallest:
        return max(estimate.p(stated.neutral(claim) + side * claim.smallest) for side in (-1, 1))
    return estimate.p(
        claim.value if claim.value is not None and stated.short_of_bound(claim, low, high) else stated.neutral(claim)
    )


def _equality(claim: Claim, estimate: Estimate, stored: dict[str, Any], level: float) -> tuple[str, float | None, str]:
    """Return the verdict on two arms being equal, its p-value, and how it was found; see `judge`."""
    values, gain = stored["values"], stored["gain"]
    what = f"{claim.gain_of} over {claim.gain_over}"
    if not gain or len(gain) != len(values):
        return CANNOT_TELL, None, f"It is about what {what} gains, which these runs do not have."
    gained = Estimate.of(gain)
    low, high = gained.interval(level)
    measured = f"{what} gains {gained.mean:.3g} ({low:.3g} to {high:.3g})."
    if low <= 0:
        return CANNOT_TELL, None, f"It is about a gain that these runs do not show: {measured}"
    p_gain = gained.p()
    margin = f"{MARGIN:.0%} of the gain ({MARGIN * gained.mean:.2g}{stated.unit(claim)}): {measured}"
    over, under = _beyond(claim, stored)
    (over_low, over_high), (under_low, under_high) = over.interval(level), under.interval(level)
    if over_high < 0 < under_low:
        equal, p = f"Equal within {margin}", max(over.p(), under.p(), p_gain)
        # A number that is not quoted is our difference of two of the paper's values, and no part of the claim.
        if claim.value is None or "quoted text" not in claim.how:
            return REPRODUCED, p, equal
        short = _short(claim, estimate.mean, *estimate.interval(level), share=stored["share"])
        return (EQUAL, p, f"{equal} {short}") if short else (REPRODUCED, p, equal)
    if over_low > 0 or under_high < 0:
        return NOT_REPRODUCED, max(over.p() if over_low > 0 else under.p(), p_gain), f"Margin: {margin}"
    return UNDECIDED, max(over.p(), under.p(), p_gain), f"Margin: {margin}"


def _beyond(claim: Claim, stored: dict[str, Any]) -> tuple[Estimate, Estimate]:
    """Return how far differences lie above the upper margin, and the lower one: below and above 0 they are equal."""
    no_effect, pairs = stated.neutral(claim), list(zip(stored["values"], stored["gain"], strict=True))
    over, under = (Estimate.of([v - no_effect + side * MARGIN * g for v, g in pairs]) for side in (-1, 1))
    return over, under


def _why(claim: Claim, estimate: Estimate, low: float, high: float, of: str, number: bool, share: float | None) -> str:
    """Return in a sentence what decided where the verdict alone does not say it."""
    if of == NO_DIFFERENCE:
        return f"Within the smallest effect of interest, {claim.smallest:g}{stated.unit(claim)} ({claim.smallest_why})."
    if of != DIRECTION:
        return ""
    if claim.value is None:
        return f"Our mean is below the smallest effect of interest, {claim.smallest:g}{stated.unit(claim)}."
    if not number and not _late(claim, share):
        return "Only the direction is judged here."
    return _short(claim, estimate.mean, low, high, share=share)


def _late(claim: Claim, share: float | None) -> bool:
    """Return whether the paper's number is one of the end of its training, which these runs do not reach."""
    return share is not None and share < END and claim.at_the_end


def _short(
    claim: Claim, mean: float, low: float, high: float, *, share: float | None = None, exact: bool = False
) -> str:
    """Return in a sentence why a mean and its interval do not show the paper's number; empty where they do."""
    if _late(claim, share):
        return f"The paper's {claim.value:g} is that of the end of its training, of which these runs reach {share:.0%}."
    paper_low, paper_high = stated.paper_range(claim, exact)
    if not paper_low <= mean <= paper_high:
        if math.isinf(paper_low) or math.isinf(paper_high):
            return f"Our mean falls short of the paper's {claim.value:g}."
        return f"Our mean lies outside the paper's {claim.value:g} ({paper_low:g} to {paper_high:g})."
    narrow = exact or high - low < NARROW * abs(claim.number - stated.neutral(claim))
    if narrow or (paper_low <= low and high <= paper_high):
        return ""
    return f"The interval is too wide to show the paper's {claim.value:g}."


def _progress(claim: Claim, estimate: Estimate, stored: dict[str, Any], of: str) -> str:
    """Return where a plan stands: its next look, and whether that is advised."""
    n, looks = estimate.samples, tuple(stored["looks"])
    if not looks or n >= looks[-1]:
        return ""
    next_look = f"The next look is at {min(look for look in looks if look > n)} seeds"
    if of not in (UNDECIDED, CANNOT_TELL):  # Holm's adjustment, or the same arms at a shared rate, may withdraw it
        return f"{next_look}, unless a verdict stands with all tests: then the plan ends."
    if _chance(claim, estimate, stored, looks) < sequential.FUTILE:
        return f"More seeds are futile: the chance that {looks[-1]} decide is below {sequential.FUTILE:.0%}."
    return f"{next_look}."


def _chance(claim: Claim, estimate: Estimate, stored: dict[str, Any], looks: tuple[int, ...]) -> float:
    """Return the chance that the last look decides an undecided claim; 1 where no effect is named.

    A difference is decided by the planned effect, or by the seen one where that is larger, or by none at all. An
    equality is decided by arms that are equal and a gain as seen, or by a difference as seen beyond the margin; by
    nothing where the arms that must differ do so the wrong way.
    """
    seen = estimate.mean - stated.neutral(claim)
    if planned := stated.effect(claim):
        likely = seen if abs(seen) > abs(planned) and seen * planned > 0 else planned
        return sequential.chance(estimate, likely, looks, within=claim.smallest or 0.0)
    if len(stored["gain"]) != estimate.samples:
        return 1.0
    gained = Estimate.of(stored["gain"])
    if (margin := MARGIN * gained.mean) <= 0:
        return 0.0
    over, under = _beyond(claim, stored)
    needed = ((over, -margin), (under, margin), (gained, gained.mean))
    equal = min(sequential.chance(part, effect, looks) for part, effect in needed)
    outer = over if seen > 0 else under
    beyond = sequential.chance(outer, outer.mean, looks) if abs(seen) > margin else 0.0
    return max(equal, beyond)
