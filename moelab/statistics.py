"""Estimate means of a few samples, and contrasts of such means, with Student intervals and p-values; adjust p-values.

Imports nothing of moelab.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ALPHA = 0.05
"""Chance that a 95 % interval misses the true mean."""


@dataclass(frozen=True)
class Estimate:
    """Hold a mean of samples, or a sum of such means times weights.

    Attributes:
        mean: of the samples.
        error: standard error of the mean; infinite for one sample.
        samples: how many there are; of several groups, those of the smallest.
        freedom: degrees of freedom of Student's t; by default one less than the samples.
    """

    mean: float
    error: float
    samples: int
    freedom: float = -1.0

    def __post_init__(self) -> None:
        if self.freedom < 0:
            object.__setattr__(self, "freedom", float(self.samples - 1))

    @classmethod
    def of(cls, values: Sequence[float], within: float = 0.0) -> Estimate:
        """Return the estimate of a mean.

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

    @classmethod
    def contrast(cls, groups: Sequence[tuple[float, Sequence[float]]]) -> Estimate:
        """Return the sum of the means of independent groups times their weights, as Welch's test has it.

        Each group has a spread of its own; the degrees of freedom are those of Welch and Satterthwaite.

        Args:
            groups: (weight, values) of each.
        """
        parts = [(weight, cls.of(values)) for weight, values in groups]
        variances = [(weight * part.error) ** 2 for weight, part in parts]
        samples, error = min(part.samples for _, part in parts), math.sqrt(math.fsum(variances))
        lost = math.fsum(v**2 / part.freedom for v, (_, part) in zip(variances, parts, strict=True) if 0 < v < math.inf)
        freedom = error**4 / lost if lost and math.isfinite(error) else float(samples - 1)
        return cls(math.fsum(weight * part.mean for weight, part in parts), error, samples, freedom)

    @property
    def spread(self) -> float:
        """Standard deviation of a sample; of a contrast, of one that takes a sample of each group."""
        return self.error * math.sqrt(self.samples)

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Return the Student interval that misses the true mean with the probability alpha."""
        from scipy.special import stdtrit  # scipy.stats takes a second to import

        half = -float(stdtrit(self.freedom, alpha / 2)) * self.error if self.samples > 1 else math.inf
        return self.mean - half, self.mean + half

    def p(self, against: float = 0.0) -> float:
        """Return the two-sided p-value of a Student test that the true mean is `against`; 1 for one sample."""
        from scipy.special import stdtr

        distance = abs(self.mean - against)
        if self.samples < 2 or not distance:
            return 1.0
        return float(2 * stdtr(self.freedom, -distance / self.error)) if self.error else 0.0


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


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return q-values after Benjamini and Hochberg (1995), in the order given.

    Of the tests whose q-value is below 0.05, 5 % at most are expected to be wrong. They say how much a list of results
    can be trusted on average, and bound no chance of a single mistake, as `holm` does.
    """
    adjusted, running, count = [1.0] * len(p_values), 1.0, len(p_values)
    for rank, i in sorted(enumerate(sorted(range(count), key=p_values.__getitem__), 1), reverse=True):
        running = min(running, p_values[i] * count / rank)
        adjusted[i] = running
    return adjusted
