"""Residual MoE: a token's routed expert and its fixed MLP, mixed (paper 4.1.2, notes 4).

Shapes: S tokens, M hidden. Three ways, all of which the literature of this one model contains:

- learned mix: ``a = softmax(x @ W^T + b)``, ``y = a_0 * moe + a_1 * mlp``, per token. The released code, and what the
  paper's runs most likely used.
- given coefficients: the same with ``a`` from the caller (any values).
- plain sum: ``y = moe + mlp``, the paper's text.

Only the difference of the two logits matters: ``a_0 = sigmoid(x . (W_0 - W_1) + b_0 - b_1)``. Mixing is in float32.
"""

from __future__ import annotations

import torch

from ._common import Backend, accumulate_dtype, next_power_of_2, pick_backend, tl, triton


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
    """y [S, M] in moe's dtype. With ``x_SM`` and ``w_2M`` (and ``b_2``; a Linear(M, 2)'s parameters) the learned mix,
    with ``coefficient_S2`` the given one (column 0 belongs to moe), with neither the plain sum. Differentiable in
    everything.

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
    if w_2M is not None and (x_SM.shape != (S, M) or w_2M.shape != (2, M) or (b_2 is not None and b_2.shape != (2,))):
        raise ValueError(
            f"residual_mix: x {tuple(x_SM.shape)}, w {tuple(w_2M.shape)} must be {(S, M)} and {(2, M)}, b [2]"
        )
    if coefficient_S2 is not None and (w_2M is not None or coefficient_S2.shape != (S, 2)):
        raise ValueError(
            f"residual_mix: either x_SM and w_2M or coefficients {(S, 2)}, not {tuple(coefficient_S2.shape)}"
        )
    chosen = pick_backend("residual_mix", backend, moe_SM, mlp_SM, x_SM, w_2M, b_2, coefficient_S2)
    if w_2M is None and coefficient_S2 is None:
        return moe_SM + mlp_SM
    if chosen == "reference":
        wide = accumulate_dtype(moe_SM.dtype)
        if coefficient_S2 is None:
            logits_S2 = x_SM.to(wide) @ w_2M.to(wide).T
            coefficient_S2 = (logits_S2 if b_2 is None else logits_S2 + b_2.to(wide)).softmax(1)
        a_S2 = coefficient_S2.to(wide)
        return (a_S2[:, :1] * moe_SM.to(wide) + a_S2[:, 1:] * mlp_SM.to(wide)).to(moe_SM.dtype)
    if coefficient_S2 is not None:
        return _Mix.apply(moe_SM, mlp_SM, coefficient_S2, chosen)
    return _LearnedMix.apply(moe_SM, mlp_SM, x_SM, w_2M, b_2, chosen)


class _Mix(torch.autograd.Function):
    """Given coefficients."""

    @staticmethod
    def forward(ctx, moe, mlp, a_S2, backend):
        moe, mlp, a_S2 = moe.contiguous(), mlp.contiguous(), a_S2.contiguous()
        ctx.save_for_backward(moe, mlp, a_S2)
        ctx.backend = backend
        if backend == "triton":
            return _mix_triton(moe, mlp, a_S2)[0]
        return _mix_torch(moe, mlp, a_S2)

    @staticmethod
    def backward(ctx, dy):
        moe, mlp, a_S2 = ctx.saved_tensors
        dy = dy.contiguous()
        if ctx.backend == "triton":
            d_moe, d_mlp, da_S2, _ = _mix_backward_triton(dy, moe, mlp, a_S2)
        else:
            d_moe, d_mlp, da_S2 = _mix_backward_torch(dy, moe, mlp, a_S2)
        return d_moe, d_mlp, da_S2.to(a_S2.dtype), None


class _LearnedMix(torch.autograd.Function):
    """Coefficients from a two-way softmax of a linear map of x."""

    @staticmethod
    def forward(ctx, moe, mlp, x, w_2M, b_2, backend):
        moe, mlp, x, w_2M = moe.contiguous(), mlp.contiguous(), x.contiguous(), w_2M.contiguous()
        if backend == "triton":
            y, a_S2 = _mix_triton(moe, mlp, None, x, w_2M, b_2)
        else:
            wide = accumulate_dtype(x.dtype)
            logits_S2 = torch.nn.functional.linear(x, w_2M.to(x.dtype)).to(wide)
            a_S2 = (logits_S2 if b_2 is None else logits_S2 + b_2.to(wide)).softmax(1)
            y = _mix_torch(moe, mlp, a_S2)
        ctx.save_for_backward(moe, mlp, x, w_2M, b_2, a_S2)
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx, dy):
        moe, mlp, x, w_2M, b_2, a_S2 = ctx.saved_tensors
        dy = dy.contiguous()
        if ctx.backend == "triton":
            d_moe, d_mlp, dl_S, dx = _mix_backward_triton(dy, moe, mlp, a_S2, x, w_2M)
        else:
            d_moe, d_mlp, da_S2 = _mix_backward_torch(dy, moe, mlp, a_S2)
            dl_S = a_S2[:, 0] * a_S2[:, 1] * (da_S2[:, 0] - da_S2[:, 1])
            dx = torch.outer(dl_S, (w_2M[0] - w_2M[1]).to(dl_S.dtype)).to(x.dtype)
        # the second row of every gradient is the negated first; sums over tokens go to the matrix library
        dw_M = dl_S @ x.to(dl_S.dtype)
        dw_2M = torch.stack([dw_M, -dw_M]).to(w_2M.dtype)
        db_2 = None
        if b_2 is not None:
            total = dl_S.sum()
            db_2 = torch.stack([total, -total]).to(b_2.dtype)
        return d_moe, d_mlp, dx, dw_2M, db_2, None


# --- CPU --------------------------------------------------------------------------------------------------------------


def _mix_torch(moe, mlp, a_S2):
    wide = a_S2.dtype if moe.dtype == torch.float64 else torch.float32
    a_S2 = a_S2.to(wide)
    y = moe * a_S2[:, :1]  # in float32: the coefficients are
    return y.addcmul_(mlp.to(wide), a_S2[:, 1:]).to(moe.dtype)


def _mix_backward_torch(dy, moe, mlp, a_S2):
    """(d moe, d mlp, d a [S, 2] in float32)."""
    wide = accumulate_dtype(dy.dtype)
    dy_wide = dy.to(wide)
    da_S2 = torch.stack([torch.linalg.vecdot(dy_wide, t.to(wide)) for t in (moe, mlp)], 1)
    a_S2 = a_S2.to(wide)
    return (dy_wide * a_S2[:, :1]).to(dy.dtype), (dy_wide * a_S2[:, 1:]).to(dy.dtype), da_S2


# --- GPU --------------------------------------------------------------------------------------------------------------


@triton.jit
def _mix_kernel(
    moe_p, mlp_p, x_p, w_p, b_p, a_p, y_p, S, M,
    LEARNED: tl.constexpr, BIAS: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y = a_0 moe + a_1 mlp for BS tokens; LEARNED computes a from x and stores it."""
    s = tl.program_id(0) * BS + tl.arange(0, BS)
    at = s[:, None].to(tl.int64) * M
    if LEARNED:
        logit = tl.zeros([BS], tl.float32)
        for start in range(0, M, BM):
            m = start + tl.arange(0, BM)
            inside = (s[:, None] < S) & (m[None, :] < M)
            w = tl.load(w_p + m, mask=m < M, other=0.0).to(tl.float32)
            w -= tl.load(w_p + M + m, mask=m < M, other=0.0).to(tl.float32)
            x = tl.load(x_p + at + m[None, :], mask=inside, other=0.0).to(tl.float32)
            logit += tl.sum(x * w[None, :], axis=1)
        if BIAS:
            logit += tl.load(b_p).to(tl.float32) - tl.load(b_p + 1).to(tl.float32)
        a0 = 1.0 / (1.0 + tl.exp(-logit))
        a1 = 1.0 / (1.0 + tl.exp(logit))
        tl.store(a_p + s * 2, a0, mask=s < S)
        tl.store(a_p + s * 2 + 1, a1, mask=s < S)
    else:
        a0 = tl.load(a_p + s * 2, mask=s < S, other=0.0).to(tl.float32)
        a1 = tl.load(a_p + s * 2 + 1, mask=s < S, other=0.0).to(tl.float32)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        inside = (s[:, None] < S) & (m[None, :] < M)
        moe = tl.load(moe_p + at + m[None, :], mask=inside, other=0.0).to(tl.float32)
        mlp = tl.load(mlp_p + at + m[None, :], mask=inside, other=0.0).to(tl.float32)
        y = a0[:, None] * moe + a1[:, None] * mlp
        tl.store(y_p + at + m[None, :], y.to(y_p.dtype.element_ty), mask=inside)


