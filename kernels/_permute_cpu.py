"""Copy tokens to rows and back on CPU: NumPy builds the table, torch's gathers move the data."""

from __future__ import annotations

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from . import _buffers


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


def _take(x_SM: torch.Tensor, index_R: np.ndarray) -> torch.Tensor:
    """Return x[index], zero where the index is negative."""
    out = _buffers.empty((len(index_R), x_SM.shape[1]), x_SM.dtype)
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
    S, K = row_SK.shape
    if rows_RM.dtype not in (torch.float32, torch.float64):
        y_SM = torch.zeros(S, rows_RM.shape[1], dtype=torch.float32)
        for k in range(K):
            part = _take(rows_RM, np.ascontiguousarray(row_SK[:, k])).float()
            y_SM += part if weight_SK is None else part.mul_(weight_SK[:, k, None])
        return y_SM.to(rows_RM.dtype)
    if K == 1 and weight_SK is None:
        return _take(rows_RM, np.ascontiguousarray(row_SK[:, 0]))
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
        return _take(x_SM, entry_R.numpy() // row_SK.shape[1])

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
        _S, K = weight_SK.shape
        entry_np = entry_R.numpy()
        full = len(entry_np) > 0 and entry_np.min() >= 0
        d_RM = _take(d_SM.contiguous(), entry_np // K)  # // keeps -1
        d_weight_SK = None
        if ctx.needs_input_grad[1]:
            if d_RM.dtype in (torch.float32, torch.float64):
                dot_R = torch.linalg.vecdot(rows_RM, d_RM)
            else:
                dot_R = (rows_RM.float() * d_RM.float()).sum(1)
            d_weight_SK = torch.zeros_like(weight_SK)
            where_R = entry_R.long() if full else torch.from_numpy(entry_np[entry_np >= 0]).long()
            d_weight_SK.view(-1)[where_R] = (dot_R if full else dot_R[entry_R >= 0]).to(weight_SK.dtype)
        if not ctx.needs_input_grad[0]:
            return None, d_weight_SK, None, None
        weight_R = weight_SK.reshape(-1)[entry_R.clamp(min=0)]
        if d_RM.dtype == weight_R.dtype:
            d_RM.mul_(weight_R[:, None])
        else:
            d_RM = (d_RM.to(weight_R.dtype) * weight_R[:, None]).to(d_RM.dtype)
        return d_RM, d_weight_SK, None, None
