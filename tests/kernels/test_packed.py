"""Operations on packed matrices, against PyTorch's in double precision; rows have the same bits in any company."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from moelab.kernels import packed

WHY_NOT = packed.why_not(torch.float32)
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.usefixtures("inference"),
]
NARROW = packed.why_not(torch.bfloat16)
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(NARROW is not None, reason=str(NARROW))),
]
SIZES = [(1, 16), (5, 48), (16, 32), (31, 16), (33, 528), (64, 1040), (97, 64), (256, 512)]  # (N, K)


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    scale = want.abs().max().item() if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_linear(N, K, dtype):
    weight, bias = draw(N, K, dtype=dtype), draw(N, dtype=dtype)
    matrix = packed.pack(weight)
    for R in (0, 1, 2, 11, 12, 13, 25, 64, 65, 130):
        x, add = draw(R, K, dtype=dtype), draw(R, N, dtype=dtype, seed=1)
        exact = x.double() @ weight.double().T
        close(packed.linear(x, matrix), exact, dtype)
        exact = exact + bias.double()
        close(packed.linear(x, matrix, bias), exact, dtype)
        close(packed.linear(x, matrix, bias, "gelu_tanh"), F.gelu(exact, approximate="tanh"), dtype)
        close(packed.linear(x, matrix, bias, add=add), exact + add.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_takes_any_strides_and_leading_sizes(dtype):
    weight, x, add = draw(40, 32, dtype=dtype), draw(3, 32, 5, dtype=dtype).mT, draw(3, 40, 5, dtype=dtype).mT
    close(packed.linear(x, packed.pack(weight), add=add), x.double() @ weight.double().T + add.double(), dtype)
    close(
        packed.linear(x, packed.pack(draw(32, 40, dtype=dtype).T)),
        x.double() @ draw(32, 40, dtype=dtype).double(),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_company_and_with_any_number_of_threads(dtype, threads):
    matrix, bias = packed.pack(draw(200, 560, dtype=dtype)), draw(200, dtype=dtype)
    x = draw(150, 560, dtype=dtype)
    together = packed.linear(x, matrix, bias, "gelu_tanh")
    for count in (1, 3):
        threads(count)
        assert torch.equal(packed.linear(x, matrix, bias, "gelu_tanh"), together)
        for first, n in ((0, 1), (149, 1), (7, 2), (30, 12), (31, 13), (60, 64), (60, 70)):
            assert torch.equal(
                packed.linear(x[first : first + n], matrix, bias, "gelu_tanh"), together[first : first + n]
            )


def of_experts(x, expert, weight, up, up_bias, down, down_bias):
    """Return the weighted sums of the experts' outputs, in double precision."""
    x, weight, up, down = (t.double() for t in (x, weight, up, down))
    gated = up.dim() == 4
    y = torch.zeros_like(x)
    for s, chosen in enumerate(expert.tolist()):
        for k, e in enumerate(chosen):
            h = up[e] @ x[s] + (0 if up_bias is None else up_bias[e].double())
            h = F.silu(h[0]) * h[1] if gated else F.gelu(h, approximate="tanh")
            y[s] += weight[s, k] * (down[e] @ h + (0 if down_bias is None else down_bias[e].double()))
    return y


def make_experts(E, M, width, gated, biased, dtype):
    shape = (E, 2, width) if gated else (E, width)
    up, down = draw(*shape, M, dtype=dtype) / M**0.5, draw(E, M, width, dtype=dtype) / width**0.5
    return up, draw(*shape, dtype=dtype) if biased else None, down, draw(E, M, dtype=dtype) if biased else None


def prepare(up, up_bias, down, down_bias):
    return packed.pack(up), up_bias, packed.pack(down), down_bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("S", "E", "K", "M", "width"), [(1, 3, 1, 16, 16), (7, 5, 2, 48, 80), (40, 2, 1, 64, 48), (90, 9, 3, 32, 64)]
)
def test_experts(S, E, K, M, width, gated, biased, dtype):
    """With experts that nobody chose, and more rows of one than a task has."""
    weights = make_experts(E, M, width, gated, biased, dtype)
    x, add, share = draw(S, M, dtype=dtype), draw(S, M, dtype=dtype, seed=1), draw(S, K).softmax(1)
    generator = torch.Generator().manual_seed(S)
    spread = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(S)])
    one = torch.arange(E - K, E).expand(S, K)
    for expert in (spread, one):
        exact = of_experts(x, expert, share, *weights)
        close(packed.experts(x, expert, share, *prepare(*weights)), exact, dtype)
        close(packed.experts(x, expert, share, *prepare(*weights), add), exact + add.double(), dtype)


@given(st.lists(st.integers(0, 3), min_size=0, max_size=200), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=20, deadline=None)
def test_a_token_of_experts_has_the_same_bits_in_any_company(chosen, dtype):
    if packed.why_not(dtype):
        return
    weights = prepare(*make_experts(4, 32, 64, False, True, dtype))
    with torch.inference_mode():
        x, expert, share = (
            draw(len(chosen), 32, dtype=dtype),
            torch.tensor(chosen).view(-1, 1).long(),
            draw(len(chosen), 1),
        )
        together = packed.experts(x, expert, share, *weights)
        assert together.isfinite().all()
        for s in range(0, len(chosen), 17):
            alone = packed.experts(x[s : s + 1], expert[s : s + 1], share[s : s + 1], *weights)
            assert torch.equal(alone[0], together[s])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("H", "N", "D"), [(1, 1, 16), (4, 4, 64), (6, 2, 48), (8, 1, 128), (2, 2, 512)])
