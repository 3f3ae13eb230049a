"""The rule that judges claims: each kind of claim at its edges, and that what is stored is judged again alike."""

import math
from dataclasses import asdict, replace

import pandas as pd
import pytest

from moelab import paper
from moelab.design import comparison
from moelab.design import verdicts as claims
from moelab.design.judging import MARGIN, agreed, can_test, judge, judge_timing, restate
from moelab.design.simulated import judge_simulated
from moelab.report.summary import parse
from moelab.statistics import interval

NEAR = paper.claim("pr-moe-matches-moe128")
ORDER = paper.claim("moe128-beats-moe32")  # lower; the smallest effect of interest is 0.01
SIZE = paper.claim("pr-moe-size")
FIG1 = replace(ORDER, kind="difference", value=-0.3, value_low=-0.32, value_high=-0.28, smallest=None)
FASTER = paper.claim("residual-faster-than-top2")  # "more than 10 %"
HALF = replace(ORDER, kind="ratio", value=0.5, direction="lower", smallest=None)  # a number without a range
BELOW = replace(ORDER, kind="bound", value=25.0, direction="lower", smallest=None)
ABOVE = replace(ORDER, kind="bound", value=100.0, direction="higher", smallest=None)
AT = replace(ORDER, kind="bound", value=100.0, direction="equal", smallest=None)
LATE = paper.claim("full-kd-hurts-late")  # from 70 % of the training on

T3 = 4.302652729911275  # 97.5 % quantile of Student's t with two degrees of freedom


def three(low, high):
    """Three values whose 95 % interval is low to high: their standard deviation is half its width x sqrt(3) / t."""
    mean, spread = (low + high) / 2, (high - low) / 2 * 3**0.5 / T3
    return [mean - spread, mean, mean + spread]


@pytest.mark.parametrize(
    ("claim", "low", "high", "verdict"),
    [
        (ORDER, -0.12, -0.10, claims.REPRODUCED),
        (ORDER, -0.0199, -0.0003, claims.REPRODUCED),  # the mean is beyond 0.01
        (ORDER, -0.0195, -0.0003, claims.DIRECTION),  # below it, and it may be more
        (ORDER, -0.0099, -0.0003, claims.NO_DIFFERENCE),  # there is one, but it does not matter
        (ORDER, -0.0099, 0.0099, claims.NO_DIFFERENCE),
        (ORDER, 0.0003, 0.0099, claims.NO_DIFFERENCE),
        (ORDER, -0.0099, 0.0101, claims.UNDECIDED),
        (ORDER, 0.0003, 0.0101, claims.NOT_REPRODUCED),
        (ORDER, 0.10, 0.12, claims.NOT_REPRODUCED),
        (ORDER, -0.10, 0.02, claims.UNDECIDED),
        # A number: our mean lies in -0.32 to -0.28, and the interval is narrower than half of 0.3.
        (FIG1, -0.354, -0.21, claims.REPRODUCED),  # -0.282
        (FIG1, -0.346, -0.21, claims.DIRECTION),  # -0.278, although the interval holds the whole range
        (FIG1, -0.39, -0.241, claims.REPRODUCED),  # 0.149 wide
        (FIG1, -0.39, -0.239, claims.DIRECTION),  # 0.151 wide
        (FIG1, -0.60, -0.01, claims.DIRECTION),  # the mean alone shows nothing
        (FIG1, -0.31, -0.29, claims.REPRODUCED),
        (FIG1, -0.12, -0.10, claims.DIRECTION),
        (FIG1, -0.60, 0.05, claims.UNDECIDED),  # meets the paper's range and allows no effect
        (FIG1, 0.01, 0.03, claims.NOT_REPRODUCED),
        (HALF, 0.48, 0.56, claims.REPRODUCED),  # within 15 % of 0.5, which has no range
        (HALF, 0.57, 0.60, claims.DIRECTION),
        # "More than 10 %": our mean is, and the interval is narrow or wholly beyond.
        (FASTER, 1.2, 1.5, claims.REPRODUCED),
        (FASTER, 1.08, 1.125, claims.REPRODUCED),  # 0.045 wide, the effect is 0.1
        (FASTER, 1.08, 1.118, claims.DIRECTION),  # 1.099, although the interval reaches it
        (FASTER, 1.08, 1.14, claims.DIRECTION),
        (FASTER, 1.03, 1.04, claims.DIRECTION),
        (FASTER, 0.95, 1.3, claims.UNDECIDED),
        (FASTER, 0.95, 1.11, claims.UNDECIDED),
        (FASTER, 0.95, 1.09, claims.NOT_REPRODUCED),  # whatever the direction, not by 10 %
        (FASTER, 0.8, 0.82, claims.NOT_REPRODUCED),
        # Bounds: kept, broken, or crossed.
        (BELOW, 20.0, 24.0, claims.REPRODUCED),
        (BELOW, 24.0, 26.0, claims.UNDECIDED),
        (BELOW, 26.0, 28.0, claims.NOT_REPRODUCED),
        (ABOVE, 101.0, 300.0, claims.REPRODUCED),
        (ABOVE, 90.0, 110.0, claims.UNDECIDED),
        (ABOVE, 50.0, 60.0, claims.NOT_REPRODUCED),
        (AT, 90.0, 110.0, claims.REPRODUCED),  # within 15 %
        (AT, 80.0, 110.0, claims.UNDECIDED),
        (AT, 50.0, 60.0, claims.NOT_REPRODUCED),
        (replace(AT, value=0.0, value_low=0.0, value_high=2.0), 0.5, 1.5, claims.REPRODUCED),  # its range begins at 0
    ],
)
def test_rules(claim, low, high, verdict):
    found = judge(claim, three(low, high))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.verdict == verdict and found.kind == claims.MEASURED and found.samples == 3
    assert bool(found.why) == (verdict in (claims.DIRECTION, claims.NO_DIFFERENCE))
    if claim.direction == "equal":
        assert (found.p < 0.05) == (verdict != claims.UNDECIDED), "of the nearer end of the range"
    elif verdict == claims.NO_DIFFERENCE:
        assert found.p < 0.05, "of an effect that matters"
    else:
        short = claim is FASTER and low <= 1 <= high < claim.value
        neutral = claim.value if claim.kind == "bound" or short else float(claim.kind == "ratio")
        assert (found.p < 0.05) == (not low <= neutral <= high)
    assert restate(claim, found) == found


