"""The residual mix: all three ways, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moelab.kernels.residual import residual_mix

WAYS = ["learned", "no bias", "given", "sum"]


def run(S, M, way, dtype, backend, device, tensors):
    moe, mlp, x, w, b, a, dy = (t.clone().to(device) for t in tensors)
    leaves = dict(moe=moe, mlp=mlp)
    args, kwargs = [], {}
    if way in ("learned", "no bias"):
        leaves |= dict(x=x, w=w) | (dict(b=b) if way == "learned" else {})
        args = list(leaves.values())[2:]
    if way == "given":
        leaves["a"] = kwargs["coefficient_S2"] = a
    for t in leaves.values():
        t.requires_grad_()
    y = residual_mix(moe, mlp, *args, backend=backend, **kwargs)
    y.backward(dy)
    return dict(y=y.detach()) | {k: t.grad for k, t in leaves.items()}


def check(target, S, M, way, dtype):
    tensors = [torch.randn(S, M).to(dtype) for _ in range(3)]
    tensors += [t.to(dtype) for t in (torch.randn(2, M) * M**-0.5, torch.randn(2))]
    tensors += [torch.rand(S, 2), torch.randn(S, M).to(dtype)]
    got = run(S, M, way, dtype, *target, tensors)
    want = run(S, M, way, dtype, "reference", target[1], tensors)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for name, a in got.items():
        b = want[name]
        assert a.dtype == b.dtype and a.shape == b.shape
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


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


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend):
    moe, mlp, x = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    w, b, a = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((2, 3), (2,), (4, 2)))
    assert torch.autograd.gradcheck(lambda *t: residual_mix(*t, backend=backend), (moe, mlp, x, w, b))
    assert torch.autograd.gradcheck(
        lambda m, n, a: residual_mix(m, n, coefficient_S2=a, backend=backend), (moe, mlp, a)
    )


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
