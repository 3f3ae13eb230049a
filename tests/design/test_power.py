"""Seeds needed: against the noncentral t distribution and simulated experiments, and for which effect."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import nct
from scipy.stats import t as student

from moelab import paper
from moelab.design import power
from moelab.design.judging import agreed, judge


def exact(seeds, ratio):
    """Power of a two-sided t test, the effect being `ratio` standard deviations; the wrong side is left out."""
    return nct.sf(student.isf(0.025, seeds - 1), seeds - 1, ratio * math.sqrt(seeds))


@pytest.mark.parametrize("ratio", [0.4, 0.7, 1.0, 1.5, 2.5])
def test_the_seeds_of_one_look_are_those_of_the_noncentral_t(ratio):
    needed = next(n for n in range(3, 100) if exact(n, ratio) >= 0.8)
    assert abs(power.of_difference(1.0, ratio).at_once - needed) <= 1
    assert power.of_difference(0.02, 0.02 * ratio) == power.of_difference(0.02, -0.02 * ratio)


def test_looks_need_a_few_seeds_more_at_most_and_fewer_on_average():
    need = power.of_difference(1.0, 1.0)
    assert need.looks == (3, 6, 9, 12) and need.at_once in (10, 11) and need.mean < need.at_once
    assert power.of_difference(1.0, 8.0) == power.Need(3, (3,), 3.0)
    assert power.of_difference(1.0, 0.1) == power.Need(None, None, None), "more than 99"


def test_an_equality_needs_the_gain_and_the_margin():
    random = np.random.default_rng(0)
    apart, gain = random.normal(0, 0.01, 4000), random.normal(0.04, 0.01, 4000)  # a margin of 0.01
    apart -= apart.mean()
    needed = power.of_equality(list(apart), list(gain)).at_once

    def decides(seeds):
        d, g = random.normal(0, 0.01, (20_000, seeds)), random.normal(0.04, 0.01, (20_000, seeds))
        edge = student.isf(0.025, seeds - 1) / math.sqrt(seeds)
        stands = [(x.mean(1) - edge * x.std(1, ddof=1)) > 0 for x in (g, g / 4 - d, g / 4 + d)]
        return np.logical_and.reduce(stands).mean()

    assert decides(needed - 1) < 0.815 and decides(needed) > 0.785
    assert power.of_equality([0.0, 0.01, 0.02], [-0.1, -0.11, -0.1]) == power.Need(None, None, None)


@pytest.mark.parametrize(
    ("id", "values", "gain", "effect", "why"),
    [
        ("moe128-350m-beats-own-base", [-0.3, -0.31, -0.29], (), 0.307 / 2, "half of -0.307"),
        ("moe128-beats-moe32", [-0.3, -0.31, -0.29], (), 0.01, "the smallest"),
        ("residual-faster-than-top2", [1.0, 1.1, 1.05], (), 0.05, "half of +0.1"),
        ("pr-moe-matches-moe128", [0.01, 0.0, 0.02], (0.1, 0.1, 0.1), 0.025, "25% of the gain"),
        ("pr-moe-matches-moe128", [0.01, 0.0, 0.02], (), None, "no gain measured"),
        ("pr-moe-matches-moe128", [0.01, 0.0, 0.02], (-0.1, -0.1, -0.1), None, "the gain is not above 0"),
    ],
)
def test_the_effect_is_half_the_papers_or_the_smallest_of_interest(id, values, gain, effect, why):
    claim = paper.claim(id)
    need, found, said = power.of_claim(claim, judge(claim, values, gain=gain))
    assert (need is None) == (effect is None) and said.startswith(why)
    assert found is None if effect is None else found == pytest.approx(effect)
    assert power.spread(judge(claim, values, gain=gain)) == pytest.approx(np.std(values, ddof=1))


def test_an_undecided_verdict_says_what_it_would_take():
    claim, values = paper.claim("moe128-350m-beats-own-base"), [-0.3, 0.2, -0.31]
    need = power.of_difference(np.std(values, ddof=1), 0.307 / 2, looks=False)
    assert need == replace(power.of_difference(np.std(values, ddof=1), 0.307 / 2), looks=None, mean=None)
    undecided = judge(claim, values)
    said = power.outlook(claim, undecided)
    assert said.startswith(
        f"The interval is ±0.72 nats. With this spread it takes {need.at_once} seeds to show an effect"
    )
    assert "an effect of 0.15 nats (half of -0.307) with 80 % probability" in said
    assert "more than 99 seeds" in power.outlook(claim, judge(claim, [-9.0, 9.0, 1.0]))
    decided = judge(claim, [-0.3, -0.31, -0.29])
    assert not power.outlook(claim, decided) and not power.outlook(claim, judge(claim, [-0.3, 0.2]))
    of_both = power.outlook(claim, agreed(decided, replace(undecided, note="At one shared rate")))
    assert of_both == said, "the rate that takes more"
    equal = paper.claim("pr-moe-matches-moe128")
    assert "equality within 0.025 nats" in power.outlook(equal, judge(equal, [0.01, 0.0, 0.1], gain=[0.1, 0.1, 0.1]))
    assert not power.outlook(equal, judge(equal, [0.01, 0.0, 0.1], gain=[-0.1, -0.1, -0.1]))