def test_why_the_number_is_not_shown():
    whys = {judge(FIG1, three(*bounds)).why for bounds in ((-0.39, -0.239), (-0.12, -0.10))}
    assert whys == {
        "The interval is too wide to show the paper's -0.3.",
        "Our mean lies outside the paper's -0.3 (-0.32 to -0.28).",
    }
    assert judge(FASTER, three(1.03, 1.04)).why == "Our mean falls short of the paper's 1.1."
    assert judge(ORDER, three(-0.0195, -0.0003)).why.startswith(
        "Our mean is below the smallest effect of interest, 0.01"
    )


def test_without_values_or_with_few():
    none = judge(ORDER, [])
    assert none.verdict == claims.NOT_TESTED and none.kind == "" and restate(ORDER, none) == none
    for values in ([-0.5], [-0.5, -0.5], [-0.5, -0.49]):
        found = judge(ORDER, values)
        assert found.verdict == claims.FEW_SEEDS and found.p is None and found.samples == len(values)
        assert found.values == tuple(values) and (found.low is None) == (len(values) == 1)
        assert restate(ORDER, found) == found
        assert judge(NEAR, [0.0] * len(values), gain=[0.1] * len(values)).verdict == claims.FEW_SEEDS


@pytest.mark.parametrize(
    ("values", "gain", "missing", "named"),
    [
        ([-0.5, -0.5, -0.5, math.nan], (), (), "value 4"),
        ([-0.5, -0.5, -0.5, math.inf], (), (), "value 4"),
        ([-0.5, -0.5, -0.5], (), ["seed 3 of MoE-128"], "seed 3 of MoE-128"),
        ([0.01, 0.01, 0.01, 0.01], (0.1, 0.1, 0.1, math.nan), (), "value 4"),
        ([], (), ["seed 0 of MoE-32", "seed 0 of MoE-128"], "seed 0 of MoE-32, seed 0 of MoE-128"),
    ],
)
def test_a_seed_without_a_value_is_named_and_nothing_is_judged(values, gain, missing, named):
    claim = NEAR if gain else ORDER
    found = judge(claim, values, gain=gain, missing=missing)
    assert found.verdict == claims.INCOMPLETE and found.why == f"Without a value: {named}." and found.p is None
    assert restate(claim, found) == found and (found.ours is None) == (not values)
    assert all(math.isfinite(v) for v in found.values)


