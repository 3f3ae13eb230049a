from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F

from moelab.config import DecoderConfig
from moelab.models import activations as module
from moelab.models.activations import ACTIVATIONS, Implementation, gelu
from moelab.models.moe import MLP, Experts


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


def decoder(feed_forward):
    """A decoder with a value that its class does not allow yet."""
    config = DecoderConfig()
    object.__setattr__(config, "feed_forward", feed_forward)
    return config


def test_every_feed_forward_has_an_activation():
    assert set(get_args(get_type_hints(DecoderConfig)["feed_forward"])) == set(ACTIVATIONS)


@pytest.mark.parametrize("make", [lambda d: MLP(4, 8, d), lambda d: Experts(2, 4, 8, d)], ids=["dense", "experts"])
def test_a_feed_forward_without_activation_is_refused_in_one_line(make):
    with pytest.raises(ValueError, match=r"^model: feed_forward 'relu' has no activation; .* has 'gelu', 'swiglu'$"):
        make(decoder("relu"))


def test_a_new_activation_is_that_of_dense_layers_and_experts(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "exact", Implementation("gelu", F.gelu))
    generator = torch.Generator().manual_seed(0)
    mlp, experts = MLP(6, 10, decoder("exact")).double(), Experts(1, 6, 10, decoder("exact")).double()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for linear, weight, bias in (
            (mlp.up, experts.up, experts.up_bias),
            (mlp.down, experts.down, experts.down_bias),
        ):
            weight[0].copy_(linear.weight.T)
            bias[0].copy_(linear.bias)
    x = torch.randn(7, 6, dtype=torch.float64, generator=generator)
    expected = mlp.down(F.gelu(mlp.up(x)))
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(experts(x, torch.tensor([0, 7], dtype=torch.int32)), expected)
    assert not torch.allclose(mlp.down(plain(mlp.up(x))), expected), "the two GELUs differ"
