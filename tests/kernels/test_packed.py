"""Operations on packed matrices, against PyTorch's in double precision; rows have the same bits in any company."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from moelab.kernels import (
    ACTIVATIONS,
    Activation,
    _cpp,
    can_pack,
    combine,
    dispatch,
    expert_ffn,
    gate,
    packed,
    residual_mix,
    routed_ffn,
    row_table,
)

from tests.kernels.helpers import assert_same_bits, assert_same_bits_on_any_number_of_threads, poison
from tests.kernels.test_experts import LARGE, MULTIPLES, each, make

pytestmark = pytest.mark.usefixtures("inference")
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 16), (5, 48), (16, 32), (31, 16), (33, 528), (64, 1040), (97, 64), (256, 512)]  # (N, K)


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    scale = max(0.01, want.abs().max().item()) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_linear(instructions, N, K, dtype):
    weight, bias = draw(2, N, K, dtype=dtype), draw(2, N, dtype=dtype)
    for activation in ACTIVATIONS.values():
        gates = 2 if activation.gated else 1
        matrix = packed.pack(weight if activation.gated else weight[0])
        for R in (0, 1, 2, 11, 25, 130) if activation.name == "none" else (1, 13, 65):
            x, add = draw(R, K, dtype=dtype), draw(R, N, dtype=dtype, seed=1)
            for b, a in ((None, None), (bias[:gates].flatten(), add)):
                pre = x.double() @ weight[:gates].flatten(0, 1).double().T
                exact = activation.forward(pre if b is None else pre + b.double())
                poison()
                got = packed.linear(x, matrix, b, activation.name, a)
                close(got, exact if a is None else exact + a.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_takes_any_strides_and_leading_sizes(instructions, dtype):
    weight, x, add = draw(40, 32, dtype=dtype), draw(3, 32, 5, dtype=dtype).mT, draw(3, 40, 5, dtype=dtype).mT
    close(packed.linear(x, packed.pack(weight), add=add), x.double() @ weight.double().T + add.double(), dtype)
    wide = draw(32, 40, dtype=dtype)
    close(packed.linear(x, packed.pack(wide.T)), x.double() @ wide.double(), dtype)
    close(packed.linear(x[0, 0], packed.pack(weight)), weight.double() @ x[0, 0].double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_product_has_the_same_bits_in_any_company(instructions, dtype):
    matrix, bias, x = packed.pack(draw(200, 560, dtype=dtype)), draw(200, dtype=dtype), draw(150, 560, dtype=dtype)
    assert_same_bits_on_any_number_of_threads(lambda: [packed.linear(x, matrix, bias, "gelu_tanh")])
    together = packed.linear(x, matrix, bias, "gelu_tanh")
    for first, n in ((0, 1), (149, 1), (7, 2), (30, 12), (31, 13), (60, 64), (60, 70)):
        rows = slice(first, first + n)
        assert torch.equal(packed.linear(x[rows], matrix, bias, "gelu_tanh"), together[rows])


def pack(params, gated):
    """Packed weights and biases from those of `expert_ffn`."""
    w1, b1, w2, b2 = params
    up = w1.unflatten(2, (2, -1)).permute(0, 2, 3, 1) if gated else w1.mT
    return packed.pack(up), b1, packed.pack(w2.mT), b2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts,spare,M,width,activation", each([*MULTIPLES, *LARGE]))
def test_experts_have_the_bits_of_those_that_are_not_packed(instructions, counts, spare, M, width, activation, dtype):
    """On any number of threads, and an expert's rows in any batch."""
    x, offsets, params, _ = make(counts, spare, M, width, dtype, activation=activation)
    for some in (params, [params[0], None, params[2], None]):
        weights = pack(some, ACTIVATIONS[activation].gated)
        want = expert_ffn(x, offsets, *some, activation=activation, backend="cpp")
        assert_same_bits_on_any_number_of_threads(
            lambda w=weights: [expert_ffn(x, offsets, *w, activation=activation)],
        )
        strided = torch.stack([offsets, offsets], 1)[:, 0]
        for same in (offsets, offsets.long(), strided):
            assert torch.equal(expert_ffn(x, same, *weights, activation=activation), want)
        for first, last in itertools.pairwise(offsets.tolist()):
            alone = offsets.clamp(max=last).sub(first).clamp(min=0)
            assert torch.equal(expert_ffn(x[first:last], alone, *weights, activation=activation), want[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_routed_ffn(instructions, activation, dtype):
    """The bits of the four operations with weights that are not packed; what is added is rounded once."""
    _, _, params, _ = make([0] * 5, 0, 32, 48, dtype, activation=activation)
    weights = pack(params, activation == "swiglu")
    x, add = draw(23, 32, dtype=dtype), draw(23, 32, dtype=dtype, seed=1)
    strided = torch.stack([x, add], -1)[..., 0]
    dropping = gate(draw(23, 5), 2, 7, seed=1, normalize=True)
    assert (dropping.slot_SK < 0).any()
    for g in (dropping, gate(draw(23, 5), 1, losses=False)):
        table = row_table(g)
        rows = expert_ffn(dispatch(x, table), table.offsets_E1, *params, activation=activation)
        plain = combine(rows, table, g.weight_SK)
        assert torch.equal(routed_ffn(x, g, *weights, activation=activation), plain)
        assert torch.equal(routed_ffn(strided, g, *weights, activation=activation), plain)
        close(routed_ffn(x, g, *weights, activation=activation, add_SM=add), plain.double() + add.double(), dtype)


@given(st.lists(st.integers(0, 3), min_size=0, max_size=200), st.sampled_from(DTYPES))
@settings(max_examples=15, deadline=None)
def test_a_token_of_experts_has_the_same_bits_in_any_company(instructions, chosen, dtype):
    with torch.inference_mode():
        _, _, params, _ = make([0] * 4, 0, 32, 64, dtype)
        weights, x = pack(params, False), draw(len(chosen), 32, dtype=dtype)
        logits = F.one_hot(torch.tensor(chosen).long(), 4).float()
        together = routed_ffn(x, gate(logits, 1, losses=False), *weights)
        assert together.isfinite().all()
        for s in range(0, len(chosen), 17):
            alone = routed_ffn(x[s : s + 1], gate(logits[s : s + 1], 1, losses=False), *weights)
            assert torch.equal(alone[0], together[s])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "N", "D"), [(1, 1, 16), (4, 4, 64), (6, 2, 48), (8, 1, 128), (2, 2, 512)])
