"""Which runs an experiment asks for: ids that never change, overrides by dotted names, and how experiments are found."""

import hashlib

import pytest

from moelab import paths
from moelab.config.overrides import SECTIONS, check_overrides, override, settable
from moelab.experiments import EXPERIMENTS, experiment, settings

IDS = {
    "start smoke": "038c2f73ad",
    "start cpu": "5f4edb603d",
    "scaling smoke": "15cc6c0b5e",
    "scaling cpu": "0553531bb1",
    "scaling gpu": "f4bb63c6db",
    "scaling paper": "6422f9a279",
    "half-moe smoke": "eedcb85554",
    "half-moe cpu": "22adb526a3",
    "half-moe gpu": "65d5a165af",
    "half-moe paper": "30dc523831",
    "top2-vs-residual smoke": "a06a675a19",
    "top2-vs-residual cpu": "8b39c84190",
    "top2-vs-residual gpu": "7771d5f0cb",
    "top2-vs-residual paper": "dc46eade32",
    "pr-moe smoke": "f44788b70b",
    "pr-moe cpu": "fae2435ed4",
    "pr-moe gpu": "bf1f0b8496",
    "pr-moe paper": "be5b634029",
    "distillation smoke": "471d0d120d",
    "distillation cpu": "c78c701a3b",
    "distillation gpu": "06f3a98f6a",
    "distillation paper": "1c462d8690",
    "throughput smoke": "c44a5c119e",
    "throughput cpu": "6495a7b26d",
    "throughput gpu": "63c0583ea2",
    "throughput paper": "86971ca6b3",
    "zero-shot smoke": "b4978354ab",
    "zero-shot cpu": "a679ee9ef5",
    "zero-shot gpu": "d643bca2d6",
    "expert-count smoke": "3a9c20d3c1",
    "expert-count cpu": "878c5a9872",
    "expert-count gpu": "a090310cc1",
    "capacity smoke": "a951d3a6d2",
    "capacity cpu": "16999d306e",
    "capacity gpu": "9093b7572f",
    "specialisation smoke": "b37e1b8b45",
    "specialisation cpu": "bf99f0a45c",
    "specialisation gpu": "b22f747bff",
    "seeds smoke": "038c2f73ad",
    "seeds cpu": "3a3cbdbc72",
    "seeds gpu": "1a529398d2",
    "learning-rate smoke": "cc59042cb2",
    "learning-rate cpu": "dfe5d801c2",
}
"""Experiment and scale -> digest of the ids of its runs with two seeds, as of the runs that are published."""

REQUESTS = [
    ("pr-moe", "cpu", {"overrides": {"train.tokens": 4194304, "data.corpus": "sotu"}}, "0ef5c8a102"),
    ("distillation", "paper", {"overrides": {"train.tokens": 4194304, "data.corpus": "sotu"}}, "8b92358f06"),
    ("pr-moe", "cpu", {"overrides": {"model.routing.drop_tokens": True}}, "aa50100afb"),
    ("pr-moe", "paper", {"overrides": {"model.routing.drop_tokens": True}}, "837ea6b813"),
    ("pr-moe", "cpu", {"overrides": {"parallel.data": 2}}, "1496ddfbf7"),
    ("distillation", "cpu", {"base": "1.3B"}, "2445c72d8b"),
    (
        "distillation",
        "gpu",
        {
            "stop": 0.5,
            "overrides": {
                "distill.temperature": 2.0,
                "distill.weight": 0.5,
                "distill.top_k": 8,
                "distill.cache_bytes": 1000,
            },
        },
        "a62e2b50b4",
    ),
    ("learning-rate", "cpu", {"base": "6.7B"}, "2d1f8f274e"),
]
"""Experiment, scale, further arguments -> digest of the ids with one seed."""


def digest(specs):
    return hashlib.sha256("\n".join(sorted(spec.id for spec in specs)).encode()).hexdigest()[:10]


@pytest.mark.parametrize("request_", IDS)
def test_existing_runs_keep_their_ids(request_):
    name, scale = request_.split()
    assert digest(experiment(name).specs(scale, 2)) == IDS[request_]


