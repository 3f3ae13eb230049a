import math
from dataclasses import replace

import pandas as pd
import pytest

from moelab import paper
from moelab.experiments import pr_moe
from moelab.paper import verdicts as claims
from moelab.paper.verdicts import Gain, judge, judge_simulated, judge_timing, restate
from moelab.statistics import holm, interval, p_value

NEAR = paper.claim("pr-moe-matches-moe128")
ORDER = paper.claim("moe128-beats-moe32")
SIZE = paper.claim("pr-moe-size")


def test_interval_is_students():
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert (
        mean == 2.0
        and high - mean == pytest.approx(4.302652729911275 / 3**0.5)
        and mean - low == pytest.approx(high - mean)
    )


T2 = 12.706204736432095  # 97.5 % quantile of Student's t with one degree of freedom
FIG1 = replace(ORDER, kind="difference", value=-0.3, value_low=-0.32, value_high=-0.28)
FASTER = paper.claim("residual-faster-than-top2")  # "more than 10 %"
BELOW = replace(ORDER, kind="bound", value=25.0, direction="lower")
ABOVE = replace(ORDER, kind="bound", value=100.0, direction="higher")
AT = replace(ORDER, kind="bound", value=100.0, direction="equal")


def two(low, high):
    """The two values whose 95 % interval is low to high: half its width is t x half their distance."""
    mean, half = (low + high) / 2, (high - low) / 2 / T2
    return [mean - half, mean + half]


@pytest.mark.parametrize(
    ("claim", "low", "high", "verdict"),
    [
        (ORDER, -0.12, -0.10, claims.REPRODUCED),
        (ORDER, 0.10, 0.12, claims.NOT_REPRODUCED),
        (ORDER, -0.10, 0.02, claims.UNDECIDED),
        # A number: the effect is 0.3, so an interval that counts is narrower than 0.15.
        (FIG1, -0.38, -0.24, claims.REPRODUCED),  # meets -0.32 to -0.28, 0.14 wide
        (FIG1, -0.38, -0.22, claims.DIRECTION),  # meets it, but is 0.16 wide
        (FIG1, -0.31, -0.29, claims.REPRODUCED),
        (FIG1, -0.12, -0.10, claims.DIRECTION),
        (FIG1, -0.60, 0.05, claims.UNDECIDED),  # meets the paper's range and allows no effect
        (FIG1, 0.01, 0.03, claims.NOT_REPRODUCED),
        (replace(FIG1, value=-0.01, value_low=-0.02, value_high=0.005), -0.05, 0.02, claims.UNDECIDED),
        (replace(FIG1, value=-0.01, value_low=-0.02, value_high=0.005), 0.001, 0.003, claims.NOT_REPRODUCED),
        # "More than 10 %": wide intervals count where all of them is beyond.
        (FASTER, 1.2, 1.5, claims.REPRODUCED),
        (FASTER, 1.08, 1.12, claims.REPRODUCED),  # 0.04 wide, the effect is 0.1
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
    ],
)
def test_rules(claim, low, high, verdict):
    found = judge(claim, two(low, high))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.verdict == verdict and found.kind == claims.MEASURED and found.samples == 2
    if claim is AT:
        assert found.p is None
    else:
        short = claim is FASTER and low <= 1 <= high < claim.value
        neutral = claim.value if claim.kind == "bound" or short else float(claim.kind == "ratio")
        assert (found.p < 0.05) == (not low <= neutral <= high)


def test_the_edge_of_half_the_effect():
    assert judge(FIG1, two(-0.37499, -0.22501)).verdict == claims.REPRODUCED
    assert judge(FIG1, two(-0.37501, -0.22499)).verdict == claims.DIRECTION


def test_without_spread_or_values():
    assert judge(ORDER, [-0.5]).verdict == claims.NO_SPREAD and judge(ORDER, [-0.5]).p is None
    assert judge(ORDER, []).verdict == claims.NOT_TESTED and judge(ORDER, []).kind == ""


