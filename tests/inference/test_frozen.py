"""Frozen modules: products, and layers that make fewer calls, against the plain ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from moelab.kernels import packed

from moelab.config import DecoderConfig, ExpertConfig, FeedForward, ModelConfig, RoutingConfig
from moelab.inference import Generator, Sampling, frozen, frozen_blocks, set_mode
from moelab.inference.frozen_blocks import CompiledExperts, FrozenMLP, FrozenMoE, PackedExperts, freeze_experts, sort
from moelab.models import build
from moelab.models.moe import MLP, Experts
from moelab.models.routing import SCORES

FREE = RoutingConfig(drop_tokens=False)
BASE = ModelConfig(layers=1, hidden=48, heads=3, vocab=64, context=32, experts=(5,), init_std=0.3, routing=FREE)
LAYERS = {
    "top-1": BASE,
    "top-3": replace(BASE, top_k=3),
    "top-3, not normalised": replace(BASE, top_k=3, routing=replace(FREE, normalize_weights=False)),
    "residual": replace(BASE, residual=True),
    "residual, sum": replace(BASE, residual=True, residual_mix="sum"),
    "sigmoid, bias": replace(BASE, top_k=2, routing=replace(FREE, scores="sigmoid", balance_rate=0.01)),
    "softmax, bias": replace(BASE, routing=replace(FREE, balance_rate=0.01)),
    "gated, shared": replace(
        BASE,
        top_k=2,
        decoder=DecoderConfig(feed_forward="swiglu", biases="none"),
        expert=ExpertConfig(shared=1, shared_gate=True),
    ),
}


KINDS = [
    *(("float32", products) for products in ("fastest", "invariant", "compiled")),
    *(("bfloat16", products) for products in ("fastest", "compiled")),
]
"""dtype and products."""


def skip_unless(dtype, products):
    if products == "compiled" and (reason := packed.why_not(dtype)):
        pytest.skip(reason)
    if products != "compiled" and not frozen.can_freeze(dtype):
        pytest.skip(f"oneDNN packs no {dtype} here")


PROCESSORS = {
    "Intel": {"mkl_is_fast": lambda: True, "LARGE": 1 << 30},
    "Intel, large": {"mkl_is_fast": lambda: True, "LARGE": 0},
    "another": {"mkl_is_fast": lambda: False, "SMALL": 0},
    "another, small": {"mkl_is_fast": lambda: False, "SMALL": 1 << 30},
}
"""Processor and size of matrix -> what makes the test's small matrices be taken for it."""


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch):
    for name, value in PROCESSORS[request.param].items():
        monkeypatch.setattr(frozen, name, value)
    return request.param


