"""The rule that judges claims: each kind of claim at its edges, and that what is stored is judged again alike."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_ind

from moelab import paper
from moelab.config import from_json
from moelab.design import claim_values, comparison
from moelab.design import verdicts as claims
from moelab.design.judging import MARGIN, agreed, can_test, judge, judge_timing, restate
from moelab.design.simulated import judge_simulated
from moelab.report.summary import parse
from moelab.statistics import Estimate

NEAR = paper.claim("pr-moe-matches-moe128")
ORDER = paper.claim("moe128-beats-moe32")  # lower; the smallest effect of interest is 0.01
SIZE = paper.claim("pr-moe-size")
FIG1 = replace(ORDER, kind="difference", value=-0.3, value_low=-0.32, value_high=-0.28, smallest=None)
FASTER = paper.claim("residual-faster-than-top2")  # "more than 10 %"
TIMES = paper.claim("dense-equivalent-4-5x")
HALF = replace(ORDER, kind="ratio", value=0.5, direction="lower", smallest=None)  # a number without a range
BELOW = replace(ORDER, kind="bound", value=25.0, direction="lower", smallest=None)
AT = replace(ORDER, kind="bound", value=100.0, direction="equal", smallest=None, how="read off plot")
LATE = paper.claim("full-kd-hurts-late")  # from 70 % of the training on

T3 = 4.302652729911275  # 97.5 % quantile of Student's t with two degrees of freedom


def sides(arms):
    """Return arms as `judge` takes them, their values those of seeds 0, 1, ..."""
    return {name: dict(enumerate(values)) for name, values in arms.items()}


def permuted(values):
    """Return some orders of the same items."""
    items = list(values.items())
    return [items, items[::-1], sorted(items), items[3:] + items[:3]]


def under_p(arms):
    pr, many, few = arms.values()
    return Estimate.contrast([(1.0, pr), (-1.25, many), (0.25, few)]).p()


def gain_p(arms):
    _, many, few = arms.values()
    return Estimate.contrast([(1.0, few), (-1.0, many)]).p()


def three(low, high):
    """Three values whose 95 % interval is low to high: their standard deviation is half its width x sqrt(3) / t."""
    mean, spread = (low + high) / 2, (high - low) / 2 * 3**0.5 / T3
    return [mean - spread, mean, mean + spread]


@pytest.mark.parametrize(
    ("claim", "low", "high", "verdict"),
    [
        # An order: the sign alone.
        (ORDER, -0.12, -0.10, claims.HOLDS),
        (ORDER, -0.0199, -0.0003, claims.HOLDS),
        (ORDER, -0.0099, -0.0003, claims.HOLDS),  # below what matters, which is said of its size
        (ORDER, -0.0099, 0.0099, claims.FAILS),  # if there is a difference, it does not matter
        (ORDER, 0.0003, 0.0099, claims.FAILS),
        (ORDER, -0.0099, 0.0101, claims.CANNOT_TELL),
        (ORDER, 0.0003, 0.0101, claims.FAILS),
        (ORDER, 0.10, 0.12, claims.FAILS),
        (ORDER, -0.10, 0.02, claims.CANNOT_TELL),
        # A number: the sign decides, and the interval's place beside -0.32 to -0.28 says the size.
        (FIG1, -0.354, -0.21, claims.HOLDS),
        (FIG1, -0.60, -0.01, claims.HOLDS),  # its size is open
        (FIG1, -0.31, -0.29, claims.HOLDS),
        (FIG1, -0.279, -0.10, claims.SMALLER),
        (FIG1, -0.281, -0.10, claims.HOLDS),
        (FIG1, -0.9, -0.321, claims.LARGER),
        (FIG1, -0.60, 0.05, claims.CANNOT_TELL),
        (FIG1, 0.01, 0.03, claims.FAILS),
        (HALF, 0.48, 0.56, claims.HOLDS),  # within 15 % of 0.5, which has no range
        (HALF, 0.58, 0.60, claims.SMALLER),
        (HALF, 0.40, 0.42, claims.LARGER),
        (HALF, 1.1, 1.2, claims.FAILS),
        # One bound: "more than 10 % faster".
        (FASTER, 1.11, 1.5, claims.HOLDS),
        (FASTER, 1.03, 1.04, claims.FAILS),  # faster, but not by 10 %
        (FASTER, 1.08, 1.14, claims.CANNOT_TELL),
        (FASTER, 0.8, 0.82, claims.FAILS),
        (BELOW, 20.0, 24.0, claims.HOLDS),
        (BELOW, 24.0, 26.0, claims.CANNOT_TELL),
        (BELOW, 26.0, 28.0, claims.FAILS),
        # Two bounds of the text are exact; a number at which something happens has its reading or 15 %.
        (TIMES, 4.1, 4.9, claims.HOLDS),
        (TIMES, 3.9, 4.9, claims.CANNOT_TELL),
        (TIMES, 1.2, 1.8, claims.FAILS),
        (TIMES, 8.5, 9.5, claims.FAILS),
        (AT, 90.0, 110.0, claims.HOLDS),
        (AT, 80.0, 110.0, claims.CANNOT_TELL),
        (AT, 50.0, 60.0, claims.FAILS),
        (replace(AT, value=0.0, value_low=0.0, value_high=2.0), 0.5, 1.5, claims.HOLDS),  # its range begins at 0
    ],
)
def test_rules(claim, low, high, verdict):
    found = judge(claim, three(low, high))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.verdict == verdict and found.kind == claims.MEASURED and found.samples == 3
    assert (found.p < 0.05) == (verdict != claims.CANNOT_TELL), "of what decides"
    assert restate(claim, found) == found


def test_what_decides_is_what_the_p_value_is_of():
    bound = judge(FASTER, three(1.03, 1.04))
    assert bound.p == pytest.approx(Estimate.of(three(1.03, 1.04)).p(1.1))
    assert judge(TIMES, three(4.1, 4.7)).p == pytest.approx(Estimate.of(three(4.1, 4.7)).p(4.0)), "the nearer bound"
    none = Estimate.of(three(-0.0099, 0.005))
    assert judge(ORDER, three(-0.0099, 0.005)).p == pytest.approx(none.p(-0.01))


def test_the_size_is_a_statement_of_its_own():
    sizes = {judge(FIG1, three(*bounds)).size for bounds in ((-0.39, -0.241), (-0.39, -0.239), (-0.12, -0.10))}
    assert sizes == {
        "The size is the paper's.",  # 0.149 wide, half of 0.3 is 0.15
        "The size is open: the interval is too wide to compare with the paper's -0.3.",
        "The paper's number is -0.3; -0.32 to -0.28 would count as alike.",
    }
    assert judge(ORDER, three(-0.0099, -0.0003)).size == "It is below the smallest effect of interest, 0.01."
    assert judge(ORDER, three(-0.12, -0.1)).size == judge(FASTER, three(1.03, 1.04)).size == ""
    why = judge(ORDER, three(-0.0099, 0.0099)).why
    assert why.startswith("Within the smallest effect of interest, 0.01 (what the paper calls a match in Fig 4")


def test_a_censored_value_refutes_by_a_sign_test_and_never_confirms():
    late = judge(AT, [118.0, 119.0, *[120.0] * 4], censored=[2, 3, 4, 5])
    assert late.verdict == claims.FAILS and late.p == pytest.approx(2 / 2**6), "six of six are later than 115"
    assert (late.low, late.high) == (None, None) and late.why.startswith("Some values are later than the end")
    for values in ([120.0] * 3, [120.0] * 5, [100.0, 101.0, 102.0], [*[120.0] * 6, 100.0]):
        found = judge(AT, values, censored=[2])
        assert found.verdict == claims.CANNOT_TELL and found.p > 0.05, "too few to exclude chance"
    assert judge(AT, [60.0, 61.0, 62.0, 120.0], censored=[3], looks=(3,)).verdict == claims.FAILS, "not in this look"
    assert restate(AT, late) == late


def test_without_values_or_with_few():
    none = judge(ORDER)
    assert none.verdict == claims.CANNOT_TELL and none.kind == "" and restate(ORDER, none) == none
    assert none.why == "This result has no value for it." and not none.judged
    for values in ([-0.5], [-0.5, -0.5], [-0.5, -0.49]):
        found = judge(ORDER, values)
        assert found.verdict == claims.CANNOT_TELL and found.p is None and found.samples == len(values)
        assert f"{len(values)} seed" in found.why and found.why.endswith("it takes 3.") and not found.judged
        assert (found.low is None) == (len(values) == 1) and restate(ORDER, found) == found
        few = sides({"350M+PR-MoE-32/64": values, "350M+MoE-128": values, "350M+MoE-32": values})
        assert "it takes 3" in judge(NEAR, arms=few).why


class TestArms:
    """Each arm has its mean over all its seeds and a spread of its own."""

    LEFT, RIGHT = [3.0, 3.02, 2.99, 3.01, 3.0], [3.1, 3.2, 3.12]

    def test_a_difference_is_welchs(self):
        found = judge(ORDER, arms=sides({ORDER.left: self.LEFT, ORDER.right: self.RIGHT}))
        theirs = ttest_ind(self.LEFT, self.RIGHT, equal_var=False)
        assert found.p == pytest.approx(theirs.pvalue) and found.samples == 3, "seeds of the smaller arm"
        interval = theirs.confidence_interval()
        assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
        assert restate(ORDER, found) == found

    def test_the_order_of_the_runs_changes_nothing(self):
        """Of a plan the first seeds count, by their numbers: in the order of the rows they gave either verdict."""
        values = {4: -0.5, 0: 0.1, 6: -0.5, 1: 0.12, 2: 0.11, 5: -0.5, 3: -0.5}
        one, *others = [judge(ORDER, dict(order), looks=(3, 9)) for order in permuted(values)]
        assert all(other == one for other in others)
        assert one.verdict == claims.FAILS and one.ours == pytest.approx(0.11)
        both = [{ORDER.left: dict(order), ORDER.right: dict.fromkeys(values, 0.0)} for order in permuted(values)]
        assert all(judge(ORDER, arms=arms, looks=(3, 9)) == judge(ORDER, arms=both[0], looks=(3, 9)) for arms in both)

    def test_each_arm_counts_up_to_the_last_look_that_it_has_reached(self):
        arms = sides({ORDER.left: [3.0, 3.01, 3.02, 9.0], ORDER.right: [3.1, 3.11, 3.12, 3.1, 3.11, 3.12, 9.0, 9.0]})
        found = judge(ORDER, arms=arms, looks=(3, 6, 9))
        assert found.samples == 3 and found.ours == pytest.approx(3.01 - 3.11) and found.looks == (3, 6, 9)
        assert found.why.startswith("Judged by the first 3 of 4 seeds, the last planned look.")

    @pytest.mark.parametrize("lost", [math.nan, math.inf, None])
    def test_a_seed_without_a_value_is_named_and_nothing_is_judged(self, lost):
        arms = sides({ORDER.left: [3.0, 3.01, lost, 3.02], ORDER.right: [3.1, 3.11, 3.12, 3.1]})
        if lost is None:
            del arms[ORDER.left][2]
        found = judge(ORDER, arms=arms)
        assert found.verdict == claims.CANNOT_TELL and found.p is None and not found.judged
        assert found.why == f"Without a value: seed 2 of {ORDER.left}." and restate(ORDER, found) == found
        assert judge(ORDER, {0: -0.5, 1: -0.5, 2: -0.5, 3: math.nan}, lost={3: "it diverged"}).why == (
            "Without a value: seed 3: it diverged."
        )
        assert all(math.isfinite(v) for of in found.arms.values() for v in of.values())

    def test_an_arm_that_has_fewer_seeds_lacks_none(self):
        arms = sides({ORDER.left: [3.0, 3.01, 3.02], ORDER.right: [3.1, 3.11, 3.12, 3.1, 3.11]})
        assert judge(ORDER, arms=arms).verdict == claims.HOLDS
        assert judge(ORDER, arms={ORDER.left: {0: 3.0}}).why == "This result has no value for it.", "one side only"

    def test_seeds_before_the_first_that_decides_are_shown_beside(self):
        values = {0: 0.5, 1: 0.6, 2: 0.7, 3: -0.1, 4: -0.11, 5: -0.12}
        found = judge(ORDER, values, decides_from=3, looks=(3,))
        assert found.verdict == claims.HOLDS and found.ours == pytest.approx(-0.11) and found.samples == 3
        assert found.why == "Seeds before 3 do not decide; they give +0.6 nats." and restate(ORDER, found) == found
        assert judge(ORDER, values, decides_from=4).why == (
            "There are 2 seeds; it takes 3. Seeds before 4 do not decide; they give +0.425 nats."
        )
        none = judge(ORDER, values, decides_from=10)
        assert none.why == "Seeds before 10 do not decide; they give +0.245 nats." and none.ours is None
        arms = {ORDER.left: {0: 3.0}, ORDER.right: {}}
        assert judge(ORDER, arms=arms, decides_from=10).why == "This result has no value for it."

    def test_paired_values_of_earlier_results_are_judged_as_they_were(self):
        now = judge(ORDER, [-0.1, -0.11, -0.12])
        then = replace(now, arms={}, values=(-0.1, -0.11, -0.12), verdict="reproduced")
        assert then.arms == now.arms and restate(ORDER, then) == now and not then.values
        values, gain = (0.012, 0.012, 0.012), (0.06, 0.08, 0.10)
        old = replace(now, claim=NEAR.id, arms={}, values=values, gain=gain, verdict="undecided")
        found = restate(NEAR, old)
        over = Estimate.of([v - MARGIN * g for v, g in zip(values, gain, strict=True)])
        under = Estimate.of([v + MARGIN * g for v, g in zip(values, gain, strict=True)])
        assert found.p == pytest.approx(max(over.p(), under.p(), Estimate.of(gain).p()))
        assert found.verdict == claims.CANNOT_TELL, "the gain's own spread counts"


class TestEquality:
    """The margin is a quarter of the gain: 0.02 where the better arm gains 0.08."""

    @staticmethod
    def judged(low, high, gain=0.08, spread=1e-9):
        """Values of PR-MoE whose difference to MoE-128, which does not vary, has the interval low to high."""
        ends = [3 + gain - spread, 3 + gain, 3 + gain + spread]
        values = [3 + v for v in three(low, high)]
        arms = {"350M+PR-MoE-32/64": values, "350M+MoE-128": [3.0, 3.0, 3.0], "350M+MoE-32": ends}
        return judge(NEAR, arms=sides(arms))

    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [
            (-0.019, 0.019, claims.HOLDS),
            (0.006, 0.014, claims.HOLDS),  # not zero, but within the margin
            (0.005, 0.021, claims.CANNOT_TELL),
            (-0.05, 0.05, claims.CANNOT_TELL),
            (0.021, 0.03, claims.FAILS),
            (-0.03, -0.021, claims.FAILS),
        ],
    )
    def test_rules(self, low, high, verdict):
        found = self.judged(low, high)
        assert MARGIN == 0.25 and found.verdict == verdict
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
        assert (found.p < 0.05) == (verdict != claims.CANNOT_TELL)
        assert "25% of the gain (0.02 nats): 350M+MoE-128 over 350M+MoE-32 gains 0.08 (0.08 to 0.08)." in found.why
        assert ("Equal within 25%" in found.why) == (verdict == claims.HOLDS) and found.size == ""
        assert restate(NEAR, found) == found

    def test_the_paired_contrast_of_the_margin_is_one_of_arms(self):
        """Difference - margin x gain of three arms: 1 PR-MoE - 0.75 MoE-128 - 0.25 MoE-32."""
        arms = {
            "350M+PR-MoE-32/64": [3.0, 3.02, 3.01],
            "350M+MoE-128": [3.0, 2.99, 3.01],
            "350M+MoE-32": [3.2, 3.15, 3.25],
        }
        found = judge(NEAR, arms=sides(arms))
        weights = {"350M+PR-MoE-32/64": 1.0, "350M+MoE-128": -0.75, "350M+MoE-32": -0.25}
        over = Estimate.contrast([(w, arms[arm]) for arm, w in weights.items()])
        assert found.p >= over.p() and found.p == pytest.approx(max(over.p(), under_p(arms), gain_p(arms)))

    @pytest.mark.parametrize("gain", [0.08, -0.08])
    def test_without_a_gain_nothing_is_equal(self, gain):
        found = self.judged(-0.001, 0.001, gain=gain, spread=0.05 if gain > 0 else 0.001)
        assert found.verdict == claims.CANNOT_TELL and "a gain that these runs do not show" in found.why
        assert found.judged and found.p > 0.05
        arms = sides({"350M+PR-MoE-32/64": [3.0, 3.1, 3.2], "350M+MoE-128": [3.0, 3.1, 3.2]})
        assert judge(NEAR, arms=arms).why.startswith("It is about what 350M+MoE-128 over 350M+MoE-32 gains, which")

    def test_of_scores_the_better_arm_has_the_higher(self):
        claim = paper.claim("zero-shot-350m-moe128-vs-1.3b")  # the gain is 1.3B's over 350M
        arms = sides({"350M+MoE-128": [40.0, 40.1, 39.9], "1.3B": [40.0, 40.1, 39.9], "350M": [30.0, 30.1, 29.9]})
        assert judge(claim, arms=arms).verdict == claims.HOLDS


class TestTestable:
    """One rule: the runs are large enough, and reach the share of the training on which the claim is."""

    @pytest.mark.parametrize(
        ("claim", "scale", "share", "able"),
        [
            (LATE, "cpu", 0.16, False),
            (LATE, "cpu", 0.7, True),
            (LATE, "cpu", None, False),  # unknown
            (LATE, "smoke", 1.0, False),
            (LATE, None, None, True),
            (LATE, None, 0.16, False),
            (ORDER, "cpu", 0.16, True),  # ahead at every reading
            (ORDER, "smoke", 1.0, False),
            (paper.claim("moe128-350m-beats-1.3b"), "cpu", 0.72, True),
            (paper.claim("moe128-350m-beats-1.3b"), "cpu", 0.7, False),
            (paper.claim("zero-shot-350m-pr-moe"), "cpu", 1.0, False),
            (paper.claim("zero-shot-350m-pr-moe"), "paper", 1.0, True),
            (paper.claim("speedup-1t"), "paper", 1.0, False),
            (ORDER, "planet", 1.0, False),
        ],
    )
    def test_scale_and_share(self, claim, scale, share, able):
        assert can_test(claim, scale, share) == able
        found = judge(claim, [0.2, 0.21, 0.22], scale=scale, share=share)
        assert (found.verdict == claims.CANNOT_TEST) == (not able) and found.ours == pytest.approx(0.21)
        assert (judge(claim, scale=scale, share=share).verdict == claims.CANNOT_TEST) == (not able)
        assert able or found.why.startswith(("The claim holds from 70% of", "The claim holds from 71% of", "It needs "))
        if share is not None:
            assert restate(claim, found, scale) == found

    def test_a_claim_that_becomes_testable_is_judged_when_its_result_is_read(self):
        old = judge(LATE, [0.2, 0.21, 0.22], scale="cpu", share=0.8)
        before = replace(old, verdict="not testable at this scale", p=None)
        assert (
            before.verdict == claims.CANNOT_TEST and old.verdict == claims.HOLDS and restate(LATE, before, "cpu") == old
        )

    @pytest.mark.parametrize("share", [0.16, 0.95])
    def test_the_number_of_the_end_needs_runs_that_reach_it(self, share):
        claim = paper.claim("moe128-350m-beats-own-base")
        found = judge(claim, [-0.507, -0.508, -0.506], scale="cpu", share=share)
        assert found.verdict == (claims.HOLDS if share < 0.9 else claims.LARGER)
        assert restate(claim, found, "cpu") == found
        assert ("is that of the end of its training, of which these runs reach 16%" in found.size) == (share < 0.9)


class TestAgreed:
    """A comparison at other settings that must say the same, such as another learning rate."""

    OTHER = "At one shared rate"

    @pytest.mark.parametrize(
        ("other", "verdict"),
        [
            ([-0.2, -0.21, -0.3], claims.HOLDS),
            ([-0.2, -0.21, 0.3], claims.CANNOT_TELL),
            ([0.2, 0.21, 0.22], claims.CANNOT_TELL),
            ([-0.2, -0.21], claims.CANNOT_TELL),
        ],
    )
    def test_both_decide_or_none_does(self, other, verdict):
        own, second = judge(ORDER, [-0.1, -0.11, -0.12]), judge(ORDER, other, note=self.OTHER)
        found = agreed(own, second)
        assert own.verdict == claims.HOLDS and found.verdict == verdict and found.ours == own.ours
        assert f"At one shared rate: {second.ours:+.3g}, {second.verdict}." in found.why
        assert found.p == (None if second.p is None else max(own.p, second.p))
        assert restate(ORDER, found) == found, "both are judged again"

    def test_what_is_not_judged_or_has_no_other_stays(self):
        for own in (judge(ORDER, [-0.1, -0.1]), judge(SIZE, [0.313], exact=True)):
            assert agreed(own, judge(ORDER, [0.1, 0.11, 0.12])) == own

    def test_without_a_verdict_there_is_none(self):
        own, other = judge(ORDER, [-0.1, -0.11, -0.12]), judge(ORDER, note=self.OTHER)
        found = agreed(own, other)
        assert found.verdict == claims.CANNOT_TELL and found.p is None and not found.judged
        assert "At one shared rate: no values" in found.why

    def test_the_same_runs_are_no_second_comparison(self):
        own = judge(ORDER, [-0.1, -0.11, -0.12])
        found = agreed(own, replace(own, note=self.OTHER))
        assert (found.why, found.verdict) == (own.why, own.verdict)
        assert restate(ORDER, found) == found

    def test_where_the_sizes_differ_it_holds_and_the_size_is_open(self):
        own, larger = judge(FIG1, three(-0.305, -0.295)), judge(FIG1, three(-0.5, -0.4))
        assert (own.verdict, larger.verdict) == (claims.HOLDS, claims.LARGER)
        for found in (agreed(own, larger), agreed(larger, own)):
            assert found.verdict == claims.HOLDS and found.size == "The size is open: it differs between the two."
        assert agreed(larger, replace(larger, arms=own.arms)).verdict == claims.LARGER

    def test_it_is_read_back_from_a_summary(self):
        found = agreed(judge(ORDER, [-0.1, -0.11, -0.12]), judge(ORDER, [0.1, 0.11, 0.12], note=self.OTHER))
        record = {"experiment": "e", "scale": "full", "title": "t", "finished": "2026", "claims": [asdict(found)]}
        assert parse(record).claims == (found,)


class TestPlans:
    def test_intervals_and_p_values_are_those_of_the_look(self):
        values = [-0.02, -0.03, -0.04, -0.05, -0.03]
        once, planned = judge(ORDER, values), judge(ORDER, values, looks=(3, 5))
        assert planned.low < once.low and planned.high > once.high and planned.p > once.p
        assert planned.looks == (3, 5) and restate(ORDER, planned) == planned

    def test_a_look_between_says_what_comes_next_or_that_it_is_futile(self):
        undecided = [-0.02, 0.01, -0.03]
        assert judge(ORDER, undecided, looks=(3, 6, 30)).why == "The next look is at 6 seeds."
        assert judge(ORDER, [-0.2, 0.3, -0.3], looks=(3, 6)).why.startswith("More seeds are futile: the chance")
        between = judge(ORDER, [*undecided, 0.0], looks=(3, 6, 30)).why
        assert between == "Judged by the first 3 of 4 seeds, the last planned look. The next look is at 6 seeds."
        decided = judge(ORDER, [-0.1] * 3, looks=(3, 6)).why
        assert decided.endswith(
            "The next look is at 6 seeds, unless a verdict stands with all tests: then the plan ends."
        )
        assert judge(ORDER, undecided, looks=(3,)).why == ""

    def test_an_equality_is_futile_where_neither_it_nor_a_difference_can_be_shown(self):
        same, gain = paper.claim("residual-equals-top2"), [0.1, 0.11, 0.12]

        def judged(values, gain):
            better = [3.0, 3.001, 2.999]
            names = ("350M+Residual-MoE-32", "350M+Top2-MoE-32", "350M+MoE-32")
            found = ([b + v for b, v in zip(better, by, strict=True)] for by in (values, [0, 0, 0], gain))
            return judge(same, arms=sides(dict(zip(names, found, strict=True))), looks=(3, 9))

        for values, futile in (([0.0, 0.3, -0.3], True), ([0.0, 0.02, -0.02], False), ([0.03, 0.045, 0.06], False)):
            found = judged(values, gain)
            assert found.verdict == claims.CANNOT_TELL and found.why.endswith("is below 10%.") == futile, values
        reverse = judged([0.0, 0.02, -0.02], [-0.1, -0.11, -0.12])
        assert reverse.verdict == claims.CANNOT_TELL and reverse.why.endswith("is below 10%.")

    def test_looks_that_were_not_planned_do_not_count(self):
        """Judged after each seed, a plan of three looks would be wrong in 7 % of cases instead of 5 %."""
        values = [-0.1, -0.11, 0.3, 0.2, -0.1]
        planned, more = judge(ORDER, values[:3], looks=(3,)), judge(ORDER, values, looks=(3,))
        assert (more.verdict, more.low, more.p) == (planned.verdict, planned.low, planned.p)
        assert list(more.arms["value"].values()) == values
        early = judge(ORDER, values[:3], looks=(5,))
        assert early.verdict == claims.CANNOT_TELL and early.why == "There are 3 seeds; it takes 5."
        assert restate(ORDER, early) == early and restate(ORDER, more) == more

    def test_what_was_seen_counts_against_futility(self):
        likely = judge(FIG1, [-0.6, -0.2, -0.1], looks=(3, 9))
        assert likely.verdict == claims.CANNOT_TELL and likely.why == "The next look is at 9 seeds."


class TestTimings:
    def test_rounds_of_one_session_are_one_sample(self):
        found = judge_timing(FASTER, [[1.2, 1.3, 1.25]], note="Twins.")
        assert found.verdict == claims.CANNOT_TELL and found.why == "There is 1 session; it takes 3."
        assert found.ours == 1.25 and found.low is None and found.high is None and found.p is None
        assert found.note == "Twins. Spread within the one session: 1.2 to 1.3 over 3 rounds."
        assert restate(FASTER, found) == found

    def test_sessions_are_the_samples(self):
        found = judge_timing(FASTER, [[1.2], [1.22], [1.24], []])
        assert found.samples == 3 and found.high - found.ours == pytest.approx(T3 * 0.02 / 3**0.5)
        assert judge_timing(FASTER, [[1.2], [1.22]]).why == "There are 2 sessions; it takes 3."
        assert judge_timing(FASTER, []).why == "This result has no value for it."

    def test_sessions_that_agree_by_chance_are_no_surer_than_their_rounds(self):
        # The rounds' variance is 0.01, a median's pi / 2 x 0.01 / 3; the medians alone would give 1.2 -+ 0.
        found = judge_timing(FASTER, [[1.1, 1.2, 1.3]] * 3)
        assert found.high - found.ours == pytest.approx(T3 * (math.pi / 2 * 0.01 / 3 / 3) ** 0.5)
        assert restate(FASTER, found) == found, "the spread inside sessions is stored"
        wide = judge_timing(FASTER, [[1.1, 1.11, 1.12], [1.5, 1.51, 1.52], [1.9, 1.91, 1.92]])
        assert wide.high - wide.ours == pytest.approx(T3 * 0.4 / 3**0.5), "the spread between sessions is greater"

    def test_a_round_that_is_no_number_is_named(self):
        found = judge_timing(FASTER, [[1.1, 1.2], [1.1, math.nan], [1.1, 1.2], [1.2]])
        assert found.verdict == claims.CANNOT_TELL and found.why == "Without a value: seed 1."

    def test_timed_claims(self):
        timed = {claim.id for claim in paper.claims() if claim.timed}
        assert {"kernels-6x", "training-5x-cheaper"} <= timed
        assert not timed & {"pr-moe-size", "moe128-beats-moe32", "hierarchical-hops", "dispatch-cost-factor-e"}


def test_a_changed_rule_counts_for_all_kinds_of_stored_verdicts():
    counted, speed = judge(SIZE, [0.313], exact=True), paper.claim("speedup-1t")
    assert restate(SIZE, replace(counted, verdict=claims.FAILS)) == counted
    for fitted in (False, True):
        now = judge_simulated(speed, 7.3, fitted=fitted)
        assert now.kind == (claims.FITTED if fitted else claims.SIMULATED)
        assert restate(speed, replace(now, verdict=claims.FAILS)) == now
    now = judge(ORDER, three(-0.12, -0.10))
    assert restate(ORDER, replace(now, verdict=claims.CANNOT_TELL, p=0.5)) == now


def test_words_of_earlier_results_are_those_of_today():
    now = judge_simulated(paper.claim("pytorch-moe-slower-than-dense"), 2.0, against=20.0)
    assert replace(now, verdict="simulated: holds", kind="predicted") == now
    for former, today in (
        ("reproduced", claims.HOLDS),
        ("direction only", claims.HOLDS),
        ("no difference that matters", claims.FAILS),
        ("undecided: the runs cannot tell", claims.CANNOT_TELL),
        ("simulated: within 15 %", claims.HOLDS),
        ("simulated: within the simulator's error", claims.CANNOT_TELL),
        ("paper's own numbers disagree", claims.CANNOT_TEST),
        ("of another version", "of another version"),
    ):
        assert claims.today(former) == today


def test_arithmetic_needs_no_spread_and_has_no_tolerance():
    verdict = judge(SIZE, [0.313], exact=True)
    assert verdict.verdict == claims.HOLDS and verdict.samples == 0 and verdict.kind == claims.COUNTED
    exact = paper.claim("residual-halves-exchange")
    assert judge(exact, [0.5], exact=True).verdict == claims.HOLDS
    assert judge(exact, [0.51], exact=True).verdict == claims.SMALLER


def test_every_verdict_has_a_sign_a_class_and_a_meaning():
    said = {value for name, value in vars(claims).items() if name.isupper() and isinstance(value, str)}
    assert said - {*claims.KINDS, claims.VALUE, claims.GAIN} == set(claims.OUTCOMES) and len(claims.OUTCOMES) == 6
    assert all(o.sign and o.meaning and o.style in claims.STYLES for o in claims.OUTCOMES.values())
    assert claims.outcome("of another version").style == "none"
    assert {claims.today(claim) for claim in claims.OUTCOMES} == set(claims.OUTCOMES)


class TestSimulated:
    """Simulations have no seeds: their verdicts say so."""

    SPEED = paper.claim("speedup-1t")  # 7.2, 7.15 to 7.25
    LIMIT = paper.claim("1t-under-25ms")
    LEVEL = paper.claim("moe-flop-efficiency")  # equal, at 1.0527
    ORDERED = paper.claim("pytorch-moe-slower-than-dense")
    WIDE = paper.claim("released-part-speedup")  # 1.42, 1.24 to 1.6

    @pytest.mark.parametrize(
        ("claim", "ours", "expected"),
        [
            (SPEED, 7.3, claims.HOLDS),
            (SPEED, 7.2 * 1.149, claims.HOLDS),
            (SPEED, 7.2 * 1.151, claims.LARGER),  # of the value, not of the end of its range
            (SPEED, 7.2 * 0.849, claims.SMALLER),
            (SPEED, 0.9, claims.FAILS),
            (WIDE, 1.3, claims.HOLDS),
            (WIDE, 1.42 * 0.86, claims.HOLDS),
            (WIDE, 1.42 * 0.84, claims.SMALLER),
            (replace(WIDE, value_low=1.1), 1.12, claims.HOLDS),  # in the range that the paper leaves open
            (LIMIT, 24.9, claims.HOLDS),
            (LIMIT, 25.1, claims.FAILS),
            (LEVEL, 1.2, claims.HOLDS),
            (LEVEL, 1.3, claims.FAILS),
            (ORDERED, 1.0, claims.HOLDS),  # against 20: 5 % apart
            (ORDERED, -1.0, claims.FAILS),
            (ORDERED, 0.99, claims.CANNOT_TELL),
            (ORDERED, -0.99, claims.CANNOT_TELL),
            (SPEED, None, claims.CANNOT_TELL),
        ],
    )
    def test_rules(self, claim, ours, expected):
        found = judge_simulated(claim, ours, against=20.0)
        assert found.verdict == expected and found.ours == ours
        assert found.simulated == found.judged == (ours is not None)
        assert ("% apart; an order counts from 5 %" in found.why) == (claim is self.ORDERED)
        assert found.samples == 0 and found.low is None and found.high is None
        assert ours is None or found.note.startswith("Simulated, on numbers that it was not fitted on")
        assert (
            ours is None or "constants were fitted on" in judge_simulated(claim, ours, against=20.0, fitted=True).note
        )
        assert restate(claim, found) == found

    def test_an_order_needs_the_value_that_it_is_against(self):
        with pytest.raises(ValueError, match="needs the value of the right side"):
            judge_simulated(self.ORDERED, 1.0)


def test_two_arms_of_one_model_are_refused_as_a_side_of_a_claim():
    claim, losses = paper.claim("moe128-350m-beats-own-base"), {"Dense": 4.0, "MoE-128": 3.7, "MoE-128 (sum)": 3.8}
    rows = [(seed, arm, loss) for seed in range(3) for arm, loss in losses.items()]
    final = pd.DataFrame(rows, columns=["seed", "arm", "validation_loss"])
    arms = {"Dense": "350M", "MoE-128": "350M+MoE-128", "MoE-128 (sum)": "350M+MoE-128"}
    with pytest.raises(ValueError, match=r"'MoE-128' and 'MoE-128 \(sum\)' both stand for 350M\+MoE-128"):
        comparison.judge_loss(claim, final, arms, "cpu")
    assert comparison.judge_loss(claim, final[final["arm"] != "MoE-128 (sum)"], arms, "cpu").arms


def test_the_loss_on_tokens_that_cannot_be_copied_stands_beside_a_verdict_and_decides_nothing():
    claim, drawn = paper.claim("moe128-350m-beats-own-base"), np.random.default_rng(0)
    rows = [
        (seed, arm, loss + noise, other + noise)
        for seed in range(4)
        for arm, loss, other in (("Dense", 4.0, 5.0), ("MoE-128", 3.7, 5.1))
        for noise in [float(drawn.normal(0, 0.01))]
    ]
    final = pd.DataFrame(rows, columns=["seed", "arm", "validation_loss", "unrepeated_loss"])
    final.loc[final["seed"] == 3, "unrepeated_loss"] = math.nan  # an older run
    arms = {"Dense": "350M", "MoE-128": "350M+MoE-128"}
    alone = comparison.judge_loss(claim, final.drop(columns="unrepeated_loss"), arms, "full")
    found = comparison.judge_loss(claim, final, arms, "full")
    assert found.verdict == alone.verdict and found.p == alone.p and found.ours == alone.ours
    weights = {claim.left: 1.0, claim.right: -1.0}
    low, high = Estimate.contrast([(w, [*found.uncopied[arm].values()]) for arm, w in weights.items()]).interval()
    assert f"On tokens that cannot be copied from the context: +0.100 ({low:+.3f} to {high:+.3f}) nats." in found.why
    assert restate(claim, from_json(claims.Verdict, json.loads(json.dumps(asdict(found))), "stored"), "full") == found
    few = comparison.judge_loss(claim, final[final["seed"] > 0], arms, "full")
    assert few.verdict == claims.HOLDS and "copied" not in few.why, "two seeds give no interval worth showing"


def test_an_arm_may_be_compared_with_itself():
    """As the best of several arms is with the first one, which it may be."""
    final = pd.DataFrame({"seed": [0, 1], "arm": ["Dense", "Dense"], "validation_loss": [3.0, 3.1]})
    assert comparison.difference(final, "Dense", "Dense").startswith("Dense ends level with Dense")


def test_a_crossing_is_told_in_its_own_unit_and_losses_in_nats():
    found = {claim.quantity: claim_values.unit(claim) for claim in paper.claims()}
    assert found["training tokens at the crossing of the validation-loss curves"] == " billion tokens"
    assert found["final validation loss"] == found["validation loss early in training"] == " nats"
    assert found["training throughput"] == ""
