"""Cached generation equals the full forward pass, and nobody's output depends on the neighbours."""

from dataclasses import replace

import pytest
import torch
from moelab.kernels import packed
from torch.utils._python_dispatch import TorchDispatchMode

from moelab.config import DecoderConfig, RoutingConfig
from moelab.inference import Generator, Sampling, frozen, set_mode

WHY_NOT = packed.why_not(torch.float32)
compiled = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
COMPILED = pytest.param("compiled", marks=compiled)
GREEDY = Sampling(max_new_tokens=8, temperature=0)


class Recorder(Generator):
    """Keeps the logits behind every token."""

    def _take(self, sequences, logits_BV, sampling):
        self.logits = getattr(self, "logits", {})
        for sequence, row in zip(sequences, logits_BV, strict=True):
            self.logits[sequence.index, len(sequence.tokens)] = row.clone()
        return super()._take(sequences, logits_BV, sampling)


def by_full_forward(model, prompt, count):
    """Greedy tokens and their logits without a cache: everything anew for each token."""
    tokens, logits = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            logits.append(model(torch.tensor([tokens])).logits_BTV[0, -1])
            tokens.append(int(logits[-1].argmax()))
    return tuple(tokens[len(prompt) :]), logits


@pytest.mark.parametrize("mode", ["baseline", "invariant", "optimised", COMPILED])
def test_cached_decoding_equals_the_full_forward_pass(kind, prompts, mode, make):
    generator = Recorder(set_mode(make(kind), mode), batch=4)
    found = generator.generate(prompts, GREEDY)
    reference = make(kind)
    for i, prompt in enumerate(prompts):
        tokens, logits = by_full_forward(reference, prompt, 8)
        assert found[i].tokens == tokens
        for n, expected in enumerate(logits):
            torch.testing.assert_close(generator.logits[i, n], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["optimised", COMPILED])
def test_static_decoding_equals_the_full_forward_pass(kind, prompts, mode, make):
    found = Generator(set_mode(make(kind), mode), batch=3, static=True).generate(prompts, GREEDY)
    reference = make(kind)
    assert [c.tokens for c in found] == [by_full_forward(reference, p, 8)[0] for p in prompts]


@pytest.mark.parametrize("mode", ["invariant", COMPILED])
def test_the_batch_changes_no_bit_of_a_sequence(kind, prompts, mode, make):
    """On CPU, frozen: a row's products have the same bits in any company, attention and draws are per sequence."""
    assert_same_bits(kind, prompts, make, mode)


@compiled
@pytest.mark.parametrize("hidden", [24, 96])
def test_compiled_or_by_libraries_the_batch_changes_no_bit(hidden, kinds, prompts, make):
    """Of widths and heads that our code does not take."""
    assert_same_bits(replace(kinds["PR-MoE"], hidden=hidden), prompts, make, "compiled")
    gated = DecoderConfig(positions="rotary", norm="rms", feed_forward="swiglu", ffn=40, kv_heads=1, qk_norm="head")
    assert_same_bits(replace(kinds["top-2"], hidden=hidden, decoder=gated), prompts, make, "compiled")


@pytest.mark.parametrize("pack_from", [0, 1 << 40], ids=["all packed", "none packed"])
@pytest.mark.parametrize("hidden", [32, 192])
def test_packed_or_not_the_batch_changes_no_bit(pack_from, hidden, kinds, prompts, make, monkeypatch):
    monkeypatch.setattr(frozen, "PACK_FROM", pack_from)
    assert_same_bits(replace(kinds["PR-MoE"], hidden=hidden), prompts, make)


@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
@pytest.mark.parametrize("ffn", [24, 40, 100])
def test_feed_forwards_that_are_no_whole_vectors_change_no_bit(ffn, feed_forward, kinds, prompts, make):
    decoder = DecoderConfig(feed_forward=feed_forward, ffn=ffn)
    assert_same_bits(replace(kinds["MoE"], decoder=decoder), prompts, make)


def assert_same_bits(kind, prompts, make, mode="invariant"):
    sampling = Sampling(max_new_tokens=6, temperature=0.8, top_k=40, top_p=0.95, seed=3)
    model = set_mode(make(kind), mode)
    together = Recorder(model, batch=7)
    found = together.generate(prompts, sampling)
    few = Recorder(model, batch=2)
    assert few.generate(prompts, sampling) == found
    backwards = Recorder(model, batch=4)
    assert [backwards.generate(prompts[5::-1], sampling)[5 - i] for i in range(6)] == found[:6]
    assert together.logits.keys() == few.logits.keys()
    assert all(torch.equal(together.logits[key], few.logits[key]) for key in together.logits)
    alone = Recorder(model, batch=1)
    assert alone.generate(prompts[:1], sampling) == found[:1]
    assert all(torch.equal(alone.logits[0, n], together.logits[0, n]) for n in range(6))