def pair(config, dtype=torch.float32, products="invariant"):
    """Return a MoE layer twice, plain and frozen, with the same weights, none of them zero."""
    made = []
    for _ in range(2):
        model = build(config, 0)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        made.append(model.to(dtype).eval().blocks[0].ffn)
    return made[0], FrozenMoE.of(made[1], products)


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (2, 9)])
@pytest.mark.parametrize(("dtype", "products"), KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_without_a_table_equals_the_plain_one(name, dtype, products, shape):
    dtype = getattr(torch, dtype)
    skip_unless(dtype, products)
    plain, quick = pair(LAYERS[name], dtype, products)
    x, add = torch.randn(2, *shape, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, routing = plain(x)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.13}  # an ulp of 16
    y, table = quick(x)
    assert table is None and routing.load_E.sum() == x.shape[0] * x.shape[1] * LAYERS[name].top_k
    torch.testing.assert_close(y, expected, **tolerance)
    y, _ = quick(x, add)
    torch.testing.assert_close(y, expected + add, **tolerance)
    if (dtype, products) == (torch.float32, "fastest"):
        return
    x, y, add = (t.flatten(0, 1)[:, None] for t in (x, y, add))
    for i in range(len(x)):
        assert torch.equal(quick(x[i : i + 1], add[i : i + 1])[0], y[i : i + 1]), "a token's bits in any company"


@torch.inference_mode()
@pytest.mark.parametrize("products", ["invariant", "fastest", "compiled"])
@pytest.mark.parametrize("name", ["top-1", "top-3", "gated, shared"])
def test_experts_with_any_numbers_of_rows(name, products, processor):
    """One row to more than MKL multiplies, experts without rows, all rows to one expert, empty rows at the end."""
    skip_unless(torch.float32, products)
    plain, quick = pair(LAYERS[name], products=products)
    if products == "compiled":
        assert isinstance(quick.experts, CompiledExperts)
    else:
        assert isinstance(quick.experts, PackedExperts) == (products == "invariant" or processor == "another")
    for counts, empty in (([1, 0, 3, 13, 30], 0), ([0, 0, 20, 0, 0], 0), ([0, 5, 4, 0, 12], 7), ([0] * 5, 3)):
        offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        rows = torch.randn(int(offsets[-1]) + empty, 48, generator=torch.Generator().manual_seed(empty))
        rows[len(rows) - empty :] = 0
        y = quick.experts(rows, offsets)
        torch.testing.assert_close(y, plain.experts(rows, offsets), rtol=1e-5, atol=1e-5)
        assert not y[len(rows) - empty :].any()


@pytest.mark.parametrize("products", ["invariant", "fastest", "compiled"])
def test_an_activation_that_frozen_layers_do_not_know_is_refused(products, processor):
    for layer, freeze in ((MLP(FeedForward(48, 96)), FrozenMLP), (Experts(3, FeedForward(48, 96)), freeze_experts)):
        layer.activation = "gelu"
        with pytest.raises(ValueError, match=r"^inference: layers are frozen with .* got 'gelu'; mode 'baseline'"):
            freeze(layer, products)


@torch.inference_mode()
def test_tokens_that_cannot_be_routed_and_drops_take_the_gate():
    plain, quick = pair(BASE)
    x = torch.randn(1, 4, 48)
    x[0, 2] = torch.nan
    y, routing = quick(x)
    assert routing.slot_SK[2, 0] == -1 and (routing.slot_SK[[0, 1, 3]] >= 0).all()
    assert y[0, [0, 1, 3]].isfinite().all()
    _, dropping = pair(replace(BASE, routing=RoutingConfig(capacity_factor_eval=0.1, min_capacity=1)))
    _, routing = dropping(torch.randn(1, 1, 48).expand(1, 9, 48))  # all to one expert
    assert (routing.slot_SK < 0).any()
    y, routing = quick(torch.zeros(0, 1, 48))
    assert y.shape == (0, 1, 48)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (6, 1), (6, 2)])
def test_rows_are_sorted_by_expert_then_token(shape):
    expert_SK = torch.randint(4, shape, generator=torch.Generator().manual_seed(3)).numpy()
    rows = sort(expert_SK)
    pairs = sorted((e, s) for s, row in enumerate(expert_SK.tolist()) for e in row)
    assert rows.experts == sorted({e for e, _ in pairs}) and rows.bounds[-1] == len(pairs)
    for i, e in enumerate(rows.experts):
        assert {p[0] for p in pairs[rows.bounds[i] : rows.bounds[i + 1]]} == {e}
    if rows.token_R is not None:
        assert rows.token_R.tolist() == [s for _, s in pairs]
        expert_R = [e for e, _ in pairs]
        assert [expert_R[r] for r in rows.row_N.tolist()] == expert_SK.ravel().tolist()


@torch.inference_mode()
@pytest.mark.parametrize(("N", "K"), [(96, 32), (32, 128), (192, 64), (576, 192), (5, 48)])
@pytest.mark.parametrize(("dtype", "products"), KINDS)
def test_a_row_of_a_product_has_the_same_bits_in_any_company(N, K, dtype, products, processor):
    """And products are right; in fp32 the fastest ones have only that."""
    dtype = getattr(torch, dtype)
    skip_unless(dtype, products)
    generator = torch.Generator().manual_seed(N)
    weight, x, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((N, K), (40, K), (N,)))
    add = torch.randn(40, N, generator=generator).to(dtype)
    times = frozen.product(weight, products)
    for options in ({}, {"activation": "gelu_tanh"}, {"add": add}):
        together = times(x, bias, **options)
        expected = F.linear(x.double(), weight.double(), bias.double())
        expected = F.gelu(expected, approximate="tanh") if "activation" in options else expected
        expected = expected + add.double() if "add" in options else expected
        error = (together.double() - expected).abs().max() / expected.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)
        for n in range(1, 20):
            some = {**options, "add": add[:n]} if "add" in options else options
            rows = times(x[:n], bias, **some)
            torch.testing.assert_close(rows, together[:n], rtol=1e-4 if dtype == torch.float32 else 0, atol=1e-4)
            assert torch.equal(rows, together[:n]) or (dtype, products) == (torch.float32, "fastest")