class TestEquality:
    """The margin is a quarter of the gain: 0.02 where the better arm gains 0.08 at every seed."""

    GAIN = (0.08, 0.08, 0.08)

    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [
            (-0.019, 0.019, claims.EQUAL),  # within the margin, and the mean is not in the paper's 0.005 to 0.015
            (-0.009, 0.019, claims.EQUAL),  # it is, but zero and more lie in the interval as well
            (-0.009, 0.004, claims.EQUAL),
            (0.0145, 0.019, claims.EQUAL),  # although the interval meets it
            (0.006, 0.014, claims.REPRODUCED),  # not zero, but within the margin
            (0.005, 0.021, claims.UNDECIDED),
            (-0.05, 0.05, claims.UNDECIDED),
            (0.021, 0.03, claims.NOT_REPRODUCED),
            (-0.03, -0.021, claims.NOT_REPRODUCED),
        ],
    )
    def test_rules(self, low, high, verdict):
        found = judge(NEAR, three(low, high), gain=self.GAIN)
        assert MARGIN == 0.25 and found.verdict == verdict
        assert (found.p < 0.05) == (verdict != claims.UNDECIDED)
        assert "25% of the gain (0.02 nats): 350M+MoE-128 over 350M+MoE-32 gains 0.08 (0.08 to 0.08)." in found.why
        equal = verdict in (claims.REPRODUCED, claims.EQUAL)
        assert ("Equal within 25%" in found.why) == equal and ("Margin: 25%" in found.why) != equal
        said = (
            "too wide to show the paper's 0.01"
            if low == -0.009 and high == 0.019
            else "outside the paper's 0.01 (0.005"
        )
        assert (said in found.why) == (verdict == claims.EQUAL)
        assert restate(NEAR, found) == found

    @pytest.mark.parametrize("id", ["residual-equals-top2", "moe128-1.3b-matches-6.7b"])
    def test_without_a_number_in_the_text_the_margin_alone_counts(self, id):
        assert judge(paper.claim(id), three(-0.019, 0.019), gain=self.GAIN).verdict == claims.REPRODUCED

    def test_the_spread_of_the_gain_counts(self):
        found = judge(NEAR, [0.012] * 3, gain=[0.0799, 0.08, 0.0801])
        assert found.verdict == claims.REPRODUCED
        found = judge(NEAR, [0.005] * 3, gain=[0.04, 0.08, 0.12])
        mean, low, _ = interval([0.04, 0.08, 0.12])
        assert [mean, low] == pytest.approx([0.08, 0.08 - T3 * 0.04 / 3**0.5])
        assert low < 0 and found.verdict == claims.CANNOT_TELL
        found = judge(NEAR, [0.012] * 3, gain=[0.06, 0.08, 0.10])
        # 0.012 - 0.25 x gain is -0.003, -0.008, -0.013: mean -0.008, half 4.30 x 0.005 / sqrt(3) = 0.0124.
        assert found.verdict == claims.UNDECIDED

    @pytest.mark.parametrize("gain", [(), three(-0.01, 0.2), (-1, -1, -1)])
    def test_where_the_arms_that_must_differ_do_not_the_runs_cannot_tell(self, gain):
        found = judge(NEAR, [0.01] * 3, gain=gain)
        assert found.verdict == claims.CANNOT_TELL and found.p is None
        assert "350M+MoE-128 over 350M+MoE-32" in found.why

    def test_a_ratio_is_held_against_one(self):
        claim = replace(NEAR, kind="ratio", value=0.99, value_low=None, value_high=None)  # 15 % either way
        assert judge(claim, three(0.989, 0.993), gain=self.GAIN).verdict == claims.REPRODUCED
        assert judge(claim, three(0.90, 0.91), gain=self.GAIN).verdict == claims.NOT_REPRODUCED

    def test_values_and_gain_are_of_the_same_seeds(self):
        with pytest.raises(ValueError, match="4 values, but the gain of 3 seeds"):
            judge(NEAR, [0.0] * 4, gain=self.GAIN)


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
        assert (found.verdict == claims.NOT_TESTABLE) == (not able) and found.ours == pytest.approx(0.21)
        assert (judge(claim, [], scale=scale, share=share).verdict == claims.NOT_TESTABLE) == (not able)
        if share is not None:
            assert restate(claim, found, scale) == found

    def test_a_claim_that_becomes_testable_is_judged_when_its_result_is_read(self):
        old = judge(LATE, [0.2, 0.21, 0.22], scale="cpu", share=0.8)
        before = replace(old, verdict=claims.NOT_TESTABLE, p=None)
        assert old.verdict == claims.REPRODUCED and restate(LATE, before, "cpu") == old

    @pytest.mark.parametrize(("share", "verdict"), [(0.16, claims.DIRECTION), (0.95, claims.REPRODUCED)])
    def test_the_number_of_the_end_needs_runs_that_reach_it(self, share, verdict):
        claim = paper.claim("moe128-350m-beats-own-base")
        found = judge(claim, [-0.307, -0.308, -0.306], scale="cpu", share=share)
        assert found.verdict == verdict and restate(claim, found, "cpu") == found
        assert ("is that of the end of its training, of which these runs reach 16%" in found.why) == (share < 0.9)
        near = judge(NEAR, [0.01, 0.011, 0.009], gain=[0.08] * 3, share=share)
        assert near.verdict == (claims.EQUAL if share < 0.9 else claims.REPRODUCED)


