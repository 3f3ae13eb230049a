"""What experiments judge: PR-MoE's claims from final losses, and all claims about inference by simulation."""

import pytest

from moelab import paper
from moelab.design import comparison
from moelab.design import verdicts as claims
from moelab.design.experiment import LOOKS
from moelab.experiments import (
    EXPERIMENTS,
    half_moe,
    inference_large,
    inference_scaling,
    model_variants_latency,
    moe_vs_dense_inference,
    pr_moe,
)
from moelab.simulate import frames
from tests.experiments import helpers


def final(losses):
    return helpers.final(losses, parameters={arm: 10 if arm == "MoE-128" else 4 for arm in losses})


def test_pr_moe_is_judged_by_the_means_of_arms_and_survives_missing_ones():
    dense = (5.0, 5.01, 5.0)
    gains = {"Dense": 0, "MoE-32": 0.1, "MoE-128": 0.2, "PR-MoE-32/64": 0.19}
    frame = final({arm: [loss - gain for loss in dense] for arm, gain in gains.items()})
    verdicts = {v.claim: v for v in pr_moe.verdicts(frame)}
    assert verdicts["moe128-beats-moe32"].ours == pytest.approx(-0.1)
    assert verdicts["moe128-beats-moe32"].verdict == claims.HOLDS
    assert verdicts["pr-moe-matches-moe128"].verdict == claims.HOLDS
    assert "350M+MoE-128 over 350M+MoE-32 gains 0.1" in verdicts["pr-moe-matches-moe128"].why
    assert verdicts["pr-moe-beats-moe32"].verdict == claims.HOLDS
    without = {v.claim: v for v in pr_moe.verdicts(frame[frame["arm"] != "MoE-32"])}
    assert without["pr-moe-matches-moe128"].verdict == claims.CANNOT_TELL
    assert verdicts["pr-moe-training-memory"].kind == claims.SIMULATED
    assert verdicts["pyramid-shrinks-gap"].ours is None
    assert verdicts["pr-moe-size"].ours == pytest.approx(4.1168 / 13.150, rel=1e-3)
    assert "+0.010 nats, inconclusive" in pr_moe.headline(frame)
    assert "40%" in pr_moe.headline(frame)
    assert "1 seed, no spread" in pr_moe.headline(frame[frame["seed"] == 0])
    assert "no finished pair" in pr_moe.headline(frame[frame["arm"] == "Dense"])


def test_the_interval_of_a_headline_is_that_of_the_planned_look():
    frame = final({"MoE-128": [4.8, 4.81, 4.8], "Dense": [5.0, 5.02, 5.01]})
    looks = [pr_moe.EXPERIMENT.looks_at(scale) for scale in ("quick", "full")]
    plain, planned = (comparison.difference(frame, "MoE-128", "Dense", plan) for plan in looks)
    assert (
        "interval -0.227 to -0.186, 3 seeds" in plain and "interval over 3 looks -0.237 to -0.176, 3 seeds" in planned
    )


def test_pr_moe_saves_training_memory_while_experts_are_not_copied_and_the_papers_gaps_come_from_it():
    ratios = pr_moe.memory_ratios()
    assert min(ratios.values()) == ratios[min(ratios)] < 1 < ratios[128]
    gaps = pr_moe.paper_gaps()
    assert gaps["Dense"][0] == pytest.approx(2.593 - 2.286) and gaps["PR-MoE-32/64"][0] == 0.01


def test_every_inference_claim_is_judged():
    dense = moe_vs_dense_inference.costs()
    found = [
        *inference_scaling.verdicts(inference_scaling.latencies()),
        *inference_large.verdicts(inference_large.latencies()),
        *model_variants_latency.verdicts(frames.memory(), model_variants_latency.latency()),
        *moe_vs_dense_inference.verdicts(dense),
    ]
    names = ("inference-scaling", "inference-large", "model-variants-latency", "moe-vs-dense-inference")
    assert {v.claim for v in found} == {claim.id for name in names for claim in paper.claims(name)}
    untested = {v.claim for v in found if not v.judged}
    assert untested == {"released-part-speedup", "pr-moe-lower-latency"}
    assert all(v.simulated for v in found if v.claim not in untested)
    by_id = {v.claim: v for v in found}
    assert by_id["half-the-gpus"].ours == 0.5
    assert by_id["pytorch-moe-slower-than-dense"].verdict == claims.HOLDS
    lowest = by_id["pr-moe-mos-lowest-latency"]
    assert lowest.verdict == claims.CANNOT_TELL and "0.25 % apart" in lowest.why
    dense_ratio = dense.query("figure == 'fig-15' and model == 'PR-MoE+MoS'").iloc[0]
    assert dense_ratio["cheaper"] == pytest.approx(2 * dense_ratio["faster"]), "8-way instead of 16-way slicing"


def test_plans_are_named_before_the_runs():
    for about in EXPERIMENTS.values():
        for scale in {*about.scales, *LOOKS, *about.looks}:
            looks = about.looks_at(scale)
            assert list(looks) == sorted(set(looks)) and looks[0] >= 3
    assert pr_moe.EXPERIMENT.looks_at("cpu") == (3, 5) and pr_moe.EXPERIMENT.looks_at("full") == (3, 6, 9)
    assert pr_moe.EXPERIMENT.looks_at("quick") == (3,)
    assert pr_moe.EXPERIMENT.plan("cpu") == {"looks": (3, 5), "decides_from": 0}


def test_seeds_of_the_wider_base_that_were_seen_before_the_plan_do_not_decide():
    assert half_moe.EXPERIMENT.plan("full") == {"looks": (3, 6, 9), "decides_from": 0}
    plan = half_moe.EXPERIMENT.plan("full", "1.3B")
    assert plan == {"looks": (3, 6, 9), "decides_from": 10}
    values = {"Second half": [9.0, 9.0, 4.8, 4.81, 4.8], "First half": [5.0, 5.0, 5.0, 5.02, 5.01]}
    frame = final(values).assign(seed=[0, 1, 10, 11, 12] * 2, tokens=101_621_760)
    (order,) = half_moe.verdicts(frame, "full", "1.3B")
    assert order.verdict == claims.HOLDS and order.samples == 3 and order.ours == pytest.approx(-0.207, abs=0.001)
    assert "Seeds before 10 do not decide; they give +4 nats." in order.why and "twins of the 1.3B base" in order.note
    said = comparison.difference(frame, "Second half", "First half", **plan)
    assert said.startswith("Second half ends 0.207 nats below First half")
    assert half_moe.verdicts(frame, "full")[0].ours > 2, "on the 350M base all seeds decide"
