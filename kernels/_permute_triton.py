"""Copy tokens to rows and back in Triton.

The numbers of tokens, rows and entries do not specialise the kernels: they change from step to step.
"""

from __future__ import annotations

import torch

from ._common import next_power_of_2
from ._triton import tl, triton


@triton.jit(do_not_specialize=["N", "R"])
def _table_kernel(
    expert_p, slot_p, kept_p, row_p, entry_p, offsets_p, N, R, E, BN: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    """Write both sides of the table: scatter BN entries, and write -1 to the empty ones of BN rows."""
    pid = tl.program_id(0)
    cols = tl.arange(0, BE)
    kept = tl.load(kept_p + cols, mask=cols < E, other=0)
    start = tl.cumsum(kept, axis=0) - kept
    n = pid * BN + tl.arange(0, BN)
    slot = tl.load(slot_p + n, mask=n < N, other=-1)
    expert = tl.load(expert_p + n, mask=n < N, other=0)
    row = tl.where(slot >= 0, tl.gather(start, expert, 0) + slot, -1)
    tl.store(row_p + n, row, mask=n < N)
    tl.store(entry_p + row, n, mask=(row >= 0) & (row < R))
    total = tl.sum(kept, axis=0)
    tl.store(entry_p + n, tl.full([BN], -1, tl.int32), mask=(n < R) & (n >= total))
    if pid == 0:
        tl.store(offsets_p + cols, start, mask=cols < E)
        tl.store(offsets_p + E, total)


@triton.jit(do_not_specialize=["R"])
def _spread_kernel(
    x_p, entry_p, weight_p, rows_p, out_p, d_weight_p,
    R, K, M, WEIGHTED: tl.constexpr, DOT: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Compute out_r = (weight(r) *) x[token(r)], 0 for empty rows; with DOT, d_weight(r) = <rows_r, x[token(r)]>."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    entry = tl.load(entry_p + r, mask=r < R, other=-1)
    there = entry >= 0
    x_at = (tl.maximum(entry, 0) // K).to(tl.int64) * M
    out_at = r.to(tl.int64) * M
    scale = tl.full([BR], 1.0, tl.float32)
    if WEIGHTED:
        scale = tl.load(weight_p + entry, mask=there, other=0.0)
    dot = tl.zeros([BR], tl.float32)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        inside = there[:, None] & (m[None, :] < M)
        x = tl.load(x_p + x_at[:, None] + m[None, :], mask=inside, other=0.0).to(tl.float32)
        if DOT:
            y = tl.load(rows_p + out_at[:, None] + m[None, :], mask=inside, other=0.0).to(tl.float32)
            dot += tl.sum(x * y, axis=1)
        x = x * scale[:, None]
        tl.store(
            out_p + out_at[:, None] + m[None, :], x.to(out_p.dtype.element_ty), mask=(r[:, None] < R) & (m[None, :] < M)
        )
    if DOT:
        tl.store(d_weight_p + entry, dot, mask=there)


@triton.jit(do_not_specialize=["S"])
def _sum_kernel(rows_p, row_p, weight_p, y_p, S, K, M, WEIGHTED: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr):
    """Compute y_s = sum_k (weight_sk *) rows[row_sk] over the rows that exist."""
    s = tl.program_id(0) * BS + tl.arange(0, BS)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        total = tl.zeros([BS, BM], tl.float32)
        for k in range(K):
            row = tl.load(row_p + s * K + k, mask=s < S, other=-1)
            inside = (row >= 0)[:, None] & (m[None, :] < M)
            part = tl.load(rows_p + row[:, None].to(tl.int64) * M + m[None, :], mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                part *= tl.load(weight_p + s * K + k, mask=s < S, other=0.0)[:, None]
            total += part
        y_at = s[:, None].to(tl.int64) * M + m[None, :]
        tl.store(y_p + y_at, total.to(y_p.dtype.element_ty), mask=(s[:, None] < S) & (m[None, :] < M))


def table_triton(expert_SK, slot_SK, kept_E, R: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (row_SK, entry_R, offsets_E1) of the kept entries, int32."""
    N, E, device = slot_SK.numel(), len(kept_E), slot_SK.device
    row_SK = torch.empty_like(slot_SK)
    entry_R = torch.empty(R, dtype=torch.int32, device=device)
    offsets_E1 = torch.empty(E + 1, dtype=torch.int32, device=device)
    _table_kernel[(max(triton.cdiv(max(N, R), 1024), 1),)](
        expert_SK, slot_SK, kept_E, row_SK, entry_R, offsets_E1, N, R, E, BN=1024, BE=next_power_of_2(E), num_warps=4
    )
    return row_SK, entry_R, offsets_E1


def _tile(like: torch.Tensor, count: int) -> tuple[int, int, int]:
    """Return (rows, columns, warps) of a tile: at least 16 bytes per thread, few rows to use the whole GPU."""
    M = like.shape[1]
    columns = min(next_power_of_2(M), 1024)
    return min(max(2048 // columns, 1), next_power_of_2(count)), columns, 4


def spread_triton(x_SM, entry_R, K, weight_SK=None, rows_RM=None):
    """Return (x or weighted x in row order, d_weight or None)."""
    R, M = len(entry_R), x_SM.shape[1]
    out = x_SM.new_empty(R, M)
    d_weight_SK = None if rows_RM is None else torch.zeros_like(weight_SK)
    if R * M:
        BR, BM, warps = _tile(x_SM, R)
        none = entry_R  # unused by the kernel
        _spread_kernel[(triton.cdiv(R, BR),)](
            x_SM, entry_R, none if weight_SK is None else weight_SK, none if rows_RM is None else rows_RM, out,
            none if d_weight_SK is None else d_weight_SK,
            R, K, M, WEIGHTED=weight_SK is not None, DOT=rows_RM is not None, BR=BR, BM=BM, num_warps=warps,
        )  # fmt: skip
    return out, d_weight_SK


def sum_triton(rows_RM, row_SK, weight_SK):
    """Return the (weighted) sums of the tokens' rows, [S, M]."""
    (S, K), M = row_SK.shape, rows_RM.shape[1]
    y = rows_RM.new_empty(S, M)
    if S * M:
        BS, BM, warps = _tile(rows_RM, S)
        _sum_kernel[(triton.cdiv(S, BS),)](
            rows_RM, row_SK, row_SK if weight_SK is None else weight_SK, y,
            S, K, M, WEIGHTED=weight_SK is not None, BS=BS, BM=BM, num_warps=warps,
        )  # fmt: skip
    return y