class TestAgreed:
    """A comparison at other settings that must say the same, such as another learning rate."""

    OTHER = "At one shared rate"

    @pytest.mark.parametrize(
        ("other", "verdict"),
        [
            ([-0.2, -0.21, -0.3], claims.REPRODUCED),
            ([-0.2, -0.21, 0.3], claims.UNDECIDED),
            ([0.2, 0.21, 0.22], claims.UNDECIDED),
            ([-0.2, -0.21], claims.INCOMPLETE),
        ],
    )
    def test_both_decide_or_none_does(self, other, verdict):
        own, second = judge(ORDER, [-0.1, -0.11, -0.12]), judge(ORDER, other, note=self.OTHER)
        found = agreed(own, second)
        assert own.verdict == claims.REPRODUCED and found.verdict == verdict and found.ours == own.ours
        assert f"At one shared rate: {second.ours:+.3g}, {second.verdict}." in found.why
        assert found.p == (own.p if second.p is None else max(own.p, second.p))
        assert restate(ORDER, found) == found, "both are judged again"

    def test_what_is_not_judged_or_has_no_other_stays(self):
        for own in (judge(ORDER, [-0.1, -0.1]), judge(SIZE, [0.313], exact=True)):
            assert agreed(own, judge(ORDER, [0.1, 0.11, 0.12])) == own

    def test_without_a_verdict_there_is_none(self):
        own, other = judge(ORDER, [-0.1, -0.11, -0.12]), judge(ORDER, [], note=self.OTHER)
        found = agreed(own, other)
        assert found.verdict == claims.INCOMPLETE and found.p is None
        assert "At one shared rate there are no values" in found.why

    def test_the_same_runs_are_no_second_comparison(self):
        own = judge(ORDER, [-0.1, -0.11, -0.12])
        found = agreed(own, replace(own, note=self.OTHER))
        assert (found.why, found.verdict) == (own.why, own.verdict)
        assert restate(ORDER, found) == found

    def test_where_one_shows_less_that_is_the_verdict(self):
        own, wide = judge(FIG1, three(-0.305, -0.295)), judge(FIG1, three(-0.5, -0.1))
        assert (own.verdict, wide.verdict) == (claims.REPRODUCED, claims.DIRECTION)
        assert agreed(own, wide).verdict == agreed(wide, own).verdict == claims.DIRECTION
        near = [judge(NEAR, three(*ends), gain=TestEquality.GAIN) for ends in ((0.006, 0.014), (-0.019, 0.019))]
        assert agreed(*near).verdict == agreed(*near[::-1]).verdict == claims.EQUAL

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
        for values, futile in (([0.0, 0.3, -0.3], True), ([0.0, 0.02, -0.02], False), ([0.03, 0.045, 0.06], False)):
            found = judge(same, values, gain=gain, looks=(3, 9))
            assert found.verdict == claims.UNDECIDED and found.why.endswith("is below 10%.") == futile, values
        reverse = judge(same, [0.0, 0.02, -0.02], gain=[-0.1, -0.11, -0.12], looks=(3, 9))
        assert reverse.verdict == claims.CANNOT_TELL and reverse.why.endswith("is below 10%.")

    def test_looks_that_were_not_planned_do_not_count(self):
        """Judged after each seed, a plan of three looks would be wrong in 7 % of cases instead of 5 %."""
        values = [-0.1, -0.11, 0.3, 0.2, -0.1]
        planned, more = judge(ORDER, values[:3], looks=(3,)), judge(ORDER, values, looks=(3,))
        assert (more.verdict, more.low, more.p) == (planned.verdict, planned.low, planned.p)
        assert more.values == tuple(values)
        early = judge(ORDER, values[:3], looks=(5,))
        assert early.verdict == claims.FEW_SEEDS and early.why == "The first look is at 5 seeds."
        assert restate(ORDER, early) == early and restate(ORDER, more) == more

    def test_what_was_seen_counts_against_futility(self):
        likely = judge(FIG1, [-0.6, -0.2, -0.1], looks=(3, 9))
        assert likely.verdict == claims.UNDECIDED and likely.why == "The next look is at 9 seeds."


