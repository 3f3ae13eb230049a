"""Cached generation equals the full forward pass, and nobody's output depends on the neighbours."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from moelab.kernels import _cpp

from moelab.config import RoutingConfig
from moelab.inference import Generator, Sampling, set_mode
from tests.models.test_dispatch import NoAnswers

GREEDY = Sampling(max_new_tokens=8, temperature=0)
SEVERAL = SimpleNamespace(world=SimpleNamespace(size=2))  # what a generator reads of a mesh before it sends anything


@pytest.mark.parametrize(("mode", "instructions"), [("baseline", ""), ("optimised", ""), ("optimised", "none")])
def test_cached_decoding_equals_the_full_forward_pass(kind, prompts, mode, instructions, make, recorder):
    """Also without C++, where nothing is packed."""
    with _cpp.limited(instructions):
        generator = recorder(set_mode(make(kind), mode), batch=4)
        assert (generator.packed is not None) == (mode == "optimised" and _cpp.available())
        found = generator.generate(prompts, GREEDY)
        static = Generator(generator.model, batch=3, static=True).generate(prompts, GREEDY)
    reference = make(kind)
    for i, prompt in enumerate(prompts):
        tokens = found[i].tokens
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *tokens[:-1]]])).logits_BTV[0, len(prompt) - 1 :]
        assert static[i].tokens == tokens == tuple(logits.argmax(1).tolist())
        recorded = torch.stack([generator.logits[i, n] for n in range(8)])
        torch.testing.assert_close(recorded, logits, rtol=1e-4, atol=1e-4)


def test_without_packed_weights_the_batch_changes_no_token(kind, prompts, make):
    """Plain products choose their kernel by the number of rows: the last bits differ, the tokens do not."""
    model, sampling = set_mode(make(kind), "baseline"), Sampling(max_new_tokens=6, temperature=0.8, seed=3)
    generators = [Generator(model, batch=7), Generator(model, batch=2), Generator(model, batch=2, static=True)]
    whole, *others = (generator.generate(prompts, sampling) for generator in generators)
    assert others == [whole, whole]


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
    seen, pieces = {}, []
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


@pytest.mark.parametrize("static", [False, True])
def test_the_cache_is_as_long_as_its_sequences_need(static, prompts, kinds, make):
    """A published model's context may be a million tokens."""
    model = set_mode(make(kinds["dense"]))
    generator = Generator(model, batch=3, static=static)
    generator.generate([[1, 2], [3]], Sampling(max_new_tokens=4, temperature=0))
    assert generator.cache.length == 6
    found = generator.generate(prompts, GREEDY)
    assert generator.cache.length == 38
    assert found == Generator(model, batch=3, length=48, static=static).generate(prompts, GREEDY)


def test_capacity_on_request(prompts, kinds, make):
    """With drops, a capacity of few slots changes outputs; drop-free is the default whatever the model was trained with."""
    tight = replace(kinds["MoE"], routing=RoutingConfig(capacity_factor_eval=0.1, min_capacity=1))
    free = Generator(set_mode(make(kinds["MoE"])), batch=7).generate(prompts, GREEDY)
    assert Generator(set_mode(make(tight)), batch=7).generate(prompts, GREEDY) == free
    assert Generator(set_mode(make(tight), drop_free=False), batch=7).generate(prompts, GREEDY) != free


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: steps are captured in a graph")
@pytest.mark.parametrize("name", ["dense", "MoE", "top-2", "PR-MoE", "residual, sum"])
def test_graphs_give_the_tokens_of_eager_steps(name, kinds, prompts, make):
    model = set_mode(make(kinds[name]).cuda())
    captured = Generator(model, batch=3)
    assert captured.static
    assert captured.generate(prompts, GREEDY) == Generator(model, batch=3, static=False).generate(prompts, GREEDY)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=3)], ids=["greedy", "all", "top-k"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused_in_one_line(value, sampling, kinds, make):
    model = make(kinds["dense"])
    with torch.no_grad():
        model.token_embedding.weight[17] = value
    generator = Generator(set_mode(model), batch=2)
    with pytest.raises(ValueError, match=r"^generate: prompt 0: the model's logits .* are NaN or infinite$"):
        generator.generate([[17, 2], [3]], sampling)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: Generator(model).stream([[1], []]), "prompt 1 is empty"),
        (lambda model: Generator(model).stream([[1], [1] * 48]), "prompt 1 has 48 tokens, allowed are at most 47"),
        (lambda model: Generator(model).stream([[1], [3, 320]]), "prompt 1 has token 320, allowed are 0 to 319"),
        (lambda model: Generator(model).stream([[1], [-1]]), "prompt 1 has token -1"),
        (lambda model: Generator(model, batch=0), "batch must be at least 1"),
        (lambda model: Generator(model, length=49), "length must be at most the model's context of 48, got 49"),
        (lambda model: Generator(model, mesh=SEVERAL, static=True), "static decoding is for one rank"),
        (lambda model: set_mode(model, "fast"), "mode must be 'optimised' or 'baseline', got 'fast'"),
    ],
)
def test_bad_prompts_and_settings(call, message, kinds, make):
    model = make(kinds["dense"])
    with pytest.raises(ValueError, match=message):
        call(model)
    assert Generator(model).generate([]) == []
