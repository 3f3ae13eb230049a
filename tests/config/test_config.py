from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moelab import paper
from moelab.config import (
    DataConfig,
    DecoderConfig,
    ExpertConfig,
    ModelConfig,
    RoutingConfig,
    TrainConfig,
    digest,
    from_json,
    from_text,
    identity,
    to_json,
)
from moelab.models import GPT, build

NAMES = [m.model for m in paper.models()]


@pytest.mark.parametrize("name", NAMES)
def test_every_model_of_the_paper_parses_to_its_canonical_name_and_shape(name):
    config = ModelConfig.parse(name)
    stated = paper.model(name)
    assert str(config) == name
    assert (config.layers, config.hidden) == (stated.layers, stated.hidden)
    assert tuple(config.experts) == tuple(stated.experts)
    assert config.residual == stated.residual and config.top_k == max(1, stated.top_k)
    if stated.heads:
        assert config.heads == stated.heads


@pytest.mark.parametrize("name", NAMES)
def test_parameters_agree_with_the_paper(name):
    config, row = ModelConfig.parse(name), paper.model(name)
    billions = config.parameters() / 1e9
    if row.computed_B:
        assert billions == pytest.approx(row.computed_B, rel=1e-3)
    if row.stated_B:
        # Within 0.7 %, or what rounding to the printed digits allows. "350M" is a nominal name: its shape has 356 M.
        assert abs(billions - row.stated_B) <= max(0.007 * row.stated_B, row.stated_precision_B) or name == "350M"
    if row.active_B:
        assert config.active_parameters() / 1e9 == pytest.approx(row.active_B, rel=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_equal_the_built_model_exactly(name):
    for config in (ModelConfig.parse(name), ModelConfig.parse(name).shrink()):
        with torch.device("meta"):
            model = GPT(config)
        assert sum(p.numel() for p in model.parameters()) == config.parameters()


def test_active_parameters_are_those_with_a_gradient_from_one_token():
    config = replace(ModelConfig.parse("350M+Top2-MoE-32").shrink(hidden=32), context=1)
    model = build(config, seed=0)
    model(torch.zeros(1, 1, dtype=torch.long)).cross_entropy(torch.ones(1, 1, dtype=torch.long)).backward()
    used = sum(
        (p.grad.abs().flatten(1).amax(1) > 0).sum().item() * p[0].numel() if ".experts." in name else p.numel()
        for name, p in model.named_parameters()
    )
    assert used == config.active_parameters()


def test_flops_per_token_equal_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig.parse("350M twin")
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        build(config, 0)(torch.zeros(1, config.context, dtype=torch.long))
    T, M, L = config.context, config.hidden, config.layers
    uncausal = counter.get_total_flops() / T  # torch computes, and counts, the full square of attention scores
    assert config.flops_per_token(training=False) == pytest.approx(uncausal - L * 2 * M * (2 * T - (T + 1)), rel=1e-6)
    assert config.flops_per_token() == 3 * config.flops_per_token(training=False)


@pytest.mark.parametrize("text", ["350m+moe-128", " 350M + MoE-128 ", "350M+MOE-128"])
def test_names_tolerate_case_and_spaces(text):
    assert str(ModelConfig.parse(text)) == "350M+MoE-128"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("400M", "allowed: 125M, 350M"),
        ("350M+MoE", "did you mean"),
        ("350M+PR-MoE-32", "two expert counts"),
        ("350M+MoE-32/64", "need Pyramid-MoE or PR-MoE"),
        ("350M+Pyramid-MoE-64/32", "no fewer experts late"),
        ("350M+L30", "between L1 and the base's L24"),
        ("350M+MoE-1", "at least 2"),
        ("350M+Top64-MoE-32", "top_k"),
        ("", "not understood"),
    ],
)
def test_wrong_names_say_what_is_allowed_in_one_line(text, part):
    with pytest.raises(ValueError) as error:
        ModelConfig.parse(text)
    assert part in str(error.value) and "\n" not in str(error.value)


