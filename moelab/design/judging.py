"""Judge claims of the paper by our measurements or our arithmetic, and stored verdicts of all kinds again.

Everything measured is judged by one interval, the 95 % Student interval: of a contrast of arms, each of which has its
mean over all its seeds and its own spread (Welch), or of the mean of values that each belong to a seed (where curves
cross) or to a session (timings). In a plan with several looks it is the repeated interval of the look
(`moelab.design.sequential`). Fewer than three seeds or sessions judge nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from moelab.design import claim_values, sequential
from moelab.design.verdicts import (
    CANNOT_TELL,
    CANNOT_TEST,
    COUNTED,
    DECIDED,
    FAILS,
    GAIN,
    HELD,
    HOLDS,
    LARGER,
    MEASURED,
    SMALLER,
    VALUE,
    Samples,
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
"""An interval must be narrower than this share of the paper's effect before our size of it counts as the paper's."""

END = 0.9
"""Runs that reach this share of the paper's training show the number of its end."""

NO_VALUE = "This result has no value for it."

Weights = dict[str, float]
"""Arm -> weight of its mean in a contrast."""


def can_test(claim: Claim, scale: str | None, share: float | None) -> bool:
    """Return whether runs can test a claim at all: by their scale, and by the share of the paper's training they reach.

    Without a scale every size will do. Without a share no run is long enough, unless there is no scale either.
    """
    if scale is None:
        return claim.from_share is None or share is None or share >= claim.from_share
    large = claim.testable_at in SCALES and scale in SCALES and SCALES.index(scale) >= SCALES.index(claim.testable_at)
    return large and (claim.from_share is None or (share or 0.0) >= claim.from_share)


def deciding(samples: Mapping[str, Mapping[int, float]], looks: Sequence[int] = (), first: int = 0) -> Samples:
    """Return the samples that decide by now: of each arm those of its first seeds, up to the last look that it reached.

    A seed beyond that waits for the next look: each look more is a chance more to be wrong.

    Args:
        looks: the plan.
        first: the first seed that decides.
    """
    found: Samples = {}
    for arm, by_seed in samples.items():
        seeds = sorted(seed for seed in by_seed if seed >= first)
        ready = max((look for look in looks if look <= len(seeds)), default=len(seeds))
        found[arm] = {seed: by_seed[seed] for seed in seeds[:ready]}
    return found


def judge(
    claim: Claim,
    values: Mapping[int, float] | Sequence[float] = (),
    *,
    arms: Mapping[str, Mapping[int, float]] | None = None,
    uncopied: Mapping[str, Mapping[int, float]] | None = None,
    note: str = "",
    exact: bool = False,
    scale: str | None = None,
    share: float | None = None,
    looks: Sequence[int] = (),
    decides_from: int = 0,
    lost: Mapping[int, str] | None = None,
    censored: Collection[int] = (),
    within: float = 0.0,
) -> Verdict:
    """Return the verdict on a claim.

    - An order, a difference or a ratio holds when the interval lies on the claimed side of "no effect"; it does not
      when it lies on the other side, or within the claim's smallest effect of interest on either side. Where the paper
      has a number, the size is said apart: larger or smaller where the interval lies wholly beyond or short of the
      paper's range, the paper's where it meets the range and is narrower than `NARROW` of the effect, else open.
    - A bound, or two of them, holds when the interval keeps it, and does not when the interval lies wholly outside. A
      censored value, known only to lie beyond the end of the training, has no interval: with one, the claim does not
      hold when so many values lie above the bounds that chance is excluded (a sign test, from six seeds on), else it
      cannot be told.
    - Two arms are equal when they differ by less than `MARGIN` of the gain that the claim is about, and that gain is
      above zero: an equivalence test (two one-sided tests, each at 2.5 %). They are not when they differ by more. Both
      are contrasts of arms, difference -+ margin x gain, so the gain's own spread counts.

    With a plan, each arm counts up to the last look that it has reached; the smallest arm says which look it is.

    Args:
        values: by seed or session, what the claim's `quantity` compares, where that is no difference of arms' means.
        arms: in place of values: by the paper's name of a run and by seed, those of both sides, and of both arms of the
            gain. A seed that an arm lacks, but has a later one than, has no value.
        uncopied: as arms, the losses on tokens that cannot be copied from the context; their difference is noted.
        exact: the values are arithmetic, without spread.
        scale: the experiment's; a claim that needs a larger one is shown, but not judged. None judges in any case.
        share: of the paper's training that the runs reach, None where that is not known.
        looks: the plan of the comparison.
        decides_from: the first seed that decides; what earlier ones say is noted.
        lost: seed -> why it has no value. With a seed without a value, nothing is judged.
        censored: seeds whose value is only known to be larger than the one given.
        within: standard error of each value alone, for timings.
    """
    given = values if isinstance(values, Mapping) else dict(enumerate(values))
    samples = arms or ({VALUE: given} if given else {})
    every = sorted({seed for of in samples.values() for seed in of})
    filled = {name: {s: of.get(s, math.nan) for s in every if s <= max(of)} for name, of in samples.items() if of}
    kept = {name: {s: float(v) for s, v in of.items() if math.isfinite(v)} for name, of in filled.items()}
    without = [
        (f"seed {seed}" if arm == VALUE else f"seed {seed} of {arm}")
        + (f": {lost[seed]}" if lost and seed in lost else "")
        for arm, of in deciding(filled, looks, decides_from).items()
        for seed in of.keys() - kept[arm].keys()
    ]
    row = Verdict(
        claim=claim.id,
        statement=claim.statement,
        where=claim.where,
        paper=claim_values.paper_text(claim),
        ours=None,
        low=None,
        high=None,
        unit=claim.unit,
        samples=0,
        verdict=CANNOT_TELL,
        note=note,
        share=share,
        looks=tuple(looks),
        decides_from=decides_from,
        missing=tuple(sorted(without)),
        censored=tuple(sorted(censored)),
        uncopied={
            arm: {seed: float(v) for seed, v in of.items() if math.isfinite(v)}
            for arm, of in sorted((uncopied or {}).items())
        },
        within=within,
    )
    able = can_test(claim, scale, share)
    if exact and able:
        return _exact(claim, replace(row, kind=COUNTED, ours=statistics.fmean(given.values())))
    return _measured(claim, replace(row, arms=kept), scale, able)


