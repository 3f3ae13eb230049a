import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from moelab import kernels
from moelab.models.attention import Attention
from tests.kernels.helpers import assert_same_bits_on_any_number_of_threads

module = sys.modules["moelab.kernels.attention"]  # the package has the function of that name
kernel = pytest.mark.skipif(not kernels.cpp_available(), reason=str(kernels.why_not()))


def plain(qkv_BT3HD):
    q, k, v = qkv_BT3HD.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def outcome(function, qkv):
    qkv = qkv.detach().clone().requires_grad_()
    y = function(qkv)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return y.detach(), qkv.grad


@pytest.mark.parametrize(
    ("B", "T", "H", "D"),
    [(2, 128, 1, 32), (3, 67, 2, 64), (1, 13, 3, 7), (2, 1, 1, 4), (4, 16, 4, 16), (2, 256, 2, 48)],
)
def test_output_and_gradient_are_those_of_the_plain_function(B, T, H, D):
    qkv = torch.randn(B, T, 3, H, D, generator=torch.Generator().manual_seed(T), dtype=torch.float64)
    for ours, theirs in zip(outcome(kernels.attention, qkv.float()), outcome(plain, qkv), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@kernel
@pytest.mark.parametrize("instructions", kernels._cpp.supported())
@pytest.mark.parametrize(("B", "T", "H", "D"), [(2, 128, 2, 32), (1, 48, 1, 16), (1, 272, 3, 64)])
def test_the_kernel_on_each_instruction_set(B, T, H, D, instructions):
    """Also longer sequences than it is used for, and the same bits in any batch and on any number of threads."""
    qkv = torch.randn(B, T, 3, H, D, generator=torch.Generator().manual_seed(T))
    run = partial(kernels.attention, backend="cpp")
    with kernels._cpp.limited(instructions):
        found = outcome(run, qkv)
        for ours, theirs in zip(found, outcome(plain, qkv.double()), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
        assert_same_bits_on_any_number_of_threads(lambda: outcome(run, qkv))
        assert torch.equal(run(qkv[:1]), found[0][:1])


@kernel
def test_what_the_kernel_does_not_take_is_one_line():
    with pytest.raises(ValueError, match="attention: backend 'cpp' does not take these sizes"):
        kernels.attention(torch.randn(1, 17, 3, 1, 16), backend="cpp")


@pytest.mark.parametrize(
    "wrong", [torch.ones(1, 16, 3, 1, 16, dtype=torch.int32), torch.ones(1, 16, 3, 16)], ids=["integers", "four dims"]
)
def test_integers_and_other_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^attention: queries, keys and values must be floating point \[B, T, 3, H"):
        kernels.attention(wrong)


def test_autocast_changes_no_dtype_on_either_path():
    qkv = torch.randn(1, 17, 3, 1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.attention(qkv).dtype == kernels.attention(qkv[:, :16]).dtype == torch.float32


def test_tensors_without_numbers_have_shape_and_dtype():
    y = kernels.attention(torch.empty(2, 8, 3, 4, 16, dtype=torch.bfloat16, device="meta"))
    assert y.shape == (2, 8, 4, 16) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [1, 4])  # of queries and keys: flat and peaked probabilities
def test_bf16_is_as_exact_as_the_fused_kernel(scale, autocast):
    qkv = torch.randn(4, 128, 3, 2, 32, generator=torch.Generator().manual_seed(0))
    qkv[:, :, :2] *= scale
    qkv = qkv.bfloat16()
    exact = outcome(plain, qkv.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, fused = outcome(kernels.attention, qkv), outcome(plain, qkv)
    for ours, theirs, truth in zip(found, fused, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - truth).norm() <= 1.6 * (theirs - truth).norm()


@kernel
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_module_takes_either_path(dropout, tiny_model, monkeypatch):
    layer = Attention(replace(tiny_model, hidden=32, heads=2, dropout=dropout)).bfloat16()
    x = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with kernels._cpp.limited("none"):
        fused = layer.eval()(x)
    calls, apply = [], module._Attention.apply
    monkeypatch.setattr(module._Attention, "apply", lambda qkv: calls.append(1) or apply(qkv))
    torch.testing.assert_close(layer.eval()(x), fused, rtol=0.02, atol=0.02)
    assert calls == [1]
    layer.train()(x)
    assert len(calls) == (1 if dropout else 2), "dropout of probabilities is the fused kernel's business"
