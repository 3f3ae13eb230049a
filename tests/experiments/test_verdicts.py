from dataclasses import replace

import pandas as pd
import pytest

from moelab import paper
from moelab.experiments import pr_moe
from moelab.paper import verdicts as claims
from moelab.paper.verdicts import judge, judge_simulated
from moelab.statistics import interval

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


@pytest.mark.parametrize(
    ("claim", "values", "verdict"),
    [
        (ORDER, [-0.10, -0.11, -0.12], claims.REPRODUCED),
        (ORDER, [0.10, 0.11, 0.12], claims.NOT_REPRODUCED),
        (ORDER, [-0.10, 0.11, 0.02], claims.UNDECIDED),
        (ORDER, [-0.5], claims.NO_SPREAD),
        (ORDER, [], claims.NOT_TESTED),
        (NEAR, [0.009, 0.010, 0.011], claims.REPRODUCED),
        (NEAR, [0.09, 0.10, 0.11], claims.NOT_REPRODUCED),
        (NEAR, [-0.05, 0.0, 0.05], claims.UNDECIDED),
        (
            replace(ORDER, kind="difference", value=-0.3, value_low=-0.32, value_high=-0.28),
            [-0.10, -0.11, -0.12],
            claims.DIRECTION,
        ),
        (
            replace(ORDER, kind="difference", value=-0.3, value_low=-0.32, value_high=-0.28),
            [-0.30, -0.31, -0.29],
            claims.REPRODUCED,
        ),
        (paper.claim("residual-faster-than-top2"), [1.3, 1.31, 1.32], claims.REPRODUCED),  # "more than 10 %"
        (paper.claim("residual-faster-than-top2"), [1.03, 1.031, 1.032], claims.DIRECTION),
        (paper.claim("residual-faster-than-top2"), [0.8, 0.81, 0.82], claims.NOT_REPRODUCED),
    ],
)
def test_rules(claim, values, verdict):
    assert judge(claim, values).verdict == verdict


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
    assert verdicts["pyramid-shrinks-gap"].verdict == claims.NOT_TESTED
    assert verdicts["pr-moe-size"].ours == pytest.approx(4.1168 / 13.150, rel=1e-3)
    assert "0.010 nats above" in pr_moe.headline(frame) and "40%" in pr_moe.headline(frame)
    assert "1 seed, no spread" in pr_moe.headline(frame[frame["seed"] == 0])
    assert "no finished pair" in pr_moe.headline(frame[frame["arm"] == "Dense"])


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
            (ORDERED, 1.0, "simulated: holds"),
            (ORDERED, -1.0, "simulated: does not hold"),
            (SPEED, None, claims.NOT_TESTED),
        ],
    )
    def test_rules(self, claim, ours, expected):
        found = judge_simulated(claim, ours)
        assert found.verdict == expected and found.ours == ours
        assert found.samples == 0 and found.low is None and found.high is None
        assert ours is None or found.note.startswith("Simulated, predicted")
        assert ours is None or "constants were fitted on" in judge_simulated(claim, ours, fitted=True).note

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
        assert untested == {"released-part-speedup"}
        assert all(v.verdict.startswith("simulated: ") for v in found if v.claim not in untested)
        by_id = {v.claim: v for v in found}
        assert by_id["half-the-gpus"].ours == 0.5
        dense_ratio = dense.query("figure == 'fig-15' and model == 'PR-MoE+MoS'").iloc[0]
        assert dense_ratio["cheaper"] == pytest.approx(2 * dense_ratio["faster"]), "8-way instead of 16-way slicing"