def judge_timing(
    claim: Claim, sessions: Sequence[Sequence[float]], *, note: str = "", scale: str | None = None
) -> Verdict:
    """Return the verdict on a claim about measured times, from the sessions' medians.

    Rounds of one session share a process and the state of its machine: they are no independent samples. But medians of
    a few sessions may lie closer together by chance than their rounds allow, so the interval takes the standard error
    that a session's median has by its rounds where that is greater than the spread between sessions.

    Args:
        sessions: per session (a process of its own), the claim's ratio round by round.
        note, scale: as for `judge`.
    """
    timed = [list(map(float, session)) for session in sessions if len(session)]
    spread = ", ".join(f"{min(s):.3g} to {max(s):.3g} over {len(s)} rounds" for s in timed)
    if timed:
        note = f"{note} Spread within {'the one session' if len(timed) == 1 else 'each session'}: {spread}.".strip()
    finite = [s for s in timed if all(map(math.isfinite, s))]
    # The variance of a median is pi / 2 times that of a mean, for normal samples.
    variances = [math.pi / 2 * statistics.variance(s) / len(s) for s in finite if len(s) > 1]
    within = math.sqrt(statistics.fmean(variances)) if variances else 0.0
    medians = [statistics.median(s) if s in finite else math.nan for s in timed]
    return judge(claim, medians, note=note, scale=scale, within=within)


def agreed(own: Verdict, other: Verdict) -> Verdict:
    """Return a measured verdict, or "cannot tell yet" where the same comparison at other settings says another thing.

    Both must hold or both must not; where their sizes differ, the claim holds, and its size is open. Both are kept, so
    that a later rule judges both again. Together they are as sure as the less sure of them.

    Args:
        other: its note says in a few words which settings those are, such as "At one shared rate". With the same values
            it is the same comparison.
    """
    if own.kind != MEASURED or not own.judged:
        return own
    if own.arms and own.arms == other.arms:
        return replace(own, other=other)
    both_hold = own.verdict in HELD and other.verdict in HELD
    same = own.verdict == other.verdict
    said = "no values" if other.ours is None else f"{other.ours:+.3g}{f' {own.unit}' if own.unit else ''}"
    return replace(
        own,
        verdict=own.verdict if same else HOLDS if both_hold else CANNOT_TELL,
        p=None if own.p is None or other.p is None else max(own.p, other.p),
        why=f"{own.why} {other.note}: {said}, {other.verdict}.".strip(),
        size=own.size if same else "The size is open: it differs between the two." if both_hold else "",
        other=other,
    )