class TestTimings:
    def test_rounds_of_one_session_are_one_sample(self):
        found = judge_timing(FASTER, [[1.2, 1.3, 1.25]], note="Twins.")
        assert found.verdict == claims.FEW_SESSIONS and found.samples == 1
        assert found.ours == 1.25 and found.low is None and found.high is None and found.p is None
        assert found.note == "Twins. Spread within the one session: 1.2 to 1.3 over 3 rounds."
        assert restate(FASTER, found) == found

    def test_sessions_are_the_samples(self):
        found = judge_timing(FASTER, [[1.2], [1.22], [1.24], []])
        assert found.samples == 3 and found.high - found.ours == pytest.approx(T3 * 0.02 / 3**0.5)
        assert judge_timing(FASTER, [[1.2], [1.22]]).verdict == claims.FEW_SESSIONS
        assert judge_timing(FASTER, []).verdict == claims.NOT_TESTED

    def test_sessions_that_agree_by_chance_are_no_surer_than_their_rounds(self):
        # The rounds' variance is 0.01, a median's pi / 2 x 0.01 / 3; the medians alone would give 1.2 -+ 0.
        found = judge_timing(FASTER, [[1.1, 1.2, 1.3]] * 3)
        assert found.high - found.ours == pytest.approx(T3 * (math.pi / 2 * 0.01 / 3 / 3) ** 0.5)
        assert found.verdict == claims.UNDECIDED or found.low > 1
        assert restate(FASTER, found) == found, "the spread inside sessions is stored"
        wide = judge_timing(FASTER, [[1.1, 1.11, 1.12], [1.5, 1.51, 1.52], [1.9, 1.91, 1.92]])
        assert wide.high - wide.ours == pytest.approx(T3 * 0.4 / 3**0.5), "the spread between sessions is greater"

    def test_a_round_that_is_no_number_is_named(self):
        found = judge_timing(FASTER, [[1.1, 1.2], [1.1, math.nan], [1.1, 1.2], [1.2]])
        assert found.verdict == claims.INCOMPLETE and found.why == "Without a value: value 2."

    def test_timed_claims(self):
        timed = {claim.id for claim in paper.claims() if claim.timed}
        assert {"kernels-6x", "training-5x-cheaper"} <= timed
        assert not timed & {"pr-moe-size", "moe128-beats-moe32", "hierarchical-hops", "dispatch-cost-factor-e"}