@pytest.mark.parametrize(("mode", "static"), [("baseline", False), ("baseline", True), ("optimised", False)])
def test_in_other_modes_the_batch_changes_no_token(kind, prompts, mode, static, make):
    """Plain products choose their kernel by the number of rows: the last bits differ, the tokens do not."""
    model = set_mode(make(kind), mode)
    sampling = Sampling(max_new_tokens=6, temperature=0.8, seed=3)
    assert Generator(model, batch=2, static=static).generate(prompts, sampling) == Generator(model, batch=7).generate(
        prompts, sampling
    )


def test_equal_prompts_draw_differently_and_seeds_matter(prompts, kinds, make):
    generator = Generator(set_mode(make(kinds["dense"])), batch=8)
    sampling = Sampling(max_new_tokens=12, temperature=1.5)
    found = generator.generate(prompts, sampling)
    assert prompts[2] == prompts[6] and found[2] != found[6]
    assert generator.generate(prompts, sampling) == found
    assert generator.generate(prompts, Sampling(max_new_tokens=12, temperature=1.5, seed=1)) != found
    longer = generator.generate(prompts, Sampling(max_new_tokens=15, temperature=1.5))
    assert [c.tokens[:12] for c in longer] == [c.tokens for c in found]


@pytest.mark.parametrize("static", [False, True])
def test_stop_conditions(prompts, static, kinds, make):
    model = set_mode(make(kinds["MoE"]))
    generator = Generator(model, batch=3, static=static)
    free = generator.generate(prompts, GREEDY)
    assert all(c.finish == "length" and len(c.tokens) == 8 for c in free)
    stop = free[0].tokens[3]
    stopped = generator.generate(prompts, Sampling(max_new_tokens=8, temperature=0, stop_tokens=(stop,)))
    for before, now in zip(free, stopped, strict=True):
        if stop in before.tokens:
            assert now.finish == "stop" and now.tokens == before.tokens[: before.tokens.index(stop) + 1]
        else:
            assert now == before
    full = generator.generate(prompts, Sampling(max_new_tokens=1000, temperature=0))
    assert all(c.finish == "context" and len(p) + len(c.tokens) == 48 for p, c in zip(prompts, full, strict=True))
    assert [c.tokens[:8] for c in full] == [c.tokens for c in free]


def test_streaming_gives_the_same_tokens_as_they_come(prompts, kinds, make):
    generator = Generator(set_mode(make(kinds["PR-MoE"])), batch=3)
    seen = {}
    pieces = []
    found = generator.generate(prompts, GREEDY, on_piece=pieces.append)
    for piece in pieces:
        assert not any(p.finish for p in seen.get(piece.prompt, [])), "nothing follows the last token"
        seen.setdefault(piece.prompt, []).append(piece)
    assert [tuple(p.token for p in seen[i]) for i in range(len(prompts))] == [c.tokens for c in found]
    first = next(iter(generator.stream(prompts, GREEDY)))
    assert first.token == found[first.prompt].tokens[0]
    assert generator.generate(prompts, GREEDY) == found, "a stream that was left half-way leaves nothing behind"


def test_a_stream_ends_when_a_later_one_begins(prompts, kinds, make):
    """Both would write into one cache."""
    generator = Generator(set_mode(make(kinds["MoE"])), batch=2)
    expected = generator.generate(prompts[:2], GREEDY)
    older, newer = generator.stream(prompts, GREEDY), generator.stream(prompts[:2], GREEDY)
    next(older)
    next(older)
    pieces = [next(newer)]
    with pytest.raises(RuntimeError, match="ended when a later one of the same generator began"):
        next(older)
    pieces += newer
    assert [tuple(p.token for p in pieces if p.prompt == i) for i in range(2)] == [c.tokens for c in expected]


@pytest.mark.parametrize("static", [False, True])
def test_more_tokens_than_the_context_holds_cost_nothing(static, prompts, kinds, make):
    generator = Generator(set_mode(make(kinds["dense"])), batch=3, static=static)
    found = [generator.generate(prompts, Sampling(max_new_tokens=n, temperature=0.9)) for n in (48, 10**15)]
    assert found[0] == found[1] and all(c.finish == "context" for c in found[1])


def test_capacity_on_request(prompts, kinds, make):
    """With drops, a capacity of few slots changes outputs; drop-free is the default whatever the model was trained with."""
    tight = replace(kinds["MoE"], routing=RoutingConfig(capacity_factor_eval=0.1, min_capacity=1))
    free = Generator(set_mode(make(kinds["MoE"])), batch=7).generate(prompts, GREEDY)
    assert Generator(set_mode(make(tight)), batch=7).generate(prompts, GREEDY) == free
    assert Generator(set_mode(make(tight), drop_free=False), batch=7).generate(prompts, GREEDY) != free


