"""Packed weights: one C++ call gives the plain modules' results, and a sequence the same bits in any batch."""

import statistics
from dataclasses import replace

import pytest
import torch
from moelab.kernels import ACTIVATIONS, _cpp, gate
from moelab.kernels.decode import PARTS, Sequences

from moelab.config import DecoderConfig, ExpertConfig, ModelConfig, RoutingConfig
from moelab.engine.checkpoint import hf
from moelab.inference import Generator, Sampling, generate, packing, set_mode
from moelab.inference.cache import KVCache
from moelab.inference.packing import Packed, why_not
from moelab.models.baseline import mask_gate
from moelab.models.moe import MoE

COMPILES = pytest.mark.skipif(_cpp.why_not() is not None, reason=str(_cpp.why_not()))
pytestmark = COMPILES

FREE = RoutingConfig(drop_tokens=False)
BASE = ModelConfig(2, 48, 3, vocab=131, context=64, experts=(0, 5), init_std=0.3, routing=FREE)
MODERN = replace(BASE, top_k=2, decoder=DecoderConfig.modern(ffn=40))
MODELS = {
    "dense": replace(BASE, experts=(0, 0)),
    "top-1": BASE,
    "top-3, not normalised": replace(BASE, top_k=3, routing=replace(FREE, normalize_weights=False)),
    "residual": replace(BASE, experts=(3, 5), residual=True),
    "residual, sum": replace(BASE, residual=True, residual_mix="sum"),
    "sigmoid": replace(BASE, top_k=2, routing=replace(FREE, scores="sigmoid", normalize_weights=False)),
    "sigmoid, bias": replace(BASE, top_k=2, routing=replace(FREE, scores="sigmoid", balance_rate=0.01)),
    "softmax, bias": replace(BASE, routing=replace(FREE, balance_rate=0.01)),
    "gated, no width a vector": replace(BASE, decoder=DecoderConfig(feed_forward="swiglu", ffn=25)),
    "smeared keys": replace(BASE, decoder=DecoderConfig(smeared_keys=True)),
    "OLMoE": replace(MODERN, decoder=DecoderConfig.modern(qk_norm="all", ffn=100)),
    "Qwen3-MoE": replace(MODERN, decoder=DecoderConfig.modern(kv_heads=1, qk_norm="head", ffn=40, rotary_base=1e6)),
    "Qwen2-MoE": replace(
        MODERN,
        decoder=DecoderConfig.modern(ffn=40, biases="qkv", tied=True),
        expert=ExpertConfig(ffn=24, shared=1, shared_gate=True),
    ),
    "DeepSeekMoE, smeared, wide heads": replace(
        MODERN,
        decoder=DecoderConfig.modern(ffn=40, head_size=80, kv_heads=3, smeared_keys=True),
        expert=ExpertConfig(ffn=24, shared=2),
    ),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06}
models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)
on_each = pytest.mark.parametrize("instructions", _cpp.supported())
LENGTHS = 23, 1, 17, 40


def draw(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(131, (n,), generator=generator).tolist() for n in lengths]


def relative(found, expected):
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


class Run:
    """Feeds sequences to a model's packed weights: prompts, then some tokens one by one."""

    def __init__(self, model, texts, steps=3):
        self.cache = KVCache(model, len(texts), 64, model.token_embedding.weight.dtype, "cpu")
        packed, rows = Packed(model), range(len(texts))
        found = [packed.prefill(self.cache, rows, [text[: len(text) - steps] for text in texts])]
        for i in range(steps):
            at = [len(text) - steps + i for text in texts]
            found.append(packed.step(self.cache, [text[n] for text, n in zip(texts, at, strict=True)], at))
        self.logits, self.likeliest = (torch.stack(parts, 1) for parts in zip(*found, strict=True))


