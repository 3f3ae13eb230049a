"""Compute how many seeds a comparison needs, before they are trained.

A comparison *decides* where its interval excludes "no effect" or, for two arms that are claimed to be equal, where it
lies within the margin. Its *power* is the chance of that if the effect is there. The number of seeds is the least with
a power of `POWER`: for one look, and for looks at every third seed (`moelab.design.sequential`), which need a few more
seeds at most and fewer on average. Powers are those of simulated experiments: normal samples of the spread that earlier
runs had. A spread of five seeds is itself uncertain: the true one may well be half or twice as large, and with it the
seeds a quarter or four times as many.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moelab.design import sequential, stated
from moelab.design.judging import MARGIN, MIN_SAMPLES
from moelab.design.verdicts import CANNOT_TELL, MEASURED, UNDECIDED, Verdict
from moelab.lazy import np
from moelab.paper.claims import Claim
from moelab.statistics import Estimate

POWER = 0.8
"""Chance to decide, if the effect is there, that a plan is made for."""

EVERY = 3
"""Seeds from one look to the next."""

MAX_SEEDS = 99
"""More seeds are not counted."""

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


def of_difference(spread: float, effect: float, looks: bool = True) -> Need:
    """Return the number of seeds that shows an effect if there is one.

    Args:
        spread: standard deviation of the difference over seeds.
        effect: that is to be seen, in the same unit.
        looks: also plan looks, which takes longer to compute.
    """
    return _need((abs(effect),), ((spread**2,),), looks)


def of_equality(differences: Sequence[float], gain: Sequence[float], looks: bool = True) -> Need:
    """Return the seeds that show two arms to be equal within `MARGIN` of a gain, if they are.

    Three means must stand out of their spread: the gain, and the margin minus and plus the difference.

    Args:
        differences, gain: per seed, of earlier runs; their mean gain is taken as the true one.
    """
    gained = np.asarray(gain, float)
    margin, apart = MARGIN * gained, np.asarray(differences, float)
    columns = np.stack([gained, margin - apart, margin + apart])
    means = (gained.mean(), margin.mean(), margin.mean())
    return _need(tuple(map(float, means)), tuple(tuple(map(float, row)) for row in np.cov(columns)), looks)


def of_claim(claim: Claim, verdict: Verdict, looks: bool = True) -> tuple[Need | None, float | None, str]:
    """Return what a measured claim needs by the values it was judged by, the effect, and where the effect is from.

    The effect is half the paper's number, or the smallest of interest. There is no need where no effect can be named.
    """
    effect = stated.effect(claim)
    if effect is not None:
        why = f"half of {claim.value - stated.neutral(claim):+.3g}" if claim.value is not None else "the smallest"
        return of_difference(spread(verdict), effect, looks), abs(effect), why
    gained = sum(verdict.gain) / max(len(verdict.gain), 1)
    if gained > 0 and len(verdict.gain) == len(verdict.values):
        apart = [value - stated.neutral(claim) for value in verdict.values]
        return of_equality(apart, verdict.gain, looks), MARGIN * gained, f"{MARGIN:.0%} of the gain"
    if not claim.gain_of:
        return None, None, "no effect named"
    return None, None, "the gain is not above 0" if verdict.gain else "no gain measured"


def outlook(claim: Claim, verdict: Verdict) -> str:
    """Return, for an undecided verdict, its interval's half-width, the effect to be seen, and the seeds that takes.

    Of two rates that must agree, for the one that takes more. The seeds decide the claim alone, in one look and
    without Holm's adjustment. Empty for other verdicts, and where no effect can be named.
    """
    if verdict.kind != MEASURED or verdict.verdict not in (UNDECIDED, CANNOT_TELL):
        return ""
    plans = []
    for v in (verdict, verdict.other):
        if v is None or not v.values or v.low is None or v.high is None:
            continue
        need, effect, why = of_claim(claim, v, looks=False)
        if need is None or effect is None:
            return ""
        plans.append((need.at_once or MAX_SEEDS + 1, (v.high - v.low) / 2, effect, why))
    if not plans:
        return ""
    seeds, half, effect, why = max(plans)
    unit, why = stated.unit(claim), why.replace("smallest", "smallest effect of interest")
    seen = f"{'equality within' if claim.direction == 'equal' else 'an effect of'} {effect:.2g}{unit} ({why})"
    count = f"{seeds if seeds <= MAX_SEEDS else f'more than {MAX_SEEDS}'} {'sessions' if claim.timed else 'seeds'}"
    return (
        f"The interval is ±{half:.2g}{unit}. With this spread it takes {count} to show {seen} with 80 % probability "
        "in one look, before Holm's adjustment."
    )


def spread(verdict: Verdict) -> float:
    """Return the standard deviation of a verdict's samples."""
    return Estimate.of(verdict.values, verdict.within).spread


@functools.lru_cache(maxsize=512)
def _need(means: tuple[float, ...], covariance: tuple[tuple[float, ...], ...], looks: bool) -> Need:
    """Return the seeds that make all means stand out above zero; the covariance is that of one seed's samples."""
    if min(means) <= 0:
        return Need(None, None, None)
    t = _statistics(means, covariance)
    at_once = _first(range(MIN_SAMPLES, MAX_SEEDS + 1), lambda n: _decides(t, (n,))[0] >= POWER)
    if at_once is None or not looks:
        return Need(at_once, None, None)
    last = _first(
        range(EVERY * -(-at_once // EVERY), MAX_SEEDS + 1, EVERY), lambda n: _decides(t, _looks(n))[0] >= POWER
    )
    return Need(at_once, *((None, None) if last is None else (_looks(last), _decides(t, _looks(last))[1])))


def _looks(last: int) -> tuple[int, ...]:
    return tuple(range(EVERY, last + 1, EVERY))


def _first(numbers: range, good: Callable[[int], bool]) -> int | None:
    """Return the first number that is good, where all after it are, too; None where none is."""
    place = bisect.bisect_left(numbers, True, key=good)
    return numbers[place] if place < len(numbers) else None


def _statistics(means: Sequence[float], covariance: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the t statistics of simulated experiments: [experiments, seeds - 1, means], from two seeds on."""
    random = np.random.default_rng(0)  # the same experiments for all plans, so that they can be compared
    values = random.multivariate_normal(means, covariance, (_SIMULATED, MAX_SEEDS), method="eigh")
    n = np.arange(1, MAX_SEEDS + 1)[:, None]
    average = values.cumsum(1) / n
    variance = ((values**2).cumsum(1) - n * average**2)[:, 1:] / (n[1:] - 1)
    return average[:, 1:] / np.sqrt(np.maximum(variance, 1e-300) / n[1:])


def _decides(t: np.ndarray, looks: tuple[int, ...]) -> tuple[float, float]:
    """Return in which share of the experiments a plan decides, and after how many seeds it ends on average."""
    from scipy.stats import t as student

    decided, ended = np.zeros(len(t), bool), np.full(len(t), looks[-1])
    for n in looks:
        edge = student.isf(sequential.level(n, looks) / 2, n - 1)
        now = (t[:, n - 2] > edge).all(-1) & ~decided
        ended[now] = n
        decided |= now
    return float(decided.mean()), float(ended.mean())
