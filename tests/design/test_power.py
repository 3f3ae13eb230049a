"""Seeds needed: against the noncentral t distribution and simulated experiments, and for which effect."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import nct, ttest_ind
from scipy.stats import t as student

from moelab import paper
from moelab.design import power
from moelab.design.judging import agreed, judge
from moelab.design.verdicts import HOLDS


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


def test_a_difference_of_arms_needs_what_welchs_test_needs():
    spreads, effect = {"a": 0.01, "b": 0.03}, 0.03
    needed = power.of_contrasts([({"a": 1.0, "b": -1.0}, effect)], spreads, looks=False).at_once
    random = np.random.default_rng(0)

    def decides(seeds):
        left, right = random.normal(0, 0.01, (10_000, seeds)), random.normal(effect, 0.03, (10_000, seeds))
        return (ttest_ind(left, right, axis=1, equal_var=False).pvalue < 0.05).mean()

    assert decides(needed - 1) < 0.815 and decides(needed) > 0.785
    stricter = power.of_contrasts([({"a": 1.0, "b": -1.0}, effect)], spreads, looks=False, alpha=0.05 / 9).at_once
    assert stricter > needed


def test_an_equality_needs_the_gain_and_the_margin():
    claim, spreads = paper.claim("pr-moe-matches-moe128"), {"PR-MoE": 0.01, "MoE-32": 0.01, "MoE-128": 0.01}
    table = power.plan(spreads, {claim.id: 0.08}).set_index("claim")
    needed = table.loc[claim.id, "at once"]
    random = np.random.default_rng(0)

    def decides(seeds):
        pr, many, few = (random.normal(mean, 0.01, (400, seeds)) for mean in (3.0, 3.0, 3.08))
        arms = {"350M+PR-MoE-32/64": pr, "350M+MoE-128": many, "350M+MoE-32": few}
        found = [judge(claim, arms={n: dict(enumerate(v[i])) for n, v in arms.items()}) for i in range(400)]
        return np.mean([verdict.verdict == HOLDS for verdict in found])

    assert decides(needed) > 0.72 and decides(max(3, needed - 2)) < 0.85
    assert table.loc["moe128-beats-moe32", "alpha"] == pytest.approx(0.05 / 9) and table.loc[claim.id, "alpha"] == 0.05


def test_a_plan_has_every_claim_of_a_family_by_the_spreads_of_arms():
    spreads = {
        "Dense": 0.05,
        "MoE-32": 0.002,
        "MoE-128": 0.001,
        "350M+Residual-MoE-32": 0.02,
        "moe-crossover-350m": 10.0,
    }
    table = power.plan(spreads).set_index("claim")
    assert set(table.index) == {claim.id for claim in paper.claims() if claim.role}
    primary = table.loc["moe128-beats-moe32"]
    assert primary[["figure", "role", "effect"]].tolist() == ["Fig 4", "primary", 0.01] and primary["looks"] == (3, 6)
    assert table.loc["residual-shrinks-gap", "at once"] > table.loc["pyramid-shrinks-gap", "at once"], "an arm's own"
    crossing = table.loc["moe-crossover-350m"]
    assert crossing["effect"] == pytest.approx(0.15 * 212.5) and crossing["at once"] == 4
    assert table.loc["pr-moe-beats-moe32", "effect from"] == "no spread given"
    assert table.loc["residual-equals-top2", "effect from"] == "the gain is not above 0"


def near(values, gain):
    """Judge PR-MoE beside MoE-128, which does not vary, by values and by what MoE-128 gains over MoE-32."""
    arms = {"350M+PR-MoE-32/64": values, "350M+MoE-128": [0.0] * len(values), "350M+MoE-32": gain}
    return judge(paper.claim("pr-moe-matches-moe128"), arms={n: dict(enumerate(v)) for n, v in arms.items() if v})


@pytest.mark.parametrize(
    ("id", "verdict", "effect", "why"),
    [
        ("moe128-350m-beats-own-base", [-0.3, -0.31, -0.29], 0.307 / 2, "half of -0.307"),
        ("moe128-beats-moe32", [-0.3, -0.31, -0.29], 0.01, "the smallest"),
        ("dense-equivalent-4-5x", [4.3, 4.4, 4.6], 0.5, "from the middle of the range to its ends"),
        ("kernels-6x", [6.0, 6.1, 6.05], None, "no effect named"),
        ("pr-moe-matches-moe128", near([0.01, 0.0, 0.02], [0.1, 0.1, 0.1]), 0.025, "25% of the gain"),
        ("pr-moe-matches-moe128", near([0.01, 0.0, 0.02], []), None, "no gain measured"),
        ("pr-moe-matches-moe128", near([0.01, 0.0, 0.02], [-0.1] * 3), None, "the gain is not above 0"),
    ],
)
def test_the_effect_is_half_the_papers_or_the_smallest_of_interest(id, verdict, effect, why):
    claim = paper.claim(id)
    judged = judge(claim, verdict) if isinstance(verdict, list) else verdict
    need, found, said = power.of_claim(claim, judged)
    assert (need is None) == (effect is None) and said.startswith(why)
    assert found is None if effect is None else found == pytest.approx(effect)
    samples = next(iter(judged.arms.values())) if isinstance(verdict, list) else {0: 0.01, 1: 0.0, 2: 0.02}
    assert power.spread(claim, judged) == pytest.approx(np.std(list(samples.values()), ddof=1))


def test_a_verdict_that_cannot_be_told_says_what_it_would_take():
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
    assert "equality within 0.025 nats" in power.outlook(equal, near([0.01, 0.0, 0.1], [0.1, 0.1, 0.1]))
    assert not power.outlook(equal, near([0.01, 0.0, 0.1], [-0.1, -0.1, -0.1]))
