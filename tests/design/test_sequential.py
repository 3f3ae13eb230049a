"""Group-sequential plans: boundaries against published tables, levels, repeated p-values, futility."""

import math

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from moelab.design import sequential
from moelab.design.sequential import boundaries, chance, level, repeated_p
from moelab.statistics import Estimate


def equal(looks):
    return [(i + 1) / looks for i in range(looks)]


def obrien_fleming_type(fraction):
    return 4 * norm.sf(norm.isf(0.05 / 4) / math.sqrt(fraction))


def pocock_type(fraction):
    return 0.05 * math.log(1 + (math.e - 1) * fraction)


@pytest.mark.parametrize(
    ("spent", "published"),
    [
        # Lan and DeMets (1983), two-sided 5 %, equally spaced looks, as in all tables since.
        (obrien_fleming_type, [2.963, 1.969]),
        (obrien_fleming_type, [3.710, 2.511, 1.993]),
        (obrien_fleming_type, [4.333, 2.963, 2.359, 2.014]),
        (obrien_fleming_type, [4.877, 3.357, 2.680, 2.290, 2.031]),
        (pocock_type, [2.157, 2.201]),
        (pocock_type, [2.438, 2.427, 2.410, 2.397, 2.386]),
    ],
)
def test_boundaries_are_the_published_ones(spent, published):
    fractions = equal(len(published))
    found = boundaries(fractions, [spent(f) for f in fractions])
    assert found == pytest.approx(published, abs=0.001)


def test_all_looks_together_miss_in_five_percent_with_few_seeds_too():
    looks = (3, 6, 9)
    values = np.random.default_rng(1).standard_normal((60_000, 9))
    missed = np.zeros(len(values), bool)
    for n in looks:
        part = values[:, :n]
        statistic = np.abs(part.mean(1)) / part.std(1, ddof=1) * math.sqrt(n)
        missed |= statistic > student.isf(level(n, looks) / 2, n - 1)
    assert 0.048 < missed.mean() < 0.057


def test_levels():
    assert level(3) == level(3, (3,)) == level(7, (3,)) == 0.05
    assert level(3, (3, 6, 9)) == pytest.approx(0.05 / 3), "a third of the seeds spends a third"
    assert level(3, (3, 6, 9)) < level(6, (3, 6, 9)) < level(9, (3, 6, 9)) < 0.05
    assert level(12, (3, 6, 9)) == level(9, (3, 6, 9)), "the plan has ended"
    assert level(3, (3, 6, 9)) < level(5, (3, 6, 9)) < level(9, (3, 6, 9)), "a look between"
    assert level(3, (6,)) == pytest.approx(0.025), "looked at before the only look"


@pytest.mark.parametrize("looks", [(3, 6, 9), (3, 5)])
def test_a_repeated_p_value_is_below_five_percent_where_the_interval_excludes(looks):
    for n in looks:
        assert repeated_p(level(n, looks), n, looks) == pytest.approx(0.05, abs=1e-6)
        assert repeated_p(0.9 * level(n, looks), n, looks) < 0.05 < repeated_p(1.1 * level(n, looks), n, looks)
    assert repeated_p(0.03, 3) == 0.03 and repeated_p(1.0, 3, looks) == 1.0 and repeated_p(0.0, 3, looks) == 0.0


def test_futility_is_the_chance_of_the_last_look():
    """Against simulation: what 3 seeds of some spread leave to decide with 12."""
    looks, so_far, spread, effect = (3, 6, 9, 12), -0.004, 0.02, -0.015
    found = Estimate(so_far, spread / math.sqrt(3), 3)
    to_come = np.random.default_rng(2).normal(effect, spread, (100_000, 9)).sum(1)
    z = (3 * so_far + to_come) / math.sqrt(12) / spread
    edge = student.isf(level(12, looks) / 2, 11)
    assert chance(found, effect, looks) == pytest.approx((z < -edge).mean(), abs=0.005)
    none = np.random.default_rng(3).normal(0, spread, (100_000, 9)).sum(1)
    within = np.abs(3 * so_far + none) / 12 + edge * spread / math.sqrt(12) < abs(effect)
    wide = chance(found, effect, looks, within=-effect)
    assert wide == pytest.approx(max(within.mean(), (z < -edge).mean()), abs=0.005)
    assert chance(Estimate(0.0, 0.3, 3), -0.01, looks, within=0.01) < sequential.FUTILE
    assert chance(Estimate(0.0, 0.3, 12), -0.01, looks, within=0.01) == 1.0, "nothing is left to wait for"
