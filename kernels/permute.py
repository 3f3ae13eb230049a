"""Tokens to expert order and back (paper 5.4 (b): the einsums against one-hot masks become table-driven copies).

Shapes: S tokens, K experts per token, R rows, E experts, M hidden, C capacity. A *row* is a token's copy for one
expert, rows lie expert by expert. Both directions and both gradients are gathers, each through the side of the table
that says where its output comes from: no atomics, hence deterministic, and nothing is ever multiplied by zero.

    rows_r = x[token(r)]                       d x_s       = sum_k d rows[row_sk]
    y_s    = sum_k weight_sk * rows[row_sk]    d rows_r    = weight(r) * d y[token(r)]
                                               d weight_sk = <d y_s, rows[row_sk]>
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from . import _buffers
from ._common import Backend, accumulate_dtype, next_power_of_2, pick_backend, tl, triton
from .gating import Gate


class RowTable(NamedTuple):
    """Which row holds which (token, k) entry, told from both sides."""

    row_SK: torch.Tensor
    """int32 [S, K]: the entry's row, -1 where it has none."""
    entry_R: torch.Tensor
    """int32 [R]: the row's entry s * K + k, -1 where the row is empty (all zeros)."""
    offsets_E1: torch.Tensor
    """int32 [E + 1]: expert e's rows are offsets[e] to offsets[e + 1]."""


def row_table(
    gate: Gate, *, capacity: int | None = None, rows: int | None = None, backend: Backend = "auto"
) -> RowTable:
    """The table of a gate's kept entries.

    Compact by default: groups lie one behind the other, uneven, without padding. With ``capacity`` every expert has
    exactly C rows, [E * C], the unused ones empty (the layout of an even all-to-all). ``rows`` fixes R of the compact
    layout; rows past the last group are empty. Without it, R is exact on CPU, and on a GPU the bound S * K, because
    asking would synchronise.
    """
    chosen = pick_backend("row_table", backend, gate.slot_SK)
    E = len(gate.kept_E)
    if chosen == "torch":
        return _table_numpy(gate, E, capacity, rows)
    S, K = gate.slot_SK.shape
    R = E * capacity if capacity is not None else (S * K if rows is None else rows)
    if chosen == "triton":
        return _table_triton(gate, R, capacity)
    start_E1 = torch.nn.functional.pad(gate.kept_E.cumsum(0), (1, 0))
    if capacity is not None:
        start_E1 = torch.arange(E + 1, device=start_E1.device) * capacity
    row_SK = torch.where(gate.slot_SK >= 0, start_E1[gate.expert_SK.long()] + gate.slot_SK, -1)
    entry_R = torch.full((R + 1,), -1, dtype=torch.int32, device=row_SK.device)
    entry_R[row_SK.flatten()] = torch.arange(S * K, dtype=torch.int32, device=row_SK.device)  # dropped: to the last
    return RowTable(row_SK.int(), entry_R[:R], start_E1.int())


def _table_numpy(gate: Gate, E: int, capacity, rows) -> RowTable:
    expert_SK, slot_SK, kept_E = gate.expert_SK.numpy(), gate.slot_SK.numpy(), gate.kept_E.numpy()
    offsets_E1 = np.zeros(E + 1, np.int32)
    if capacity is None:
        np.cumsum(kept_E, out=offsets_E1[1:])
    else:
        offsets_E1[:] = np.arange(E + 1) * capacity
    R = int(offsets_E1[E]) if rows is None or capacity is not None else rows
    row_SK = offsets_E1[expert_SK] + slot_SK
    row_SK[slot_SK < 0] = R
    entry_R = np.full(R + 1, -1, np.int32)
    entry_R[row_SK.ravel()] = np.arange(row_SK.size, dtype=np.int32)
    row_SK[slot_SK < 0] = -1
    return RowTable(torch.from_numpy(row_SK), torch.from_numpy(entry_R[:R]), torch.from_numpy(offsets_E1))