def test_a_matrix_that_needs_many_rows_is_packed(monkeypatch):
    packed = []
    monkeypatch.setattr(frozen, "least_rows", lambda N, K, threads: frozen.MOST_REPEATED + N - 8)
    monkeypatch.setattr(frozen, "_packed", lambda weight, x, *rest: packed.append(len(x)))
    x = torch.randn(2, 16)
    assert frozen.product(torch.randn(8, 16), "invariant")(x, None).shape == (2, 8) and not packed
    frozen.product(torch.randn(9, 16), "invariant")(x, None)
    assert packed == [2]


def test_least_rows_finds_the_number(monkeypatch):
    def few_rows_differ(x, weight, bias=None):
        return x @ weight.T * (1.0 if len(x) >= 5 else 1.001)

    monkeypatch.setattr(frozen.F, "linear", few_rows_differ)
    frozen.least_rows.cache_clear()
    assert frozen.least_rows(7, 11, 1) == 5
    frozen.least_rows.cache_clear()


@torch.inference_mode()
@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
@pytest.mark.parametrize("ffn", [24, 100, 256])
@pytest.mark.parametrize("count", [1, 3])
def test_a_sequence_has_the_same_bits_among_so_many_that_threads_share_them(count, ffn, feed_forward, threads):
    threads(count)
    config = ModelConfig(
        layers=2, hidden=64, heads=2, experts=(0, 4), vocab=97, context=65, init_std=0.2,
        decoder=DecoderConfig(feed_forward=feed_forward, ffn=ffn),
    )  # fmt: skip
    model = set_mode(build(config, 1), "invariant")
    tokens = torch.randint(97, (41, 65), generator=torch.Generator().manual_seed(0))
    together = model(tokens).logits_BTV
    for i in range(0, 41, 8):
        assert torch.equal(model(tokens[i : i + 1]).logits_BTV[0], together[i])


@torch.inference_mode()
def test_scores_of_a_layer_with_a_table_have_the_same_bits_in_any_company():
    _, quick = pair(replace(BASE, routing=replace(FREE, scores="sigmoid", normalize_weights=False)))
    x = torch.randn(301, 48, generator=torch.Generator().manual_seed(0))
    together = quick.router(x).weight_SK
    chosen, weights = quick.router.choose(x)
    assert torch.equal(torch.from_numpy(weights), together)
    for i in range(len(x)):
        assert torch.equal(quick.router(x[i : i + 1]).weight_SK[0], together[i])


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tokens", [7, 301, 1601])
def test_a_new_kind_of_scores_has_the_same_bits_in_any_company(tokens, count, threads, monkeypatch):
    """Of a number of experts that is no whole number of vectors; 1601 tokens are shared among threads."""
    threads(count)
    monkeypatch.setitem(SCORES, "sqrt_softplus", lambda logits_SE: F.softplus(logits_SE).sqrt())
    free = replace(FREE, normalize_weights=False)
    object.__setattr__(free, "scores", "sqrt_softplus")  # a name that the class does not allow yet
    plain, quick = pair(replace(BASE, experts=(30,), top_k=2))
    plain.router.config = quick.router.config = free
    x = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(0))
    logits = quick.router.logits(x)
    together = quick.router.activate(logits)
    torch.testing.assert_close(together, F.softplus(logits).sqrt())
    chosen, weights = quick.router.choose(x)
    assert torch.equal(torch.from_numpy(weights), together.gather(1, torch.from_numpy(chosen).long()))
    torch.testing.assert_close(torch.from_numpy(weights), plain.router(x).weight_SK)
    for i in range(0, tokens, 1 + tokens // 300):
        assert torch.equal(quick.router.activate(logits[i : i + 1])[0], together[i])
        assert np.array_equal(quick.router.choose(x[i : i + 1])[1][0], weights[i])


@pytest.mark.parametrize("products", ["fastest", "compiled"])
@pytest.mark.parametrize("experts", [(0, 0), (0, 4)])
def test_bf16_changes_no_bit_with_the_batch(experts, products):
    skip_unless(torch.bfloat16, products)
    config = replace(BASE, layers=2, experts=experts, heads=3)
    model = set_mode(build(config, 0).bfloat16(), "compiled" if products == "compiled" else "optimised")
    prompts = [[1, 2, 3], [5], [7, 8, 9, 10], [4, 4]]
    sampling = Sampling(max_new_tokens=8, temperature=0.7)
    together = Generator(model, batch=4).generate(prompts, sampling)
    assert Generator(model, batch=2).generate(prompts, sampling) == together
    assert isinstance(model.blocks[1], frozen_blocks.FrozenBlock)
