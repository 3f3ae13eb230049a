"""Estimates, their intervals and p-values, and Holm's adjustment."""

import math
from dataclasses import astuple

import numpy as np
import pytest
from scipy.stats import false_discovery_control, ttest_ind
from scipy.stats import t as student

from moelab.statistics import Estimate, benjamini_hochberg, holm, interval, ratio_interval


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


def test_a_difference_of_means_is_welchs():
    left, right = [1.0, 2.0, 4.0, 3.0], [5.0, 9.0, 7.0]
    found, theirs = Estimate.contrast([(1, left), (-1, right)]), ttest_ind(left, right, equal_var=False)
    assert (found.p(), found.freedom, found.samples) == (pytest.approx(theirs.pvalue), pytest.approx(theirs.df), 3)
    assert found.interval() == pytest.approx(tuple(theirs.confidence_interval()))
    moved = ttest_ind(left, [v - 2 for v in right], equal_var=False)
    assert found.p(-2) == pytest.approx(moved.pvalue), "against another difference than none"
    assert astuple(Estimate.contrast([(1, left)])) == pytest.approx(astuple(Estimate.of(left)))
    one = Estimate.contrast([(1, left), (-1, [2.0])])
    assert one.error == math.inf and one.p() == 1.0 and one.interval() == (-math.inf, math.inf)
    still = Estimate.contrast([(1, [2.0, 2.0, 2.0]), (-1, [1.0, 1.0, 1.0])])
    assert (still.error, still.p(), still.interval()) == (0.0, 0.0, (1.0, 1.0))
    half = Estimate.contrast([(1, left), (-1, [3.0, 3.0, 3.0])])
    assert half.freedom == pytest.approx(3) and half.error == Estimate.of(left).error, "an arm without spread adds none"


@pytest.mark.parametrize("weights", [(1.0, -1.0, 0.0), (1.0, -0.75, -0.25)])
def test_contrasts_of_few_unequal_samples_miss_in_five_percent(weights):
    random, sizes, spreads = np.random.default_rng(0), (3, 6, 9), (1.0, 3.0, 0.5)
    groups = [random.normal(0, spread, (40_000, n)) for n, spread in zip(sizes, spreads, strict=True)]
    parts = np.stack([w**2 * g.var(1, ddof=1) / g.shape[1] for w, g in zip(weights, groups, strict=True)])
    error2 = parts.sum(0)
    freedom = error2**2 / sum(part**2 / (n - 1) for part, n in zip(parts, sizes, strict=True))
    mean = sum(w * g.mean(1) for w, g in zip(weights, groups, strict=True))
    first = Estimate.contrast([(w, list(g[0])) for w, g in zip(weights, groups, strict=True) if w])
    assert (first.mean, first.error**2) == (pytest.approx(mean[0]), pytest.approx(error2[0]))
    assert first.freedom == pytest.approx(freedom[0])
    missed = np.abs(mean) > student.isf(0.025, freedom) * np.sqrt(error2)
    assert 0.04 < missed.mean() < 0.065


def test_q_values_are_those_of_benjamini_and_hochberg():
    p_values = [0.01, 0.04, 0.03, 0.005, 0.6]
    assert benjamini_hochberg(p_values) == pytest.approx(false_discovery_control(p_values))
    assert benjamini_hochberg([]) == [] and benjamini_hochberg([0.2]) == [0.2]


def test_holm_multiplies_the_least_by_their_number_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []
    assert holm([0.01, math.nan, 0.02]) == pytest.approx([0.03, 1.0, 0.04]) and holm([math.nan]) == [1.0]
