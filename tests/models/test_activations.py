from typing import get_args, get_type_hints

import pytest
import torch

from moelab import kernels
from moelab.config import DecoderConfig, FeedForward
from moelab.config.feed_forward import FUNCTIONS, Function, FunctionName
from moelab.models.moe import MLP, Experts


@pytest.mark.parametrize("name", ["gelu_tanh", "swiglu"])
@pytest.mark.skipif(not kernels.cpp_available(), reason=str(kernels.why_not()))
def test_an_element_has_the_same_bits_anywhere(name):
    x = torch.randn(9, 74, generator=torch.Generator().manual_seed(0))
    whole = kernels.activate(x, name)
    width = whole.shape[1]
    halves = x[:, :width], x[:, width:]
    for columns in (slice(0, 5), slice(3, 36), slice(1, 2)):
        part = torch.cat([h[:, columns] for h in halves], 1) if len(halves[1][0]) else x[:, columns]
        assert torch.equal(kernels.activate(part, name), whole[:, columns])


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