def restate(claim: Claim, stored: Verdict, scale: str | None = None) -> Verdict:
    """Return a stored verdict by today's rule, from the values that it stores; one without values as it is.

    Args:
        scale: of the result; None judges in any case.
    """
    if stored.other is not None:
        return agreed(restate(claim, replace(stored, other=None), scale), restate(claim, stored.other, scale))
    if stored.ours is not None and (stored.kind == COUNTED or (stored.simulated and claim.kind != "ordering")):
        return _exact(claim, stored)
    if not stored.arms:
        lacks = _too_small(claim, scale, stored.share) if stored.verdict == CANNOT_TEST else NO_VALUE
        return stored if stored.why or stored.ours is not None else replace(stored, why=lacks)
    if claim.testable_at not in SCALES and stored.verdict != CANNOT_TEST:
        scale = None  # what is mostly simulated may be measured, too
    return _measured(claim, stored, scale, can_test(claim, scale, stored.share))


def _exact(claim: Claim, row: Verdict) -> Verdict:
    """Return the verdict on a value without spread; a simulation has a tolerance, arithmetic has none."""
    ours, paper = row.ours or 0.0, claim_values.paper_range(claim, exact=not row.simulated, wide=row.simulated)
    of, size = _rule(claim, ours, ours, paper, exact=True)
    end = None if row.simulated else ours
    return replace(row, verdict=of, size=size, low=end, high=end)


def _measured(claim: Claim, row: Verdict, scale: str | None, able: bool) -> Verdict:
    """Return the verdict on samples, the rest of `row` as it is."""
    samples = deciding(row.arms, row.looks, row.decides_from)
    difference, gain = contrasts(claim, samples)
    n = min((len(samples[arm]) for arm in difference | gain), default=0)
    row = replace(row, kind=MEASURED if n else "", verdict=CANNOT_TELL, p=None, why="", size="", samples=n)
    if n:
        estimate, level = estimated(samples, difference, row.within), sequential.level(n, row.looks)
        low, high = estimate.interval(level)
        ends = (low, high) if estimate.samples > 1 else (None, None)
        row = replace(row, ours=estimate.mean, low=ends[0], high=ends[1])
    if not able:
        return replace(row, verdict=CANNOT_TEST, why=_too_small(claim, scale, row.share))
    early = _early(claim, row)
    if row.missing or not n:
        why = f"Without a value: {', '.join(row.missing)}." if row.missing else early or NO_VALUE
        return replace(row, why=why)
    if n < (least := max((MIN_SAMPLES, *row.looks[:1]))):
        what = f"{'session' if claim.timed else 'seed'}{'s' * (n != 1)}"
        return replace(row, why=f"There {'is' if n == 1 else 'are'} {n} {what}; it takes {least}. {early}".strip())
    if claim.direction == "equal" and claim.kind != "bound":
        of, p, why = _equality(claim, samples, difference, gain, level)
        size = ""
    elif any(seed in row.censored for seed in samples.get(VALUE, ())):
        of, p, size = *_censored(claim, samples[VALUE], level), ""
        why = "Some values are later than the end of the training: their mean is a lower bound, and has no interval."
        row = replace(row, low=None, high=None)
    else:
        of, size = _rule(claim, low, high, claim_values.paper_range(claim), share=row.share)
        p, why = _p(claim, estimate, low, high, of), ""
        if of == FAILS and claim.smallest and low <= claim_values.neutral(claim) <= high:
            why = f"Within the smallest effect of interest, {claim.smallest:g} ({claim.smallest_why})."
    p = None if p is None else sequential.repeated_p(p, n, row.looks)
    others = _uncopied(claim, row, difference), _waiting(row, n), early
    whys = why, *others, _progress(claim, row, samples, of, estimate)
    return replace(row, verdict=of, p=p, size=size, why=" ".join(text for text in whys if text))


def _too_small(claim: Claim, scale: str | None, share: float | None) -> str:
    if claim.from_share and share is not None and share < claim.from_share:
        return f"The claim holds from {claim.from_share:.0%} of the paper's training on; these runs reach {share:.0%}."
    need = "a cluster's simulation" if claim.testable_at == "simulated" else f"the scale {claim.testable_at}"
    return f"It needs {need}; this is scale {scale}." if scale else f"It needs {need}."


