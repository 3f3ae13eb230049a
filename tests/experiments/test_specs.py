"""Which runs an experiment asks for: ids that never change, overrides by dotted names, and how experiments are found."""

import hashlib
from dataclasses import replace

import pytest

from moelab import paths
from moelab.config import ModelConfig
from moelab.config.overrides import SECTIONS, check_overrides, override, settable
from moelab.design import settings
from moelab.design.parameters import resolve
from moelab.experiments import EXPERIMENTS, experiment, upcycling

TABLE = """
experiment       smoke      quick      cpu        full       gpu        paper
start            fdcfc197d8 -          94d75e102b -          -          -
scaling          8079779132 1001b59c3f 52012ec8f2 b06013256a ce1ec9369f ff85921426
half-moe         d7458eba27 f723df7a91 9e8ad2dcd4 f15593427d 237e5c576c 5da5fa9851
top2-vs-residual 3df32537ea 3996098de6 a94c22f7ca 6c45d430bf 6ca8647aac 2e859c27d0
pr-moe           c5d5234ee9 ea2a9350f4 ff97bad5fd 65fb5bf15c f33176081c 9c92bc5a14
distillation     096ab2b263 4b31bca5d0 b91ca88044 6d7a270e54 ffc6ee3999 0ed24215a1
throughput       e3dac82197 -          aa90976859 -          737db46bc6 -
zero-shot        7b633e6514 -          7fa782540e af781cc703 37ee8a07f6 -
expert-count     9d95d1b174 5246c04780 5ad91496e6 18ed8461a5 b4cbeb0665 -
capacity         b8937d103e 73d7fd4dd3 5e3047f4d7 78819a6bca a06d93db82 -
specialisation   641c45f376 -          5ca7891e0f 46842699d1 4092c19b23 -
seeds            13cd21e710 f9d4306ae2 5541447821 0e0b8d1e08 cc8dc4ed6d -
learning-rate    2f5d305bc4 -          92d5fc8946 c2fb2ae94f -          -
what-survives    1795eadae4 a1e68c5046 df7ff09ff4 -          1d8cc056d0 -
upcycling        520f5a6049 747761d1dc 0839163dd4 -          45d8415712 -
ladder           7002b491e7 -          510eb9a59f -          8e103a638a -
tries            8c167c0ff9 66fcb4ff7f d78665dd3e 6d1153ca8c -          -
prediction       23793f9bfd e5713995a8 -          6792d2dc91 -          -
"""
(_, *SCALES), *ROWS = (line.split() for line in TABLE.split("\n") if line)
IDS = {name: {s: id for s, id in zip(SCALES, ids, strict=True) if id != "-"} for name, *ids in ROWS}
"""Experiment -> scale -> digest of the ids of its runs with two seeds, as of the runs that are published."""

TEXT = {"overrides": {"train.tokens": 4194304, "data.corpus": "sotu"}}
DROPS = {"overrides": {"model.routing.drop_tokens": True}}
TAUGHT = {"distill.temperature": 2.0, "distill.weight": 0.5}
REQUESTS = [
    ("pr-moe", "cpu", TEXT, "3ce41b30fe"),
    ("distillation", "paper", TEXT, "bf18f8a2a8"),
    ("pr-moe", "cpu", DROPS, "44e73f8fe3"),
    ("pr-moe", "paper", DROPS, "fa4d633a38"),
    ("pr-moe", "cpu", {"overrides": {"parallel.data": 2}}, "bc7303f2ca"),
    ("distillation", "cpu", {"base": "1.3B"}, "8e5c2adf06"),
    ("distillation", "gpu", {"stop": 0.5, "overrides": TAUGHT}, "4a2bce2f71"),
    ("learning-rate", "cpu", {"base": "6.7B"}, "2fae7a7dfd"),
    ("learning-rate", "full", {"base": "1.3B", "arms": ["Dense", "MoE-128"]}, "2f4ff22a53"),
    ("ladder", "cpu", {"larger": True}, "f3e846b317"),
]
"""Experiment, scale, further arguments -> digest of the ids with one seed."""


def digest(specs):
    return hashlib.sha256("\n".join(sorted(spec.id for spec in specs)).encode()).hexdigest()[:10]


