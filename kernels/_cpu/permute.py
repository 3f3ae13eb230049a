"""Copy tokens to rows and back on CPU: NumPy builds the table, torch's gathers copy the data."""

from __future__ import annotations

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .._common import accumulate_dtype
from . import buffers


def table_cpu(expert_SK, slot_SK, kept_E, rows: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (row_SK, entry_R, offsets_E1) of the kept entries, int32."""
    expert_SK, slot_SK = expert_SK.numpy(), slot_SK.numpy()
    offsets_E1 = np.zeros(len(kept_E) + 1, np.int32)
    np.cumsum(kept_E.numpy(), out=offsets_E1[1:])
    R = int(offsets_E1[-1]) if rows is None else rows
    row_SK = offsets_E1[expert_SK] + slot_SK
    row_SK[slot_SK < 0] = R
    entry_R = np.full(R + 1, -1, np.int32)
    entry_R[row_SK.ravel()] = np.arange(row_SK.size, dtype=np.int32)
    row_SK[slot_SK < 0] = -1
    return torch.from_numpy(row_SK), torch.from_numpy(entry_R[:R]), torch.from_numpy(offsets_E1)


def _blocks(rows: int, width: int) -> list[slice]:
    """Return slices of rows small enough to stay in a core's cache over several passes."""
    step = max((1 << 16) // max(width, 1), 1)
    return [slice(i, i + step) for i in range(0, rows, step)]


def take(x_SM: torch.Tensor, index_R: np.ndarray) -> torch.Tensor:
    """Return x[index], zero where the index is negative."""
    out = buffers.empty((len(index_R), x_SM.shape[1]), x_SM.dtype)
    holes = np.flatnonzero(index_R < 0)
    if len(holes) == len(index_R):
        return out.zero_()
    if len(holes):
        index_R = np.maximum(index_R, 0)
    torch.index_select(x_SM, 0, torch.from_numpy(index_R), out=out)
    if len(holes):
        out.index_fill_(0, torch.from_numpy(holes), 0)
    return out


def _sum_rows(rows_RM: torch.Tensor, row_SK: np.ndarray, weight_SK: torch.Tensor | None) -> torch.Tensor:
    """Return sum_k weight_sk * rows[row_sk] over the rows that exist, accumulated in float32."""
    (S, K), M = row_SK.shape, rows_RM.shape[1]
    if K == 1 and weight_SK is None:
        return take(rows_RM, np.ascontiguousarray(row_SK[:, 0]))
    if rows_RM.dtype not in (torch.float32, torch.float64):
        y_SM = buffers.empty((S, M), rows_RM.dtype)
        for here in _blocks(S, M):
            total_BM = None
            for k in range(K):
                part_BM = take(rows_RM, np.ascontiguousarray(row_SK[here, k])).float()
                if weight_SK is not None:
                    part_BM.mul_(weight_SK[here, k, None])
                total_BM = part_BM if total_BM is None else total_BM.add_(part_BM)
            y_SM[here] = total_BM
        return y_SM
    there_SK = row_SK >= 0
    count_S = there_SK.sum(1) if K > 1 else there_SK[:, 0]
    bag_S1 = np.zeros(S + 1, row_SK.dtype)
    np.cumsum(count_S, out=bag_S1[1:])
    index_N = torch.from_numpy(row_SK[there_SK])
    if len(index_N) == 0:
        return rows_RM.new_zeros(S, rows_RM.shape[1])
    weight_N = None
    if weight_SK is not None:
        weight_N = weight_SK.to(rows_RM.dtype)[torch.from_numpy(there_SK)]
    return torch.embedding_bag(rows_RM, index_N, torch.from_numpy(bag_S1), False, 0, False, weight_N, True)[0]


class CPUDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SM, row_SK, entry_R):
        ctx.row_SK = row_SK
        return take(x_SM, entry_R.numpy() // row_SK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, d_RM):
        return _sum_rows(d_RM.contiguous(), ctx.row_SK.numpy(), None), None, None


class CPUCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RM, weight_SK, row_SK, entry_R):
        ctx.save_for_backward(rows_RM, weight_SK, entry_R)
        return _sum_rows(rows_RM, row_SK.numpy(), weight_SK)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_SM):
        rows_RM, weight_SK, entry_R = ctx.saved_tensors
        d_SM, wide = d_SM.contiguous(), accumulate_dtype(d_SM.dtype)
        (R, M), K, need_weight = rows_RM.shape, weight_SK.shape[1], ctx.needs_input_grad[1]
        entry_np = entry_R.numpy()
        there_np = np.flatnonzero(entry_np >= 0)
        d_RM = buffers.empty((R, M), d_SM.dtype)
        d_weight_SK = torch.zeros_like(weight_SK) if need_weight else None
        if not len(there_np):
            return d_RM.zero_(), d_weight_SK, None, None
        entry_R = torch.from_numpy(np.maximum(entry_np, 0))
        token_R, weight_R1 = entry_R // K, weight_SK.view(-1)[entry_R][:, None]
        dot_R = torch.empty(R, dtype=wide) if need_weight else None
        for here in _blocks(R, M):
            d_BM = d_RM[here]
            torch.index_select(d_SM, 0, token_R[here], out=d_BM)
            wide_BM = d_BM.to(wide)
            if need_weight:
                torch.linalg.vecdot(rows_RM[here].to(wide), wide_BM, out=dot_R[here])
            wide_BM.mul_(weight_R1[here])
            if wide_BM is not d_BM:
                d_BM.copy_(wide_BM)
        if len(there_np) < R:
            d_RM.index_fill_(0, torch.from_numpy(np.flatnonzero(entry_np < 0)), 0)
            there_R = torch.from_numpy(there_np)
            entry_R, dot_R = entry_R[there_R], dot_R[there_R] if need_weight else None
        if need_weight:
            d_weight_SK.view(-1)[entry_R] = dot_R.to(weight_SK.dtype)
        return d_RM if ctx.needs_input_grad[0] else None, d_weight_SK, None, None