class NoAnswers(TorchDispatchMode):
    """Refuses operations that hand a tensor's values to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=8, top_k=9, top_p=0.9)])
def test_a_static_step_never_asks_the_device(kinds, make, prompts, sampling):
    """Dense: on CPU the MoE kernels may ask. Those of CUDA may not either, or the capture in the test below fails."""
    generator = Generator(set_mode(make(kinds["dense"])), batch=3, static=True)
    generator.generate(prompts, sampling)
    step = generator._step
    state = (step.tokens_B1, step.positions_B, step.count_B1, generator.cache.keys)
    addresses = [t.data_ptr() for t in state]
    with NoAnswers():
        step.compute()
    assert addresses == [t.data_ptr() for t in state], "a graph finds its state where it was captured"
    with pytest.raises(AssertionError), NoAnswers():
        step.tokens_B1.sum().item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: steps are captured in a graph")
def test_graphs_give_the_tokens_of_eager_steps(kind, prompts, make):
    model = set_mode(make(kind).cuda())
    captured = Generator(model, batch=3)
    assert captured.static
    assert captured.generate(prompts, GREEDY) == Generator(model, batch=3, static=False).generate(prompts, GREEDY)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 is empty"),
        ([1] * 48, "prompt 1 has 48 tokens, allowed are at most 47"),
        ([3, 320], "prompt 1 has token 320, allowed are 0 to 319"),
        ([-1], "prompt 1 has token -1"),
    ],
)
def test_bad_prompts(prompt, message, kinds, make):
    generator = Generator(make(kinds["dense"]), batch=2)
    with pytest.raises(ValueError, match=message):
        generator.stream([[1], prompt])


def test_compiled_says_in_a_line_why_it_does_not_work(kinds, make, monkeypatch):
    model = make(kinds["dense"])
    monkeypatch.setattr("moelab.inference.modes.why_not_compiled", lambda weight: None)
    monkeypatch.setattr(
        "moelab.kernels.load_compiled", lambda: (_ for _ in ()).throw(RuntimeError("compiling failed: x"))
    )
    with pytest.raises(ValueError, match=r"^inference: mode 'compiled': compiling failed: x; 'optimised' works"):
        set_mode(model, "compiled")
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    with pytest.raises(ValueError, match=r"^inference: mode 'compiled' does not work here: there is no C.. compiler"):
        set_mode(model, "compiled")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    with pytest.raises(ValueError, match="does not work here: the processor has no AVX-512; 'optimised' works"):
        set_mode(model, "compiled")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="does not work here: the processor has no AVX512_BF16"):
        set_mode(model.bfloat16(), "compiled")
    set_mode(model)  # nothing was changed


def test_bad_settings(kinds, make):
    model = make(kinds["dense"])
    with pytest.raises(ValueError, match="batch must be at least 1"):
        Generator(model, batch=0)
    with pytest.raises(ValueError, match="length must be at most the model's context of 48, got 49"):
        Generator(model, length=49)
    with pytest.raises(ValueError, match="mode must be 'optimised', 'compiled', 'invariant' or 'baseline', got 'fast'"):
        set_mode(model, "fast")
    with pytest.raises(ValueError, match=r"'invariant' needs a CPU whose oneDNN .* got torch.float16 on cpu"):
        set_mode(make(kinds["dense"]).half(), "invariant")
    assert Generator(model).generate([]) == []


@pytest.mark.parametrize("mode", ["optimised", "invariant"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_model_has_its_loss_with_and_without_gradients_on(mode, tied, kinds, make):
    kind = replace(kinds["MoE"], decoder=DecoderConfig(tied=tied))
    tokens = torch.randint(320, (3, 21), generator=torch.Generator().manual_seed(0))
    inputs = {"tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:]}
    plain, model = make(kind), set_mode(make(kind), mode)

    def further(logits_NV, first, past):
        return logits_NV.logsumexp(1).sum(), torch.zeros_like(logits_NV)

    for options in ({}, {"reduction": "sum"}, {"further": further}):
        with torch.no_grad():
            expected = plain(**inputs, **options)
        found = model(**inputs, **options)
        assert not found.loss.requires_grad
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.further, expected.further)
    assert not any(p.requires_grad for p in model.parameters())
    assert tied or not hasattr(model, "output_weight"), "nobody takes the embedding for the head"


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=3)], ids=["greedy", "all", "top-k"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused_in_one_line(value, sampling, kinds, make):
    model = make(kinds["dense"])
    with torch.no_grad():
        model.token_embedding.weight[17] = value
    generator = Generator(set_mode(model), batch=2)
    with pytest.raises(ValueError, match=r"^generate: prompt 0: the model's logits .* are NaN or infinite$"):
        generator.generate([[17, 2], [3]], sampling)


@pytest.mark.parametrize("again", ["optimised", "invariant", "baseline"])
def test_a_frozen_model_is_not_switched_again(again, kinds, make):
    model = set_mode(make(kinds["MoE"]), "optimised")
    with pytest.raises(ValueError, match=rf"^inference: mode '{again}' needs .*; build or load it again$"):
        set_mode(model, again)
    set_mode(set_mode(make(kinds["MoE"]), "baseline"), again)