@pytest.mark.parametrize("name", [e.name for e in EXPERIMENTS.values() if e.arms or e.build])
def test_every_scale_has_runs_and_existing_runs_keep_their_ids(name):
    chosen, found = experiment(name), {}
    for scale in chosen.scales:
        specs = chosen.specs(scale, 2)
        found[scale] = digest(specs)
        assert specs and {spec.train.seed % 100 for spec in specs} == {0, 1}
        for spec in specs:
            assert spec.label and (spec.train.device == "cuda") == (scale in ("gpu", "paper"))
            small = scale == "smoke" or name == "start" or spec.label in upcycling.SHORTER
            assert small or spec.train.tokens >= 1_000_000
    assert found == IDS.get(name), "add what is new to TABLE, so that no change of code gives these runs other ids"
    with pytest.raises(ValueError, match=f"{name}: no scale 'huge'"):
        chosen.specs("huge")


@pytest.mark.parametrize(("name", "scale", "arguments", "expected"), REQUESTS)
def test_existing_runs_with_other_settings_keep_their_ids(name, scale, arguments, expected):
    assert digest(experiment(name).specs(scale, **arguments)) == expected


def test_text_as_on_a_command_line_and_values_are_the_same_overrides():
    texts = {
        "train.tokens": "4e6", "train.lr": "0.01", "train.betas": "[0.9, 0.99]", "data.corpus": "folder:a_b", "train.dtype": "bf16",
        "model.routing.drop_tokens": "True", "model.routing.normalize_weights": "none", "parallel.data": "2",
    }  # fmt: skip
    values = {
        "train.tokens": 4_000_000, "train.lr": 0.01, "train.betas": (0.9, 0.99), "data.corpus": "folder:a_b", "train.dtype": "bf16",
        "model.routing.drop_tokens": True, "model.routing.normalize_weights": None, "parallel.data": 2,
    }  # fmt: skip
    assert check_overrides(texts) == check_overrides(values) == values
    (spec,) = experiment("pr-moe").specs("cpu", arms=["MoE-32"], overrides=texts)
    train = spec.train
    assert (train.tokens, train.lr, train.min_lr, train.betas) == (4_000_000, 0.01, 0.001, (0.9, 0.99))
    assert spec.data.corpus == "folder:a_b" and spec.model.routing.drop_tokens and train.dtype == "bf16"
    assert (spec.parallel.data, train.micro_batch) == (2, 16), "a micro-batch a rank"


def test_the_arms_of_figures_2_and_4_are_trained_on_either_base():
    for name in ("half-moe", "top2-vs-residual", "pr-moe"):
        small, wide = (experiment(name).specs("full", base=base) for base in ("350M", "1.3B"))
        assert [s.label for s in small] == [s.label for s in wide]
        assert {str(s.model).replace("1.3B", "350M") for s in wide} == {str(s.model) for s in small}
        assert {(s.model.hidden, s.model.heads) for s in wide} == {(64, 2)}
        with pytest.raises(ValueError, match=f"^{name}: base must be one of 350M, 1.3B, got '6.7B'$"):
            experiment(name).specs("full", base="6.7B")


def with_arm(arm):
    return replace(experiment("half-moe"), name="tried", arms={"fine": arm}, build=None)


def test_an_arms_own_settings_yield_to_the_users():
    arm = {"name": "350M+MoE-128", "overrides": {"model.top_k": 4, "model.expert.ffn": "32", "train.lr": 0.01}}
    (plain,) = with_arm("350M+MoE-128").specs("cpu")
    (own,) = with_arm(arm).specs("cpu")
    assert own.model == replace(plain.model, top_k=4, expert=replace(plain.model.expert, ffn=32))
    assert own.train == replace(plain.train, lr=0.01, min_lr=0.001) and own.data == plain.data
    (given,) = with_arm(arm).specs("cpu", overrides={"model.top_k": 2})
    assert (given.model.top_k, given.model.expert.ffn) == (2, 32)
    assert arm["overrides"]["model.top_k"] == 4, "the description stays as it is"


