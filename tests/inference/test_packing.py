"""Packed weights: the results of the plain ones, and the same bits in any batch."""

from dataclasses import replace

import pytest
import torch
from moelab.kernels import ACTIVATIONS, _cpp, gate

from moelab.config import DecoderConfig, ExpertConfig, ModelConfig, RoutingConfig
from moelab.engine.checkpoint import hf
from moelab.inference import Generator, Sampling, generate, packing, set_mode
from moelab.inference.packing import can_pack
from moelab.models.baseline import mask_gate
from moelab.models.moe import MoE

pytestmark = pytest.mark.skipif(not _cpp.available(), reason="needs the C++ kernels")

FREE = RoutingConfig(drop_tokens=False)
BASE = ModelConfig(2, 48, 3, vocab=131, context=64, experts=(0, 5), init_std=0.3, routing=FREE)
MODERN = replace(BASE, top_k=2, decoder=DecoderConfig.modern(ffn=40))
LAYERS = {
    "top-1": BASE,
    "top-3, not normalised": replace(BASE, top_k=3, routing=replace(FREE, normalize_weights=False)),
    "residual": replace(BASE, experts=(3, 5), residual=True),
    "residual, sum": replace(BASE, residual=True, residual_mix="sum"),
    "sigmoid, bias": replace(BASE, top_k=2, routing=replace(FREE, scores="sigmoid", balance_rate=0.01)),
    "softmax, bias": replace(BASE, routing=replace(FREE, balance_rate=0.01)),
    "gated, no width a vector": replace(BASE, decoder=DecoderConfig(feed_forward="swiglu", ffn=25)),
    "OLMoE": replace(MODERN, decoder=DecoderConfig.modern(qk_norm="all", ffn=100)),
    "Qwen3-MoE": replace(MODERN, decoder=DecoderConfig.modern(kv_heads=1, qk_norm="head", ffn=40)),
    "Qwen2-MoE": replace(MODERN, expert=ExpertConfig(ffn=24, shared=1, shared_gate=True)),
    "DeepSeekMoE": replace(MODERN, expert=ExpertConfig(ffn=24, shared=2)),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06}
kinds = pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


@pytest.fixture
def packed(make):
    """`packed(config, dtype)`: a model whose weights are packed, and the same one with plain weights."""

    def build(config, dtype=torch.float32):
        model = set_mode(make(config).to(dtype))
        assert model.packed is not None
        return model, make(config).to(dtype)

    return build