@given(st.text(alphabet="350M+PRMoEL-/124Top twinhalf", max_size=30))
@example("350M+MoE-2/2")
def test_any_text_parses_to_itself_or_to_one_line(text):
    try:
        config = ModelConfig.parse(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert ModelConfig.parse(str(config)) == config


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"heads": 7}, "7 heads do not divide hidden size 1024"),
        ({"experts": (0, 32)}, "experts lists 2 layers, the model has 24"),
        ({"residual": True}, "residual needs MoE layers"),
        ({"experts": (1,) * 24}, "at least 2 experts"),
        ({"dropout": 1.0}, "dropout must be in [0, 1)"),
    ],
)
def test_impossible_models_are_refused_in_one_line(fields, part):
    with pytest.raises(ValueError) as error:
        replace(ModelConfig.parse("350M"), **fields)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_twins_keep_the_shape_rule():
    twin = ModelConfig.parse("350M+PR-MoE-32/64").shrink()
    assert (twin.layers, twin.hidden, twin.heads, twin.vocab) == (8, 64, 1, 4096)
    assert twin.experts == (0, 4, 0, 4, 0, 4, 0, 8) and twin.residual
    assert ModelConfig.parse("350M+PR-MoE-32/64+L21").shrink().experts == (0, 4, 0, 4, 0, 8, 0)
    assert ModelConfig.parse("350M+SecondHalf-MoE-32").shrink().experts == (0, 0, 0, 0, 0, 4, 0, 4)
    assert ModelConfig.parse("350M+FirstHalf-MoE-32").shrink().experts == (0, 4, 0, 4, 0, 0, 0, 0)
    assert ModelConfig.parse("350M+MoE-128 twin") == ModelConfig.parse("350M+MoE-128").shrink()
    assert ModelConfig.parse("1.3B").shrink().head_size == 64
    assert twin.init_std == pytest.approx(0.014 * 4)  # 1 / sqrt(hidden)


@pytest.mark.parametrize("expert", [ExpertConfig(shared=1), ExpertConfig(ffn=64, shared=2, shared_gate=True)])
def test_a_twin_without_moe_layers_has_no_shared_experts(expert):
    source = ModelConfig(layers=3, hidden=512, heads=8, experts=(0, 8, 8), expert=expert)
    twin = source.shrink()
    assert twin.experts == (0,) and twin.expert == ExpertConfig() and not twin.is_moe
    assert replace(source, layers=6, experts=(0, 8) * 3).shrink().expert.shared == expert.shared


@pytest.mark.parametrize(("hidden", "heads", "head_size"), [(9408, 147, 64), (15616, 122, 64), (512, 8, 1)])
def test_a_twin_with_rotary_positions_has_heads_of_even_size(hidden, heads, head_size):
    rotary = ModelConfig(layers=24, hidden=hidden, heads=heads, decoder=DecoderConfig.modern())
    twin = rotary.shrink(head_size=head_size)
    assert twin.head_size % 2 == 0 and twin.hidden % twin.heads == 0


def test_an_experts_size_is_that_of_the_built_one():
    config = ModelConfig.parse("350M+PR-MoE-32/64 twin")
    with torch.device("meta"):
        layer = GPT(config).blocks[1].ffn
    built = sum(p[0].numel() for p in layer.experts.parameters())
    expert = config.expert_feed_forward
    assert expert.parameters == built == sum(p.numel() for p in layer.mlp.parameters())
    assert expert.bytes("fp32") == 4 * built and expert.bytes() == 2 * built
    with pytest.raises(ValueError, match="dtype must be one of fp32, bf16, fp16, got 'int8'"):
        expert.bytes("int8")


