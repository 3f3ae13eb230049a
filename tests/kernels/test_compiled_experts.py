"""The experts' compiled code on the sizes that it takes; ``test_experts.py`` has the sizes that others compute."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from moelab.kernels import ACTIVATIONS, _compiled, expert_ffn
from moelab.kernels._compiled import experts as compiled
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.test_experts import make, poison, run

pytestmark = pytest.mark.skipif(_compiled.why_not() is not None, reason=str(_compiled.why_not()))
narrow = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bf16 needs AVX512_BF16")


@pytest.fixture(autouse=True, scope="module")
def also_with_amx():
    """With AMX other code computes bf16 by default; this one works there as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "takes_bfloat16", torch.cpu._is_avx512_bf16_supported)
        yield


NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2")
CASES = [  # rows per expert, spare rows, M, F
    ([1], 0, 16, 16),
    ([0, 0], 3, 16, 32),
    ([3, 0, 4, 0], 2, 32, 48),
    ([7, 64, 1, 65, 128, 129], 0, 32, 128),  # about the rows of a product
    ([0, 300, 0, 9], 1, 80, 560),  # more than a task has rows and columns, and panels of fewer than 64 columns
    ([1, 2] * 64, 0, 64, 256),
    ([9, 2], 0, 528, 64),  # longer rows than one product takes
]


def compare(got, want, tolerance):
    for name, a, b in zip(NAMES, got, want, strict=False):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("counts,spare,M,F", CASES)
def test_float32(counts, spare, M, F, activation):
    x, offsets, params, dy = make(counts, spare, M, F, M, dtype=torch.float32, device="cpu", activation=activation)
    assert compiled.fits(x, params[2], activation)
    poison()
    got = run(x, offsets, params, dy, activation=activation, backend="compiled")
    compare(got, run(x, offsets, params, dy, activation=activation, backend="reference"), 2e-5)
    assert not got[0][sum(counts) :].any() and not got[1][sum(counts) :].any()


@narrow
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("counts,spare,M,F", CASES)
def test_bfloat16(counts, spare, M, F, activation, weights):
    """Rows in bfloat16 and weights in either type: as exact as the other CPU implementation, against float32."""
    x, offsets, params, dy = make(counts, spare, M, F, M, dtype=torch.bfloat16, device="cpu", activation=activation)
    assert compiled.fits(x, params[2], activation)
    params = [p.to(weights) for p in params]
    poison()
    got = run(x, offsets, params, dy, activation=activation, backend="compiled")
    wide = run(x.float(), offsets, [p.float() for p in params], dy.float(), activation=activation, backend="reference")
    assert [t.dtype for t in got] == [torch.bfloat16] * 2 + [weights] * 4
    compare([t.float() for t in got], wide, 3e-2)


@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.sampled_from([16, 48, 64]), st.sampled_from([32, 96]))
@settings(max_examples=25, deadline=None)
def test_any_counts(counts, M, F):
    x, offsets, params, dy = make(counts, 0, M, F, M, dtype=torch.float32, device="cpu")
    compare(run(x, offsets, params, dy, backend="compiled"), run(x, offsets, params, dy, backend="reference"), 2e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_activations_and_slopes_are_exact_to_float32(activation):
    x = torch.cat([torch.linspace(-30, 30, 16 * 4000), torch.tensor([-1e9, -300.0, -0.0, 0.0, 1e-30, 300.0, 1e9] * 16)])
    x = x.view(-1, 16)
    offsets, eye = torch.tensor([0, len(x)], dtype=torch.int32), torch.eye(16)[None]
    w1 = torch.cat([eye, torch.zeros_like(eye)], 2) if activation == "swiglu" else eye
    bias = torch.cat([torch.zeros(1, 16), torch.ones(1, 16)], 1) if activation == "swiglu" else None  # up: 1
    leaf = x.clone().requires_grad_()
    y = expert_ffn(leaf, offsets, w1, bias, eye, None, activation=activation, backend="compiled")
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    wide = x.double().requires_grad_()
    function = {"gelu": F.gelu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"), "swiglu": F.silu}[activation]
    want = function(wide)
    (want_slope,) = torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope.double(), want_slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=narrow)])