class TestEquality:
    """The margin is a quarter of the gain: 0.02 where the better arm gains 0.08 at every seed."""

    GAIN = Gain("MoE-128 over Dense", [0.08, 0.08])

    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [
            (-0.019, 0.019, claims.EQUAL),  # within the margin, and meets the paper's 0.005 to 0.015, but is wide
            (-0.009, 0.004, claims.EQUAL),  # beside the paper's range
            (0.006, 0.014, claims.REPRODUCED),  # not zero, but within the margin; inside the paper's range
            (0.0145, 0.019, claims.REPRODUCED),  # meets the range and is narrower than half of 0.01
            (0.005, 0.021, claims.UNDECIDED),
            (-0.05, 0.05, claims.UNDECIDED),
            (0.021, 0.03, claims.NOT_REPRODUCED),
            (-0.03, -0.021, claims.NOT_REPRODUCED),
        ],
    )
    def test_rules(self, low, high, verdict):
        found = judge(NEAR, two(low, high), gain=self.GAIN)
        assert claims.MARGIN == 0.25 and found.verdict == verdict
        assert (found.p < 0.05) == (verdict != claims.UNDECIDED)
        assert "25 % of the gain (0.02 nats): MoE-128 over Dense gains 0.08 (0.08 to 0.08)." in found.note
        equal = verdict in (claims.REPRODUCED, claims.EQUAL)
        assert ("Equal within 25 %" in found.note) == equal and ("Margin: 25 %" in found.note) != equal
        assert ("The paper's 0.01 is not shown" in found.note) == (verdict == claims.EQUAL)

    @pytest.mark.parametrize("id", ["residual-equals-top2", "moe128-1.3b-matches-6.7b"])
    def test_without_a_number_in_the_text_the_margin_alone_counts(self, id):
        assert judge(paper.claim(id), two(-0.019, 0.019), gain=self.GAIN).verdict == claims.REPRODUCED

    def test_the_spread_of_the_gain_counts(self):
        # Differences of 0.005 twice against gains of 0.04 and 0.08: beyond the upper margin are -0.005 and -0.015, whose
        # interval is -0.01 -+ 12.7 x 0.005, so it may be beyond. Without the gain's spread it would be within 0.015.
        found = judge(NEAR, [0.005, 0.005], gain=Gain("a over b", [0.0799, 0.0801]))
        assert found.verdict == claims.REPRODUCED
        found = judge(NEAR, [0.005, 0.005, 0.005], gain=Gain("a over b", [0.04, 0.08, 0.12]))
        mean, low, _ = interval([0.04, 0.08, 0.12])
        assert (mean, low) == (pytest.approx(0.08), pytest.approx(0.08 - 4.302652729911275 * 0.04 / 3**0.5))
        assert low < 0 and found.verdict == claims.CANNOT_TELL
        found = judge(NEAR, [0.012, 0.012, 0.012], gain=Gain("a over b", [0.06, 0.08, 0.10]))
        # 0.012 - 0.25 x gain is -0.003, -0.008, -0.013: mean -0.008, half 4.30 x 0.005 / sqrt(3) = 0.0124.
        assert found.verdict == claims.UNDECIDED

    @pytest.mark.parametrize(
        "gain", [None, Gain("a over b", []), Gain("a over b", two(-0.01, 0.2)), Gain("a", [-1, -1])]
    )
    def test_insensitive_runs_cannot_tell(self, gain):
        found = judge(NEAR, [0.0, 0.0], gain=gain)
        assert found.verdict == claims.CANNOT_TELL and found.p is None and "ensitivity check" in found.note

    def test_a_ratio_is_held_against_one(self):
        claim = replace(NEAR, kind="ratio", value=0.99, value_low=None, value_high=None)
        assert judge(claim, two(0.989, 0.993), gain=self.GAIN).verdict == claims.REPRODUCED
        assert judge(claim, two(0.99, 1.01), gain=self.GAIN).verdict == claims.EQUAL
        assert judge(claim, two(0.90, 0.91), gain=self.GAIN).verdict == claims.NOT_REPRODUCED

    def test_values_and_gain_are_of_the_same_seeds(self):
        with pytest.raises(ValueError, match="3 values, but the gain of 2 seeds"):
            judge(NEAR, [0.0, 0.0, 0.0], gain=self.GAIN)


