"""Look at a comparison several times without raising its chance of a wrong verdict (group-sequential plans).

A *plan* is a tuple of *looks*: the numbers of seeds at which a comparison is judged, such as (3, 6, 9). Were each look
judged by a 95 % interval, the chance that one of three misses the true mean would be 10 %. So the 5 % are spent over
the looks, by an alpha-spending function (Lan and DeMets 1983): at n of N planned seeds, n / N of the 5 % are spent
(Kim and DeMets 1987, rho = 1). Each look gets the *level* at which the boundary of its z statistic is crossed; that
level's Student interval is a *repeated confidence interval* (Jennison and Turnbull 1989): all looks' intervals hold the
true mean together with 95 % probability, whenever one stops.

Few seeds: boundaries are those of z statistics, and the t statistic of a look is judged at the same two-sided level
(Jennison and Turnbull 2000, section 4.4). With looks at 3, 6, … up to 30 seeds this misses the true mean in 5.3 to
5.5 % of simulated experiments. The boundary that is usual for large trials, O'Brien and Fleming's, would spend so
little at 3 seeds that a t statistic above 69 were needed there (looks at 3, 6, 9); ours needs one above 7.6.

*Futility*: where the last look is unlikely to decide anything (`chance` below `FUTILE`), the plan stops.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from moelab.lazy import np
from moelab.statistics import ALPHA, Estimate

_HALF = 120  # nodes of the integration on either side of zero: boundaries are exact to four digits

FUTILE = 0.1
"""A plan stops for futility where the chance that its last look decides is smaller."""


def boundaries(fractions: Sequence[float], cumulative: Sequence[float]) -> list[float]:
    """Return the boundaries of |z| at looks, by numerical integration (Armitage, McPherson and Rowe 1969).

    Args:
        fractions: of the planned seeds at each look, increasing.
        cumulative: chance, under no effect, that a boundary has been crossed at this look or before.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtr

    def beyond(z: float, goal: float, x: np.ndarray, mass: np.ndarray, step: float, root: float) -> float:
        return float(mass @ (ndtr((x - z * root) / step) + ndtr((-z * root - x) / step))) - goal

    found: list[float] = []
    # The sum of the samples is a random walk: after the fraction f its variance is f. x and mass: its distribution
    # among walks that have crossed no boundary yet, on a grid.
    x, mass, before, gone = np.zeros(1), np.ones(1), 0.0, 0.0
    for fraction, total in zip(fractions, cumulative, strict=True):
        step, root = math.sqrt(fraction - before), math.sqrt(fraction)
        z = brentq(beyond, 0, 12, (total - gone, x, mass, step, root))
        found.append(z)
        grid, width = np.linspace(-z * root, z * root, 2 * _HALF + 1, retstep=True)
        simpson = width / 3 * np.array([1, *[4, 2] * (_HALF - 1), 4, 1])
        density = np.exp(-(((grid[:, None] - x) / step) ** 2) / 2) / math.sqrt(2 * math.pi) / step
        mass = simpson * (density @ mass)
        x, before, gone = grid, fraction, total
    return found


@functools.lru_cache(maxsize=1024)
def _levels(fractions: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    from scipy.special import ndtr

    return tuple(float(2 * ndtr(-z)) for z in boundaries(fractions, [alpha * f for f in fractions]))


def level(seeds: int, looks: tuple[int, ...] = (), alpha: float = ALPHA) -> float:
    """Return the two-sided level at which a comparison is judged at a number of seeds.

    At a number between two looks, the looks before and this one are counted. After the last look its level stays.
    Without a plan, and at the end of one with a single look, it is alpha.

    Args:
        looks: of the plan, increasing.
        alpha: of all looks together.
    """
    if not looks or (len(looks) == 1 and seeds >= looks[0]):
        return alpha
    if seeds in looks[:-1]:  # the levels of a plan's looks are computed together
        return _levels(tuple(n / looks[-1] for n in looks), alpha)[looks.index(seeds)]
    taken = looks if seeds >= looks[-1] else (*(n for n in looks if n < seeds), seeds)
    return _levels(tuple(n / looks[-1] for n in taken), alpha)[-1]


def repeated_p(p: float, seeds: int, looks: tuple[int, ...] = ()) -> float:
    """Return the p-value of a look, adjusted for all looks: below 0.05 just where its repeated interval excludes.

    Args:
        p: of the look by itself.
    """
    if level(seeds, looks) == ALPHA or not 0 < p < 1:
        return p
    from scipy.optimize import brentq

    low, high = 1e-12, 0.99
    if level(seeds, looks, high) <= p:
        return 1.0
    if level(seeds, looks, low) >= p:
        return low
    return float(brentq(lambda alpha: level(seeds, looks, alpha) - p, low, high, xtol=1e-9))


def chance(estimate: Estimate, effect: float, looks: tuple[int, ...], *, within: float = 0.0) -> float:
    """Return the chance that the last look decides, given the samples so far and their spread.

    That is the chance that its interval excludes zero if the true mean is `effect`, or, if that is greater, the chance
    that it lies within -+ `within` if the true mean is zero. Samples to come are taken as normal, of the spread so far.

    Args:
        effect: with the sign that is claimed.
        within: the smallest effect of interest, where the second decision is one, too.
    """
    from scipy.special import ndtr, stdtrit

    last, n, spread = looks[-1], estimate.samples, estimate.spread
    if n >= last or not spread:
        return 1.0
    edge = -float(stdtrit(estimate.freedom * (last - 1) / max(n - 1, 1), level(last, looks) / 2))
    done, left = n / last, math.sqrt(1 - n / last)
    so_far = estimate.mean / spread * n / math.sqrt(last)  # of the z statistic of the last look
    there = abs(effect) / spread * math.sqrt(last)
    exceeds = ndtr((there * (1 - done) + math.copysign(1, effect) * so_far - edge) / left)
    room = max(within / spread * math.sqrt(last) - edge, 0.0)
    lies_within = ndtr((room - so_far) / left) - ndtr((-room - so_far) / left)
    return float(max(exceeds, lies_within if within else 0.0))