@triton.jit
def _mix_backward_kernel(
    dy_p, moe_p, mlp_p, a_p, w_p, d_moe_p, d_mlp_p, da_p, dx_p, S, M,
    LEARNED: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """d moe, d mlp, and d a [S, 2]; with LEARNED instead d (logit_0 - logit_1) [S] and d x."""
    s = tl.program_id(0) * BS + tl.arange(0, BS)
    at = s[:, None].to(tl.int64) * M
    a0 = tl.load(a_p + s * 2, mask=s < S, other=0.0).to(tl.float32)
    a1 = tl.load(a_p + s * 2 + 1, mask=s < S, other=0.0).to(tl.float32)
    da0 = tl.zeros([BS], tl.float32)
    da1 = tl.zeros([BS], tl.float32)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        inside = (s[:, None] < S) & (m[None, :] < M)
        dy = tl.load(dy_p + at + m[None, :], mask=inside, other=0.0).to(tl.float32)
        da0 += tl.sum(dy * tl.load(moe_p + at + m[None, :], mask=inside, other=0.0).to(tl.float32), axis=1)
        da1 += tl.sum(dy * tl.load(mlp_p + at + m[None, :], mask=inside, other=0.0).to(tl.float32), axis=1)
        tl.store(d_moe_p + at + m[None, :], (a0[:, None] * dy).to(d_moe_p.dtype.element_ty), mask=inside)
        tl.store(d_mlp_p + at + m[None, :], (a1[:, None] * dy).to(d_mlp_p.dtype.element_ty), mask=inside)
    if LEARNED:
        dl = a0 * a1 * (da0 - da1)
        tl.store(da_p + s, dl, mask=s < S)
        for start in range(0, M, BM):
            m = start + tl.arange(0, BM)
            w = tl.load(w_p + m, mask=m < M, other=0.0).to(tl.float32)
            w -= tl.load(w_p + M + m, mask=m < M, other=0.0).to(tl.float32)
            inside = (s[:, None] < S) & (m[None, :] < M)
            tl.store(dx_p + at + m[None, :], (dl[:, None] * w[None, :]).to(dx_p.dtype.element_ty), mask=inside)
    else:
        tl.store(da_p + s * 2, da0, mask=s < S)
        tl.store(da_p + s * 2 + 1, da1, mask=s < S)


def _mix_tile(S: int, M: int) -> dict:
    """Tokens and columns of a program."""
    columns = min(next_power_of_2(M), 1024)
    elements = 1024 if M % 16 else 2048  # odd widths are addressed one by one, which takes registers
    return dict(BS=min(max(elements // columns, 1), next_power_of_2(S)), BM=columns, num_warps=4)


def _mix_triton(moe, mlp, a_S2, x=None, w=None, b=None):
    S, M = moe.shape
    y = torch.empty_like(moe)
    learned = x is not None
    if learned:
        a_S2 = torch.empty(S, 2, dtype=torch.float32, device=moe.device)
    if S * M:
        tile = _mix_tile(S, M)
        _mix_kernel[(triton.cdiv(S, tile["BS"]),)](
            moe, mlp, x if learned else moe, w if learned else moe, moe if b is None else b, a_S2, y, S, M,
            LEARNED=learned, BIAS=b is not None, **tile,
        )  # fmt: skip
    return y, a_S2


def _mix_backward_triton(dy, moe, mlp, a_S2, x=None, w=None):
    """(d moe, d mlp, d a [S, 2] or d logit [S], d x or None)."""
    S, M = moe.shape
    learned = x is not None
    d_moe, d_mlp = torch.empty_like(moe), torch.empty_like(mlp)
    dx = torch.empty_like(x) if learned else None
    da = torch.empty((S,) if learned else (S, 2), dtype=torch.float32, device=moe.device)
    if S * M:
        tile = _mix_tile(S, M)
        _mix_backward_kernel[(triton.cdiv(S, tile["BS"]),)](
            dy,
            moe,
            mlp,
            a_S2,
            w if learned else dy,
            d_moe,
            d_mlp,
            da,
            dx if learned else dy,
            S,
            M,
            LEARNED=learned,
            **tile,
        )
    return d_moe, d_mlp, da, dx
