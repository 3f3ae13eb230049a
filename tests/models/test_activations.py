import pytest
import torch
import torch.nn.functional as F

from moelab.models import activations as module
from moelab.models.activations import gelu


def outcome(function, x):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.backward(torch.ones_like(y))
    return y.detach(), x.grad


def plain(x):
    return F.gelu(x, approximate="tanh")


EVERY_SIZE = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 1e-30, 1e4, -1e4, 1e10, -1e10])])


@pytest.mark.parametrize("chunk", [7, 1 << 18])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 2**-8)]
)
def test_value_and_slope_are_those_of_the_plain_function(dtype, rounding, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    x = EVERY_SIZE.to(dtype)
    for ours, theirs in zip(outcome(gelu, x), outcome(plain, x.double()), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=rounding, atol=rounding)


def test_layout_does_not_matter_and_without_gradient_it_is_the_plain_function():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    a, b = outcome(lambda t: gelu(t.T), x), outcome(lambda t: plain(t.T), x)
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])
    assert torch.equal(gelu(x), plain(x))


def test_swiglu_is_silu_of_the_first_half_times_the_second():
    pre = torch.randn(7, 26, dtype=torch.float64, requires_grad=True)
    gate, up = pre[:, :13], pre[:, 13:]
    torch.testing.assert_close(module.swiglu(pre), gate / (1 + (-gate).exp()) * up)
    assert torch.autograd.gradcheck(module.swiglu, pre)
