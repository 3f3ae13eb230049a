from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F

from moelab import kernels
from moelab.config import DecoderConfig, FeedForward
from moelab.config.feed_forward import FUNCTIONS, Function, FunctionName
from moelab.models import activations as module
from moelab.models.activations import gelu
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


def test_each_function_of_a_feed_forward_is_an_activation_of_the_kernels():
    """The names and what is gated stand in the configuration as well, which imports no torch."""
    assert set(FUNCTIONS) == set(get_args(FunctionName)) == set(get_args(get_type_hints(DecoderConfig)["feed_forward"]))
    for activation, gated in FUNCTIONS.values():
        assert kernels.ACTIVATIONS[activation].gated == gated


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("name", kernels.ACTIVATIONS)
def test_dense_layers_and_experts_compute_any_activation_of_the_table(name, biases, monkeypatch):
    activation = kernels.ACTIVATIONS[name]
    monkeypatch.setitem(FUNCTIONS, "another", Function(name, activation.gated))
    shape, generator = FeedForward(6, 10, "another", biases), torch.Generator().manual_seed(0)
    mlp, experts = MLP(shape).double(), Experts(1, shape).double()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for name, parameter in experts.named_parameters():
            stem, _, bias = name.partition("_")
            source = mlp.get_submodule(stem).get_parameter(bias or "weight")
            parameter.copy_((source.mT if source.dim() == 2 else source).reshape(parameter.shape))
    assert [sum(p.numel() for p in m.parameters()) for m in (mlp, experts)] == [shape.parameters] * 2
    x = torch.randn(7, 6, dtype=torch.float64, generator=generator)
    expected = mlp.down(activation.forward(mlp.up(x)))
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(experts(x, torch.tensor([0, 7], dtype=torch.int32)), expected)