def test_fine_grained_experts_are_a_quarter_as_wide_at_any_width():
    for given in ({}, {"model.hidden": 64}, {"model.decoder.ffn": 96}):
        specs = {spec.label: spec.model for spec in experiment("what-survives").specs("cpu", overrides=given)}
        shared, fine = specs["Shared"], specs["Shared, fine"]
        assert (4 * fine.expert_feed_forward.ffn, fine.expert.shared_ffn) == (shared.ffn, shared.ffn)


def test_a_mistake_in_an_arm_is_one_line_with_what_is_allowed():
    for arm, part in (
        ({"name": "350M+MoE-128", "top_k": 4}, "no field 'top_k'; allowed: name, overrides, published, routing, "),
        ({"overrides": {}}, "name must be a str, got nothing; allowed: name, overrides, "),
        (ModelConfig.parse("350M"), "expected a model's name or a mapping with name, got ModelConfig"),
        ({"name": "350M", "routing": {"drop_tokens": False}}, "routing must be a RoutingConfig, got dict"),
        ({"name": "350M", "overrides": "model.top_k=4"}, "overrides must be a Mapping, got str"),
        ({"name": "350M+MoE-32", "overrides": {"model.routing.top_k": 4}}, "no setting 'model.routing.top_k'"),
        (
            {"name": "350M", "overrides": {"distill.weight": 2.0}},
            "settings of distill.… need a teacher, and it has none",
        ),
    ):
        with pytest.raises(ValueError) as error:
            with_arm(arm).specs("smoke")
        assert str(error.value).startswith("tried: arm 'fine': " + part) and "\n" not in str(error.value)


def test_settings_come_from_the_fields_and_what_goes_with_one_can_be_set_as_well():
    assert {name.partition(".")[0] for name in settable()} == set(SECTIONS)
    assert settable()["model.routing.capacity_factor"] is float and "train.seed" not in settable()
    given = {"train.lr": 0.01, "train.min_lr": 0.0, "parallel.data": 2, "train.micro_batch": 2}
    spec = settings.spec("350M+MoE-32", "cpu", overrides=given)
    assert (spec.train.min_lr, spec.train.micro_batch) == (0.0, 2)
    assert override("train", spec.train, {"data.corpus": "sotu"}) is spec.train, "other sections are left alone"


def test_a_mistake_in_overrides_is_one_line_with_what_is_allowed():
    for given, part in (
        ({"train.tokenz": 1}, "'train.tokenz'; did you mean train.tokens? allowed: train.tokens, train.batch_size"),
        ({"model.routing.top_k": 4}, "did you mean model.top_k?"),
        ({"model.shared": 1}, "did you mean model.expert.shared?"),
        ({"top_k": 4}, "did you mean model.top_k?"),
        ({"tokens": 1}, "no setting 'tokens'; did you mean train.tokens? allowed: model.…, train.…, data.…, parall"),
        ({"train.seed": 1}, "no setting 'train.seed'"),
        ({"distill.top_k": 8}, "no setting 'distill.top_k'"),
        ({"model.dispatch": "einsum"}, "no setting 'model.dispatch'"),
        ({"train.tokens": 1.5}, "train.tokens must be a whole number, got '1.5'"),
        ({"train.tokens": True}, "train.tokens must be a whole number, got 'true'"),
        ({"train.device": "tpu"}, "train.device must be 'cpu' or 'cuda', got 'tpu'"),
        ({"distill.weight": 2.0}, "settings of distill.… need a run that has a teacher"),
        ({"train.lr": -1.0}, "train: lr must be positive"),
    ):
        with pytest.raises(ValueError) as error:
            experiment("half-moe").specs("smoke", overrides=given)
        said = str(error.value)
        assert said.startswith("half-moe: ") and part in said and "\n" not in said


def test_module_command_and_notebook_have_one_name():
    notebooks = {path.name for path in paths.notebooks().glob("*.ipynb")}
    assert {e.notebook for e in EXPERIMENTS.values()} == notebooks
    numbers = [e.number for e in EXPERIMENTS.values()]
    assert numbers == sorted(set(numbers)), "in the order of the numbers, none twice"