def test_threads_do_not_change_a_bit(dtype):
    x, offsets, params, dy = make([400, 0, 31, 7], 0, 64, 640, 64, dtype=dtype, device="cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(x, offsets, params, dy, backend="compiled"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_rows_that_are_not_finite_stay_with_their_expert():
    x, offsets, params, dy = make([5, 6, 3], 0, 32, 64, 32, dtype=torch.float32, device="cpu")
    clean = run(x, offsets, params, dy, backend="compiled")
    x[5:11], dy[5:11] = math.nan, math.inf
    got = run(x, offsets, params, dy, backend="compiled")
    rows = torch.tensor([*range(5), *range(11, 14)])
    for name, a, b in zip(NAMES, got, clean, strict=True):
        kept = rows if name in ("y", "dx") else torch.tensor([0, 2])
        assert torch.equal(a[kept], b[kept]), name
        assert not a[6 if name in ("y", "dx") else 1].isfinite().all()


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu", "none"])
def test_frozen_tensors_and_missing_biases(activation):
    x, offsets, params, dy = make([4, 20], 0, 16, 32, 16, dtype=torch.float32, device="cpu", activation=activation)
    full = run(x, offsets, params, dy, activation=activation, backend="compiled")
    for free in range(5):
        leaves = [t.clone().requires_grad_(i == free) for i, t in enumerate((x, *params))]
        expert_ffn(leaves[0], offsets, *leaves[1:], activation=activation, backend="compiled").backward(dy)
        assert [leaf.grad is not None for leaf in leaves] == [i == free for i in range(5)]
        torch.testing.assert_close(leaves[free].grad, full[1 + free])
    without = []
    for backend in BOTH:
        leaves = [t.clone().requires_grad_() for t in (x, params[0], params[2])]
        y = expert_ffn(leaves[0], offsets, leaves[1], None, leaves[2], None, activation=activation, backend=backend)
        without.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for a, b in zip(*without, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


BOTH = ("compiled", "reference")


@pytest.mark.parametrize(
    "M,F,dtype", [(16, 24, torch.float32), (8, 16, torch.float32), (16, 16, torch.float16), (16, 16, torch.float64)]
)
def test_what_does_not_fit_is_computed_by_the_other_code(M, F, dtype):
    x, offsets, params, dy = make([3, 5], 0, M, F, M, dtype=dtype, device="cpu")
    assert not compiled.fits(x, params[2], "gelu_tanh")
    got, other = (run(x, offsets, params, dy, backend=backend) for backend in ("compiled", "torch"))
    assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True))


def test_offsets_are_checked():
    x, offsets, params, _ = make([3, 5], 0, 16, 32, 16, dtype=torch.float32, device="cpu")
    strided = torch.stack([offsets, offsets * 0 + 7], 1)[:, 0]
    same = [expert_ffn(x, o, *params, backend="compiled") for o in (offsets, strided)]
    assert torch.equal(*same)
    for wrong in ([0, 3, 9], [0, 5, 3], [1, 3, 8]):
        with pytest.raises(RuntimeError, match="offsets must rise from 0 to at most 8"):
            expert_ffn(x, torch.tensor(wrong, dtype=torch.int32), *params, backend="compiled")


def test_for_large_experts_the_other_code_computes():
    x, weights = torch.zeros(1, 16), torch.empty(1, 64, 16)
    assert compiled.fits(x, weights, "gelu_tanh")
    assert not compiled.fits(x, torch.empty(1, 1 << 20, 16, device="meta"), "gelu_tanh")


def test_a_counter_of_operations_sees_the_products():
    x, offsets, params, _ = make([3, 5], 0, 16, 32, 16, dtype=torch.float32, device="cpu")
    with FlopCounterMode(display=False) as counter:
        expert_ffn(x, offsets, *params, backend="compiled")
    assert counter.get_total_flops() == 8 * 2 * 2 * 16 * 32


@pytest.mark.slow
def test_a_compiler_that_fails_is_one_line_and_leaves_nothing(tmp_path):
    script = (
        '#!/bin/sh\nwhile [ "$1" != -o ]; do shift || exit 3; done\necho half > "$2"; echo made up error >&2; exit 3\n'
    )
    (tmp_path / "broken").write_text(script)
    (tmp_path / "broken").chmod(0o755)
    made = tmp_path / "made"
    made.mkdir()
    killed, beside = made / "moelab-kernels-1.tmp", made / "moelab-kernels-2.tmp"  # another compilation's
    for path in (killed, beside):
        path.touch()
    os.utime(killed, (0, 0))
    code = "from moelab.kernels import _compiled; _compiled.load()"
    env = os.environ | {"CXX": str(tmp_path / "broken"), "TORCH_EXTENSIONS_DIR": str(made)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].endswith("failed: made up error")
    assert [path for path in made.iterdir() if path.suffix != ".lock"] == [beside]


def test_why_not_names_what_is_missing(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler 'no-such-compiler'" in _compiled.why_not()
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert _compiled.why_not() == "the processor has no AVX-512"
