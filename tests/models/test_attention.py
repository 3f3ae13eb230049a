from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moelab.models import attention as module
from moelab.models.attention import Attention, short_attention


def plain(qkv_BT3HD):
    q, k, v = qkv_BT3HD.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def outcome(function, qkv):
    qkv = qkv.detach().clone().requires_grad_()
    y = function(qkv)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return y.detach(), qkv.grad


@pytest.mark.parametrize(
    ("B", "T", "H", "D"), [(2, 128, 1, 32), (3, 67, 2, 64), (1, 13, 3, 7), (2, 1, 1, 4), (4, 2, 4, 16)]
)
def test_output_and_gradient_are_those_of_the_plain_function(B, T, H, D):
    qkv = torch.randn(B, T, 3, H, D, generator=torch.Generator().manual_seed(T), dtype=torch.float64)
    for ours, theirs in zip(outcome(short_attention, qkv), outcome(plain, qkv), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(outcome(short_attention, qkv.float()), outcome(plain, qkv), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [1, 4])  # of queries and keys: flat and peaked probabilities
def test_bf16_is_as_exact_as_the_fused_kernel(scale, autocast):
    qkv = torch.randn(4, 128, 3, 2, 32, generator=torch.Generator().manual_seed(0))
    qkv[:, :, :2] *= scale
    qkv = qkv.bfloat16()
    exact = outcome(plain, qkv.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, fused = outcome(short_attention, qkv), outcome(plain, qkv)
    for ours, theirs, truth in zip(found, fused, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - truth).norm() <= 1.6 * (theirs - truth).norm()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_module_takes_either_path(dropout, tiny_model, monkeypatch):
    layer = Attention(replace(tiny_model, dropout=dropout)).bfloat16()
    x = torch.randn(2, 32, tiny_model.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    calls = []
    monkeypatch.setattr(module, "short_attention", lambda qkv: calls.append(1) or short_attention(qkv))
    short = layer.eval()(x)
    assert calls == [1]
    layer.train()(x)
    assert len(calls) == (1 if dropout else 2), "dropout of probabilities is the fused kernel's business"
    monkeypatch.setattr(module, "SHORT", 16)
    torch.testing.assert_close(layer.eval()(x), short, rtol=0.02, atol=0.02)
    layer.float()(x.float())
    assert len(calls) == (1 if dropout else 2), "neither a longer sequence nor fp32 takes the short path"