def test_a_changed_rule_counts_for_all_kinds_of_stored_verdicts():
    counted, speed = judge(SIZE, [0.313], exact=True), paper.claim("speedup-1t")
    assert restate(SIZE, replace(counted, verdict=claims.NOT_REPRODUCED)) == counted
    for fitted in (False, True):
        now = judge_simulated(speed, 7.3, fitted=fitted)
        assert now.kind == (claims.FITTED if fitted else claims.PREDICTED)
        assert restate(speed, replace(now, verdict=claims.SIMULATED_FAILS)) == now
    now = judge(ORDER, three(-0.12, -0.10))
    assert restate(ORDER, replace(now, verdict=claims.UNDECIDED, p=0.5)) == now


def test_arithmetic_needs_no_spread_and_has_no_tolerance():
    verdict = judge(SIZE, [0.313], exact=True)
    assert verdict.verdict == claims.REPRODUCED and verdict.samples == 0 and verdict.kind == claims.COUNTED
    exact = paper.claim("residual-halves-exchange")
    assert judge(exact, [0.5], exact=True).verdict == claims.REPRODUCED
    assert judge(exact, [0.51], exact=True).verdict == claims.DIRECTION


def test_every_verdict_has_a_sign_a_class_and_a_meaning():
    said = {value for name, value in vars(claims).items() if name.isupper() and isinstance(value, str)}
    assert said - {claims.MEASURED, claims.COUNTED, claims.PREDICTED, claims.FITTED} == set(claims.OUTCOMES)
    assert all(o.sign and o.meaning and o.style in claims.STYLES for o in claims.OUTCOMES.values())
    assert claims.outcome("of another version").style == "none"
    assert {*claims.NOT_JUDGED} == {v for v, o in claims.OUTCOMES.items() if o.style == "none"} - {claims.NOT_YET}


class TestSimulated:
    """Simulations have no seeds: their verdicts say so."""

    SPEED = paper.claim("speedup-1t")  # 7.2, 7.15 to 7.25
    LIMIT = paper.claim("1t-under-25ms")
    ORDERED = paper.claim("pytorch-moe-slower-than-dense")
    WIDE = paper.claim("released-part-speedup")  # 1.42, 1.24 to 1.6

    @pytest.mark.parametrize(
        ("claim", "ours", "expected"),
        [
            (SPEED, 7.3, "simulated: within 15 %"),
            (SPEED, 7.2 * 1.149, "simulated: within 15 %"),
            (SPEED, 7.2 * 1.151, "simulated: direction only"),  # of the value, not of the end of its range
            (SPEED, 7.2 * 0.849, "simulated: direction only"),
            (SPEED, 0.9, "simulated: does not hold"),
            (WIDE, 1.3, "simulated: within 15 %"),
            (WIDE, 1.42 * 0.86, "simulated: within 15 %"),
            (WIDE, 1.42 * 0.84, "simulated: direction only"),
            (replace(WIDE, value_low=1.1), 1.12, "simulated: within 15 %"),  # in the range that the paper leaves open
            (LIMIT, 24.9, "simulated: holds"),
            (LIMIT, 25.1, "simulated: does not hold"),
            (ORDERED, 1.0, "simulated: holds"),  # against 20: 5 % apart
            (ORDERED, -1.0, "simulated: does not hold"),
            (ORDERED, 0.99, "simulated: within the simulator's error"),
            (ORDERED, -0.99, "simulated: within the simulator's error"),
            (SPEED, None, claims.NOT_TESTED),
        ],
    )
    def test_rules(self, claim, ours, expected):
        found = judge_simulated(claim, ours, against=20.0)
        assert found.verdict == expected and found.ours == ours
        assert found.verdict == claims.NOT_TESTED or found.verdict in claims.SIMULATED
        assert ("% apart; an order counts from 5 %" in found.note) == (claim is self.ORDERED)
        assert found.samples == 0 and found.low is None and found.high is None
        assert ours is None or found.note.startswith("Simulated, predicted")
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
    assert comparison.judge_loss(claim, final[final["arm"] != "MoE-128 (sum)"], arms, "cpu").values


def test_an_arm_may_be_compared_with_itself():
    """As the best of several arms is with the first one, which it may be."""
    final = pd.DataFrame({"seed": [0, 1], "arm": ["Dense", "Dense"], "validation_loss": [3.0, 3.1]})
    assert comparison.difference(final, "Dense", "Dense").startswith("Dense ends level with Dense")
