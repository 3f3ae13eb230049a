"""Mix two branches in Triton. The number of tokens does not specialise the kernels."""

from __future__ import annotations

import torch

from ._common import next_power_of_2
from ._triton import tl, triton


@triton.jit(do_not_specialize=["S"])
def _mix_kernel(
    moe_p, mlp_p, x_p, w_p, b_p, a_p, y_p, S, M, BS: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Compute a = softmax(x W^T + b), which is stored, and y = a_0 moe + a_1 mlp for BS tokens."""
    s = tl.program_id(0) * BS + tl.arange(0, BS)
    at = s[:, None].to(tl.int64) * M
    logit = tl.zeros([BS], tl.float32)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        inside = (s[:, None] < S) & (m[None, :] < M)
        w = tl.load(w_p + m, mask=m < M, other=0.0).to(tl.float32)
        w -= tl.load(w_p + M + m, mask=m < M, other=0.0).to(tl.float32)
        x = tl.load(x_p + at + m[None, :], mask=inside, other=0.0).to(tl.float32)
        logit += tl.sum(x * w[None, :], axis=1)
    logit += tl.load(b_p).to(tl.float32) - tl.load(b_p + 1).to(tl.float32)
    a0 = 1.0 / (1.0 + tl.exp(-logit))
    a1 = 1.0 / (1.0 + tl.exp(logit))
    tl.store(a_p + s * 2, a0, mask=s < S)
    tl.store(a_p + s * 2 + 1, a1, mask=s < S)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        inside = (s[:, None] < S) & (m[None, :] < M)
        moe = tl.load(moe_p + at + m[None, :], mask=inside, other=0.0).to(tl.float32)
        mlp = tl.load(mlp_p + at + m[None, :], mask=inside, other=0.0).to(tl.float32)
        y = a0[:, None] * moe + a1[:, None] * mlp
        tl.store(y_p + at + m[None, :], y.to(y_p.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S"])
def _mix_backward_kernel(
    dy_p, moe_p, mlp_p, a_p, w_p, d_moe_p, d_mlp_p, dl_p, dx_p, S, M, BS: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Compute d moe, d mlp, d (logit_0 - logit_1) [S] and d x."""
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
    dl = a0 * a1 * (da0 - da1)
    tl.store(dl_p + s, dl, mask=s < S)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        w = tl.load(w_p + m, mask=m < M, other=0.0).to(tl.float32)
        w -= tl.load(w_p + M + m, mask=m < M, other=0.0).to(tl.float32)
        inside = (s[:, None] < S) & (m[None, :] < M)
        tl.store(dx_p + at + m[None, :], (dl[:, None] * w[None, :]).to(dx_p.dtype.element_ty), mask=inside)


def _mix_tile(moe: torch.Tensor) -> dict:
    """Return a program's tile (BS tokens, BM columns) and its number of warps."""
    S, M = moe.shape
    columns = min(next_power_of_2(M), 1024)
    elements = 1024 if M % 16 else 2048  # unaligned widths are loaded element by element, which takes registers
    return dict(BS=min(max(elements // columns, 1), next_power_of_2(S)), BM=columns, num_warps=4)


def mix_triton(moe, mlp, x, w, b):
    """Return (y, the coefficients a [S, 2])."""
    S, M = moe.shape
    y = torch.empty_like(moe)
    a_S2 = torch.empty(S, 2, dtype=torch.float32, device=moe.device)
    if S * M:
        tile = _mix_tile(moe)
        _mix_kernel[(triton.cdiv(S, tile["BS"]),)](moe, mlp, x, w, b, a_S2, y, S, M, **tile)
    return y, a_S2


def mix_backward_triton(dy, moe, mlp, a_S2, x, w):
    """Return (d moe, d mlp, d (logit_0 - logit_1) [S], d x)."""
    S, M = moe.shape
    d_moe, d_mlp, dx = (torch.empty_like(t) for t in (moe, mlp, x))
    dl_S = torch.empty(S, dtype=torch.float32, device=moe.device)
    if S * M:
        tile = _mix_tile(moe)
        _mix_backward_kernel[(triton.cdiv(S, tile["BS"]),)](dy, moe, mlp, a_S2, w, d_moe, d_mlp, dl_S, dx, S, M, **tile)
    return d_moe, d_mlp, dl_S, dx
