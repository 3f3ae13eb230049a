"""Compute how many seeds a comparison needs, before they are trained.

A comparison *decides* where its interval excludes "no effect" or, for two arms that are claimed to be equal, where it
lies within the margin. Its *power* is the chance of that if the effect is there. The number of seeds of each arm is the
least with a power of `POWER`: for one look, and for looks at every third seed (`moelab.design.sequential`), which need
a few more seeds at most and fewer on average. Powers are those of simulated experiments, judged by the same test as
real ones (Welch's, where arms are compared): normal samples of the spread that earlier runs had. A spread of five seeds
is itself uncertain: the true one may well be half or twice as large, and with it the seeds a quarter or four times as
many.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moelab import paper
from moelab.design import claim_values, judging, sequential, settings
from moelab.design.judging import MARGIN, MIN_SAMPLES, Weights
from moelab.design.verdicts import CANNOT_TELL, MEASURED, VALUE, Samples, Verdict
from moelab.lazy import np, pd
from moelab.paper.claims import PRIMARY, Claim
from moelab.statistics import ALPHA, Estimate

POWER = 0.8
"""Chance to decide, if the effect is there, that a plan is made for."""

EVERY = 3
"""Seeds from one look to the next."""

MAX_SEEDS = 99
"""More seeds are not counted."""

PRIMARIES = 9
"""Primary statements at most: the hardest test among them is at this share of the 5 %."""

_SIMULATED = 4000
"""Simulated experiments: the standard error of a power of 0.8 is 0.006."""


@dataclass(frozen=True)
class Need:
    """Say how many seeds a comparison needs; None is more than `MAX_SEEDS`.

    Attributes:
        at_once: with one look.
        looks: with a look at every third seed: the plan.
        mean: of that plan, how many are trained on average if the effect is there, because it stops where it decides.
    """

    at_once: int | None
    looks: tuple[int, ...] | None
    mean: float | None


def of_difference(spread: float, effect: float, looks: bool = True, alpha: float = ALPHA) -> Need:
    """Return the number of seeds that shows an effect in values that each belong to a seed, if there is one.

    Args:
        spread: standard deviation of the values over seeds.
        effect: that is to be seen, in the same unit.
        looks: also plan looks, which takes longer to compute.
        alpha: chance of a wrong decision that is allowed.
    """
    return of_contrasts([({VALUE: 1.0}, abs(effect))], {VALUE: spread}, looks, alpha)


def of_contrasts(
    contrasts: Sequence[tuple[Weights, float]], spreads: Mapping[str, float], looks: bool = True, alpha: float = ALPHA
) -> Need:
    """Return the number of seeds of each arm with which all contrasts of the arms' means stand out above zero.

    Args:
        contrasts: weights of the arms, and the contrast's true value.
        spreads: arm -> standard deviation of its values over seeds.
        looks, alpha: as for `of_difference`.
    """
    arms = sorted({arm for weights, _ in contrasts for arm in weights})
    weights = tuple(tuple(float(of.get(arm, 0.0)) for arm in arms) for of, _ in contrasts)
    return _need(tuple(float(mean) for _, mean in contrasts), weights, tuple(spreads[a] for a in arms), looks, alpha)


def of_claim(
    claim: Claim, verdict: Verdict, looks: bool = True, alpha: float = ALPHA
) -> tuple[Need | None, float | None, str]:
    """Return what a measured claim needs by the values it was judged by, the effect, and where the effect is from.

    The effect is half the paper's number, or the smallest of interest. There is no need where no effect can be named.
    """
    samples = judging.deciding(verdict.arms, verdict.looks, verdict.decides_from)
    found = {arm: Estimate.of(list(of.values()), verdict.within) for arm, of in samples.items()}
    spreads, means = ({arm: getattr(e, name) for arm, e in found.items()} for name in ("spread", "mean"))
    return _planned(claim, samples, spreads, means, looks, alpha)


def _planned(
    claim: Claim, arms: Samples, spreads: Mapping[str, float], means: Mapping[str, float], looks: bool, alpha: float
) -> tuple[Need | None, float | None, str]:
    difference, gain = judging.contrasts(claim, arms)
    effect = claim_values.effect(claim)
    if effect is not None:
        why = f"half of {claim.value - claim_values.neutral(claim):+.3g}" if claim.value is not None else "the smallest"
        return of_contrasts([(difference, abs(effect))], spreads, looks, alpha), abs(effect), why
    if claim.kind == "bound" and claim.direction == "equal":
        low, high = claim_values.paper_range(claim)
        half = (high - low) / 2
        sides = [({VALUE: side}, half) for side in (1.0, -1.0)]
        return of_contrasts(sides, spreads, looks, alpha), half, "from the middle of the range to its ends"
    if not claim.gain_of:
        return None, None, "no effect named"
    gained = sum(weight * means[arm] for arm, weight in gain.items())
    if gained <= 0:
        return None, None, "the gain is not above 0" if gain else "no gain measured"
    margin = MARGIN * gained
    over, under = judging.beyond(difference, gain)
    needed = [(gain, gained), (under, margin), ({arm: -weight for arm, weight in over.items()}, margin)]
    return of_contrasts(needed, spreads, looks, alpha), margin, f"{MARGIN:.0%} of the gain"


def plan(spreads: Mapping[str, float], gains: Mapping[str, float] | None = None) -> pd.DataFrame:
    """Return how many seeds each primary and secondary claim needs with 80 % power.

    Primaries are tested at their family's hardest level (5 % / `PRIMARIES`), secondaries at 5 %, as if alone.

    Args:
        spreads: standard deviation over seeds: arm (the paper's name) or family of arms (`settings.FAMILIES`) -> that
            of its losses; claim -> that of its value, where it is one by seed, such as where curves cross.
        gains: equality -> the gain that it is about; by default unknown, so that nothing is planned for it.

    Returns:
        Columns claim, figure, role, effect, effect from, alpha, at once, looks, on average. A number of seeds is
        missing where a spread or an effect is, or where it is more than `MAX_SEEDS`.
    """
    rows = []
    for claim in paper.claims():
        if not claim.role:
            continue
        alpha, gained = ALPHA / PRIMARIES if claim.role == PRIMARY else ALPHA, (gains or {}).get(claim.id, 0.0)
        sides = dict.fromkeys((claim.left, claim.right, claim.gain_of, claim.gain_over))
        names = [VALUE] if claim.kind == "bound" or claim.id in spreads else [name for name in sides if name]
        found = {name: _spread(spreads, claim.id if name == VALUE else name) for name in names}
        known = {name: spread for name, spread in found.items() if spread is not None}
        need, effect, why = None, None, "no spread given"
        if len(known) == len(names):
            # Only the gain's mean counts: the better of its two arms ends that much lower (or higher).
            means = dict.fromkeys(names, 0.0) | {claim.gain_of: -gained if claim.lower_is_better else gained}
            arms = {name: {0: 0.0} for name in names}
            need, effect, why = _planned(claim, arms, known, means, True, alpha)
        numbers = (need.at_once, need.looks, need.mean) if need else (None,) * 3
        rows.append([claim.id, claim.family, claim.role, effect, why, alpha, *numbers])
    head = ["claim", "figure", "role", "effect", "effect from", "alpha", "at once", "looks", "on average"]
    return pd.DataFrame(rows, columns=head).astype({"at once": "Int64"})


def _spread(spreads: Mapping[str, float], name: str) -> float | None:
    if name in spreads:
        return spreads[name]
    try:
        return spreads.get(settings.family(name.replace("+KD", "").replace("+MoS", "")))
    except ValueError:  # no model's name
        return None


def spread(claim: Claim, verdict: Verdict) -> float:
    """Return the standard deviation of what a claim compares, from one seed (of each arm) to the next."""
    samples = judging.deciding(verdict.arms, verdict.looks, verdict.decides_from)
    return judging.estimated(samples, judging.contrasts(claim, samples)[0], verdict.within).spread


def outlook(claim: Claim, verdict: Verdict) -> str:
    """Return, for a verdict that cannot be told, its interval's half-width, the effect to be seen, and its seeds.

    Of two rates that must agree, for the one that takes more. The seeds decide the claim alone, in one look and
    without adjustment. Empty for other verdicts, and where no effect can be named.
    """
    if verdict.kind != MEASURED or verdict.verdict != CANNOT_TELL or not verdict.judged:
        return ""
    plans = []
    for v in (verdict, verdict.other):
        if v is None or not v.arms or v.low is None or v.high is None:
            continue
        need, effect, why = of_claim(claim, v, looks=False)
        if need is None or effect is None:
            return ""
        plans.append((need.at_once or MAX_SEEDS + 1, (v.high - v.low) / 2, effect, why))
    if not plans:
        return ""
    seeds, half, effect, why = max(plans)
    unit, why = claim_values.unit(claim), why.replace("smallest", "smallest effect of interest")
    seen = f"{'equality within' if claim.direction == 'equal' else 'an effect of'} {effect:.2g}{unit} ({why})"
    count = f"{seeds if seeds <= MAX_SEEDS else f'more than {MAX_SEEDS}'} {'sessions' if claim.timed else 'seeds'}"
    return (
        f"The interval is ±{half:.2g}{unit}. With this spread it takes {count} to show {seen} with 80 % probability "
        "in one look, before adjustment."
    )


@functools.lru_cache(maxsize=512)
def _need(
    means: tuple[float, ...],
    weights: tuple[tuple[float, ...], ...],
    spreads: tuple[float, ...],
    looks: bool,
    alpha: float,
) -> Need:
    """Return the seeds that make all contrasts stand out above zero."""
    if min(means) <= 0:
        return Need(None, None, None)
    statistics = _statistics(means, weights, spreads)
    numbers = range(MIN_SAMPLES, MAX_SEEDS + 1)
    at_once = _first(numbers, lambda n: _decides(statistics, (n,), alpha)[0] >= POWER)
    if at_once is None or not looks:
        return Need(at_once, None, None)
    numbers = range(EVERY * -(-at_once // EVERY), MAX_SEEDS + 1, EVERY)
    last = _first(numbers, lambda n: _decides(statistics, _looks(n), alpha)[0] >= POWER)
    return Need(
        at_once, *((None, None) if last is None else (_looks(last), _decides(statistics, _looks(last), alpha)[1]))
    )


def _looks(last: int) -> tuple[int, ...]:
    return tuple(range(EVERY, last + 1, EVERY))


def _first(numbers: range, good: Callable[[int], bool]) -> int | None:
    """Return the first number that is good, where all after it are, too; None where none is."""
    place = bisect.bisect_left(numbers, True, key=good)
    return numbers[place] if place < len(numbers) else None


def _statistics(
    means: Sequence[float], weights: Sequence[Sequence[float]], spreads: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the t statistics of simulated experiments and their degrees of freedom, from two seeds on.

    Both are [experiments, seeds - 1, contrasts].
    """
    random = np.random.default_rng(0)  # the same experiments for all plans, so that they can be compared
    values = random.standard_normal((_SIMULATED, MAX_SEEDS, len(spreads))) * np.asarray(spreads)
    n = np.arange(1, MAX_SEEDS + 1)[:, None]
    average = values.cumsum(1) / n
    variance = ((values**2).cumsum(1) - n * average**2)[:, 1:] / (n[1:] - 1) / n[1:]
    by = np.asarray(weights).T
    parts = np.maximum(variance, 1e-300)[..., None] * by**2
    error, lost = parts.sum(2), (parts**2).sum(2) / (n[1:] - 1)
    return (average[:, 1:] @ by + np.asarray(means)) / np.sqrt(error), error**2 / np.maximum(lost, math.ulp(0.0))


def _decides(statistics: tuple[np.ndarray, np.ndarray], looks: tuple[int, ...], alpha: float) -> tuple[float, float]:
    """Return in which share of the experiments a plan decides, and after how many seeds it ends on average."""
    from scipy.special import stdtrit

    t, freedom = statistics
    decided, ended = np.zeros(len(t), bool), np.full(len(t), looks[-1])
    for n in looks:
        edge = -stdtrit(freedom[:, n - 2], sequential.level(n, looks, alpha) / 2)
        now = (t[:, n - 2] > edge).all(-1) & ~decided
        ended[now] = n
        decided |= now
    return float(decided.mean()), float(ended.mean())