def test_attention(instructions, H, N, D, dtype):
    """Sequences of any lengths, also full ones; queries and keys are views of one tensor; others' memory stays."""
    B, T = 5, 40
    positions = torch.tensor([0, 1, 15, 16, T - 1])
    keys, values = draw(B + 2, N, T, D, dtype=dtype), draw(B + 2, N, T, D, dtype=dtype, seed=1)
    before = keys.clone(), values.clone()
    qkv = draw(B, H + 2 * N, 1, D, dtype=dtype)
    q, k, v = qkv.split([H, N, N], 1)
    assert_same_bits_on_any_number_of_threads(lambda: [packed.attend(q, k, v, keys, values, positions[:, None])])
    y = packed.attend(q, k, v, keys, values, positions[:, None])
    assert y.shape == (B, H, 1, D) and y.is_contiguous()
    for b, n in enumerate(positions.tolist()):
        for cache, new, old in ((keys, k, before[0]), (values, v, before[1])):
            old[b, :, n] = new[b, :, 0]
            assert torch.equal(cache[b], old[b])
        seen = (t[b : b + 1, :, : n + 1].double() for t in (keys, values))
        close(y[b : b + 1], F.scaled_dot_product_attention(q[b : b + 1].double(), *seen, enable_gqa=True), dtype)
        alone = packed.attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], keys[b:], values[b:], positions[b : b + 1])
        assert torch.equal(alone[0], y[b])
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_large_scores(instructions, dtype):
    """The largest score decides, and none overflows."""
    keys, values = draw(1, 1, 33, 16, dtype=dtype) * 100, draw(1, 1, 33, 16, dtype=dtype)
    q, k, v = draw(3, 1, 1, 1, 16, dtype=dtype).unbind()
    y = packed.attend(q * 100, k, v, keys, values, torch.tensor([32]))
    seen = (keys.double(), values.double())
    close(y, F.scaled_dot_product_attention((q * 100).double(), *seen), dtype)