def contrasts(claim: Claim, samples: Samples) -> tuple[Weights, Weights]:
    """Return what the claim compares, and the gain of an equality, as contrasts; empty where an arm is not there."""
    if VALUE in samples:
        return {VALUE: 1.0}, {GAIN: 1.0} if GAIN in samples and len(samples[GAIN]) == len(samples[VALUE]) else {}
    if not {claim.left, claim.right} <= samples.keys():
        return {}, {}
    sign = -1.0 if claim.lower_is_better else 1.0
    both = claim.direction == "equal" and {claim.gain_of, claim.gain_over} <= samples.keys()
    return {claim.left: 1.0, claim.right: -1.0}, {claim.gain_of: sign, claim.gain_over: -sign} if both else {}


def estimated(samples: Samples, weights: Weights, within: float = 0.0) -> Estimate:
    """Return the estimate of a contrast: values of one seed are summed first, arms have independent seeds."""
    if VALUE in samples:
        seeds = samples[next(iter(weights))]
        return Estimate.of([sum(w * samples[name][seed] for name, w in weights.items()) for seed in seeds], within)
    return Estimate.contrast([(w, list(samples[arm].values())) for arm, w in weights.items()])


def _rule(
    claim: Claim,
    low: float,
    high: float,
    paper: tuple[float, float],
    *,
    share: float | None = None,
    exact: bool = False,
) -> tuple[str, str]:
    """Return the verdict that an interval allows, and the sentence on the size, for all but equalities of two arms."""
    if claim.kind == "bound" or claim.direction == "equal":
        inside, meets = paper[0] <= low and high <= paper[1], low <= paper[1] and high >= paper[0]
        return HOLDS if inside else CANNOT_TELL if meets else FAILS, ""
    # From here on effects point upwards, whichever side is claimed.
    sign, zero = -1 if claim.direction == "lower" else 1, claim_values.neutral(claim)
    low, high = sorted((sign * (low - zero), sign * (high - zero)))
    least, most = sorted(sign * (end - zero) for end in paper)
    if low <= 0:
        smallest = claim.smallest or 0.0
        return FAILS if high < 0 or (-smallest < low and high < smallest) else CANNOT_TELL, ""
    if claim.value is None:
        small = claim.smallest and high < claim.smallest
        return HOLDS, f"It is below the smallest effect of interest, {claim.smallest:g}." if small else ""
    if claim.at_the_end and share is not None and share < END:
        reach = f"the paper's {claim.value:g} is that of the end of its training, of which these runs reach {share:.0%}"
        return HOLDS, f"The size is open: {reach}."
    if high < least or low > most:
        alike = f"; {paper[0]:.3g} to {paper[1]:.3g} would count as alike" if paper[0] < paper[1] else ""
        return SMALLER if high < least else LARGER, f"The paper's number is {claim.value:.3g}{alike}."
    if exact or high - low < NARROW * abs(claim.value - zero):
        return HOLDS, "The size is the paper's."
    return HOLDS, f"The size is open: the interval is too wide to compare with the paper's {claim.value:g}."


def _censored(claim: Claim, values: Mapping[int, float], level: float) -> tuple[str, float]:
    """Return the verdict on values of which some are only lower bounds, and the p-value of a two-sided sign test.

    Values that all lie at the end of the training have no spread, so an interval would be surer than they are.
    """
    from scipy.stats import binomtest

    above = sum(value > claim_values.paper_range(claim)[1] for value in values.values())
    p = float(binomtest(above, len(values)).pvalue)
    return FAILS if p < level and 2 * above > len(values) else CANNOT_TELL, p


def _p(claim: Claim, estimate: Estimate, low: float, high: float, of: str) -> float:
    """Return the p-value of what decides: no effect, an effect that matters, or the bound (of two, the nearer)."""
    zero = claim_values.neutral(claim)
    if claim.kind == "bound":
        return max(estimate.p(end) for end in claim_values.paper_range(claim) if math.isfinite(end))
    if of == FAILS and low <= zero <= high:
        return max(estimate.p(zero + side * (claim.smallest or 0.0)) for side in (-1, 1))
    return estimate.p(zero)


def beyond(difference: Weights, gain: Weights) -> tuple[Weights, Weights]:
    """Return how far a difference lies above the upper margin, and above the lower one, as contrasts."""
    over, under = (
        {arm: difference.get(arm, 0.0) + side * MARGIN * gain.get(arm, 0.0) for arm in difference | gain}
        for side in (-1, 1)
    )
    return over, under