def test_every_scale_of_every_experiment_with_runs_is_pinned():
    assert set(IDS) == {f"{e.name} {scale}" for e in EXPERIMENTS.values() if e.arms or e.build for scale in e.scales}


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
    assert (spec.train.tokens, spec.train.lr, spec.train.min_lr, spec.train.betas) == (
        4_000_000,
        0.01,
        0.001,
        (0.9, 0.99),
    )
    assert spec.data.corpus == "folder:a_b" and spec.model.routing.drop_tokens and spec.train.dtype == "bf16"
    assert (spec.parallel.data, spec.train.micro_batch) == (2, 4), "a micro-batch a rank"


def test_what_goes_with_a_setting_can_be_set_as_well():
    given = {"train.lr": 0.01, "train.min_lr": 0.0, "parallel.data": 2, "train.micro_batch": 2}
    spec = settings.spec("350M+MoE-32", "cpu", overrides=given)
    assert (spec.train.min_lr, spec.train.micro_batch) == (0.0, 2)
    assert override("train", spec.train, {"data.corpus": "sotu"}) is spec.train, "other sections are left alone"


def test_settings_come_from_the_fields():
    assert {name.partition(".")[0] for name in settable()} == set(SECTIONS)
    assert settable()["model.routing.capacity_factor"] is float and "train.seed" not in settable()


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"train.tokenz": 1}, "no setting 'train.tokenz'; allowed: train.tokens, train.batch_size"),
        ({"train.tokenz": 1}, "did you mean train.tokens?"),
        ({"tokens": 1}, "no setting 'tokens'; allowed: model.…, train.…, data.…, parallel.…, distill.…"),
        ({"train.seed": 1}, "no setting 'train.seed'"),
        ({"train.tokens": "many"}, "train.tokens: expected int, got 'many'"),
        ({"train.tokens": 1.5}, "train.tokens: expected int, got 1.5"),
        ({"train.tokens": True}, "train.tokens: expected int, got True"),
        ({"train.device": "tpu"}, "train.device: must be one of 'cpu', 'cuda', got 'tpu'"),
        ({"distill.weight": 2.0}, "settings of distill.… need a run that has a teacher"),
        ({"train.lr": -1.0}, "train: lr must be positive"),
    ],
)
def test_a_mistake_in_overrides_is_one_line_with_what_is_allowed(given, part):
    with pytest.raises(ValueError) as error:
        experiment("half-moe").specs("smoke", overrides=given)
    assert str(error.value).startswith("half-moe: ") and part in str(error.value) and "\n" not in str(error.value)


def test_module_command_and_notebook_have_one_name():
    notebooks = {path.name for path in paths.notebooks().glob("*.ipynb")}
    assert {e.notebook for e in EXPERIMENTS.values()} == notebooks - {"16_what_if.ipynb"}
    numbers = [e.number for e in EXPERIMENTS.values()]
    assert numbers == sorted(set(numbers)), "in the order of the numbers, none twice"


def test_parameters_that_do_not_concern_the_runs_are_ignored():
    chosen = experiment("distillation")
    given = {"scale": "smoke", "seeds": 1, "arms": None, "base": "1.3B", "overrides": {}, "again": True}
    assert chosen.specs_of(given) == chosen.specs("smoke", base="1.3B")
    assert experiment("gating-kernels").specs_of({"scale": "smoke", "rounds": None}) == []


def test_the_command_line_fills_the_notebooks_overrides_with_what_json_can_hold():
    from moelab.notebook.execute import check_parameters

    given = {"seeds": "2", "train.betas": "[0.9, 0.99]", "overrides": '{"data.corpus": "sotu"}', "train.tokens": "4e6"}
    found = check_parameters(experiment("pr-moe"), given)
    expected = {"data.corpus": "sotu", "train.betas": [0.9, 0.99], "train.tokens": 4_000_000}
    assert found == {"seeds": 2, "overrides": expected}
    assert {spec.train.betas for spec in experiment("pr-moe").specs_of(found)} == {(0.9, 0.99)}
