"""Mix a token's routed expert with its fixed MLP: Residual MoE (paper 4.1.2).

Shapes: S tokens, M hidden. The branches are mixed in one of three ways:

- learned mix: ``a = softmax(x @ W^T + b)``, ``y = a_0 * moe + a_1 * mlp``, per token, as in the released code; the
  paper's runs most likely used it.
- given coefficients: the same with ``a`` from the caller (any values).
- plain sum: ``y = moe + mlp``, as in the paper's text.

Only the difference of the two logits matters: ``a_0 = sigmoid(x . (W_0 - W_1) + b_0 - b_1)``. Mixing is in float32.
The Triton implementation is in ``_residual_triton.py``, that for CPU in ``_cpp/residual.cpp``.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._common import Backend, accumulate_dtype, contiguous, pick_backend
from ._cpp import operations
from .packed import pack_mix


def residual_mix(
    moe_SM: torch.Tensor,
    mlp_SM: torch.Tensor,
    x_SM: torch.Tensor | None = None,
    w_2M: torch.Tensor | None = None,
    b_2: torch.Tensor | None = None,
    *,
    coefficient_S2: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return the mix y [S, M] in moe's dtype.

    With ``x_SM`` and ``w_2M`` (and ``b_2``; the parameters of a Linear(M, 2)) the mix is learned, with
    ``coefficient_S2`` (column 0 weights moe) it has given coefficients, and with neither it is the plain sum.
    Differentiable (once) in all tensors.

    Raises ``ValueError`` for shapes that do not fit, or for both kinds of coefficients at once.
    """
    if moe_SM.dim() != 2 or moe_SM.shape != mlp_SM.shape or moe_SM.dtype != mlp_SM.dtype:
        raise ValueError(
            f"residual_mix: moe {moe_SM.dtype} {tuple(moe_SM.shape)} and mlp {mlp_SM.dtype} {tuple(mlp_SM.shape)} "
            "must agree"
        )
    S, M = moe_SM.shape
    if (x_SM is None) != (w_2M is None) or (b_2 is not None and w_2M is None):
        raise ValueError("residual_mix: the learned mix needs both x_SM and w_2M")
    fit = ((x_SM, (S, M)), (w_2M, (2, M)), (b_2, (2,)))
    if x_SM is not None and w_2M is not None and any(t is not None and t.shape != shape for t, shape in fit):
        raise ValueError(
            f"residual_mix: x {tuple(x_SM.shape)}, w {tuple(w_2M.shape)} must be {(S, M)} and {(2, M)}, b [2]"
        )
    if coefficient_S2 is not None and (w_2M is not None or coefficient_S2.shape != (S, 2)):
        raise ValueError(
            f"residual_mix: either x_SM and w_2M or coefficients {(S, 2)}, not {tuple(coefficient_S2.shape)}"
        )
    fits = moe_SM.is_floating_point() and (x_SM is None or x_SM.dtype == moe_SM.dtype)
    chosen = pick_backend("residual_mix", backend, moe_SM, mlp_SM, x_SM, w_2M, b_2, coefficient_S2, fits=fits)
    if w_2M is None and coefficient_S2 is None:
        return moe_SM + mlp_SM
    if chosen == "reference":
        wide = accumulate_dtype(moe_SM.dtype)
        if x_SM is not None and w_2M is not None:
            logits_S2 = x_SM.to(wide) @ w_2M.to(wide).T
            coefficient_S2 = (logits_S2 if b_2 is None else logits_S2 + b_2.to(wide)).softmax(1)
        assert coefficient_S2 is not None
        a_S2 = coefficient_S2.to(wide)
        return (a_S2[:, :1] * moe_SM.to(wide) + a_S2[:, 1:] * mlp_SM.to(wide)).to(moe_SM.dtype)
    if coefficient_S2 is not None:
        return _Mix.apply(*contiguous(moe_SM, mlp_SM, coefficient_S2), chosen)
    return _LearnedMix.apply(*contiguous(moe_SM, mlp_SM, x_SM, w_2M, b_2), chosen)


class _Mix(torch.autograd.Function):
    """Mix with given coefficients."""

    @staticmethod
    def forward(ctx, moe, mlp, a_S2, backend):
        ctx.backend, ctx.dtype = backend, a_S2.dtype
        if backend == "triton":
            from ._residual_triton import mix_triton

            ctx.save_for_backward(moe, mlp, a_S2)
            return mix_triton(moe, mlp, a_S2)[0]
        a_S2 = a_S2.float()
        ctx.save_for_backward(moe, mlp, a_S2)
        return operations().mix.default(moe, mlp, a_S2, None, None, 0.0, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        moe, mlp, a_S2 = ctx.saved_tensors
        dy = dy.contiguous()
        if ctx.backend == "triton":
            from ._residual_triton import mix_backward_triton

            d_moe, d_mlp, da_S2, _ = mix_backward_triton(dy, moe, mlp, a_S2)
        else:
            d_moe, d_mlp, da_S2 = (torch.empty_like(t) for t in (moe, mlp, a_S2))
            operations().mix_backward.default(dy, moe, mlp, a_S2, None, None, d_moe, d_mlp, da_S2, None, None)
        return d_moe, d_mlp, da_S2.to(ctx.dtype), None


class _LearnedMix(torch.autograd.Function):
    """Mix with the two-way softmax of a linear map of x."""

    @staticmethod
    def forward(ctx, moe, mlp, x, w_2M, b_2, backend):
        if backend == "triton":
            from ._residual_triton import mix_triton

            y, a_S2 = mix_triton(moe, mlp, None, x, w_2M, b_2)
        else:
            a_S2 = torch.empty(len(moe), 2, dtype=torch.float32)
            y = operations().mix.default(moe, mlp, a_S2, x, *pack_mix(w_2M, b_2), None)
        ctx.save_for_backward(moe, mlp, x, w_2M, b_2, a_S2)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        moe, mlp, x, w_2M, b_2, a_S2 = ctx.saved_tensors
        dy = dy.contiguous()
        if ctx.backend == "triton":
            from ._residual_triton import mix_backward_triton

            d_moe, d_mlp, dl_S, dx = mix_backward_triton(dy, moe, mlp, a_S2, x, w_2M)
            dw_M, db = dl_S @ x.to(dl_S.dtype), dl_S.sum()  # sums over tokens go to the matrix library
        else:
            d_moe, d_mlp, dx = (torch.empty_like(t) for t in (moe, mlp, x))
            sums = torch.empty(x.shape[1] + 1, dtype=torch.float32)
            tensors = dy, moe, mlp, a_S2, x, pack_mix(w_2M, None).difference_M, d_moe, d_mlp, None, dx, sums
            operations().mix_backward.default(*tensors)
            dw_M, db = sums[:-1], sums[-1]
        # the second row of every gradient is the negated first
        dw_2M = torch.stack([dw_M, -dw_M]).to(w_2M.dtype)
        db_2 = None if b_2 is None else torch.stack([db, -db]).to(b_2.dtype)
        return d_moe, d_mlp, dx, dw_2M, db_2, None
