"""Ideas that are tried: what is judged, read off curves and recommended, from made-up runs with known answers."""

import json
import math
from dataclasses import replace

import pytest

from moelab.config import ModelConfig
from moelab.design.verdicts import CANNOT_TELL
from moelab.experiments import tries
from moelab.runs.collection import Runs
from moelab.runs.store import Run

STEPS = (512, 1024, 2048, 4096, 8192, 12288)


def made(root, spec, final, curve, seconds=10.0, cpu="one"):
    """A finished run: its final loss, and its loss on part of the text as a function of the tokens."""
    path = root / f"{spec.title}-{spec.id}"
    path.mkdir()
    numbers = dict.fromkeys(("steps", "bits_per_byte", "parameters", "active_parameters", "flops_per_token"), 1)
    result = {**numbers, "tokens": STEPS[-1], "validation_loss": final, "unigram_loss": 5.0, "seconds": seconds}
    (path / "result.json").write_text(json.dumps(result))
    (path / "provenance.json").write_text(json.dumps({"hardware": {"cpu": cpu}}))
    rows = [{"step": i, "tokens": t, "loss": curve(t)} for i, t in enumerate((0, *STEPS))]
    (path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(spec, path)


def fall(factor):
    """A curve that is as low as another one after `factor` times the tokens."""
    return lambda tokens: 7.0 - 0.3 * math.log(max(1, tokens) * factor)


def runs_of(root, factor, noise=(0.0, 0.002, -0.002), cpu="one", given=None):
    """Runs of the baseline and of an idea whose curve is that of the baseline with `factor` times the tokens."""
    seeds = len(noise)
    specs = tries.pair(given or {"model.routing.z_loss": "1e-3"}, "smoke", seeds, "idea")
    made_runs = []
    for i, spec in enumerate(specs):
        curve = fall(factor if i >= seeds else 1.0)
        own = {"seconds": 20.0, "cpu": cpu} if i >= seeds else {}
        # The whole validation text is harder by 0.5 than the part of it that curves are of.
        made_runs.append(made(root, spec, curve(STEPS[-1]) + 0.5 + noise[i % seeds], curve, **own))
    return Runs(made_runs)


def test_an_idea_that_needs_half_the_tokens_is_twice_as_fast_and_lowers_the_loss(tmp_path):
    found = tries.judge(runs_of(tmp_path, 2.0), "idea", "smoke")
    assert found.verdict == tries.HELPS and found.difference == pytest.approx(-0.3 * math.log(2))
    assert found.low < found.difference < found.high < 0
    assert found.flops == pytest.approx(2.0, rel=1e-6) and found.flops_low < 2.0 < found.flops_high
    assert found.seconds == pytest.approx(1.0), "twice the seconds for the same tokens"
    # Welch's half interval for equal spreads of 0.002 in groups of three is the noise floor.
    assert found.noise == pytest.approx(2.776 * 0.002 * math.sqrt(2 / 3), rel=1e-3)
    assert found.high - found.difference == pytest.approx(found.noise, rel=1e-3)
    assert found.seeds == 3 and 2 <= found.to_know <= 3


def test_one_that_needs_more_raises_the_loss_and_stops_the_ladder(tmp_path):
    found = tries.judge(runs_of(tmp_path, 0.5, cpu="other"), "idea", "quick")
    assert found.verdict == tries.HURTS and found.flops == pytest.approx(0.5, rel=1e-6)
    assert found.seconds is None, "seconds of two processors are not compared"
    assert found.next == "stop: a gain of 0.01 nats per token is excluded"


def test_more_flops_a_token_count_against_an_idea(tmp_path):
    found = tries.judge(runs_of(tmp_path, 2.0, given={"model.expert.shared": "1"}), "idea", "smoke")
    plain, shared = (s.cost for s in tries.pair({"model.expert.shared": 1}, "smoke", 1, "idea"))
    assert shared > plain and found.flops == pytest.approx(2.0 * plain / shared, rel=1e-6)


def test_noise_cannot_be_told_and_says_how_many_seeds_could(tmp_path):
    found = tries.judge(runs_of(tmp_path, 1.01, noise=(0.0, 0.02, -0.02)), "idea", "quick")
    assert found.verdict == CANNOT_TELL and found.low < 0 < found.high and found.to_know is None
    assert found.next.startswith("go on to cpu")


def test_few_seeds_and_lost_ones_decide_nothing(tmp_path):
    (two := tmp_path / "two").mkdir()
    found = tries.judge(runs_of(two, 4.0, noise=(0.0, 0.001)), "idea", "quick")
    assert found.verdict == f"{CANNOT_TELL}: fewer than 3 seeds" and found.next == "more seeds on this rung"
    (one := tmp_path / "one").mkdir()
    found = tries.judge(runs_of(one, 4.0, noise=(0.0,)), "idea", "quick")
    assert (found.low, found.noise, found.to_know, found.flops_low) == (None,) * 4
    assert json.loads(json.dumps(found.__dict__))["difference"] == found.difference
    (lost := tmp_path / "lost").mkdir()
    runs = runs_of(lost, 4.0, noise=(0.0, 0.001, 0.002, 0.003))
    (runs[-1].path / "result.json").unlink()
    assert tries.judge(runs, "idea", "quick").verdict == f"{CANNOT_TELL}: without seed 3 of idea"
    assert tries.judge(Runs(runs[:4]), "idea", "quick") is None


def test_the_rule_for_going_on():
    assert tries.go_on("quick", -0.02, CANNOT_TELL).startswith("go on to cpu")
    assert tries.go_on("cpu", -0.02, tries.HELPS).startswith("go on to full")
    assert tries.go_on("cpu", -0.009, tries.HELPS).startswith("stop")
    assert tries.go_on("full", -0.02, tries.HELPS) == "the last rung"
    assert tries.go_on("smoke", -0.02, CANNOT_TELL).startswith("start at quick")


def test_seeds_are_planned_by_the_spread():
    assert tries.planned_seeds("quick", None) == tries.planned_seeds("quick", 1e-4) == 3
    few, many = (tries.planned_seeds("quick", 0.014, effect) for effect in (0.05, 0.03))
    assert 3 <= few < many < tries.MOST_SEEDS == tries.planned_seeds("quick", 0.014, 0.001)


def test_settings_that_compare_nothing_are_refused():
    for given, said in (
        ({"data.corpus": "sotu"}, r"try: data.corpus cannot be tried"),
        ({"model.routing.z_loss": "0"}, r"try: with model.routing.z_loss the model is the baseline"),
        ({"model.routing.zloss": "0"}, r"no setting 'model.routing.zloss'; did you mean model.routing.z_loss"),
    ):
        with pytest.raises(ValueError, match=said):
            tries.pair(given, "smoke", 1, "idea")


@pytest.mark.parametrize("scale", list(tries.EXPERIMENT.scales))
def test_every_idea_changes_the_baseline_by_what_it_says_alone(scale):
    runs = {spec.title: spec for spec in tries.EXPERIMENT.specs(scale)}
    plain = runs.pop(tries.BASELINE)
    assert len(runs) == len(tries.IDEAS) >= 8 and len({spec.id for spec in runs.values()}) == len(runs)
    assert str(plain.model) == f"{tries.base(scale)}+MoE-128 twin"
    for spec in runs.values():
        assert (spec.train, spec.data) == (plain.train, plain.data)
    fine = runs["fine-grained experts"].model
    same = replace(fine, experts=plain.model.experts, top_k=1, expert=plain.model.expert)
    assert same == plain.model and max(fine.experts) == 2 * max(plain.model.experts)
    assert fine.top_k * fine.expert_feed_forward.weights == plain.model.expert_feed_forward.weights


def test_the_table_has_a_row_an_idea_and_its_line_counts_sure_ones(tmp_path):
    specs = [
        s for seed in range(3) for s in tries.build("smoke", seed, {}) if s.title in ("MoE-128", "z-loss", "QK norm")
    ]
    gain = {"MoE-128": 0.0, "z-loss": -0.2, "QK norm": 0.001}
    ends = [3.5 + gain[s.title] + 0.001 * s.train.seed for s in specs]
    runs = Runs([made(tmp_path, spec, end, fall(1.0)) for spec, end in zip(specs, ends, strict=True)])
    found = tries.table(runs, "smoke")
    assert list(found["idea"]) == ["z-loss", "QK norm"]
    assert found["settings"].iloc[0] == "model.routing.z_loss=0.001"
    assert tries.headline(found) == (
        "1 of 2 ideas lower the loss of MoE-128 for sure, z-loss most, by 0.200 nats per token"
    )
    assert tries.headline(tries.table(Runs(runs[:0]), "smoke")).startswith("no idea and the baseline")


def test_router_in_bf16_is_a_setting_of_the_model():
    assert ModelConfig.parse("350M+MoE-128").routing.precision == "fp32"
    (spec,) = tries.EXPERIMENT.specs("smoke", arms=["router in bf16"])
    assert spec.model.routing.precision == "bf16"