def test_parameters_that_do_not_concern_the_runs_are_ignored_and_seeds_may_begin_later():
    chosen = experiment("distillation")
    given = {"scale": "smoke", "seeds": 1, "arms": None, "base": "1.3B", "overrides": {}, "again": True}
    assert chosen.specs_of(given) == chosen.specs("smoke", base="1.3B")
    assert experiment("gating-kernels").specs_of({"scale": "smoke", "rounds": None}) == []
    chosen = experiment("zero-shot")
    later = chosen.specs_of({"scale": "smoke", "seeds": 2, "first_seed": 3})
    assert later == chosen.specs("smoke", 5)[3 * len(chosen.arms) :]
    assert {spec.train.seed for spec in later} == {3, 4}


def test_the_command_line_fills_the_notebooks_overrides_with_what_json_can_hold():
    given = {"seeds": "2", "train.betas": "[0.9, 0.99]", "overrides": '{"data.corpus": "sotu"}', "train.tokens": "4e6"}
    found = resolve(experiment("pr-moe"), given)
    expected = {"data.corpus": "sotu", "train.betas": [0.9, 0.99], "train.tokens": 4_000_000}
    assert found.given == {"seeds": 2, "overrides": expected}
    assert {spec.train.betas for spec in found.specs} == {(0.9, 0.99)}