def test_attention_passes_on_what_is_not_finite(instructions):
    keys, values = torch.zeros(2, 1, 4, 16), torch.zeros(2, 1, 4, 16)
    q = torch.ones(2, 1, 1, 16)
    q[1, 0, 0, 3] = torch.nan
    y = packed.attend(q, torch.ones_like(q), torch.ones_like(q), keys, values, torch.tensor([2, 2]))
    assert y[0].isfinite().all() and y[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 16), (48,), (1, 1, 48), (3, 70, 528)])
def test_rms_norm(instructions, shape, dtype):
    x, weight = draw(*shape, dtype=dtype) * 3, draw(shape[-1], dtype=dtype)
    close(packed.rms_norm(x, weight, 1e-5), F.rms_norm(x.double(), (shape[-1],), weight.double(), 1e-5), dtype)
    assert_same_bits_on_any_number_of_threads(lambda: [packed.rms_norm(x, weight, 1e-5)])
    apart = torch.stack([x, x], -1)[..., 0]
    assert_same_bits([packed.rms_norm(apart, weight, 1e-5)], [packed.rms_norm(x, weight, 1e-5)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("S", "M"), [(0, 16), (1, 5), (300, 67)])
def test_mix(instructions, S, M, dtype):
    """The bits of `residual_mix`; what is added is rounded once."""
    moe, mlp, x, add = (draw(S, M, dtype=dtype, seed=i) for i in range(4))
    w, b = draw(2, M, dtype=dtype) / M**0.5, draw(2, dtype=dtype)
    weights, want = packed.pack_mix(w, b), residual_mix(moe, mlp, x, w, b, backend="cpp")
    assert torch.equal(packed.mix(moe, mlp, x, weights), want) and weights.bias == float(b[0].float() - b[1].float())
    wide = residual_mix(*(t.double() for t in (moe, mlp, x, w, b)), backend="reference")
    close(packed.mix(moe, mlp, x, weights, add), wide + add.double(), dtype)


def test_what_cannot_be_packed(instructions):
    half, meta = torch.zeros(32, 16, dtype=torch.float16), torch.zeros(32, 16, device="meta")
    for wrong in (torch.zeros(32, 24), torch.zeros(16), half, meta):
        assert not can_pack(wrong)
        with pytest.raises(ValueError, match=r"^pack: .* the C\+\+ kernels pack float32 or bfloat16 matrices on a CPU"):
            packed.pack(wrong)
    assert can_pack(torch.zeros(32, 16))
    with _cpp.limited("none"):
        assert not can_pack(torch.zeros(32, 16))


def test_what_does_not_fit_is_refused_in_a_line(instructions, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "table", Activation("table", torch.relu, torch.sign))
    matrix, three = packed.pack(torch.zeros(40, 32)), packed.pack(torch.zeros(3, 32, 32))
    wide = packed.pack(torch.zeros(3, 48, 32))
    x, offsets = torch.zeros(2, 32), torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    plain = torch.zeros(3, 32, 32)
    attention = [torch.zeros(2, 1, 1, 16)] * 3 + [torch.zeros(2, 1, 4, 16)] * 2
    at = torch.tensor([0, 1])
    g = gate(torch.zeros(2, 3), 1, losses=False)
    strided, same, alike = torch.zeros(16, 2).T[0], "linear: tensors must be contiguous, all float32", "all bfloat16"
    names = "activation must be one of none, gelu, gelu_tanh, swiglu, got"
    for call, message in (
        (lambda: packed.linear(torch.zeros(2, 16), matrix), "linear: x [..., 16] for a matrix [N, 32]"),
        (lambda: packed.linear(x, three), "linear: 3 matrices for activation 0"),
        (lambda: packed.linear(x, matrix, None, "swiglu"), "linear: 1 matrices for activation 3"),
        (lambda: packed.linear(x, matrix, None, "relu"), f"linear: {names} 'relu'"),
        (lambda: packed.linear(x, matrix, None, "table"), f"linear: {names} 'table'"),
        (lambda: packed.linear(x, matrix, torch.zeros(39)), "linear: bias has another size than [40]"),
        (lambda: packed.linear(x, matrix, torch.zeros(80)[::2]), same),
        (lambda: packed.linear(x, matrix, add=torch.zeros(1, 40)), "linear: add has another shape"),
        (lambda: packed.linear(x.double(), matrix), same),
        (lambda: packed.linear(x.bfloat16(), matrix), same),
        (lambda: packed.linear(x, matrix, torch.zeros(40).bfloat16()), same),
        (lambda: packed.linear(x, matrix, add=torch.zeros(2, 40).bfloat16()), same),
        (lambda: packed.linear(x, matrix._replace(columns=65)), "linear: N = 65 in 2 panels"),
        (lambda: packed.linear(torch.tensor(1.0), matrix), "linear: N = 40"),
        (lambda: expert_ffn(x, offsets, three, None, three, None, activation="table"), f"expert_ffn: {names} 'table'"),
        (
            lambda: expert_ffn(x, offsets, wide, None, three, None),
            "expert_ffn: packed weights of 3 experts of 32 and 48",
        ),
        (lambda: expert_ffn(x, offsets[:3], three, None, three, None), "expert_ffn: packed weights of 2 experts"),
        (lambda: expert_ffn(x, offsets, three, None, plain, None), "expert_ffn: both weights are packed or none"),
        (lambda: expert_ffn(x, offsets, plain, None, three, None), "expert_ffn: both weights are packed or none"),
        (
            lambda: expert_ffn(x, offsets, three, None, three, None, backend="reference"),
            "expert_ffn: both weights are packed or none, for backend 'auto' or 'cpp', not 'reference'",
        ),
        (lambda: expert_ffn(x, offsets + 1, three, None, three, None), "expert_ffn: packed weights of 3 experts"),
        (lambda: expert_ffn(x.bfloat16(), offsets, three, None, three, None), alike),
        (lambda: expert_ffn(x, offsets, three, torch.zeros(3, 32).bfloat16(), three, None), alike),
        (
            lambda: expert_ffn(x, offsets, three, torch.zeros(3, 16), three, None),
            "expert_ffn: packed weights of 3 experts",
        ),
        (lambda: routed_ffn(x.double(), g, three, None, three, None), "routed_ffn: tokens must be contiguous"),
        (lambda: routed_ffn(x, g, three, None, three, None, add_SM=x.bfloat16()), "routed_ffn: tokens must be"),
        (lambda: routed_ffn(x, g, three, None, three, None, add_SM=x[:1]), "routed_ffn: tokens must be"),
        (lambda: routed_ffn(x[:1], g, three, None, three, None), "routed_ffn: tokens must be"),
        (lambda: packed.attend(*attention, torch.tensor([0, 4])), "attend: position 4, allowed are 0 to 3"),
        (lambda: packed.attend(*attention, torch.tensor([0])), "attend: queries [2, 1, 1, 16]"),
        (lambda: packed.attend(*attention, at.int()), "attend: queries [2, 1, 1, 16]"),
        (lambda: packed.attend(attention[0].bfloat16(), *attention[1:], at), "attend: queries [2, 1, 1, 16]"),
        (lambda: packed.rms_norm(torch.zeros(2, 32), torch.zeros(16), 1e-5), "rms_norm: weight [16] does not fit x"),
        (lambda: packed.rms_norm(torch.zeros(2, 0), torch.zeros(0), 1e-5), "rms_norm: weight [0] does not fit x"),
        (lambda: packed.rms_norm(torch.zeros(2, 16), strided, 1e-5), "rms_norm: tensors must be contiguous"),
        (lambda: packed.rms_norm(torch.zeros(2, 16), torch.zeros(16).bfloat16(), 1e-5), "rms_norm: tensors must be"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=re.escape(message)):
            call()