def _equality(
    claim: Claim, samples: Samples, difference: Weights, gain: Weights, level: float
) -> tuple[str, float | None, str]:
    """Return the verdict on two arms being equal, its p-value, and how it was found; see `judge`."""
    what, zero = f"{claim.gain_of} over {claim.gain_over}", claim_values.neutral(claim)
    if not gain:
        return CANNOT_TELL, None, f"It is about what {what} gains, which these runs do not have."
    gained, *edges = (estimated(samples, weights) for weights in (gain, *beyond(difference, gain)))
    (low, high), over, under = gained.interval(level), *(edge.interval(level) for edge in edges)
    p = max(edges[0].p(zero), edges[1].p(zero), gained.p() if gained.mean > 0 else 1.0)
    measured = f"{what} gains {gained.mean:.3g} ({low:.3g} to {high:.3g})."
    margin = f"{MARGIN:.0%} of the gain ({MARGIN * gained.mean:.2g}{claim_values.unit(claim)}): {measured}"
    if low <= 0:
        return CANNOT_TELL, p, f"It is about a gain that these runs do not show: {measured}"
    if over[0] > zero or under[1] < zero:
        return FAILS, max(edges[over[0] <= zero].p(zero), gained.p()), f"Margin: {margin}"
    equal = over[1] < zero < under[0]
    return (HOLDS, p, f"Equal within {margin}") if equal else (CANNOT_TELL, p, f"Margin: {margin}")


def _uncopied(claim: Claim, row: Verdict, difference: Weights) -> str:
    """Return the same contrast of the losses on tokens that cannot be copied from the context; empty without them."""
    samples = deciding(row.uncopied, row.looks, row.decides_from)
    if not difference.keys() <= samples.keys() or min(len(samples[arm]) for arm in difference) < MIN_SAMPLES:
        return ""
    found = estimated(samples, difference)
    low, high = found.interval(sequential.level(found.samples, row.looks))
    where = "On tokens that cannot be copied from the context"
    return f"{where}: {found.mean:+.3f} ({low:+.3f} to {high:+.3f}){claim_values.unit(claim)}."


def _waiting(row: Verdict, n: int) -> str:
    """Say how many seeds beyond the last planned look wait; empty without any."""
    there = min(map(len, deciding(row.arms, (), row.decides_from).values()))
    return f"Judged by the first {n} of {there} seeds, the last planned look." if there > n else ""


def _early(claim: Claim, row: Verdict) -> str:
    """Say what the seeds before the first that decides give; empty without any."""
    early = {arm: {s: v for s, v in of.items() if s < row.decides_from} for arm, of in row.arms.items()}
    difference = contrasts(claim, early)[0]
    if not difference or not all(early[arm] for arm in difference):
        return ""
    mean = estimated(early, difference).mean
    return f"Seeds before {row.decides_from} do not decide; they give {mean:+.3g}{claim_values.unit(claim)}."


def _progress(claim: Claim, row: Verdict, samples: Samples, of: str, estimate: Estimate) -> str:
    """Return where a plan stands: its next look, and whether that is advised."""
    n, looks = estimate.samples, row.looks
    if not looks or n >= looks[-1]:
        return ""
    next_look = f"The next look is at {min(look for look in looks if look > n)} seeds"
    if of in DECIDED:  # adjustment, or the same arms at a shared rate, may withdraw it
        return f"{next_look}, unless a verdict stands with all tests: then the plan ends."
    if _chance(claim, samples, estimate, looks) < sequential.FUTILE:
        return f"More seeds are futile: the chance that {looks[-1]} decide is below {sequential.FUTILE:.0%}."
    return f"{next_look}."


def _chance(claim: Claim, samples: Samples, estimate: Estimate, looks: tuple[int, ...]) -> float:
    """Return the chance that the last look decides an undecided claim; 1 where no effect is named.

    A difference is decided by the planned effect, or by the seen one where that is larger, or by none at all. An
    equality is decided by arms that are equal and a gain as seen, or by a difference as seen beyond the margin; by
    nothing where the arms that must differ do so the wrong way.
    """
    seen = estimate.mean - claim_values.neutral(claim)
    if planned := claim_values.effect(claim):
        likely = seen if abs(seen) > abs(planned) and seen * planned > 0 else planned
        return sequential.chance(estimate, likely, looks, within=claim.smallest or 0.0)
    difference, gain = contrasts(claim, samples)
    if not gain:
        return 1.0
    gained = estimated(samples, gain)
    if (margin := MARGIN * gained.mean) <= 0:
        return 0.0
    over, under = (estimated(samples, weights) for weights in beyond(difference, gain))
    needed = ((over, -margin), (under, margin), (gained, gained.mean))
    equal = min(sequential.chance(part, effect, looks) for part, effect in needed)
    outer = over if seen > 0 else under
    return max(equal, sequential.chance(outer, outer.mean, looks) if abs(seen) > margin else 0.0)