class TestTimings:
    def test_rounds_of_one_session_are_one_sample(self):
        found = judge_timing(FASTER, [[1.2, 1.3, 1.25]], note="Twins.")
        assert found.verdict == claims.ONE_SESSION and found.samples == 1
        assert found.ours == 1.25 and found.low is None and found.high is None and found.p is None
        assert found.note == "Twins. Spread within the one session: 1.2 to 1.3 over 3 rounds."

    def test_sessions_are_the_samples(self):
        found = judge_timing(FASTER, [[1.1, 1.2, 9.0], [1.22, 1.22], []])
        assert found.samples == 2 and found.ours == pytest.approx(1.21)  # medians 1.2 and 1.22
        assert found.high - found.ours == pytest.approx(T2 * 0.01)
        assert "in each session: 1.1 to 9 over 3 rounds, 1.22 to 1.22 over 2 rounds" in found.note

    def test_no_session(self):
        assert judge_timing(FASTER, []).verdict == claims.NOT_TESTED

    def test_timed_claims(self):
        timed = {claim.id for claim in paper.claims() if claim.timed}
        assert {"kernels-6x", "training-5x-cheaper"} <= timed
        assert not timed & {"pr-moe-size", "moe128-beats-moe32", "hierarchical-hops", "dispatch-cost-factor-e"}


class TestStored:
    """Verdicts of summaries from before there were kinds."""

    @staticmethod
    def old(claim, values, verdict, **fields):
        return replace(judge(claim, values), verdict=verdict, kind="", p=None, **fields)

    def test_an_ordering_is_judged_again_from_its_interval(self):
        found = restate(ORDER, self.old(ORDER, two(-0.12, -0.10), claims.UNDECIDED))
        assert found == judge(ORDER, two(-0.12, -0.10))
        wide = restate(FIG1, self.old(FIG1, two(-0.60, 0.05), claims.REPRODUCED))
        assert wide.verdict == claims.UNDECIDED

    def test_an_equality_cannot_be_told(self):
        found = restate(NEAR, self.old(NEAR, two(0.009, 0.011), claims.REPRODUCED))
        assert found.verdict == claims.CANNOT_TELL and found.kind == claims.MEASURED and found.p is None

    def test_a_timing_is_one_session(self):
        found = restate(FASTER, self.old(FASTER, two(1.2, 1.3), claims.REPRODUCED))
        assert found.verdict == claims.ONE_SESSION and found.samples == 1 and found.low is None
        assert "95 % interval over 2 rounds: 1.2 to 1.3." in found.note

    def test_kinds(self):
        counted = judge(SIZE, [0.313], exact=True)
        assert restate(SIZE, replace(counted, kind="")) == counted
        speed = paper.claim("speedup-1t")
        for fitted in (False, True):
            now = judge_simulated(speed, 7.3, fitted=fitted)
            assert now.kind == (claims.FITTED if fitted else claims.PREDICTED)
            assert restate(speed, replace(now, kind="")) == now

    @pytest.mark.parametrize("now", [judge(NEAR, [0.0, 0.0]), judge(ORDER, []), judge_timing(FASTER, [[1.2, 1.3]])])
    def test_verdicts_of_today_stay(self, now):
        assert restate(paper.claim(now.claim), now) == now

    def test_one_seed_and_shown_values_keep_their_words(self):
        for found in (judge(ORDER, [-0.5]), judge(paper.claim("moe128-350m-beats-1.3b"), [0.1, 0.2], scale="cpu")):
            assert restate(paper.claim(found.claim), replace(found, kind="")) == found


