"""Estimate means of a few samples with Student intervals and p-values; Holm's adjustment. Imports nothing of moelab."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ALPHA = 0.05
"""Chance that a 95 % interval misses the true mean."""


@dataclass(frozen=True)
class Estimate:
    """Hold a mean of samples.

    Attributes:
        mean: of the samples.
        error: standard error of the mean; infinite for one sample.
        samples: how many there are.
    """

    mean: float
    error: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float], within: float = 0.0) -> Estimate:
        """Return the estimate from values.

        Args:
            within: standard error of each value by itself, where it is known, such as that of a session's median from
                its rounds. Values cannot tell their mean better than that allows, so the spread between a few values
                that lie close together by chance does not count below it.
        """
        n, mean = len(values), math.fsum(values) / len(values)
        if n < 2:
            return cls(mean, math.inf, n)
        between = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
        return cls(mean, math.sqrt(max(between, within**2) / n), n)

    @property
    def spread(self) -> float:
        """Standard deviation of a sample."""
        return self.error * math.sqrt(self.samples)

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Return the Student interval that misses the true mean with the probability alpha."""
        from scipy.stats import t

        half = float(t.isf(alpha / 2, self.samples - 1)) * self.error if self.samples > 1 else math.inf
        return self.mean - half, self.mean + half

    def p(self, against: float = 0.0) -> float:
        """Return the two-sided p-value of a Student test that the true mean is `against`; 1 for one sample."""
        from scipy.stats import t

        distance = abs(self.mean - against)
        if self.samples < 2 or not distance:
            return 1.0
        return float(2 * t.sf(distance / self.error, self.samples - 1)) if self.error else 0.0


def interval(values: Sequence[float], alpha: float = ALPHA) -> tuple[float, float, float]:
    """Return the mean and its Student interval, 95 % by default; the bounds are infinite for a single value."""
    estimate = Estimate.of(values)
    return estimate.mean, *estimate.interval(alpha)


def ratio_interval(values: Sequence[float], alpha: float = ALPHA) -> tuple[float, float, float]:
    """Return the geometric mean of ratios and its interval, that of their logarithms; a single value is all three."""
    mean, *bounds = interval([math.log(value) for value in values], alpha)
    low, high = bounds if len(values) > 1 else (mean, mean)
    return math.exp(mean), math.exp(low), math.exp(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number after Holm (1979), in the order given.

    Rejecting where the adjusted value is below 0.05 keeps the chance of any wrong rejection below 5 %. A test whose
    p-value is NaN counts among the tests and rejects nothing: its adjusted value is 1.
    """
    known = [1.0 if math.isnan(p) else p for p in p_values]
    adjusted, running = [1.0] * len(known), 0.0
    for rank, i in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        running = max(running, min(1.0, (len(known) - rank) * known[i]))
        adjusted[i] = running
    return adjusted
