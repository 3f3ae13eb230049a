"""Compute Student intervals and p-values of a few samples, and Holm's adjustment. Imports nothing of moelab."""

from __future__ import annotations

import math
from collections.abc import Sequence


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % Student interval; the bounds are infinite for a single value."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, -math.inf, math.inf
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half


def p_value(low: float, high: float, samples: int, against: float = 0.0) -> float:
    """Return the two-sided p-value of a Student test that the mean is `against`, from the mean's 95 % interval.

    Args:
        low, high: of `interval`.
        samples: how many values the interval is of, at least 2.
    """
    from scipy.stats import t

    distance, half = abs((low + high) / 2 - against), (high - low) / 2
    if half == 0:
        return 0.0 if distance else 1.0
    return float(2 * t.sf(distance / half * t.ppf(0.975, samples - 1), samples - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number after Holm (1979), in the order given.

    Rejecting where the adjusted value is below 0.05 keeps the chance of any wrong rejection below 5 %.
    """
    adjusted, running = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
