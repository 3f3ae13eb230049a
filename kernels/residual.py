"""Mix a token's routed expert with its fixed MLP: Residual MoE (paper 4.1.2).

``a = softmax(x @ W^T + b)``, ``y = a_0 * moe + a_1 * mlp``, per token, as in the released code, which the paper's runs
most likely used. (The sum ``moe + mlp`` of the paper's text needs no operation.)

Shapes: S tokens, M hidden. Only the difference of the two logits matters: ``a_0 = sigmoid(x . (W_0 - W_1) + b_0 -
b_1)``. Mixing is in float32. The Triton implementation is in ``_residual_triton.py``, that for CPU in
``_cpp/residual.cpp``.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._common import Backend, accumulate_dtype, contiguous, pick_backend
from ._cpp import operations


def residual_mix(
    moe_SM: torch.Tensor,
    mlp_SM: torch.Tensor,
    x_SM: torch.Tensor,
    w_2M: torch.Tensor,
    b_2: torch.Tensor,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return the mix y [S, M] in moe's dtype, by the parameters of a Linear(M, 2), whose first output weights moe.

    Differentiable (once) in all tensors.

    Raises ``ValueError`` for shapes that do not fit.
    """
    if moe_SM.dim() != 2 or moe_SM.shape != mlp_SM.shape or moe_SM.dtype != mlp_SM.dtype:
        raise ValueError(
            f"residual_mix: moe {moe_SM.dtype} {tuple(moe_SM.shape)} and mlp {mlp_SM.dtype} {tuple(mlp_SM.shape)} "
            "must agree"
        )
    S, M = moe_SM.shape
    shapes = tuple(x_SM.shape), tuple(w_2M.shape), tuple(b_2.shape)
    if shapes != ((S, M), (2, M), (2,)):
        given = ", ".join(map(str, shapes))
        raise ValueError(f"residual_mix: x, w and b must be {(S, M)}, {(2, M)} and (2,), got {given}")
    fits = moe_SM.is_floating_point() and x_SM.dtype == moe_SM.dtype
    chosen = pick_backend("residual_mix", backend, moe_SM, mlp_SM, x_SM, w_2M, b_2, fits=fits)
    if chosen == "reference":
        wide = accumulate_dtype(moe_SM.dtype)
        with torch.autocast(moe_SM.device.type, enabled=False):
            a_S2 = (x_SM.to(wide) @ w_2M.to(wide).T + b_2.to(wide)).softmax(1)
        return (a_S2[:, :1] * moe_SM.to(wide) + a_S2[:, 1:] * mlp_SM.to(wide)).to(moe_SM.dtype)
    return _Mix.apply(*contiguous(moe_SM, mlp_SM, x_SM, w_2M, b_2), chosen)


def differences(w_2M: torch.Tensor, b_2: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the first row minus the second, float32 [M], and the same of the bias, as the C++ takes them."""
    w_2M, b_2 = w_2M.detach().float(), b_2.detach().float()
    return (w_2M[0] - w_2M[1]).contiguous(), float(b_2[0] - b_2[1])


class _Mix(torch.autograd.Function):
    """Mix with the two-way softmax of a linear map of x."""

    @staticmethod
    def forward(ctx, moe, mlp, x, w_2M, b_2, backend):
        if backend == "triton":
            from ._residual_triton import mix_triton

            y, a_S2 = mix_triton(moe, mlp, x, w_2M, b_2)
        else:
            a_S2 = torch.empty(len(moe), 2, dtype=torch.float32)
            y = operations().mix.default(moe, mlp, a_S2, x, *differences(w_2M, b_2), None)
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
            difference_M, _ = differences(w_2M, b_2)
            operations().mix_backward.default(dy, moe, mlp, a_S2, x, difference_M, d_moe, d_mlp, dx, sums)
            dw_M, db = sums[:-1], sums[-1]
        # the second row of every gradient is the negated first
        dw_2M, db_2 = torch.stack([dw_M, -dw_M]).to(w_2M.dtype), torch.stack([db, -db]).to(b_2.dtype)
        return d_moe, d_mlp, dx, dw_2M, db_2, None