@torch.inference_mode()
@models
@dtypes
@on_each
def test_prompts_and_steps_equal_the_plain_modules(config, dtype, instructions, make):
    """In bf16 a near tie may choose another expert, which changes some rows: the median row is compared."""
    model, texts = set_mode(make(config).to(dtype)), draw(*(n + 3 for n in LENGTHS))
    with _cpp.limited(instructions):
        assert why_not(model) is None
        run = Run(model, texts)
    found = run.logits
    expected = torch.stack([model(torch.tensor([text])).logits_BTV[0, -4:] for text in texts])
    assert found.dtype == expected.dtype == dtype
    errors = [relative(*rows) for rows in zip(found.flatten(0, 1), expected.flatten(0, 1), strict=True)]
    error = statistics.median(errors) if dtype == torch.bfloat16 else max(errors)
    assert error < TOLERANCE[dtype]
    assert torch.equal(run.likeliest, found.argmax(2))


@torch.inference_mode()
@models
@dtypes
@on_each
def test_a_sequence_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(
    config, dtype, instructions, make, threads
):
    model, texts = set_mode(make(config).to(dtype)), draw(*(n + 3 for n in LENGTHS * 5))
    with _cpp.limited(instructions):
        threads(1)
        alone = {i: Run(model, [texts[i]]) for i in (0, 1, 7)}
        for count in (1, 2, 3):
            threads(count)
            together = Run(model, texts)
            for i, run in alone.items():
                assert torch.equal(run.logits[0], together.logits[i])
                n = len(texts[i])
                assert torch.equal(run.cache.keys[:, 0, :, :n], together.cache.keys[:, i, :, :n])
                assert torch.equal(run.cache.values[:, 0, :, :n], together.cache.values[:, i, :, :n])


@pytest.mark.slow
@models
@dtypes
def test_generation_has_the_same_bits_in_any_batch(config, dtype, make, threads, monkeypatch, recorder):
    """Batches of 1 and 7, prompts in one forward pass and in several, another order, one thread and two."""
    sampling = Sampling(max_new_tokens=6, temperature=0.8, top_k=40, top_p=0.95, seed=3)
    prompts = draw(7, 1, 19, 12, 7, 30, 3, seed=5)
    model = set_mode(make(config).to(dtype))
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
def test_a_token_that_cannot_be_routed_leaves_other_sequences_alone(make):
    model, texts = set_mode(make(replace(BASE, decoder=DecoderConfig(tied=False)))), [[7] * 9, [3] * 12]
    expected = Run(model, [texts[1]]).logits[0]
    model.token_embedding.weight.data[7] = torch.nan
    run = Run(model, texts)
    assert run.logits[0].isnan().all() and torch.equal(run.logits[1], expected)
    assert (run.likeliest[0] == -1).all() and (run.likeliest[1] >= 0).all()


@torch.inference_mode()
@dtypes
@on_each
def test_of_equal_logits_the_lowest_token_is_likeliest_and_infinite_ones_have_none(dtype, instructions, make):
    model = set_mode(make(replace(BASE, decoder=DecoderConfig(tied=False))).to(dtype))
    with _cpp.limited(instructions):
        for logits, expected in (({}, 0), ({130: 1, 129: 1, 5: -1}, 129), ({130: 1e38}, -1)):
            model.norm.weight.data.zero_()
            model.norm.bias.data.fill_(10.0)
            model.output.weight.data.zero_()
            for token, value in logits.items():
                model.output.weight.data[token] = value
            assert (Run(model, [[7] * 9]).likeliest == expected).all()


@torch.inference_mode()
def test_what_the_call_refuses(make):
    model = set_mode(make(BASE))
    packed, cache = Packed(model), KVCache(model, 2, 8, torch.float32, "cpu")
    for given, message in (
        (([131], Sequences([0], [0], [1])), "decode: token 131 of 131"),
        (([-1], Sequences([0], [0], [1])), "decode: token -1 of 131"),
        (([1], Sequences([2], [0], [1])), "decode: slot 2 of 2"),
        (([1], Sequences([0], [8], [1])), "decode: a sequence would have 9 tokens, the cache has room for 8"),
        (([1], Sequences([0], [0], [2])), "decode: 1 tokens for sequences of 2"),
        (([1], Sequences([0, 1], [0], [1])), "decode: weights, cache and sequences do not fit 2 layers"),
    ):
        with pytest.raises(RuntimeError) as error:
            packed(cache, *given)
        assert str(error.value).startswith(message)
    with pytest.raises(RuntimeError, match="the cache must be contiguous and of the weights' dtype"):
        packed(KVCache(model, 2, 8, torch.bfloat16, "cpu"), [1], Sequences([0], [0], [1]))


