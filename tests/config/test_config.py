import itertools
from dataclasses import replace
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
def test_every_model_of_the_paper_has_its_name_shape_and_sizes(name):
    """Sizes as the paper's tables have them, and exactly those of the built model, which its twin has as well."""
    config, row = ModelConfig.parse(name), paper.model(name)
    assert str(config) == name == str(ModelConfig.parse(f" {name.lower().replace('+', ' + ')} "))
    assert from_json(ModelConfig, to_json(config)) == config
    assert (config.layers, config.hidden, tuple(config.experts)) == (row.layers, row.hidden, tuple(row.experts))
    assert config.residual == row.residual and config.top_k == max(1, row.top_k)
    assert config.heads == row.heads or not row.heads
    assert config.parameters() / 1e9 == pytest.approx(row.computed_B, rel=1e-3)
    assert config.active_parameters() / 1e9 == pytest.approx(row.active_B, rel=1e-3)
    for model in (config, config.shrink()):
        with torch.device("meta"):
            assert sum(p.numel() for p in GPT(model).parameters()) == model.parameters()


def test_active_parameters_are_those_with_a_gradient_from_one_token():
    config = replace(ModelConfig.parse("350M+Top2-MoE-32").shrink(hidden=32), context=1)
    model = build(config, seed=0)
    token = torch.zeros(1, 1, dtype=torch.long)
    model(token, targets_BT=token + 1).loss.backward()
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


def without_lines(change, part):
    with pytest.raises(ValueError) as error:
        change()
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("400M", "allowed: 125M, 350M"),
        ("350M+FirstHalf-MoE-8+L3", "none of its 3 layers would have experts"),
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
    without_lines(lambda: ModelConfig.parse(text), part)


@pytest.mark.parametrize(
    ("kind", "fields", "part"),
    [
        ("model", {"heads": 7}, "7 heads do not divide hidden size 1024"),
        ("model", {"experts": (0, 32)}, "experts lists 2 layers, the model has 24"),
        ("model", {"residual": True}, "residual needs MoE layers"),
        ("model", {"experts": (1,) * 24}, "at least 2 experts"),
        ("model", {"dropout": 1.0}, "dropout must be in [0, 1)"),
        ("model", {"decoder": DecoderConfig(ffn=10**30)}, "decoder.ffn must be at most 16,777,216"),
        ("train", {"betas": (2, 2)}, "train: betas must be two numbers from 0 up to, not including, 1, got [2, 2]"),
        ("train", {"betas": (0.9, 1.0)}, "train: betas must be two"),
        ("train", {"betas": (0.9,)}, "train: betas must be two"),
        ("train", {"betas": (-0.1, 0.9)}, "train: betas must be two"),
        ("train", {"threads": 100_000}, "train: threads must be at most 1024, got 100000"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(kind, fields, part):
    good = ModelConfig.parse("350M") if kind == "model" else TrainConfig(betas=(0, 0.95), threads=1024)
    without_lines(lambda: replace(good, **fields), part)


@given(st.text(alphabet="350M+PRMoEL-/124Top twinhalf", max_size=30))
@example("350M+MoE-2/2")
def test_any_text_parses_to_itself_or_to_one_line(text):
    try:
        config = ModelConfig.parse(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert ModelConfig.parse(str(config)) == config


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


def test_capacity_is_exact():
    """Against integers: ceil(S K / E * factor), where floating point is one too high at 400 / 4 * 1.1 = 110."""
    for hundredths in range(5, 405, 5):
        factor = hundredths / 100
        routing = RoutingConfig(capacity_factor=factor, capacity_factor_eval=factor, min_capacity=1)
        for S, E, K in itertools.product((1, 7, 100, 400, 8192), (2, 3, 4, 10, 128), (1, 2)):
            exact = -(-S * K * hundredths // (100 * E))
            assert routing.capacity(S, E, K, training=hundredths % 2 == 0) == exact
    papers = [RoutingConfig().capacity(S, 128, K, training=True) for S, K in ((8192, 1), (8192, 2), (10, 1))]
    assert papers == [64, 128, 4], "the micro-batch of the 350M runs, doubled for top-2, and min_capacity"
    assert RoutingConfig(drop_tokens=False).capacity(8192, 128, 1, training=True) is None


def test_identity_leaves_out_defaults_and_names():
    assert identity(TrainConfig()) == {}
    assert identity(TrainConfig(lr=1e-3, checkpoint_every=7)) == {"lr": 1e-3}
    a, b = ModelConfig.parse("350M"), replace(ModelConfig.parse("350M"), name="other")
    assert a == b and digest(a) == digest(b)
    for config in (TrainConfig(betas=(0.8, 0.9)), DataConfig(corpus="mix5")):
        back = from_json(type(config), to_json(config))
        assert back == config and to_json(back) == to_json(config)
    shape = a.dense_feed_forward
    assert shape.bytes("fp32") == 4 * shape.parameters == 2 * shape.bytes()
    with pytest.raises(ValueError, match="dtype must be one of fp32, bf16, fp16, got 'int8'"):
        shape.bytes("int8")


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"lr": 1, "learning": 2}, "unknown field learning; allowed: tokens"),
        ({"seeds": 1}, "unknown field seeds; did you mean seed? allowed: tokens"),
        ({"lr": "fast"}, "TrainConfig.lr must be a number, got 'fast'"),
        ({"betas": [0.9]}, "TrainConfig: betas.1 is missing"),
        ({"dtype": "fp64"}, "TrainConfig.dtype must be 'fp32' or 'bf16', got 'fp64'"),
        ({"seed": True}, "TrainConfig.seed must be a whole number, got True"),
        ({"lr": -1}, "train: lr must be positive"),
        ([], "TrainConfig must be an object, got []"),
    ],
)
def test_bad_json_is_one_line(data, part):
    without_lines(lambda: from_json(TrainConfig, data), part)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "4e6", 4_000_000), (int, "1_000", 1000), (float, "4e6", 4e6), (float | None, "none", None),
        (bool, "no", False), (bool, "1", True), (bool, "yes", True), (str, "None", "None"),
        (list[int], "3", [3]), (list[int], "1, 2", [1, 2]), (list[str], '["a,b"]', ["a,b"]),
        (tuple[float, float], "[0.9, 1]", (0.9, 1.0)), (dict[str, Any], '{"A_b": "C"}', {"A_b": "C"}),
        (int, "true", None), (int, "1.5", None), (float, "inf", None), (float, "half", None), (bool, "2", None),
        (list[int], "[true]", None), (dict[str, Any], "[]", None),
    ],
)  # fmt: skip
def test_a_text_is_read_as_the_declared_type(kind, text, value):
    if value is None and kind != float | None:
        with pytest.raises(ValueError, match=r"^p(\.0)? must be [^\n]*, got"):
            from_text(kind, text, "p")
    else:
        found = from_text(kind, text, "p")
        assert found == value and type(found) is type(value)