def dispatch(x_SM: torch.Tensor, table: RowTable, *, backend: Backend = "auto") -> torch.Tensor:
    """Rows [R, M] in expert order from tokens [S, M], same dtype; empty rows are zero. Differentiable in ``x_SM``."""
    S, K = table.row_SK.shape
    if x_SM.dim() != 2 or x_SM.shape[0] != S:
        raise ValueError(f"dispatch: tokens {tuple(x_SM.shape)} for a table of {S} tokens; they must be [S, M]")
    chosen = pick_backend("dispatch", backend, x_SM, table.row_SK)
    if chosen == "reference":
        padded = torch.cat([x_SM, x_SM.new_zeros(1, x_SM.shape[1])])
        return padded[torch.where(table.entry_R >= 0, table.entry_R // K, S)]
    return (_TorchDispatch if chosen == "torch" else _TritonDispatch).apply(x_SM, *table[:2])


def combine(
    rows_RM: torch.Tensor, table: RowTable, weight_SK: torch.Tensor, *, backend: Backend = "auto"
) -> torch.Tensor:
    """Tokens [S, M], the weighted sums of their rows, in the rows' dtype, accumulated in float32; a token without
    rows is zero.

    ``weight_SK`` is float32 (Gate.weight_SK). Differentiable in the rows and the weights. Empty rows are never read.
    """
    if rows_RM.dim() != 2 or len(rows_RM) != len(table.entry_R) or weight_SK.shape != table.row_SK.shape:
        raise ValueError(
            f"combine: rows {tuple(rows_RM.shape)} and weights {tuple(weight_SK.shape)} for a table of "
            f"{len(table.entry_R)} rows and {tuple(table.row_SK.shape)} entries"
        )
    chosen = pick_backend("combine", backend, rows_RM, table.row_SK, weight_SK)
    if chosen == "reference":
        padded = torch.cat([rows_RM, rows_RM.new_zeros(1, rows_RM.shape[1])])  # row -1
        wide_SKM = padded[table.row_SK].to(accumulate_dtype(rows_RM.dtype))
        return (wide_SKM * weight_SK[:, :, None]).sum(1).to(rows_RM.dtype)
    return (_TorchCombine if chosen == "torch" else _TritonCombine).apply(rows_RM, weight_SK, *table[:2])


# --- CPU --------------------------------------------------------------------------------------------------------------


def _take(x_SM: torch.Tensor, index_R: np.ndarray) -> torch.Tensor:
    """x[index], zero where the index is negative."""
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
    """sum_k weight_sk * rows[row_sk] over the rows that exist, accumulated in float32."""
    S, K = row_SK.shape
    if rows_RM.dtype not in (torch.float32, torch.float64):
        y_SM = torch.zeros(S, rows_RM.shape[1])
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


class _TorchDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SM, row_SK, entry_R):
        ctx.row_SK = row_SK
        return _take(x_SM, entry_R.numpy() // row_SK.shape[1])

    @staticmethod
    def backward(ctx, d_RM):
        return _sum_rows(d_RM.contiguous(), ctx.row_SK.numpy(), None), None, None


class _TorchCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RM, weight_SK, row_SK, entry_R):
        ctx.save_for_backward(rows_RM, weight_SK, entry_R)
        return _sum_rows(rows_RM.contiguous(), row_SK.numpy(), weight_SK)

    @staticmethod
    def backward(ctx, d_SM):
        rows_RM, weight_SK, entry_R = ctx.saved_tensors
        _S, K = weight_SK.shape
        entry_np = entry_R.numpy()
        full = len(entry_np) > 0 and entry_np.min() >= 0
        d_RM = _take(d_SM, entry_np // K)  # // keeps -1
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


# --- GPU --------------------------------------------------------------------------------------------------------------


@triton.jit
def _table_kernel(
    expert_p, slot_p, kept_p, row_p, entry_p, offsets_p,
    N, R, E, CAP, PADDED: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Both sides of the table: entries [pid * BN, …) scatter themselves, rows in the same range that stay empty get
    -1."""
    pid = tl.program_id(0)
    cols = tl.arange(0, BE)
    kept = tl.load(kept_p + cols, mask=cols < E, other=0)
    start = cols * CAP if PADDED else tl.cumsum(kept, axis=0) - kept
    n = pid * BN + tl.arange(0, BN)
    slot = tl.load(slot_p + n, mask=n < N, other=-1)
    expert = tl.load(expert_p + n, mask=n < N, other=0)
    row = tl.where(slot >= 0, tl.gather(start, expert, 0) + slot, -1)
    tl.store(row_p + n, row, mask=n < N)
    tl.store(entry_p + row, n, mask=(row >= 0) & (row < R))
    if PADDED:
        empty = n % CAP >= tl.gather(kept, tl.minimum(n // CAP, E - 1), 0)
    else:
        empty = n >= tl.sum(kept, axis=0)
    tl.store(entry_p + n, tl.full([BN], -1, tl.int32), mask=(n < R) & empty)
    if pid == 0:
        tl.store(offsets_p + cols, start, mask=cols < E)
        tl.store(offsets_p + E, E * CAP if PADDED else tl.sum(kept, axis=0))


@triton.jit
def _spread_kernel(
    x_p, entry_p, weight_p, rows_p, out_p, d_weight_p,
    R, K, M, WEIGHTED: tl.constexpr, DOT: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out_r = (weight(r) *) x[token(r)], zero where the row is empty; with DOT also d_weight(r) = <rows_r,
    x[token(r)]>."""
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


@triton.jit
def _sum_kernel(rows_p, row_p, weight_p, y_p, S, K, M, WEIGHTED: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr):
    """y_s = sum_k (weight_sk *) rows[row_sk] over the rows that exist."""
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


def _table_triton(gate: Gate, R: int, capacity: int | None) -> RowTable:
    N, E, device = gate.slot_SK.numel(), len(gate.kept_E), gate.slot_SK.device
    table = RowTable(
        torch.empty_like(gate.slot_SK),
        torch.empty(R, dtype=torch.int32, device=device),
        torch.empty(E + 1, dtype=torch.int32, device=device),
    )
    _table_kernel[(max(triton.cdiv(max(N, R), 1024), 1),)](
        gate.expert_SK, gate.slot_SK, gate.kept_E, *table,
        N, R, E, capacity or 1, PADDED=capacity is not None, BN=1024, BE=next_power_of_2(E), num_warps=4,
    )  # fmt: skip
    return table


def _tile(count: int, M: int) -> tuple[int, int]:
    """(rows, columns) of a program's tile: 16 bytes a thread and more, few rows each, so that small batches fill the
    GPU."""
    columns = min(next_power_of_2(M), 1024)
    return min(max(2048 // columns, 1), next_power_of_2(count)), columns


def _spread(x_SM, entry_R, K, weight_SK=None, rows_RM=None):
    """(x or weighted x in row order, d_weight or None)."""
    R, M = len(entry_R), x_SM.shape[1]
    out = x_SM.new_empty(R, M)
    d_weight_SK = None if rows_RM is None else torch.zeros_like(weight_SK)
    if R * M:
        BR, BM = _tile(R, M)
        none = entry_R  # any pointer
        _spread_kernel[(triton.cdiv(R, BR),)](
            x_SM, entry_R, none if weight_SK is None else weight_SK, none if rows_RM is None else rows_RM, out,
            none if d_weight_SK is None else d_weight_SK,
            R, K, M, WEIGHTED=weight_SK is not None, DOT=rows_RM is not None, BR=BR, BM=BM, num_warps=4,
        )  # fmt: skip
    return out, d_weight_SK


def _sum(rows_RM, row_SK, weight_SK=None):
    (S, K), M = row_SK.shape, rows_RM.shape[1]
    y = rows_RM.new_empty(S, M)
    if S * M:
        BS, BM = _tile(S, M)
        _sum_kernel[(triton.cdiv(S, BS),)](
            rows_RM, row_SK, row_SK if weight_SK is None else weight_SK, y,
            S, K, M, WEIGHTED=weight_SK is not None, BS=BS, BM=BM, num_warps=4,
        )  # fmt: skip
    return y


class _TritonDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SM, row_SK, entry_R):
        ctx.row_SK = row_SK
        return _spread(x_SM.contiguous(), entry_R, row_SK.shape[1])[0]

    @staticmethod
    def backward(ctx, d_RM):
        return _sum(d_RM.contiguous(), ctx.row_SK), None, None


class _TritonCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RM, weight_SK, row_SK, entry_R):
        rows_RM, weight_SK = rows_RM.contiguous(), weight_SK.contiguous()
        ctx.save_for_backward(rows_RM, weight_SK, entry_R)
        return _sum(rows_RM, row_SK, weight_SK)

    @staticmethod
    def backward(ctx, d_SM):
        rows_RM, weight_SK, entry_R = ctx.saved_tensors
        d_RM, d_weight_SK = _spread(d_SM.contiguous(), entry_R, weight_SK.shape[1], weight_SK, rows_RM)
        return d_RM, d_weight_SK, None, None