def test_the_call_books_its_parts_and_counts_experts(make):
    generator = Generator(set_mode(make(replace(BASE, experts=(4, 5), residual=True))), batch=2)
    seconds = generator.packed.time()
    generator.generate(draw(9, 9), Sampling(max_new_tokens=4, temperature=0))
    parts = dict(zip(PARTS, seconds.tolist(), strict=False))
    assert len(parts) == 6 and all(spent > 0 for spent in parts.values())
    distinct, layers = seconds[len(PARTS) :].tolist()
    assert layers == 2 * 4 and 2 * 4 <= distinct <= 9 * 4


def test_the_baseline_of_a_dense_model_is_its_own_modules(make):
    model = make(MODELS["dense"])
    assert why_not(set_mode(model, "baseline")) == "it is in baseline mode" and why_not(set_mode(model)) is None


@pytest.mark.parametrize("again", ["optimised", "baseline"])
def test_a_model_is_switched_again_and_evaluates_after_it_has_generated(again, make):
    model = set_mode(make(BASE))
    before = model(torch.arange(9)[None]).logits_BTV
    Generator(model, batch=1).generate(draw(5), Sampling(max_new_tokens=2))
    assert torch.equal(model(torch.arange(9)[None]).logits_BTV, before)
    set_mode(model, again)
    gates = {block.ffn.router.gate for block in model.blocks if isinstance(block.ffn, MoE)}
    assert gates == {gate if again == "optimised" else mask_gate}
    assert (Generator(model).packed is not None) == (again == "optimised")


def test_released_weights_are_freed_layer_by_layer_and_not_exported(make, monkeypatch, tmp_path):
    model, left = set_mode(make(replace(BASE, layers=4, experts=(5,) * 4, decoder=DecoderConfig(tied=False)))), []
    pack_experts = packing._pack_experts

    def counted(experts):
        left.append(sum(p.numel() for p in model.parameters()))
        return pack_experts(experts)

    kept = Generator(model, batch=1).generate(draw(5), Sampling(max_new_tokens=4))
    monkeypatch.setattr(packing, "_pack_experts", counted)
    generator = Generator(model, batch=1, release=True)
    assert len(left) == 4 and left == sorted(set(left), reverse=True)
    assert generator.generate(draw(5), Sampling(max_new_tokens=4)) == kept
    with pytest.raises(ValueError, match=r"^export: weights of this model are released to a generator"):
        hf.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.inference_mode()
@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("width", "its width of 24 and heads of 16 are not multiples of 16"),
        ("width of heads", "its width of 48 and heads of 8 are not multiples of 16"),
        ("dtype", "its dtype is torch.float64"),
        ("activation", "the C++ lacks its activation gelu_tanh"),
        ("drops", "its experts drop tokens"),
        ("machine", "there are no CPU kernels"),
    ],
)
def test_what_cannot_be_packed_generates_with_its_modules_and_says_why(what, why, make, monkeypatch):
    """An activation without a number is not in the C++; without a compiler there is none."""
    wide = replace(BASE, hidden=24, decoder=DecoderConfig.modern(head_size=16)) if what == "width" else BASE
    config = replace(wide, decoder=DecoderConfig.modern(head_size=8)) if what == "width of heads" else wide
    config = replace(config, routing=RoutingConfig()) if what == "drops" else config
    model = make(config).double() if what == "dtype" else make(config)
    if what == "activation":
        unknown = replace(ACTIVATIONS["gelu_tanh"], number=None)
        monkeypatch.setitem(ACTIVATIONS, "gelu_tanh", unknown)
    with _cpp.limited("none" if what == "machine" else ""):
        generator = Generator(set_mode(model, drop_free=what != "drops"), batch=1)
        assert generator.packed is None and generator.why_plain.startswith(why)
        assert len(generator.generate(draw(5), Sampling(max_new_tokens=2))[0].tokens) == 2