def relative(found, expected):
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@torch.inference_mode()
@kinds
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (2, 9)])
def test_a_layer_equals_the_plain_one_and_a_token_has_the_same_bits_alone(kind, dtype, shape, packed):
    quick, plain = ((model.blocks[-1].ffn) for model in packed(kind, dtype))
    x, add = torch.randn(2, *shape, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, routing = plain(x)
    y, found = quick(x)
    assert found.aux_loss is None and routing.aux_loss is not None, "nobody reads the losses"
    same = (found.expert_SK == routing.expert_SK).all(1).view(shape)  # bf16 rounds logits, too
    assert same.all() or dtype == torch.bfloat16
    assert relative(y[same], expected[same]) < TOLERANCE[dtype]
    total, _ = quick(x, add)
    assert relative(total[same], (expected + add)[same]) < TOLERANCE[dtype]
    x, total, add = (t.flatten(0, 1)[:, None] for t in (x, total, add))
    for i in range(len(x)):
        assert torch.equal(quick(x[i : i + 1], add[i : i + 1])[0], total[i : i + 1])


@torch.inference_mode()
@kinds
@dtypes
@pytest.mark.parametrize("count", [1, 3])
def test_a_sequence_has_the_same_bits_among_so_many_that_threads_share_them(kind, dtype, count, packed, threads):
    model, plain = packed(kind, dtype)
    left = {name for name, _ in model.named_parameters()}
    assert left < {name for name, _ in plain.named_parameters()}, "packed weights replace the parameters"
    assert all("embedding" in name or "norm" in name or "bias" in name for name in left)
    tokens = torch.randint(131, (41, 64), generator=torch.Generator().manual_seed(0))
    threads(1)
    alone = {i: model(tokens[i : i + 1]).logits_BTV[0] for i in range(0, 41, 8)}
    assert dtype == torch.bfloat16 or relative(alone[8], plain(tokens[8:9]).logits_BTV[0]) < 1e-4
    threads(count)
    together = model(tokens).logits_BTV
    assert all(torch.equal(logits, together[i]) for i, logits in alone.items())


@pytest.mark.slow
@kinds
@dtypes
def test_generation_has_the_same_bits_in_any_batch(kind, dtype, packed, threads, monkeypatch, recorder):
    """Batches of 1 and 7, prompts in one forward pass and in several, another order, one thread and two."""
    sampling = Sampling(max_new_tokens=6, temperature=0.8, top_k=40, top_p=0.95, seed=3)
    draws = torch.Generator().manual_seed(5)
    prompts = [torch.randint(131, (n,), generator=draws).tolist() for n in (7, 1, 19, 12, 7, 30, 3)]
    model, _ = packed(kind, dtype)
    threads(1)
    together = recorder(model, batch=7)
    found = together.generate(prompts, sampling)
    monkeypatch.setattr(generate, "_PREFILL_TOKENS", 20)
    for count, batch in ((1, 1), (2, 2), (1, 7)):
        threads(count)
        other = recorder(model, batch=batch)
        assert other.generate(prompts, sampling) == found
        assert other.logits.keys() == together.logits.keys()
        assert all(torch.equal(other.logits[key], together.logits[key]) for key in other.logits)
    backwards = Generator(model, batch=4).generate(prompts[::-1], sampling)
    assert backwards[::-1] == found


@torch.inference_mode()
def test_tokens_that_cannot_be_routed_no_tokens_and_drops(packed, make):
    layer = packed(BASE)[0].blocks[-1].ffn
    x = torch.randn(1, 4, 48)
    x[0, 2] = torch.nan
    y, routing = layer(x)
    assert routing.slot_SK[2, 0] == -1 and y[0, [0, 1, 3]].isfinite().all()
    assert layer(torch.zeros(0, 1, 48))[0].shape == (0, 1, 48)
    tight = replace(BASE, routing=RoutingConfig(capacity_factor_eval=0.1, min_capacity=1))
    same = torch.randn(1, 1, 48).expand(1, 9, 48)  # all to one expert
    plain, dropping = make(tight), set_mode(make(tight), drop_free=False)
    expected, found = (model.blocks[-1].ffn(same) for model in (plain, dropping))
    assert (found[1].slot_SK < 0).any() and torch.equal(found[1].slot_SK, expected[1].slot_SK)
    torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_with_and_without_gradients_on(tied, packed):
    model, plain = packed(replace(BASE, decoder=DecoderConfig(tied=tied)))
    tokens = torch.randint(131, (3, 21), generator=torch.Generator().manual_seed(0))
    inputs = {"tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:]}
    for options in ({}, {"reduction": "none"}):
        with torch.no_grad():
            expected = plain(**inputs, **options)
        found = model(**inputs, **options)
        assert not found.loss.requires_grad
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.soft_loss, expected.soft_loss)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("again", ["optimised", "baseline"])
def test_a_packed_model_is_not_switched_again(again, packed, make):
    with pytest.raises(ValueError, match=rf"^inference: mode '{again}' needs .*; build or load it again$"):
        set_mode(packed(BASE)[0], again)
    model = set_mode(set_mode(make(BASE), "baseline"), again)  # not packed before
    gates = {block.ffn.router.gate for block in model.blocks if isinstance(block.ffn, MoE)}
    assert gates == {gate if again == "optimised" else mask_gate}
    tokens = torch.arange(9)[None]
    torch.testing.assert_close(model(tokens).logits_BTV, set_mode(make(BASE), again)(tokens).logits_BTV)


def test_a_packed_model_is_not_exported_without_its_weights(packed, tmp_path):
    quick, plain = packed(BASE)
    with pytest.raises(ValueError, match=r"^export: weights of this model are packed for inference"):
        hf.export(quick, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hf.export(plain, tmp_path / "out")


@torch.inference_mode()
@pytest.mark.parametrize("what", ["width", "width of heads", "dtype", "activation", "machine"])
def test_what_cannot_be_packed_stays_as_it_is(what, make, monkeypatch):
    """An activation without a number is not in the C++; without a compiler there is none."""
    wide = replace(BASE, hidden=24) if what == "width" else BASE
    config = replace(wide, decoder=DecoderConfig.modern(head_size=8)) if what == "width of heads" else wide
    model = make(config).half() if what == "dtype" else make(config)
    if what == "activation":
        unknown = replace(ACTIVATIONS["gelu_tanh"], number=None)
        monkeypatch.setitem(ACTIVATIONS, "gelu_tanh", unknown)
    with _cpp.limited("none" if what == "machine" else ""):
        assert not can_pack(model) and set_mode(model).packed is None
        x = torch.randn(2, 3, config.hidden).to(model.token_embedding.weight.dtype)
        assert model.blocks[-1](x)[0].isfinite().all()


def test_a_model_is_packed_layer_by_layer(make, monkeypatch):
    """When a layer is packed, the parameters of those before it are gone."""
    model, left = make(replace(BASE, layers=4, experts=(5,) * 4)), []
    pack_experts = packing._pack_experts

    def counted(experts):
        left.append(len(list(model.parameters())))
        return pack_experts(experts)

    monkeypatch.setattr(packing, "_pack_experts", counted)
    packing.pack(model)
    assert len(left) == 4 and left == sorted(set(left), reverse=True)
