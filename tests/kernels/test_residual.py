"""The residual mix: all three ways, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moelab.kernels.residual import residual_mix

from tests.kernels.helpers import TOLERANCE, assert_same_bits_on_any_number_of_threads, compare, poison, refused

WAYS = ["learned", "no bias", "given", "sum"]


def make(S, M, dtype):
    """moe, mlp, x, dy, w, b, coefficients"""
    w, b = torch.randn(2, M) / M**0.5, torch.randn(2)
    return [*torch.randn(4, S, M).to(dtype), w.to(dtype), b.to(dtype), torch.rand(S, 2)]


def run(way, backend, tensors):
    """Return names and outputs and gradients."""
    moe, mlp, x, dy, w, b, a = (t.clone() for t in tensors)
    more = {"learned": dict(x=x, w=w, b=b), "no bias": dict(x=x, w=w), "given": dict(a=a), "sum": {}}[way]
    leaves = {name: t.requires_grad_() for name, t in dict(moe=moe, mlp=mlp, **more).items()}
    args = [t for name, t in leaves.items() if name in "xwb"]
    y = residual_mix(moe, mlp, *args, coefficient_S2=leaves.get("a"), backend=backend)
    y.backward(dy)
    return ["y", *leaves], [y.detach(), *(t.grad for t in leaves.values())]


def check(target, S, M, way, dtype):
    backend, device, _ = target
    tensors = [t.to(device) for t in make(S, M, dtype)]
    if backend == "cpp" and dtype == torch.float16:
        with refused():
            run(way, "cpp", tensors)
        return
    poison()
    names, got = run(way, backend, tensors)
    compare(names, got, run(way, "reference", tensors)[1], TOLERANCE[dtype])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("S,M", [(1, 1), (7, 13), (67, 130), (13, 1100), (0, 8)])
def test_values_and_gradients(target, S, M, way):
    check(target, S, M, way, torch.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(target, way, dtype):
    check(target, 13, 67, way, dtype)


@settings(max_examples=20, deadline=None)
@given(S=st.integers(1, 40), M=st.integers(1, 90), way=st.sampled_from(WAYS))
def test_hypothesis(target, S, M, way):
    check(target, S, M, way, torch.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_any_number_of_threads(instructions, way, dtype):
    tensors = make(700, 67, dtype)
    assert_same_bits_on_any_number_of_threads(lambda: run(way, "cpp", tensors)[1])


def test_tokens_of_another_dtype_are_left_to_the_reference(instructions):
    moe, mlp, x, _, w, b, _ = make(9, 16, torch.bfloat16)
    with refused():
        residual_mix(moe, mlp, x.float(), w, b, backend="cpp")
    torch.testing.assert_close(residual_mix(moe, mlp, x.float(), w, b), residual_mix(moe, mlp, x, w, b))


def test_gradcheck():
    moe, mlp, x = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    w, b, a = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((2, 3), (2,), (4, 2)))
    assert torch.autograd.gradcheck(residual_mix, (moe, mlp, x, w, b))
    assert torch.autograd.gradcheck(lambda m, n, a: residual_mix(m, n, coefficient_S2=a), (moe, mlp, a))


def test_coefficients_stay_per_token():
    """The mix is a softmax over the two branches, not over tokens (a bug of the released code's early days)."""
    moe, mlp = torch.ones(5, 3), torch.zeros(5, 3)
    w = torch.zeros(2, 3)
    assert torch.equal(residual_mix(moe, mlp, torch.randn(5, 3), w), torch.full((5, 3), 0.5))
    assert torch.equal(residual_mix(moe, mlp, torch.randn(5, 3), w, torch.tensor([50.0, -50.0])), moe)


def test_clear_errors():
    t = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="must agree"):
        residual_mix(t, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="both x_SM and w_2M"):
        residual_mix(t, t, t)
    with pytest.raises(ValueError, match="either"):
        residual_mix(t, t, t, torch.zeros(2, 4), coefficient_S2=torch.zeros(3, 2))