def test_attention(H, N, D, count, dtype, threads):
    """Sequences of any lengths, also full ones; queries and keys are views of one tensor; others' memory stays."""
    threads(count)
    B, T = 5, 40
    positions = torch.tensor([0, 1, 15, 16, T - 1])
    keys, values = draw(B + 2, N, T, D, dtype=dtype), draw(B + 2, N, T, D, dtype=dtype, seed=1)
    before = keys.clone(), values.clone()
    qkv = draw(B, H + 2 * N, 1, D, dtype=dtype)
    q, k, v = qkv.split([H, N, N], 1)
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
def test_attention_of_large_scores(dtype):
    """The largest score decides, and none overflows."""
    keys, values = draw(1, 1, 33, 16, dtype=dtype) * 100, draw(1, 1, 33, 16, dtype=dtype)
    q, k, v = draw(3, 1, 1, 1, 16, dtype=dtype).unbind()
    y = packed.attend(q * 100, k, v, keys, values, torch.tensor([32]))
    seen = (keys.double(), values.double())
    close(y, F.scaled_dot_product_attention((q * 100).double(), *seen), dtype)


def test_attention_passes_on_what_is_not_finite():
    keys, values = torch.zeros(2, 1, 4, 16), torch.zeros(2, 1, 4, 16)
    q = torch.ones(2, 1, 1, 16)
    q[1, 0, 0, 3] = torch.nan
    y = packed.attend(q, torch.ones_like(q), torch.ones_like(q), keys, values, torch.tensor([2, 2]))
    assert y[0].isfinite().all() and y[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 16), (1, 1, 48), (3, 70, 528)])
def test_rms_norm(shape, dtype):
    x, weight = draw(*shape, dtype=dtype) * 3, draw(shape[-1], dtype=dtype)
    close(packed.rms_norm(x, weight, 1e-5), F.rms_norm(x.double(), (shape[-1],), weight.double(), 1e-5), dtype)
    strided = torch.stack([weight, weight * 0], -1)[..., 0]
    assert torch.equal(packed.rms_norm(x, strided, 1e-5), packed.rms_norm(x, weight, 1e-5))


def test_what_does_not_fit_is_refused_in_a_line():
    with pytest.raises(ValueError, match=r"^pack: the last size must be a multiple of 16, got \(32, 24\)$"):
        packed.pack(torch.zeros(32, 24))
    with pytest.raises(ValueError, match=r"^linear: activation must be 'none' or 'gelu_tanh', got 'gelu'$"):
        packed.linear(torch.zeros(2, 32), packed.pack(torch.zeros(40, 32)), None, "gelu")
    with pytest.raises(ValueError, match=r"^pack: packed matrices are float32 or bfloat16, not torch.float16$"):
        packed.pack(torch.zeros(32, 16, dtype=torch.float16))
    matrix, three = packed.pack(torch.zeros(40, 32)), packed.pack(torch.zeros(3, 32, 32))
    nine = packed.pack(torch.zeros(3, 3, 32, 32))
    x, one = torch.zeros(2, 32), torch.ones(2, 1)
    attention = [torch.zeros(2, 1, 1, 16)] * 3 + [torch.zeros(2, 1, 4, 16)] * 2
    for call, message in (
        (lambda: packed.linear(torch.zeros(2, 16), matrix), "linear: x [..., 16] for a matrix [N, 32]"),
        (lambda: packed.linear(x, three), "linear: one matrix, not 3"),
        (lambda: packed.linear(x, matrix, torch.zeros(39)), "linear: bias [39] for N = 40"),
        (lambda: packed.linear(x, matrix, add=torch.zeros(1, 40)), "linear: add [1, 40] to [2, 40]"),
        (lambda: packed.linear(x.double(), matrix), "Float"),
        (lambda: packed.experts(x, torch.tensor([[0], [3]]), one, three, None, three, None), "experts: no expert 3"),
        (
            lambda: packed.experts(x, torch.tensor([[0], [-1]]), one, three, None, three, None),
            "experts: no expert -1",
        ),
        (lambda: packed.experts(x, torch.zeros(1, 1).long(), one, three, None, three, None), "experts: x [2, 32]"),
        (lambda: packed.attend(*attention, torch.tensor([0, 4])), "attend: position 4, allowed are 0 to 3"),
        (lambda: packed.attend(*attention, torch.tensor([0])), "attend: q [2, 1, 1, 16]"),
        (lambda: packed.rms_norm(torch.zeros(2, 32), torch.zeros(16), 1e-5), "rms_norm: x [2, 32], weight [16]"),
        (lambda: packed.rms_norm(torch.zeros(2, 0), torch.zeros(0), 1e-5), "rms_norm: x [2, 0], weight [0]"),
        (lambda: packed.linear(x, matrix._replace(columns=65)), "linear: N = 65 in [1, 2, 32, 32]"),
        (lambda: packed.linear(torch.tensor(1.0), matrix), "linear: N = 40"),
        (
            lambda: packed.experts(x, one.long(), one, three._replace(columns=65), None, three, None),
            "experts: x [2, 32]",
        ),
        (lambda: packed.experts(x, one.long(), one, nine, None, three, None), "experts: x [2, 32]"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call()