@pytest.mark.parametrize("hundredths", range(5, 405, 5))
def test_capacity_is_exact(hundredths):
    """Against integers: ceil(S K / E * factor), where floating point is one too high at 400 / 4 * 1.1 = 110."""
    routing = RoutingConfig(capacity_factor=hundredths / 100, capacity_factor_eval=hundredths / 100, min_capacity=1)
    for tokens in (1, 7, 100, 400, 1000, 8192):
        for experts in (2, 3, 4, 10, 128):
            for top_k in (1, 2):
                exact = -(-tokens * top_k * hundredths // (100 * experts))
                assert routing.capacity(tokens, experts, top_k, training=hundredths % 2 == 0) == exact


def test_capacity_is_the_papers():
    routing = RoutingConfig()
    assert routing.capacity(8192, 128, 1, training=True) == 64  # micro-batch of the 350M runs
    assert routing.capacity(8192, 128, 2, training=True) == 128  # doubled for top-2
    assert routing.capacity(10, 128, 1, training=True) == 4  # min_capacity
    assert RoutingConfig(drop_tokens=False).capacity(8192, 128, 1, training=True) is None


def test_identity_leaves_out_defaults_and_names():
    assert identity(TrainConfig()) == {}
    assert identity(TrainConfig(lr=1e-3, checkpoint_every=7)) == {"lr": 1e-3}
    a, b = ModelConfig.parse("350M"), replace(ModelConfig.parse("350M"), name="other")
    assert a == b and digest(a) == digest(b)


@pytest.mark.parametrize(
    "config", [ModelConfig.parse("350M+PR-MoE-32/64"), TrainConfig(betas=(0.8, 0.9)), DataConfig(corpus="mix5")]
)
def test_json_round_trip(config):
    back = from_json(type(config), to_json(config))
    assert back == config and to_json(back) == to_json(config)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"lr": 1, "learning": 2}, "unknown field learning; allowed: tokens"),
        ({"seeds": 1}, "unknown field seeds; did you mean seed? allowed: tokens"),
        ({"lr": "fast"}, "TrainConfig.lr must be a valid number, got 'fast'"),
        ({"betas": [0.9]}, "TrainConfig: betas.1 is missing"),
        ({"dtype": "fp64"}, "TrainConfig.dtype must be 'fp32' or 'bf16', got 'fp64'"),
        ({"seed": True}, "TrainConfig.seed must be a valid integer, got True"),
        ({"lr": -1}, "train: lr must be positive"),
        ([], "TrainConfig must be an object, got []"),
    ],
)
def test_bad_json_is_one_line(data, part):
    with pytest.raises(ValueError) as error:
        from_json(TrainConfig, data)
    assert part in str(error.value) and "\n" not in str(error.value)


@dataclass(frozen=True)
class Site:
    """Holds a field of each kind that a profile's file may have."""

    nodes: int = 1
    share: float = 1.0
    exclusive: bool = False
    lines: tuple[str, ...] = ()


def test_a_file_of_texts_has_fields_of_all_kinds():
    texts = {"nodes": "4", "share": "0.5", "exclusive": "yes", "lines": ["7"]}
    assert from_json(Site, texts, texts=True) == Site(4, 0.5, True, ("7",))
    for name, text, kind in (
        ("share", "half", "number"),
        ("exclusive", "maybe", "boolean"),
        ("nodes", "1.5", "integer"),
    ):
        with pytest.raises(ValueError, match=f"^site.{name} must be a valid {kind}, got '{text}'$"):
            from_json(Site, {name: text}, "site", texts=True)
    assert from_json(Site, {"nodes": 2, "later": 1}, known=True) == Site(2)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "4e6", 4_000_000), (int, "1_000", 1000), (float, "4e6", 4e6), (bool, "no", False), (bool, "1", True), (str, "None", "None"),
        (float | None, "none", None), (list[int], "3", [3]), (list[int], "1, 2", [1, 2]), (list[str], '["a,b"]', ["a,b"]),
        (tuple[float, float], "[0.9, 1]", (0.9, 1.0)), (dict[str, Any], '{"A_b": "C"}', {"A_b": "C"}),
        (int, "true", None), (int, "1.5", None), (float, "inf", None), (bool, "2", None), (list[int], "[true]", None), (dict[str, Any], "[]", None),
    ],
)  # fmt: skip
def test_a_text_is_read_as_the_declared_type(kind, text, value):
    if value is None and kind != float | None:
        with pytest.raises(ValueError, match=r"^p(\.0)? must be [^\n]*, got"):
            from_text(kind, text, "p")
    else:
        found = from_text(kind, text, "p")
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("betas", (2, 2), r"train: betas must be two numbers from 0 up to, not including, 1, got \[2, 2\]"),
        ("betas", (0.9, 1.0), "train: betas must be two"),
        ("betas", (0.9,), "train: betas must be two"),
        ("betas", (-0.1, 0.9), "train: betas must be two"),
        ("threads", 100_000, "train: threads must be at most 1024, got 100000"),
    ],
)
def test_settings_that_end_a_training_are_refused_when_they_are_given(field, value, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{field: value})
    assert getattr(TrainConfig(betas=(0, 0.95), threads=1024), field)
