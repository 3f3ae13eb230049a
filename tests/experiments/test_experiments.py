"""The training experiments: their specs at every scale, and the arithmetic between runs and verdicts."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moelab import paper
from moelab.config import ModelConfig
from moelab.design import comparison, rates, settings
from moelab.design import verdicts as claims
from moelab.evaluation import routing
from moelab.experiments import (
    EXPERIMENTS,
    all_to_all,
    capacity,
    decoding,
    distillation,
    expert_count,
    gating_kernels,
    half_moe,
    inference_large,
    inference_scaling,
    learning_rate,
    model_variants_latency,
    moe_vs_dense_inference,
    pr_moe,
    scaling,
    seeds,
    specialisation,
    throughput,
    top2_vs_residual,
    upcycling,
    zero_shot,
)
from moelab.lab import Lab
from moelab.runs.collection import Runs
from moelab.runs.dry_run import paper_rate, planned_runs, state_bytes
from moelab.runs.spec import Start, closure
from moelab.runs.store import RunStore
from moelab.simulate import frames, ways
from moelab.training.balance import random_max_violation
from moelab.training.schedule import learning_rate as learning_rate_at

SCALED = [(e.name, scale) for e in EXPERIMENTS.values() if e.arms or e.build for scale in e.scales]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "scale"), SCALED)
def test_every_experiment_has_specs_at_each_of_its_scales(name, scale):
    experiment = EXPERIMENTS[name]
    specs = experiment.specs(scale, 2)
    assert specs and {spec.train.seed % 100 for spec in specs} == {0, 1}
    for spec in specs:
        assert spec.label and (spec.train.device == "cuda") == (scale in ("gpu", "paper"))
        assert spec.train.tokens >= 1_000_000 or scale == "smoke" or name == "start" or spec.label in upcycling.SHORTER
    with pytest.raises(ValueError, match=f"{name}: no scale 'huge'"):
        experiment.specs("huge")


def test_equal_arms_of_experiments_are_one_run():
    def ids(module, *arms):
        return [spec.id for spec in module.EXPERIMENT.specs("cpu", 1, arms=arms) if spec.label in arms]

    assert ids(pr_moe, "Dense") == ids(scaling, "350M") == ids(half_moe, "Dense") == ids(expert_count, "1 (dense)")
    assert (
        ids(pr_moe, "MoE-32") == ids(half_moe, "MoE-32") == ids(top2_vs_residual, "MoE-32") == ids(expert_count, "32")
    )
    assert ids(pr_moe, "MoE-128") == ids(scaling, "350M+MoE-128") == ids(capacity, "drop-free")
    assert ids(pr_moe, "MoE-128") == ids(expert_count, "128")
    assert ids(pr_moe, "Residual-MoE-32") == ids(top2_vs_residual, "Residual-MoE-32")
    assert ids(seeds, "MoE-128") == [s.id for s in specialisation.EXPERIMENT.specs("cpu")]
    assert ids(pr_moe, "Dense, 4.1 M tokens") == ids(scaling, "350M, 4.1 M tokens") != []


@pytest.mark.parametrize("run", [s.run for s in paper.all_training_settings()])
def test_the_paper_scale_is_the_published_settings(run):
    s = paper.training_settings(run)
    spec = settings.spec(s.model, "paper", published=run)
    train = spec.train
    assert abs(train.steps(spec.data.context) - s.steps) <= 1
    assert (train.lr, train.min_lr, train.batch_size, train.micro_batch) == (
        s.lr,
        s.min_lr,
        s.batch_seqs,
        s.micro_batch_seqs,
    )
    assert (train.warmup_tokens, train.decay_tokens) == (s.warmup_tokens, s.decay_tokens)
    assert spec.model.parameters() == ModelConfig.parse(s.model).parameters() and spec.model.dropout == s.dropout
    if s.capacity_factor_train:
        assert spec.model.routing.capacity_factor == s.capacity_factor_train and spec.model.routing.drop_tokens
    assert spec.parallel.ranks == paper.GPUS


def test_full_is_the_papers_ratio_of_tokens_and_its_schedule_in_proportion():
    for s in paper.all_training_settings():
        if settings.base_of(s.run) not in ("350M", "1.3B", "6.7B"):
            continue
        spec = settings.spec(s.model, "full", published=s.run)
        train, cpu = spec.train, settings.spec(s.model, "cpu")
        share = train.tokens / s.train_tokens
        ratio = s.train_tokens / ModelConfig.parse(s.model).parameters()
        assert train.tokens / spec.model.parameters() == pytest.approx(ratio, rel=0.3), s.run
        assert train.warmup_tokens == pytest.approx(s.warmup_tokens * share, abs=1)
        assert train.decay_tokens == pytest.approx(s.decay_tokens * share, abs=1)
        assert train.min_lr / train.lr == pytest.approx(s.min_lr / s.lr, rel=1e-3)
        assert learning_rate_at(train, train.decay_tokens) == pytest.approx(train.min_lr)
        assert spec.model == cpu.model and (train.batch_size, train.micro_batch) == (cpu.train.batch_size, 0)
    assert train.tokens == pytest.approx(101.6e6, rel=1e-3) and train.dtype == "bf16"
    evaluated = {step * 300 / train.steps(spec.data.context) for step in range(0, 24_811, train.eval_every)}
    read = {point.tokens_B for point in paper.loss_points() if point.kind == "point"}
    assert {b for b in read if min(abs(b - e) for e in evaluated) > 0.01} == {295.0}, "validation where Fig 1 was read"


def test_a_shorter_run_at_full_keeps_the_shares_of_its_schedule():
    given = {"train.tokens": 4_096_000, "train.lr": 0.01}
    whole, short = (settings.spec("350M", "full", overrides=o).train for o in ({}, given))
    for what in ("warmup_tokens", "decay_tokens"):
        assert getattr(short, what) / short.tokens == pytest.approx(getattr(whole, what) / whole.tokens, rel=1e-3)
    assert short.min_lr == pytest.approx(0.001)


def test_at_full_equal_arms_are_one_run_and_every_arm_has_both_rates(monkeypatch):
    def ids(name, *arms):
        return {rates.arm(s.label): s.id for s in EXPERIMENTS[name].specs("full", arms=arms)}

    def same(*named):
        assert len({ids(name, arm)[arm] for name, arm in named}) == 1, named

    def check():
        same(("pr-moe", "Dense"), ("scaling", "350M"), ("half-moe", "Dense"))
        same(("pr-moe", "MoE-32"), ("half-moe", "MoE-32"), ("top2-vs-residual", "MoE-32"))
        same(("pr-moe", "MoE-128"), ("scaling", "350M+MoE-128"))
        same(("pr-moe", "Residual-MoE-32"), ("top2-vs-residual", "Residual-MoE-32"))
        same(("pr-moe", "PR-MoE-32/64"), ("distillation", "Teacher"))

    check()
    names = ("scaling", "half-moe", "top2-vs-residual", "pr-moe", "distillation")
    assert all(len(closure(EXPERIMENTS[n].specs("full"))) * 2 >= len(EXPERIMENTS[n].specs("full")) for n in names)
    own = dict(zip(settings.FAMILIES, (8e-3, 6e-3, 3e-3, 2e-3), strict=True))
    monkeypatch.setitem(settings.FULL_RATES, "350M", settings.Rates(own, 4e-3))
    check()
    for name in names:
        specs = EXPERIMENTS[name].specs("full")
        at_own = rates.at_own(specs)
        shared = {rates.arm(s.label): s for s in specs if s not in at_own}
        assert {s.label for s in at_own} - set(shared) <= {"350M on mix5", "350M+MoE-128 on mix5"}
        for spec in at_own:
            model = str(spec.model).removesuffix(" twin")
            assert spec.train.lr == pytest.approx(own[settings.family(model)] * settings.rate_ratio(model), abs=1e-6)
            if spec.label in shared:
                expected = pytest.approx(4e-3 * settings.rate_ratio(model), abs=1e-6)
                assert shared[spec.label].train.lr == expected and shared[spec.label].id != spec.id


def test_families_by_experts():
    assert {settings.family(name) for name in ("350M", "1.3B", "6.7B")} == {"Dense"}
    for part, family in (("MoE-32", "MoE-32"), ("SecondHalf-MoE-32", "MoE-32"), ("Pyramid-MoE-32/64", "MoE-32"), ("Top2-MoE-128", "MoE-128"), ("PR-MoE-32/64+L21", "PR-MoE")):  # fmt: skip
        assert settings.family(f"350M+{part}") == family
    assert settings.family("1.3B+PR-MoE-64/128") == "PR-MoE", "with 128 experts, too"


def test_students_at_full_read_what_their_teacher_has_read_once():
    specs = {s.label: s for s in rates.at_own(distillation.EXPERIMENT.specs("full", base="1.3B"))}
    teacher, alone, taught, staged = (specs[a] for a in ("Teacher", "L21 alone", "L21 + KD", "L21 + staged KD"))
    assert set(specs) == {s.label for s in (teacher, alone, taught, staged)}
    assert {s.data.part for s in specs.values()} == {"whole"} and taught.teacher.id == teacher.id
    assert staged.start.run.id == taught.id and staged.start.tokens == 0.7 * staged.train.tokens
    assert staged.train == alone.train and staged.teacher is None


def test_the_pair_on_another_text_is_the_same_training():
    specs = {s.label: s for s in rates.at_own(scaling.EXPERIMENT.specs("full"))}
    for arm in scaling.BUDGETED:
        there, other = specs[arm], specs[scaling.on_other_text(arm)]
        assert other.data == replace(there.data, corpus="mix5") and (other.model, other.train) == (
            there.model,
            there.train,
        )
    table = final(
        {"350M": [4.0], "350M+MoE-128": [3.6], "350M on mix5": [4.0, 4.0], "350M+MoE-128 on mix5": [3.7, 3.8]}
    )
    gaps = scaling.over_texts(table).groupby("text")["gap"].mean()
    assert gaps.to_dict() == {"mix15": pytest.approx(-0.4), "mix5": pytest.approx(-0.25)}
    assert not len(scaling.over_texts(final({"350M": [4.0], "350M+MoE-128": [3.6]})))


def test_the_papers_students_are_taught_as_published():
    specs = {spec.label: spec for spec in distillation.EXPERIMENT.specs("paper")}
    staged = specs["L21 + staged KD"]
    assert staged.teacher == specs["Teacher"] and staged.distill.stop == pytest.approx(400_000 * 256 * 2048, rel=0.002)
    s = paper.training_settings("350M+PR-MoE-32/64+L21+MoS")
    assert (staged.distill.weight, staged.distill.temperature) == (s.kd_beta, s.kd_temperature)
    assert specs["L21 alone"].distill is None and specs["L21 + KD"].distill.schedule == "constant"


def test_students_read_the_half_that_their_teacher_has_not_read():
    specs = {spec.label: spec for spec in distillation.EXPERIMENT.specs("cpu")}
    teacher, alone, taught, staged = (specs[a] for a in ("Teacher", "L21 alone", "L21 + KD", "L21 + staged KD"))
    assert teacher.data.part == "even blocks" and {s.data.part for s in (alone, taught, staged)} == {"odd blocks"}
    assert taught.teacher.id == teacher.id and staged.teacher is None
    assert staged.start.run.id == taught.id and staged.start.tokens == pytest.approx(
        0.7 * staged.train.tokens, rel=1e-3
    )
    assert staged.start.tokens in taught.train.keep_at
    longer = specs["L21 alone, equal cost"]
    assert longer.cost == pytest.approx(taught.cost, rel=1e-3) and longer.train.tokens > alone.train.tokens


@pytest.mark.parametrize("scale", ["smoke", "quick", "cpu", "gpu"])
def test_an_upcycled_run_is_a_branch_before_the_decay(scale):
    specs = upcycling.EXPERIMENT.specs(scale)
    arms = {spec.label: spec for spec in specs}
    assert tuple(arms) == upcycling.ARMS and set(arms) >= {
        a for left, right, _ in upcycling.EXPECTED for a in (left, right)
    }
    whole = arms["Dense"].train
    for label, (trunk, becomes, _) in upcycling.BRANCHES.items():
        run = arms[label]
        assert run.start.run.id == arms[trunk].id and specs.index(arms[trunk]) < specs.index(run)
        assert run.model == arms[becomes].model and run.train == arms[becomes].train
        assert (
            run.start.tokens in arms[trunk].train.keep_at and run.start.tokens <= whole.tokens - whole.cooldown_tokens
        )
        factor = max(run.model.experts) / max(1, *run.start.run.model.experts)
        assert any(run.start.upcycle.scale == pytest.approx(scale) for scale in (1, factor, 0.36 * factor))
    own, equal = (arms[label] for label in upcycling.SHORTER)
    assert own.train.tokens == arms["Upcycled"].own_tokens
    ratio = equal.total_cost / arms["Upcycled"].total_cost
    assert ratio == pytest.approx(1, abs=0.5 / whole.steps(own.data.context) * 1.5)
    assert arms["Top-2"].total_cost == arms["Top-2"].cost > arms["Upcycled"].total_cost
    if scale != "smoke":  # they decay on their own, from the trunk's checkpoint
        assert {s.start.run.id for s in (own, equal)} == {arms["Top-2"].id}
        assert {s.start.tokens for s in (own, equal)} == set(arms["Top-2"].train.keep_at)


def test_a_shorter_run_whose_warm_up_does_not_fit_begins_anew():
    arms = {s.label: s for s in upcycling.EXPERIMENT.specs("quick", upcycle_at=0.8)}
    own = arms["Top-2, MoE's tokens"].train
    assert arms["Top-2, MoE's tokens"].start is None and own.tokens == 204_800
    assert (own.warmup_tokens, own.cooldown_tokens) == (81_920, 40_960)


def test_differences_of_upcycling():
    losses = {"Upcycled": 5.0, "Dense": 5.2, "Top-2": 5.0, "MoE-128": 4.9}
    table = final({arm: [loss, loss + 0.01, loss + 0.02] for arm, loss in losses.items()})
    found = comparison.differences(table, upcycling.EXPECTED).set_index("right")["found"]
    assert dict(found) == {"Dense": "below", "Top-2": "cannot tell"}
    table["validation_loss"] -= np.where(table["arm"] == "Top-2", 0.1, 0)
    found = comparison.differences(table, upcycling.EXPECTED).set_index("right")
    assert found.loc["Top-2", "found"] == "above" and found.loc["Top-2", "mean"] == pytest.approx(0.1)
    assert set(comparison.differences(table[table["seed"] < 2], upcycling.EXPECTED)["found"]) == {"too few seeds"}


def test_balance_at_the_end_of_training(tmp_path, tiny_spec):
    """The mean over seeds of the last row that has statistics; a run that stopped early and a dense one have none."""
    rows = [
        {"step": 1, "max_violation": 9.0, "balance": {"2": {}}, "load_percentiles": {"2": [0, 0, 0, 0, 9]}},
        {
            "step": 2,
            "max_violation": 1.0,
            "balance": {"2": {}},
            "load_percentiles": {"2": [0, 0, 1, 1, 2], "4": [1] * 5},
        },
    ]
    store, made = RunStore(tmp_path), []
    dense = replace(tiny_spec, model=replace(tiny_spec.model, experts=(), residual=False), label="dense")
    for seed, spec in enumerate((tiny_spec, tiny_spec, dense)):
        run = store.run(replace(spec, train=replace(spec.train, seed=seed)))
        (run.path / "result.json").write_text("{}")
        rows[1]["max_violation"] = 1.0 + seed
        (run.path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append(run)
    tokens = tiny_spec.train.batch_size * tiny_spec.data.context

    def random(experts):
        return random_max_violation(tokens, experts, tiny_spec.model.top_k)

    table = comparison.balance(Runs(made))
    assert table.to_dict("records") == [
        {
            "arm": "tiny",
            "max_violation": 1.5,
            "max_violation, random": pytest.approx((random(2) + random(4)) / 2),
            "p0": 0.5,
            "p10": 0.5,
            "p50": 1,
            "p90": 1,
            "p100": 1.5,
        }
    ]
    assert not len(comparison.balance(Runs(made[2:])))


def test_losses_where_branches_begin(tmp_path, tiny_spec):
    """The trunk was evaluated at step 8, but not at step 12."""
    trunk = replace(tiny_spec, train=replace(tiny_spec.train, cooldown_tokens=6 * 128), label="trunk")
    store = RunStore(tmp_path)
    rows = {None: {0: 6.0, 8: 5.0, 16: 4.0}, 8: {8: 5.5, 24: 3.0}, 12: {12: 7.0, 24: 3.0}}
    made = []
    for step, losses in rows.items():
        start = Start(trunk, step * 128) if step else None
        run = store.run(replace(trunk, start=start, label=f"from {step}" if step else "trunk"))
        (run.path / "result.json").write_text("{}")
        lines = (json.dumps({"step": at, "loss": loss}) + "\n" for at, loss in losses.items())
        (run.path / "validation.jsonl").write_text("".join(lines))
        made.append(run)
    found = comparison.at_the_start(Runs(made)).set_index("arm")
    assert found.loc["from 8", ["before", "after"]].tolist() == [5.0, 5.5]
    assert found.loc["from 12", "after"] == 7 and pd.isna(found.loc["from 12", "before"])
    assert comparison.costs([run.spec for run in made])["training TFLOPs of both"].nunique() == 1


def test_the_sweep_is_the_regime_itself_on_a_seed_of_its_own():
    specs = learning_rate.EXPERIMENT.specs("cpu")
    assert {spec.train.seed for spec in specs} == {settings.SWEEP_SEED}
    for spec in specs:
        used = settings.spec(str(spec.model).removesuffix(" twin"), "cpu", settings.SWEEP_SEED)
        assert replace(spec.train, lr=used.train.lr, min_lr=used.train.min_lr) == used.train
        assert spec.model == used.model and spec.data == used.data
    assert set(learning_rate.used("350M", "cpu").values()) <= set(learning_rate.rates())


@pytest.mark.parametrize("scale", ["cpu", "full"])
def test_the_rates_in_use_are_the_lowest_of_the_published_sweep(scale):
    files = list((ROOT / "results" / "learning-rate" / scale).glob("*/summary.json"))
    assert files
    for file in files:
        base = json.loads(file.read_text())["parameters"]["base"]
        table = pd.read_json(file.with_name("loss-over-rate.jsonl"), lines=True)
        assert scale == "cpu" or not learning_rate.unbracketed(table)
        for arm, rate in learning_rate.used(base, scale).items():
            means = table[table["arm"] == arm].groupby("rate")["loss"].mean()
            assert len(means) > 1 and means.idxmin() == pytest.approx(rate), (base, arm)


def test_the_sweep_at_full_is_of_four_families_and_names_an_optimum_at_an_edge():
    specs = learning_rate.EXPERIMENT.specs("full", 2, peaks=[4e-3, 1e-3, 2e-3])
    assert {s.label for s in specs} == {"Dense", "MoE-128", "MoE-32", "PR-MoE"} == set(settings.FAMILIES)
    assert {s.train.lr for s in specs} == {1e-3, 2e-3, 4e-3} and {s.train.seed for s in specs} == {100, 101}
    assert all(s.train.min_lr < s.train.lr / 9 for s in specs)
    rates = {(s.label, s.train.lr) for s in learning_rate.EXPERIMENT.specs("full")}
    assert rates == {(arm, rate) for arm in settings.FAMILIES for rate in (4e-3, 8e-3, 16e-3)} | {
        ("Dense", 2e-3),
        ("Dense", 32e-3),
    }
    check = learning_rate.EXPERIMENT.specs("full", base="1.3B")
    assert {str(s.model) for s in check} == {"1.3B twin", "1.3B+MoE-128 twin"}
    losses = {"A": (3.2, 3.1, 3.3), "B": (3.0, 3.1, 3.3), "C": (3.4, 3.3, 3.1)}
    rows = [[a, r, 100, v] for a, vs in losses.items() for r, v in zip((2e-3, 4e-3, 8e-3), vs, strict=True)]
    table = pd.DataFrame(rows, columns=["arm", "rate", "seed", "loss"])
    edges = ["B's lowest loss is at 0.002, the lowest rate", "C's lowest loss is at 0.008, the highest rate"]
    assert learning_rate.unbracketed(table) == edges
    line = learning_rate.headline(table, dict.fromkeys(losses, 4e-3), "350M")
    assert line.endswith(f"; not bracketed: {edges[0]}; not bracketed: {edges[1]}")


def test_larger_bases_train_at_less():
    names = ("350M", "1.3B", "1.3B+MoE-128", "6.7B")
    for scale in ("cpu", "gpu"):
        train = {name: settings.spec(name, scale).train for name in names}
        assert train["350M"].lr > train["1.3B"].lr > train["6.7B"].lr
        assert all(t.min_lr == pytest.approx(t.lr / 10, rel=1e-4) for t in train.values())
    # without a sweep in the proportion of the paper's dense rates
    assert train["1.3B"].lr == pytest.approx(train["350M"].lr * 2e-4 / 3e-4, rel=1e-3)
    assert train["6.7B"].lr == pytest.approx(train["350M"].lr * 1.2e-4 / 3e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: half_moe.EXPERIMENT.specs(arms='["Dense"]'), "half-moe: arms cannot be the text"),
        (lambda: half_moe.EXPERIMENT.specs(overrides="{}"), "half-moe: overrides cannot be the text '{}'; papermill"),
        (lambda: half_moe.EXPERIMENT.specs(arms=["Third half"]), "half-moe: unknown arm 'Third half'; allowed: Dense"),
        (lambda: top2_vs_residual.EXPERIMENT.specs(seeds=0), "top2-vs-residual: seeds must be 1 to 1000"),
        (lambda: zero_shot.EXPERIMENT.specs(first_seed=-1), "zero-shot: first_seed must be 0 to"),
        (
            lambda: scaling.EXPERIMENT.specs(overrides={"train.tokens": 5}),
            "scaling: train: 5 tokens are less than one step",
        ),
        (lambda: distillation.EXPERIMENT.specs(base="2B"), "distillation: base must be one of 350M, 1.3B, got '2B'"),
        (
            lambda: learning_rate.EXPERIMENT.specs(base="2B"),
            "learning-rate: base must be one of 350M, 1.3B, 6.7B, got '2B'",
        ),
        (lambda: distillation.EXPERIMENT.specs(stop=1.5), "distillation: stop must be a share"),
        (
            lambda: pr_moe.EXPERIMENT.specs("cpu", rate="shared"),
            r"pr-moe: rate must be one of own \(full has shared\) at scale cpu, got 'shared'",
        ),
        (
            lambda: upcycling.EXPERIMENT.specs(upcycle_at=0.9),
            "upcycling: upcycle_at must be a share of the tokens between",
        ),
        (lambda: distillation.EXPERIMENT.specs(arms=["L22"]), "distillation: unknown arm 'L22'"),
        (
            lambda: pr_moe.EXPERIMENT.specs(overrides={"parallel.data": 3}),
            "pr-moe: parallel.data must divide the batch",
        ),
    ],
)
def test_bad_arguments_are_one_line(call, part):
    with pytest.raises(ValueError, match=part) as error:
        call()
    assert "\n" not in str(error.value)


def curves(losses, tokens=(0, 100, 200, 300)):
    rows = [
        {"arm": arm, "seed": seed, "tokens": t, "loss": loss}
        for (arm, seed), values in losses.items()
        for t, loss in zip(tokens, values, strict=True)
    ]
    return pd.DataFrame(rows)


def final(losses, **columns):
    rows = [
        {"arm": arm, "seed": seed, "validation_loss": v, **{k: c[arm] for k, c in columns.items()}}
        for arm, values in losses.items()
        for seed, v in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_equal_tokens_pairs_each_moe_with_both_dense_models():
    table = final({"350M": [4], "350M+MoE-128": [2], "1.3B": [1]})
    pairs = comparison.pairs(table, scaling.AGAINST)
    assert dict(zip(pairs["right"], pairs["gap"], strict=True)) == {"350M": -2, "1.3B": 1}
    assert set(scaling.paper_pairs()) >= set(pairs["arm"])


def test_scaling_judges_the_base_and_only_shows_the_larger_model():
    table = final({"350M": [5.0, 5.1, 5.2], "350M+MoE-128": [4.9, 5.01, 5.1], "1.3B": [4.6, 4.7, 4.8]}).assign(
        tokens=16_384_000
    )
    verdicts = {v.claim: v for v in scaling.verdicts(table, "cpu")}
    assert verdicts["moe128-350m-beats-own-base"].verdict == claims.DIRECTION
    assert verdicts["moe128-350m-beats-1.3b"].verdict == claims.NOT_TESTABLE
    assert verdicts["moe128-350m-beats-1.3b"].ours == pytest.approx(0.303, abs=0.01)
    assert verdicts["moe128-1.3b-beats-own-base"].verdict == claims.NOT_TESTED


def test_distillation_early_is_the_mean_of_the_first_half():
    lines = curves(
        {("L21 alone", 0): (9, 6, 5, 4), ("L21 + KD", 0): (9, 5, 5, 5), ("L21 + staged KD", 0): (9, 5, 4, 3)}
    )
    assert distillation.early(lines).set_index("arm")["gap"].to_dict() == {"L21 + KD": -1, "L21 + staged KD": -1}
    assert distillation.early(lines, 0.7).set_index("arm")["gap"].to_dict() == {"L21 + KD": -0.5, "L21 + staged KD": -1}
    longer = curves({("L21 alone, equal cost", 0): (9, 6, 5, 4, 3, 2, 1)}, range(0, 700, 100))
    both = pd.concat([lines, longer])
    assert distillation.early(both).equals(distillation.early(lines))
    falls = distillation.late_training(both, pd.DataFrame(), until=1).iloc[0]
    assert set(falls.index) == {"L21 alone", "L21 alone, equal cost", "L21 + KD", "L21 + staged KD"}


def test_distillation_late_is_before_the_decay():
    assert distillation.decay_begins(distillation.EXPERIMENT.specs("cpu")) == pytest.approx(0.8, abs=0.001)
    assert distillation.decay_begins(distillation.EXPERIMENT.specs("paper")) == 1
    lines = curves({("L21 alone", 0): (9, 8, 7, 6, 5.5, 3)}, range(0, 600, 100))
    fall = distillation.late_training(lines, pd.DataFrame(), until=0.75).iloc[0]
    assert fall["L21 alone"] == 0  # one evaluation, at 60 % of the tokens
    assert distillation.late_training(lines, pd.DataFrame(), until=0.81).iloc[0]["L21 alone"] == 0
    lines = curves({("L21 alone", 0): range(20, -1, -1)}, range(0, 2100, 100))
    assert distillation.late_training(lines, pd.DataFrame(), until=0.8).iloc[0]["L21 alone"] == 3


def test_claims_of_top2():
    def judged(losses, sessions):
        return {v.claim: v for v in top2_vs_residual.verdicts(final(losses), sessions, "cpu")}

    level = {"MoE-32": [5.1, 5.1, 5.1], "Top2-MoE-32": [5.0, 5.001, 5.0], "Residual-MoE-32": [5.001, 5.0, 5.0]}
    verdicts = judged({"MoE-32": [1.0]}, {1: [[1.2, 1.21, 1.22]], 2: [[1.3, 1.3], [1.31, 1.31], [1.32, 1.32]]})
    assert verdicts["residual-halves-exchange"].ours == 0.5
    assert verdicts["top2-flops-33pct"].ours == pytest.approx(4 / 3, abs=0.002)
    assert verdicts["residual-faster-than-top2"].verdict == claims.FEW_SESSIONS
    assert verdicts["residual-faster-than-top2-2-ranks"].verdict == claims.REPRODUCED
    assert verdicts["residual-faster-than-top2-4-ranks"].verdict == claims.NOT_TESTED
    assert verdicts["residual-equals-top2"].verdict == claims.NOT_TESTED
    # Top-2 gains 0.1 over top-1, so the margin is 0.025.
    found = judged(level, {})
    assert found["residual-equals-top2"].verdict == claims.REPRODUCED
    assert found["top2-beats-top1"].verdict == claims.REPRODUCED
    found = judged({**level, "MoE-32": [5.0, 5.001, 5.0]}, {})
    assert found["residual-equals-top2"].verdict == claims.CANNOT_TELL


def test_speed_on_ranks_is_measured_in_sessions_of_new_processes():
    specs = top2_vs_residual.EXPERIMENT.specs("smoke")
    measured = top2_vs_residual.sessions(specs, 2, 2, 1, 2)
    assert [len(rounds) for rounds in measured] == [2, 2]
    ratios = [ratio for rounds in measured for ratio in rounds]
    assert all(0.01 < ratio < 100 for ratio in ratios) and len(set(ratios)) == 4
    table = top2_vs_residual.sessions_table({2: measured})
    assert list(table["arm"]) == ["2 ranks"] * 2 and (table["least"] <= table["median"]).all()
    assert top2_vs_residual.sessions(specs[:2], 2, 2, 1, 2) == [], "an arm is missing"


def test_a_student_is_held_against_its_teacher_only_where_the_teacher_is_the_better_model():
    def judged(alone):
        losses = {"Teacher": [5.0, 5.001, 5.0], "L21 alone": alone, "L21 + staged KD": [5.001, 5.0, 5.0]}
        curves = pd.DataFrame(columns=["arm", "seed", "tokens", "loss"])
        return {v.claim: v.verdict for v in distillation.verdicts(final(losses), curves, "cpu")}

    found = judged([5.2, 5.21, 5.2])
    assert found["student-alone-behind-teacher"] == claims.REPRODUCED
    assert found["staged-kd-matches-teacher-350m"] == claims.REPRODUCED
    found = judged([4.9, 4.91, 4.9])
    assert found["student-alone-behind-teacher"] == claims.NOT_REPRODUCED
    assert found["staged-kd-matches-teacher-350m"] == claims.CANNOT_TELL


def test_a_verdict_on_teacher_and_student_says_that_they_read_different_halves():
    losses = {"Teacher": [5.0, 5.1], "L21 alone": [5.2, 5.3], "L21 + KD": [5.1, 5.2], "L21 + staged KD": [5.0, 5.1]}
    curves = pd.DataFrame(columns=["arm", "seed", "tokens", "loss"])
    with_teacher = {"student-alone-behind-teacher", "staged-kd-matches-teacher-350m"}
    for scale, expected in (("cpu", with_teacher), ("paper", set())):
        judged = distillation.verdicts(final(losses), curves, scale)
        assert {v.claim for v in judged if "read different halves of the text" in v.note} == expected


def test_throughput_ratio_at_the_papers_size():
    ratio = throughput.flops_ratio(ModelConfig.parse("6.7B"), ModelConfig.parse("1.3B+MoE-128"))
    assert 4.5 < ratio < 5.3
    predicted = frames.training()
    assert predicted["fits"].all()
    verdicts = {v.claim: v for v in throughput.verdicts(predicted)}
    assert verdicts["training-5x-cheaper"].ours == pytest.approx(
        predicted["samples/s"]["1.3B+MoE-128"] / predicted["samples/s"]["6.7B"]
    )
    assert all(v.samples == 0 and "imulated" in v.note for v in verdicts.values())


def test_what_a_variable_tells_of_the_expert():
    assert routing.explained_entropy(np.diag([500, 500])) == pytest.approx(1, abs=0.01)
    assert routing.explained_entropy(np.full((2, 4), 1000)) == pytest.approx(0, abs=0.01)
    draw = np.random.default_rng(0)
    chance = np.zeros((200, 16), int)
    np.add.at(chance, (draw.integers(200, size=4000), draw.integers(16, size=4000)), 1)
    assert routing.explained_entropy(chance) < 0.05, "what a small sample shows by chance is taken off"


def test_pairing_takes_the_common_part_out():
    table = final({"Dense": [5.0, 5.2, 5.4], "MoE-32": [4.9, 5.1, 5.31], "MoE-128": [4.8, 5.0, 5.2]})
    row = seeds.deviations(table).set_index("what").loc["MoE-128 − Dense"]
    assert row["mean"] == pytest.approx(-0.2) and row["paired"] < 1e-9
    assert row["unpaired"] == pytest.approx(math.hypot(0.2, 0.2))
    assert row["seeds for 0.03"] == row["seeds for 0.01"] == 3, "as few as judge at all"


def test_a_plan_counts_state_and_hours(tmp_path):
    specs = [spec for spec in distillation.EXPERIMENT.specs("paper", arms=["L21 + KD"])]
    teacher, student = planned_runs(specs, RunStore(tmp_path))
    assert teacher.spec == specs[0].teacher and teacher.state == "new" and not list(tmp_path.iterdir())
    assert teacher.gpu_hours == pytest.approx(teacher.flops / paper_rate() / 3600) and student.gpu_hours > 0
    one = settings.spec("1.3B+MoE-128", "paper")
    experts = 12 * 2 * (2 * 2048 * 8192 + 8192 + 2048)  # 128 experts on 64 ranks: two a layer
    shared = ModelConfig.parse("1.3B+MoE-128").parameters() - 64 * experts
    assert state_bytes(one) == 16 * (experts + shared)
    assert planned_runs(half_moe.EXPERIMENT.specs("cpu"), RunStore(tmp_path))[0].gpu_hours is None


def test_summary_and_gaps():
    table = final({"a": [2.0, 3.0], "b": [1.0, 2.5]})
    assert comparison.paired(table, "a", "b") == [1.0, 0.5] and comparison.paired(table, "a", "c") == []
    assert comparison.gaps(table, "b").query("arm == 'a'")["gap"].tolist() == [1.0, 0.5]
    assert "a ends 0.750 nats above b (95 % interval" in comparison.difference(table, "a", "b")
    for missing in (("c", "b"), ("c", "d")):  # a selection of the arms: what is there is compared
        assert comparison.difference(table, *missing) == comparison.difference(table, "b", "a")
    assert comparison.difference(final({"a": [2.0]}), "b", "c") == "b and c have no finished pair"


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([3.0, 3.5], "all far below it"),
        ([5.9, 6.0], "not far below it; these"),
        ([6.0, 6.2], "not all below it; these"),
    ],
)
def test_losses_are_told_beside_the_unigram_loss_as_they_are(losses, said):
    found = comparison.beside_unigram(pd.DataFrame({"validation_loss": losses, "unigram_loss": 6.13}))
    assert found.startswith(f"unigram 6.13 nats; arms {losses[0]:.2f} to {losses[1]:.2f}: {said}")


def test_counts_of_the_exchanges_are_the_papers_and_the_simulators():
    counted = pd.DataFrame(all_to_all.counts((8, 32, 128)))
    for what in ("messages", "rows", "gathered_rows"):
        assert counted[what].tolist() == counted[f"formula_{what}"].tolist() == counted[f"simulated_{what}"].tolist()
    verdicts = {v.claim: v for v in all_to_all.verdicts(counted)}
    assert {v.verdict for v in verdicts.values()} == {claims.REPRODUCED}
    assert verdicts["hierarchical-hops"].ours == pytest.approx(10 / 31) and verdicts["pcc-hops"].ours == 16 / 128
    assert verdicts["hierarchical-volume"].ours == 2 and "1.68" in verdicts["hierarchical-volume"].note


def test_the_simulated_exchange_pays_with_ranks():
    found = ways.times().set_index(["bytes", "way", "ranks"])["ratio"]
    for size in (1 << 14, 1 << 18, 1 << 22):
        assert found[size, "hierarchical", 8] == 1 and found[size, "hierarchical", 256] < 0.7
        assert found[size, "coordinated", 256] < found[size, "hierarchical", 256]


def kernel_rounds(session, masks, ours):
    """Rounds of "all three" in a session, at 8 tokens and 16 experts, and one slow shape that no verdict looks at."""
    rows = [
        (8, 16, name, i, ms)
        for name, all_ms in (("einsum (baseline)", masks), ("ours", ours))
        for i, ms in enumerate(all_ms)
    ]
    rows += [(64, 4, name, 0, ms) for name, ms in (("einsum (baseline)", 50.0), ("ours", 1.0))]
    columns = ["tokens", "experts", "candidate", "round", "ms"]
    return gating_kernels.speedups(pd.DataFrame(rows, columns=columns).assign(part="all three", session=session))


@pytest.mark.parametrize(
    ("sessions", "scale", "verdict"),
    [
        ([(7.0, 7.1, 7.2)], "gpu", claims.FEW_SESSIONS),
        ([(7.0, 7.1, 7.2), (7.1, 7.2, 7.3)], "gpu", claims.FEW_SESSIONS),
        ([(7.0, 7.1, 7.2), (7.1, 7.2, 7.3), (7.1, 7.3, 7.4)], "gpu", claims.REPRODUCED),
        ([(7.0, 7.1, 7.2), (7.1, 7.2, 7.3), (7.1, 7.3, 7.4)], "cpu", claims.DIRECTION),
        ([(0.5, 0.51, 0.52), (0.5, 0.52, 0.53), (0.5, 0.51, 0.52)], "cpu", claims.NOT_REPRODUCED),
        ([(7.0, 7.1, 7.2)], "smoke", claims.NOT_TESTABLE),
    ],
)
def test_six_times_is_judged_over_sessions_and_on_a_processor_only_its_order(sessions, scale, verdict):
    ratios = pd.concat([kernel_rounds(i, masks, (1.0, 1.0, 1.0)) for i, masks in enumerate(sessions)])
    found, work = gating_kernels.verdicts(ratios, scale, "a machine", 64.0)
    medians = [sorted(masks)[1] for masks in sessions]
    assert found.verdict == verdict and found.ours == pytest.approx(sum(medians) / len(medians))
    assert "On a machine: 8 tokens, 16 experts" in found.note and "to 50.0 times" in found.note
    assert f"{min(sessions[0]):.3g} to {max(sessions[0]):.3g} over 3 rounds" in found.note
    at = gating_kernels.of_sessions(ratios).query("tokens == 8")
    assert list(at["ratio"]) == medians
    assert work.verdict == claims.REPRODUCED and work.kind == claims.COUNTED


def test_the_work_of_dispatch_is_tokens_times_slots():
    s = gating_kernels.SHAPES["smoke"]
    S, E = s.tokens[-1], s.experts[-1]
    assert gating_kernels.work("smoke") == -(-S // E) * E


def test_the_measured_twin_is_the_papers_in_small():
    for scale in inference_scaling.SHRINK:
        model = {"52B": ModelConfig.parse("1.3B+MoE-128")}
        twin = decoding.twins(model, scale, inference_scaling.SHRINK)["52B"]
        assert twin.is_moe and max(twin.experts) % 4 == 0, "experts spread over 1, 2 and 4 ranks"
        assert twin.parameters() < (2e9 if scale == "gpu" else 100e6), "two copies on one card"


def test_twins_of_the_large_models_keep_what_tells_them_apart():
    for module in (inference_large, model_variants_latency, moe_vs_dense_inference):
        for scale in decoding.SHRINK:
            twins = decoding.twins(module.models(), scale)
            assert list(twins) == list(module.models())
            assert max(twin.parameters() for twin in twins.values()) < (3e9 if scale == "gpu" else 300e6)
            for name, twin in twins.items():
                assert twin.is_moe == (name != "6.7B dense")
                assert all(experts % 2 == 0 for experts in twin.experts), "experts spread over 2 ranks"
    moe, pr_moe, student = decoding.twins(model_variants_latency.models(), "cpu").values()
    assert pr_moe.parameters() < moe.parameters() and student.layers < pr_moe.layers
    assert decoding.twins(model_variants_latency.models(), "paper") == {}


def test_measurements_of_a_cluster_are_read_and_drawn(tmp_path):
    import matplotlib.pyplot as plt

    from moelab.plotting import serving

    def row(mode, ranks, ms):
        parts = {"attention": ms / 2, "all-to-all": ms / 2}
        rank = {
            "candidate": mode,
            "ranks": ranks,
            "median_ms": ms,
            "p95_ms": 2 * ms,
            "floor_ms": 1.0,
            "parts_ms": parts,
        }
        return rank | {"batch": 64, "empty_collective_ms": 0.1}

    rows = [row(mode, ranks, ms) for ranks, ms in ((64, 4.0), (8, 9.0)) for mode in ("baseline", "optimised")]
    file = tmp_path / "decode.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = inference_scaling.measured_steps(Lab().measure, "paper", str(file))
    assert list(found["label"]) == ["8 ranks", "8 ranks", "64 ranks", "64 ranks"]
    assert decoding.speedups(found) == {"8 ranks": 1.0, "64 ranks": 1.0}
    fig, axes = plt.subplots(1, 2)
    serving.decoding_steps(found, *axes)
    for ax in axes:
        shown = {t.get_text() for t in (*ax.texts, *ax.get_yticklabels())}
        assert {"8 ranks", "64 ranks"} <= shown
    plt.close(fig)
    file.write_text("{}")
    for given, part in (
        (None, "needs -p measured_file=FILE"),
        (str(tmp_path / "none"), "No such file"),
        (str(file), "no rows"),
    ):
        with pytest.raises(ValueError, match=part):
            inference_scaling.measured_steps(Lab().measure, "paper", given)


def test_what_a_domain_can_tell_is_bounded_by_its_entropy():
    """Two domains, four experts in even use: ln 2 / ln 4. With one expert in use, nothing is left to be told."""

    def shares(by_domain):
        return pd.DataFrame(
            [
                {"layer": 2, "seed": 0, "domain": domain, "expert": expert, "share": share}
                for domain, each in by_domain.items()
                for expert, share in enumerate(each)
            ]
        )

    even = shares({"a": [0.5, 0.5, 0, 0], "b": [0, 0, 0.5, 0.5]})
    assert specialisation.most_by_domain(even).to_dict() == {2: pytest.approx(0.5)}
    assert specialisation.most_by_domain(even.drop(columns="seed")).to_dict() == {2: pytest.approx(0.5)}
    assert specialisation.most_by_domain(shares({"a": [1, 0], "b": [1, 0]})).to_dict() == {2: 1}
    layers = pd.DataFrame([{"layer": 2, "seed": 0, "by_token": 0.7, "by_domain": 0.1}])
    assert "the domain, which can tell 50% at most, 10% and 10%" in specialisation.headline(layers, even)
