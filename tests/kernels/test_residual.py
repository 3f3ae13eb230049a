"""The residual mix, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moelab.kernels.residual import residual_mix

from tests.kernels.helpers import TOLERANCE, assert_same_bits_on_any_number_of_threads, compare, poison, refused


def make(S, M, dtype):
    """moe, mlp, x, w, b, dy"""
    moe, mlp, x, dy = torch.randn(4, S, M).to(dtype)
    return [moe, mlp, x, (torch.randn(2, M) / M**0.5).to(dtype), torch.randn(2).to(dtype), dy]


def run(backend, tensors):
    """Return the output and the gradients."""
    *leaves, dy = (t.clone() for t in tensors)
    y = residual_mix(*(t.requires_grad_() for t in leaves), backend=backend)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in leaves)]


def check(target, S, M, dtype):
    backend, device, _ = target
    tensors = [t.to(device) for t in make(S, M, dtype)]
    if backend == "cpp" and dtype == torch.float16:
        with refused():
            run("cpp", tensors)
        return
    poison()
    compare(["y", "moe", "mlp", "x", "w", "b"], run(backend, tensors), run("reference", tensors), TOLERANCE[dtype])


@pytest.mark.parametrize("S,M", [(1, 1), (7, 13), (67, 130), (13, 1100), (0, 8)])
def test_values_and_gradients(target, S, M):
    check(target, S, M, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(target, dtype):
    check(target, 13, 67, dtype)


@pytest.mark.parametrize("logit", [-30.0, -17.0, -8.5, 0.5, 8.5, 17.0, 30.0])
def test_the_smaller_weight_keeps_its_digits(target, logit):
    """Gradients of both branches are the weights themselves, whichever of them is near 1."""
    backend, device, _ = target
    S, M = 5, 16
    moe, mlp, x, w, _, dy = (t.to(device) for t in make(S, M, torch.float32))
    b = torch.tensor([logit, 0.0], device=device)
    w = torch.zeros_like(w)
    found = run(backend, [moe, mlp, x, w, b, dy])
    for gradient, weight in zip(found[1:3], torch.tensor([logit, 0.0]).double().softmax(0).tolist(), strict=True):
        torch.testing.assert_close(gradient, dy * weight, rtol=1e-4, atol=0.0)


@settings(max_examples=20, deadline=None)
@given(S=st.integers(1, 40), M=st.integers(1, 90))
def test_hypothesis(target, S, M):
    check(target, S, M, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_any_number_of_threads(instructions, dtype):
    tensors = make(700, 67, dtype)
    assert_same_bits_on_any_number_of_threads(lambda: run("cpp", tensors))


def test_the_reference_mixes_in_float32_under_autocast_too():
    tensors = [t.float() for t in make(13, 67, torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16):
        found = residual_mix(*tensors[:-1], backend="reference")
    assert torch.equal(found, residual_mix(*tensors[:-1], backend="reference"))


def test_tokens_of_another_dtype_are_left_to_the_reference(instructions):
    moe, mlp, x, w, b, _ = make(9, 16, torch.bfloat16)
    with refused():
        residual_mix(moe, mlp, x.float(), w, b, backend="cpp")
    torch.testing.assert_close(residual_mix(moe, mlp, x.float(), w, b), residual_mix(moe, mlp, x, w, b))


def test_gradcheck():
    moe, mlp, x = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    w, b = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((2, 3), (2,)))
    assert torch.autograd.gradcheck(residual_mix, (moe, mlp, x, w, b))


def test_coefficients_stay_per_token():
    """The mix is a softmax over the two branches, not over tokens (a bug of the released code's early days)."""
    moe, mlp = torch.ones(5, 3), torch.zeros(5, 3)
    w = torch.zeros(2, 3)
    assert torch.equal(residual_mix(moe, mlp, torch.randn(5, 3), w, torch.zeros(2)), torch.full((5, 3), 0.5))
    assert torch.equal(residual_mix(moe, mlp, torch.randn(5, 3), w, torch.tensor([50.0, -50.0])), moe)


def test_clear_errors():
    t, w, b = torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(2)
    with pytest.raises(ValueError, match="must agree"):
        residual_mix(t, torch.zeros(3, 5), t, w, b)
    for wrong in ((t[:2], w, b), (t, w[:1], b), (t, w, b[:1])):
        with pytest.raises(ValueError) as caught:
            residual_mix(t, t, *wrong)
        given = ", ".join(str(tuple(one.shape)) for one in wrong)
        assert str(caught.value) == f"residual_mix: x, w and b must be (3, 4), (2, 4) and (2,), got {given}"
