"""The training experiments: their specs at every scale, and the arithmetic between runs and verdicts."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from moelab import paper
from moelab.config import ModelConfig
from moelab.design import comparison, overview, rates, settings
from moelab.design import verdicts as claims
from moelab.evaluation import routing
from moelab.experiments import (
    EXPERIMENTS,
    decoding,
    expert_count,
    inference_large,
    inference_scaling,
    model_variants_latency,
    moe_vs_dense_inference,
    seeds,
    specialisation,
    throughput,
    top2_vs_residual,
)
from moelab.plotting import layout, placement
from moelab.runs.collection import Runs
from moelab.runs.dry_run import paper_rate, planned_runs, show, state_bytes
from moelab.runs.spec import Start
from moelab.runs.store import RunStore
from moelab.simulate import frames
from moelab.training.balance import random_max_violation
from moelab.training.schedule import learning_rate as learning_rate_at
from tests.experiments.helpers import final

SAME = [
    [("pr-moe", "Dense"), ("scaling", "350M"), ("half-moe", "Dense"), ("expert-count", "1 (dense)")],
    [("pr-moe", "MoE-32"), ("half-moe", "MoE-32"), ("top2-vs-residual", "MoE-32"), ("expert-count", "32")],
    [("pr-moe", "MoE-128"), ("scaling", "350M+MoE-128"), ("capacity", "drop-free"), ("expert-count", "128")],
    [("pr-moe", "Residual-MoE-32"), ("top2-vs-residual", "Residual-MoE-32")],
    [("seeds", "MoE-128"), ("specialisation", "MoE-128")],
]
BUDGETS = [("pr-moe", "Dense, 4.1 M tokens"), ("scaling", "350M, 4.1 M tokens")]
TEACHERS = [("pr-moe", "PR-MoE-32/64"), ("distillation", "Teacher")]  # with less text, a teacher reads half of it


def equal_arms_are_one_run(scale):
    same = [arms for arms in SAME if scale != "full" or arms[0][0] != "seeds"]  # at full it trains other twins
    for arms in (*same, BUDGETS if scale == "cpu" else TEACHERS):
        named = [(EXPERIMENTS[name], arm) for name, arm in arms if scale in EXPERIMENTS[name].scales]
        ids = [{rates.arm(s.label): s.id for s in chosen.specs(scale, 1, arms=[arm])}[arm] for chosen, arm in named]
        assert len(set(ids)) <= 1, arms


def test_equal_arms_of_experiments_are_one_run_and_at_full_every_arm_has_both_rates(monkeypatch):
    equal_arms_are_one_run("cpu")
    equal_arms_are_one_run("full")
    own = dict(zip(settings.FAMILIES, (8e-3, 6e-3, 3e-3, 2e-3), strict=True))
    monkeypatch.setattr(settings, "FULL_RATES", {"350M": settings.Rates(own, 4e-3)})  # larger bases in proportion
    equal_arms_are_one_run("full")
    for name in ("scaling", "half-moe", "top2-vs-residual", "pr-moe", "distillation", "expert-count", "capacity"):
        specs = EXPERIMENTS[name].specs("full")
        at_own = rates.at_own(specs)
        shared = {rates.arm(s.label): s for s in specs if s not in at_own}
        assert {s.label for s in at_own} - set(shared) <= {"350M on mix5", "350M+MoE-128 on mix5"}
        for spec in at_own:
            model = str(spec.model).removesuffix(" twin")
            ratio = settings.rate_ratio(model)
            assert spec.train.lr == pytest.approx(own[settings.family(model)] * ratio, abs=1e-6)
            if spec.label in shared:
                other = shared[spec.label]
                assert other.train.lr == pytest.approx(4e-3 * ratio, abs=1e-6) and other.id != spec.id


@pytest.mark.parametrize("run", [s.run for s in paper.all_training_settings()])
def test_the_paper_scale_is_the_published_settings(run):
    s = paper.training_settings(run)
    spec = settings.spec(s.model, "paper", published=run)
    train = spec.train
    assert abs(train.steps(spec.data.context) - s.steps) <= 1
    assert (train.lr, train.min_lr) == (s.lr, s.min_lr)
    assert (train.batch_size, train.micro_batch) == (s.batch_seqs, s.micro_batch_seqs)
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
    given = {"train.tokens": 4_096_000, "train.lr": 0.01}
    whole, short = (settings.spec("350M", "full", overrides=o).train for o in ({}, given))
    for what in ("warmup_tokens", "decay_tokens"):
        assert getattr(short, what) / short.tokens == pytest.approx(getattr(whole, what) / whole.tokens, rel=1e-3)
    assert short.min_lr == pytest.approx(0.001)
    evaluated = {step * 300 / train.steps(spec.data.context) for step in range(0, 24_811, train.eval_every)}
    read = {point.tokens_B for point in paper.loss_points() if point.kind == "point"}
    assert {b for b in read if min(abs(b - e) for e in evaluated) > 0.01} == {295.0}, "validation where Fig 1 was read"


def test_families_by_experts():
    assert {settings.family(name) for name in ("350M", "1.3B", "6.7B")} == {"Dense"}
    for part, family in (("MoE-32", "MoE-32"), ("SecondHalf-MoE-32", "MoE-32"), ("Pyramid-MoE-32/64", "MoE-32"), ("Top2-MoE-128", "MoE-128"), ("PR-MoE-32/64+L21", "PR-MoE")):  # fmt: skip
        assert settings.family(f"350M+{part}") == family
    assert settings.family("1.3B+PR-MoE-64/128") == "PR-MoE", "with 128 experts, too"


def test_balance_at_the_end_of_training(tmp_path, tiny_spec):
    """The mean over seeds of the last row that has statistics; a run that stopped early and a dense one have none."""
    loads = ({"2": [0, 0, 0, 0, 9]}, {"2": [0, 0, 1, 1, 2], "4": [1] * 5})
    rows = [
        {"step": step, "max_violation": 9.0, "balance": {"2": {}}, "load_percentiles": load}
        for step, load in enumerate(loads, start=1)
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

    (found,) = overview.balance(Runs(made)).to_dict("records")
    expected = {"max_violation": 1.5, "max_violation, random": pytest.approx((random(2) + random(4)) / 2)}
    assert found == {"arm": "tiny", **expected, "p0": 0.5, "p10": 0.5, "p50": 1, "p90": 1, "p100": 1.5}
    assert not len(overview.balance(Runs(made[2:])))


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
    found = overview.at_the_start(Runs(made)).set_index("arm")
    assert found.loc["from 8", ["before", "after"]].tolist() == [5.0, 5.5]
    assert found.loc["from 12", "after"] == 7 and pd.isna(found.loc["from 12", "before"])
    assert overview.costs([run.spec for run in made])["training TFLOPs of both"].nunique() == 1


def test_bad_arguments_are_one_line():
    for name, given, part in (
        ("half-moe", {"arms": '["Dense"]'}, "arms cannot be the text"),
        ("half-moe", {"overrides": "{}"}, "overrides cannot be the text '{}'; papermill"),
        ("half-moe", {"arms": ["Third half"]}, "unknown arm 'Third half'; allowed: Dense"),
        ("top2-vs-residual", {"seeds": 0}, "seeds must be 1 to 1000"),
        ("zero-shot", {"first_seed": -1}, "first_seed must be 0 to"),
        ("scaling", {"overrides": {"train.tokens": 5}}, "train: 5 tokens are less than one step"),
        ("learning-rate", {"base": "2B"}, "base must be one of 350M, 1.3B, 6.7B, got '2B'"),
        ("distillation", {"stop": 1.5}, "stop must be a share"),
        ("pr-moe", {"scale": "cpu", "rate": "shared"}, "rate must be one of own (full has shared) at scale cpu, got"),
        ("upcycling", {"upcycle_at": 0.9}, "upcycle_at must be a share of the tokens between"),
    ):
        with pytest.raises(ValueError) as error:
            EXPERIMENTS[name].specs(**given)
        assert str(error.value).startswith(f"{name}: {part}") and "\n" not in str(error.value)


def test_claims_of_top2():
    def judged(losses, sessions):
        return {v.claim: v for v in top2_vs_residual.verdicts(final(losses), sessions, "cpu")}

    level = {"MoE-32": [5.1, 5.1, 5.1], "Top2-MoE-32": [5.0, 5.001, 5.0], "Residual-MoE-32": [5.001, 5.0, 5.0]}
    verdicts = judged({"MoE-32": [1.0]}, {1: [[1.2, 1.21, 1.22]], 2: [[1.3, 1.3], [1.31, 1.31], [1.32, 1.32]]})
    assert verdicts["residual-halves-exchange"].ours == 0.5
    assert verdicts["top2-flops-33pct"].ours == pytest.approx(4 / 3, abs=0.002)
    assert verdicts["residual-faster-than-top2"].verdict == claims.CANNOT_TEST
    assert verdicts["residual-faster-than-top2-2-ranks"].verdict == claims.CANNOT_TEST
    assert verdicts["residual-faster-than-top2-4-ranks"].ours is None
    assert verdicts["residual-equals-top2"].ours is None
    # Top-2 gains 0.1 over top-1, so the margin is 0.025.
    found = judged(level, {})
    assert found["residual-equals-top2"].verdict == claims.HOLDS
    assert found["top2-beats-top1"].verdict == claims.HOLDS
    found = judged({**level, "MoE-32": [5.0, 5.001, 5.0]}, {})
    assert found["residual-equals-top2"].verdict == claims.CANNOT_TELL


def test_sessions_on_ranks_are_a_row_each_and_need_both_arms():
    table = top2_vs_residual.sessions_table({1: [[1.0, 1.2, 0.9]], 2: [[1.3, 1.1], [1.5, 1.4]]})
    assert list(table["arm"]) == ["1 rank", "2 ranks", "2 ranks"] and list(table["seed"]) == [0, 0, 1]
    assert list(table["median"]) == pytest.approx([1.0, 1.2, 1.45])
    assert list(table["least"]) == [0.9, 1.1, 1.4] and list(table["greatest"]) == [1.2, 1.3, 1.5]
    assert top2_vs_residual.sessions(top2_vs_residual.EXPERIMENT.specs("smoke")[:2], 2, 2, 1, 2) == []


def test_speeds_are_of_sequences_as_long_as_the_runs(monkeypatch):
    asked = []
    monkeypatch.setattr("moelab.bench.train.side_by_side", lambda models, *_, **__: asked.extend(models.values()))
    monkeypatch.setattr(
        "moelab.bench.sessions.speed_ratios", lambda *sides: asked.extend(m for m, _ in sides[:2]) or []
    )
    specs = top2_vs_residual.EXPERIMENT.specs("cpu", overrides={"data.context": 64})
    throughput.speeds(specs, 3, 3)
    top2_vs_residual.sessions(specs, 1, 1, 3, 3)
    assert [model.context for model in asked] == [64] * 5 and {spec.model.context for spec in specs} == {128}


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
    assert row["seeds for 0.03"] is None, "more than 99: claims are judged by the spreads of the arms"
    one = seeds.deviations(table[table["seed"] == 0])
    assert not len(one) and "two seeds" in seeds.headline(one), "one seed has no spread"


def test_a_plan_counts_state_and_hours(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    specs = EXPERIMENTS["distillation"].specs("paper", arms=["L21 + KD"])
    teacher, student = planned_runs(specs)
    assert teacher.spec == specs[0].teacher and teacher.state == "new" and not list(tmp_path.iterdir())
    assert teacher.gpu_hours == pytest.approx(teacher.spec.cost / paper_rate() / 3600) and student.gpu_hours > 0
    show([replace(teacher, state="stopped", done=0.75)])
    assert f"1 of 1 runs to train, {teacher.gpu_hours / 4:,.0f} A100 hours" in capsys.readouterr().out, "what is left"
    one = settings.spec("1.3B+MoE-128", "paper")
    experts = 12 * 2 * (2 * 2048 * 8192 + 8192 + 2048)  # 128 experts on 64 ranks: two a layer
    shared = ModelConfig.parse("1.3B+MoE-128").parameters() - 64 * experts
    assert state_bytes(one) == 16 * (experts + shared)
    assert planned_runs(EXPERIMENTS["half-moe"].specs("cpu"))[0].gpu_hours is None


def test_summary_and_gaps():
    table = final({"a": [2.0, 3.0], "b": [1.0, 2.5]})
    assert comparison.paired(table, "a", "b") == [1.0, 0.5] and comparison.paired(table, "a", "c") == []
    assert comparison.gaps(table, "b").query("arm == 'a'")["gap"].tolist() == [1.0, 0.5]
    assert comparison.difference(table, "a", "b").startswith("a minus b: +0.750 nats, inconclusive (95 % interval")
    clear = final({"a": [2.0, 2.1, 2.2], "b": [1.0, 1.1, 1.2]})
    assert comparison.difference(clear, "a", "b").startswith(
        "a ends 1.000 nats above b (95 % interval +0.773 to +1.227"
    )
    assert comparison.difference(clear, "a", "b", decides_from=2).endswith("(1 seed, no spread)")
    early = comparison.difference(clear, "a", "b", decides_from=10)
    assert early == f"{comparison.difference(clear, 'a', 'b')} on seeds before 10, which do not decide"
    for missing in (("c", "b"), ("c", "d")):  # a selection of the arms: what is there is compared
        assert comparison.difference(table, *missing) == comparison.difference(table, "b", "a")
    assert comparison.difference(final({"a": [2.0]}), "b", "c") == "b and c have no finished pair"
    assert "interval over 2 looks" in comparison.difference(table, "a", "b", (3,)), "the planned one is to come"
    none = Runs().final()
    assert comparison.difference(none, "a", "b") == "a and b have no finished pair"
    assert not len(comparison.gaps(none, "a"))
    lost = final({"a": [2.0, 3.0, 4.0], "b": [1.0, 2.0], "c": [1.0, 2.0, 3.0]})
    said = comparison.gaps_headline(lost, "a")
    assert said == "Against a: b -1.000, c -1.000 nats; without seed 2 of b"
    assert comparison.gaps_headline(lost, "b").endswith("c +0.000 nats; without seed 2 of b"), "of the reference"
    counted = final({"16": [2.0, 3.0], "32": [1.9, 2.9], "64": [2.0]})
    assert expert_count.headline(counted).startswith("Lowest at 32 experts"), "64 has the easier seed alone"
    assert 0 < comparison.alpha(none, (3,)) < 0.05
    for least, most, said in ((3.0, 3.5, "all far below"), (5.9, 6.0, "not far below"), (6.0, 6.2, "not all below")):
        said_of = comparison.beside_unigram(pd.DataFrame({"validation_loss": [least, most], "unigram_loss": 6.13}))
        assert said_of.startswith(f"unigram 6.13 nats; arms {least:.2f} to {most:.2f}: {said} it")


def test_twins_of_the_large_models_keep_what_tells_them_apart():
    for scale in inference_scaling.SHRINK:
        model = {"52B": ModelConfig.parse("1.3B+MoE-128")}
        twin = decoding.twins(model, scale, inference_scaling.SHRINK)["52B"]
        assert twin.is_moe and max(twin.experts) % 4 == 0, "experts spread over 1, 2 and 4 ranks"
        assert twin.parameters() < (2e9 if scale == "gpu" else 100e6), "two copies on one card"
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


def test_what_a_domain_can_tell_is_bounded_by_its_entropy():
    """Two domains, four experts in even use: ln 2 / ln 4. With one expert in use, nothing is left to be told."""

    def shares(by_domain):
        rows = [(2, 0, domain, i, share) for domain, each in by_domain.items() for i, share in enumerate(each)]
        return pd.DataFrame(rows, columns=["layer", "seed", "domain", "expert", "share"])

    even = shares({"a": [0.5, 0.5, 0, 0], "b": [0, 0, 0.5, 0.5]})
    assert specialisation.most_by_domain(even).to_dict() == {2: pytest.approx(0.5)}
    assert specialisation.most_by_domain(even.drop(columns="seed")).to_dict() == {2: pytest.approx(0.5)}
    unequal = even.assign(choices=[90] * 4 + [10] * 4)  # ln 2 more than the domain's entropy is the expert's
    domain = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert specialisation.most_by_domain(unequal).to_dict() == {2: pytest.approx(domain / (domain + math.log(2)))}
    assert specialisation.most_by_domain(shares({"a": [1, 0], "b": [1, 0]})).to_dict() == {2: 1}
    layers = pd.DataFrame([[2, 0, 0.7, 0.1], [4, 0, 0.5, 0.12]], columns=["layer", "seed", "by_token", "by_domain"])
    assert specialisation.headline(layers) == "Token tells 50 to 70% of the choice, domain 10 to 12%"


def test_a_preference_is_over_an_even_share_of_its_own_layer():
    rows = [(2, "a", 0, 0.6), (2, "a", 1, 0.4), *((4, "a", i, share) for i, share in enumerate((0.5, 0.3, 0.1, 0.1)))]
    shares = pd.DataFrame(rows, columns=["layer", "domain", "expert", "share"])
    shares = pd.concat([shares, shares[shares["layer"] == 4].assign(domain="b", share=[0.1, 0.1, 0.2, 0.6])])
    found = specialisation.favourites(shares)
    assert specialisation.domain_headline(found) == "b gives expert 3 of layer 4 2.4 times an even share"
    rows = list(found[["favours", "expert", "domain"]].itertuples(index=False, name=None))
    assert rows == [("b", 3, "a"), ("b", 3, "b"), ("a", 0, "a"), ("a", 0, "b")], "the strongest first, with the others"
    assert found["times"].tolist() == pytest.approx([0.4, 2.4, 2.0, 0.4])
    _, (ax,) = layout.panels()
    placement.favourites(found, ax)
    assert [text.get_text() for text in ax.texts] == ["b: expert 3 of layer 4", "a: expert 0 of layer 4"]


def test_steps_are_compared_with_the_dense_one():
    rows = [("6.7B dense", 4.0), ("52B MoE", 3.0)]
    steps = pd.DataFrame(
        [(name, mode, ms) for name, ms in rows for mode in decoding.MODES], columns=["name", "candidate", "median_ms"]
    )
    said = moe_vs_dense_inference.steps_headline(steps)
    assert said == "Step over 6.7B dense's: 52B MoE 0.75"
