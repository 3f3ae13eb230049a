"""Estimates, their intervals and p-values, and Holm's adjustment."""

import math

import pytest

from moelab.statistics import Estimate, holm, interval, ratio_interval


def test_interval_is_students():
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and high - mean == pytest.approx(4.302652729911275 / 3**0.5) == pytest.approx(mean - low)
    _, low, high = interval([1.0, 2.0, 3.0], 0.01)
    assert high - 2.0 == pytest.approx(9.924843200918294 / 3**0.5) == pytest.approx(2.0 - low)
    assert interval([1.0]) == (1.0, -math.inf, math.inf)


def test_ratios_have_the_interval_of_their_logarithms():
    mean, low, high = ratio_interval([1.0, 4.0, 2.0])
    assert mean == pytest.approx(2.0) and low * high == pytest.approx(mean**2) and 0 < low < 1 < high
    inverse = ratio_interval([1.0, 0.25, 0.5])
    assert inverse == pytest.approx((1 / mean, 1 / high, 1 / low)), "which of both is divided makes no difference"
    assert ratio_interval([3.0]) == pytest.approx((3.0, 3.0, 3.0))


def test_p_values_are_students():
    # One degree of freedom is the Cauchy distribution: two-sided p of t is 1 - 2 / pi x atan(t).
    found = Estimate.of([1.0, 3.0])  # mean 2, standard error 1
    assert (found.error, found.spread) == (pytest.approx(1), pytest.approx(2**0.5))
    assert found.p() == pytest.approx(1 - 2 / math.pi * math.atan(2)) and found.p(1.0) == pytest.approx(0.5)
    assert Estimate.of([1.0, 1.0, 1.0]).p() == 0 and Estimate.of([1.0, 1.0, 1.0]).p(1.0) == 1
    assert Estimate.of([1.0]).p() == 1.0


def test_values_tell_their_mean_no_better_than_each_is_known():
    assert Estimate.of([1.0, 1.0, 1.0], within=0.3).error == pytest.approx(0.3 / 3**0.5)
    assert Estimate.of([0.0, 1.0, 2.0], within=0.3).error == pytest.approx(1 / 3**0.5), "the spread between is greater"


def test_holm_multiplies_the_least_by_their_number_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []
    assert holm([0.01, math.nan, 0.02]) == pytest.approx([0.03, 1.0, 0.04]) and holm([math.nan]) == [1.0]