def test_p_values_are_students():
    # One degree of freedom is the Cauchy distribution: two-sided p of t is 1 - 2 / pi x atan(t).
    low, high = interval([1.0, 3.0])[1:]  # mean 2, standard error 1
    assert p_value(low, high, 2) == pytest.approx(1 - 2 / math.pi * math.atan(2))
    assert p_value(low, high, 2, against=1.0) == pytest.approx(0.5)
    assert p_value(0.0, 0.2, 7) == pytest.approx(0.05), "an interval that ends at the value has p 0.05"
    assert p_value(1.0, 1.0, 3) == 0 and p_value(1.0, 1.0, 3, against=1.0) == 1


def test_holm_multiplies_the_least_by_their_number_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_arithmetic_needs_no_spread():
    verdict = judge(SIZE, [0.313], exact=True)
    assert verdict.verdict == claims.REPRODUCED and verdict.samples == 0


def final(losses):
    rows = [
        {"arm": arm, "seed": seed, "validation_loss": loss + 0.1 * seed, "parameters": 10 if arm == "MoE-128" else 4}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_pr_moe_pairs_by_seed_and_survives_missing_arms():
    frame = final({"Dense": [5.0, 5.01], "MoE-32": [4.9, 4.91], "MoE-128": [4.8, 4.81], "PR-MoE-32/64": [4.81, 4.82]})
    verdicts = {v.claim: v for v in pr_moe.verdicts(frame)}
    assert verdicts["moe128-beats-moe32"].ours == pytest.approx(-0.1)
    assert verdicts["moe128-beats-moe32"].verdict == claims.REPRODUCED, "seeds differ by 0.1, pairs do not"
    assert verdicts["pr-moe-matches-moe128"].verdict == claims.REPRODUCED
    assert "MoE-128 over Dense gains 0.2" in verdicts["pr-moe-matches-moe128"].note
    assert verdicts["pr-moe-beats-moe32"].verdict == claims.REPRODUCED
    without = {v.claim: v for v in pr_moe.verdicts(frame[frame["arm"] != "Dense"])}
    assert without["pr-moe-matches-moe128"].verdict == claims.CANNOT_TELL
    assert verdicts["pr-moe-training-memory"].kind == claims.PREDICTED
    assert verdicts["pyramid-shrinks-gap"].verdict == claims.NOT_TESTED
    assert verdicts["pr-moe-size"].ours == pytest.approx(4.1168 / 13.150, rel=1e-3)
    assert "0.010 nats above" in pr_moe.headline(frame) and "40%" in pr_moe.headline(frame)
    assert "1 seed, no spread" in pr_moe.headline(frame[frame["seed"] == 0])
    assert "no finished pair" in pr_moe.headline(frame[frame["arm"] == "Dense"])


def test_pr_moe_saves_training_memory_only_while_experts_are_not_copied():
    ratios = pr_moe.memory_ratios()
    assert min(ratios.values()) == ratios[min(ratios)] < 1 < ratios[128]


def test_the_papers_gaps_come_from_the_paper():
    gaps = pr_moe.paper_gaps()
    assert gaps["Dense"][0] == pytest.approx(2.593 - 2.286) and gaps["PR-MoE-32/64"][0] == 0.01


@pytest.mark.parametrize(
    "bad",
    [
        {"arms": ["MoE-64"]},
        {"seeds": 0},
        {"scale": "huge"},
        {"overrides": {"train.tokens": -1}},
        {"overrides": {"train.tokens": 5}},
    ],
)
def test_bad_arguments_are_one_line(bad):
    with pytest.raises(ValueError) as error:
        pr_moe.EXPERIMENT.specs(**bad)
    assert "\n" not in str(error.value)


class TestSimulated:
    """Simulations have no seeds: their verdicts say so."""

    SPEED = paper.claim("speedup-1t")
    LIMIT = paper.claim("1t-under-25ms")
    ORDERED = paper.claim("pytorch-moe-slower-than-dense")

    @pytest.mark.parametrize(
        ("claim", "ours", "expected"),
        [
            (SPEED, 7.3, "simulated: within 15 %"),
            (SPEED, 7.25 * 1.149, "simulated: within 15 %"),
            (SPEED, 7.25 * 1.16, "simulated: direction only"),
            (SPEED, 5.1, "simulated: direction only"),
            (SPEED, 0.9, "simulated: does not hold"),
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

    def test_an_order_needs_the_value_that_it_is_against(self):
        with pytest.raises(ValueError, match="needs the value of the right side"):
            judge_simulated(self.ORDERED, 1.0)

    def test_every_inference_claim_is_judged(self):
        from moelab.experiments import (
            inference_large,
            inference_scaling,
            model_variants_latency,
            moe_vs_dense_inference,
        )
        from moelab.simulate import frames

        dense = moe_vs_dense_inference.costs()
        found = [
            *inference_scaling.verdicts(inference_scaling.bars()),
            *inference_large.verdicts(inference_large.bars()),
            *model_variants_latency.verdicts(frames.memory(), model_variants_latency.latency()),
            *moe_vs_dense_inference.verdicts(dense),
        ]
        wanted = {
            claim.id
            for name in (
                "inference-scaling",
                "inference-large",
                "model-variants-latency",
                "moe-vs-dense-inference",
            )
            for claim in paper.claims(name)
        }
        assert {v.claim for v in found} == wanted
        untested = {v.claim for v in found if v.verdict == claims.NOT_TESTED}
        assert untested == {"released-part-speedup", "pr-moe-lower-latency"}
        assert all(v.verdict.startswith("simulated: ") for v in found if v.claim not in untested)
        by_id = {v.claim: v for v in found}
        assert by_id["half-the-gpus"].ours == 0.5
        assert by_id["pytorch-moe-slower-than-dense"].verdict == claims.SIMULATED_HOLDS
        lowest = by_id["pr-moe-mos-lowest-latency"]
        assert lowest.verdict == claims.SIMULATED_CLOSE and "0.25 % apart" in lowest.note
        dense_ratio = dense.query("figure == 'fig-15' and model == 'PR-MoE+MoS'").iloc[0]
        assert dense_ratio["cheaper"] == pytest.approx(2 * dense_ratio["faster"]), "8-way instead of 16-way slicing"


def test_a_verdict_on_another_number_of_seeds_than_planned_says_so(tmp_path, monkeypatch):
    from moelab import paper
    from moelab.report.publication import Publication

    claim = paper.claim("moe128-beats-moe32")
    (tmp_path / "x").mkdir()
    publication = Publication("pr-moe", "cpu", {}, tmp_path / "x", interactive=False)
    publication.claims(
        [
            judge(claim, values, scale="cpu")
            for values in ([-0.1, -0.11, -0.12], [-0.1, -0.11, -0.12, -0.1, -0.11], [-0.1])
        ]
    )
    three, five, one = (verdict.note for verdict in publication.verdicts)
    assert three == "5 seeds were planned." and one == ""
    assert five == "3 seeds were planned first, 5 after these had been seen."


def test_a_direction_only_says_why_the_number_is_not_shown():
    wide, beside = judge(FIG1, two(-0.38, -0.22)), judge(FIG1, two(-0.12, -0.10), note="Twins.")
    assert wide.note == "The paper's -0.3 is not shown: the interval includes it, but is too wide."
    assert beside.note == "Twins. The paper's -0.3 is not shown: it lies outside the interval."
    assert judge(FIG1, two(-0.31, -0.29)).note == ""