def test_files_and_folders_are_those_of_the_caller(tmp_path, monkeypatch):
    """A notebook's kernel works in another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    for given in ({"data.corpus": "folder:my texts"}, {"overrides": '{"data.corpus": "folder:my texts"}'}):
        found = resolve(experiment("pr-moe"), {"scale": "smoke", **given}).given
        assert found["overrides"] == {"data.corpus": f"folder:{tmp_path}/my texts"}
    (tmp_path / "pile").mkdir()
    for text, corpus in {
        "sotu": "sotu",
        "hf:pile": f"hf:{tmp_path}/pile",
        "hf:./pile:a": f"hf:{tmp_path}/pile:a",
    }.items():
        found = resolve(experiment("pr-moe"), {"data.corpus": text}).given
        assert found["overrides"] == {"data.corpus": corpus}
    (tmp_path / "exchange.jsonl").write_text('{"alpha_ms": 0.1, "ranks": 8}')
    found = resolve(experiment("all-to-all"), {"scale": "paper", "measured_file": "exchange.jsonl"}).given
    assert found["measured_file"] == str(tmp_path / "exchange.jsonl")
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"imported-model: model model: a relative path needs a /, as in \./model"):
        resolve(experiment("imported-model"), {"model": "model"})
    with pytest.raises(ValueError, match=r"^imported-model: .*model"):
        resolve(experiment("imported-model"), {"model": "./model"})


def test_what_would_fail_after_the_training_is_refused_before():
    for name, given, message in (
        ("zero-shot", {"limit": "1"}, "limit must be 0"),
        ("specialisation", {"max_tokens": "-5"}, "max_tokens must be 0"),
        ("specialisation", {"max_tokens": "50"}, "max_tokens must be 0 .all. or at least 64, got 50"),
        ("pr-moe", {"train.lr": "1e400"}, "finite"),
        ("all-to-all", {"scale": "paper"}, "all-to-all: scale paper needs -p measured_file=FILE, the exchange.jsonl"),
        ("inference-scaling", {"scale": "paper", "measured_file": "/no/file"}, "inference-scaling: /no/file: No such"),
        ("inference-large", {"scale": "paper"}, "inference-large: scale paper needs -p measured_file=FILE"),
        ("imported-model", {"model": "/no/model"}, "imported-model: run '/no/model': no such run or directory"),
        ("imported-model", {"cluster": "h1000"}, "imported-model: no cluster 'h1000'; did you mean h100"),
        ("imported-model", {"system": "vllm"}, "imported-model: no system 'vllm'"),
        ("imported-model", {"system": "megatron"}, "imported-model: system megatron is for training alone"),
        ("what-if", {"cached": "0"}, "what-if: cached must be at least 1, got 0"),
        ("throughput", {"rounds": "0"}, "throughput: rounds must be at least 1, got 0"),
        ("gating-kernels", {"threads": "0"}, "gating-kernels: threads must be at least 1, got 0"),
        ("all-to-all", {"rounds": "-1"}, "all-to-all: rounds must be at least 1, got -1"),
        ("imported-model", {"corpus": "mix6"}, "imported-model: data: unknown corpus 'mix6'"),
        ("imported-model", {"context": "0"}, "imported-model: .*context must be at least 1"),
        ("imported-model", {"max_tokens": "100"}, "imported-model: max_tokens must be 0 .all. or at least 512, the"),
        ("imported-model", {"gpus": "0"}, "imported-model: gpus must be at least 1, got 0"),
        ("learning-rate", {"train.lr": "0.01"}, "learning-rate: train.lr is what its runs differ in.* peaks are"),
        ("ladder", {"model.hidden": "64"}, "ladder: model.hidden is what its runs differ in"),
        ("scaling", {"model.hidden": "64"}, "scaling: model.hidden is what its bases differ in"),
        (
            "what-survives",
            {"model.routing.drop_tokens": "true"},
            "what-survives: with model.routing.drop_tokens the arms 'Shared' and 'Shared, capacity 1' are one and the",
        ),
        (
            "capacity",
            {"model.routing.capacity_factor": "1.5"},
            "capacity: model.routing.capacity_factor is what its arms",
        ),
        ("distillation", {"data.part": "whole"}, "distillation: data.part cannot be set at scale smoke"),
        ("distillation", {"distill.unit": "steps"}, "distillation: distill.unit must be tokens"),
        ("imported-model", {"dtype": "fp8"}, "imported-model: dtype must be bf16 or fp32, got 'fp8'"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(experiment(name), {"scale": "smoke", **given})
    others = {"arms": '["Dense", "Shared"]', "model.routing.drop_tokens": "true"}
    assert len(resolve(experiment("what-survives"), {"scale": "smoke", **others}).specs) == 2


def test_all_experiments_of_the_paper_leave_out_those_that_need_a_file():
    from moelab.notebook import batch

    chosen = [request.experiment.name for request in batch.chosen({"scale": "paper"})]
    assert "all-to-all" in batch.left_out("paper") and "all-to-all" not in chosen
    assert not batch.left_out("cpu") and "scaling" in chosen


@pytest.mark.parametrize("looks", [(6, 3), (3, 3, 6), 3, (), (0, 3)])
def test_looks_that_are_no_plan_are_refused_before_the_first_run(looks):
    with pytest.raises(ValueError, match=r"^experiment half-moe: looks of cpu must be increasing numbers of seeds"):
        replace(experiment("half-moe"), looks={"cpu": looks})
    with pytest.raises(ValueError, match=r"^experiment half-moe: no scale 'ful'; allowed: smoke"):
        replace(experiment("half-moe"), looks={"ful": (3, 6)})


def test_an_experiment_without_its_notebook_is_told_in_one_line(tmp_path, monkeypatch):
    lone = replace(experiment("half-moe"), name="granularity", number=31)
    with pytest.raises(ValueError) as error:
        resolve(lone, {})
    assert str(error.value) == "granularity: notebooks/31_granularity.ipynb does not exist; docs/extend.md, step 2"
    monkeypatch.setattr(paths, "notebooks", lambda: tmp_path)
    (tmp_path / lone.notebook).write_text('{"cells": [{"source": [], "metadata": {}}]}')
    with pytest.raises(ValueError, match="0 cells have the tag parameters, expected one"):
        resolve(lone, {})


@pytest.mark.parametrize("scale", ["cpu", "full", "paper"])
@pytest.mark.parametrize(("typed", "name"), [("1.3B + MoE-128", "1.3B+MoE-128"), ("350M+pr-moe-32/64", None)])
def test_a_model_is_the_same_run_however_its_name_is_typed(typed, name, scale):
    assert settings.spec(typed, scale).id == settings.spec(name or "350M+PR-MoE-32/64", scale).id


def test_a_twins_name_is_not_shrunk_again():
    with pytest.raises(ValueError, match=r"350M\+MoE-128 twin.*the scale makes the twin.*350M\+MoE-128"):
        settings.spec("350M+MoE-128 twin", "cpu")
