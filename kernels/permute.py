"""Bring tokens into expert order and back (paper 5.4 (b): table-driven copies instead of einsums with one-hot masks).

Shapes: S tokens, E experts, K experts per token, M hidden, R rows. An *entry* is one (token, k) pair. A *row* is the
copy of a token for one of its experts; the rows are sorted by expert. Both directions and both gradients are gathers,
each by the side of the table that maps its output to its input: there are no atomics, so results are deterministic, and
no products with zeros.

    rows_r = x[token(r)]                       d x_s       = sum_k d rows[row_sk]
    y_s    = sum_k weight_sk * rows[row_sk]    d rows_r    = weight(r) * d y[token(r)]
                                               d weight_sk = <d y_s, rows[row_sk]>

The Triton implementation is in ``_permute_triton.py``, that for CPU in ``_cpp/permute.cpp``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ._common import Backend, accumulate_dtype, contiguous, pick_backend
from ._cpp import operations
from .gating import Gate


class RowTable(NamedTuple):
    """Map entries to rows and rows to entries."""

    row_SK: torch.Tensor
    """int32 [S, K]: the entry's row, -1 where it has none."""
    entry_R: torch.Tensor
    """int32 [R]: the row's entry s * K + k, -1 where the row is empty (all zeros after `dispatch`)."""
    offsets_E1: torch.Tensor
    """int32 [E + 1]: expert e's rows are offsets[e] to offsets[e + 1]."""


def row_table(gate: Gate, *, rows: int | None = None, backend: Backend = "auto") -> RowTable:
    """Return the table of a gate's kept entries; the experts' groups of rows follow each other without gaps.

    ``rows`` fixes R; rows past the last group are empty. Without it, R is exact on CPU, and on a GPU the bound S * K,
    because the exact number would cost a synchronisation.
    """
    chosen = pick_backend("row_table", backend, gate.slot_SK, gate.expert_SK, gate.kept_E)
    expert_SK, slot_SK, kept_E = contiguous(gate.expert_SK, gate.slot_SK, gate.kept_E)
    if chosen == "cpp":
        return RowTable(*operations().row_table.default(expert_SK, slot_SK, kept_E, rows))
    entries = slot_SK.numel()
    exact = chosen == "reference" and slot_SK.device.type == "cpu"
    R = rows if rows is not None else int(kept_E.sum()) if exact else entries
    if chosen == "triton":
        from ._permute_triton import table_triton

        return RowTable(*table_triton(expert_SK, slot_SK, kept_E, R))
    start_E1 = torch.nn.functional.pad(kept_E.cumsum(0), (1, 0))
    row_SK = torch.where(slot_SK >= 0, start_E1[expert_SK.long()] + slot_SK, -1)
    entry_R = torch.full((R + 1,), -1, dtype=torch.int32, device=row_SK.device)
    entry_R[row_SK.flatten()] = torch.arange(entries, dtype=torch.int32, device=row_SK.device)  # row -1 is cut off
    return RowTable(row_SK.int(), entry_R[:R], start_E1.int())


def dispatch(x_SM: torch.Tensor, table: RowTable, *, backend: Backend = "auto") -> torch.Tensor:
    """Return rows [R, M] in expert order from tokens [S, M], same dtype; empty rows are zero.

    Differentiable (once) in ``x_SM``. Raises ``ValueError`` where the tokens do not fit the table.
    """
    S, K = table.row_SK.shape
    if x_SM.dim() != 2 or x_SM.shape[0] != S:
        raise ValueError(f"dispatch: tokens {tuple(x_SM.shape)} for a table of {S} tokens; they must be [S, M]")
    chosen = pick_backend("dispatch", backend, x_SM, table.row_SK)
    if chosen == "reference":
        padded = torch.cat([x_SM, x_SM.new_zeros(1, x_SM.shape[1])])
        return padded[torch.where(table.entry_R >= 0, table.entry_R // K, S)]
    return _Dispatch.apply(*contiguous(x_SM, table.row_SK, table.entry_R), chosen)


def combine(
    rows_RM: torch.Tensor, table: RowTable, weight_SK: torch.Tensor, *, backend: Backend = "auto"
) -> torch.Tensor:
    """Return tokens [S, M], the weighted sums of their rows, in the rows' dtype; a token without rows is zero.

    ``weight_SK`` is float32 (Gate.weight_SK); sums accumulate in float32. Differentiable (once) in the rows and the
    weights. Empty rows are never read. Raises ``ValueError`` where rows or weights do not fit the table.
    """
    if rows_RM.dim() != 2 or len(rows_RM) != len(table.entry_R) or weight_SK.shape != table.row_SK.shape:
        raise ValueError(
            f"combine: rows {tuple(rows_RM.shape)} and weights {tuple(weight_SK.shape)} for a table of "
            f"{len(table.entry_R)} rows and {tuple(table.row_SK.shape)} entries"
        )
    fits = weight_SK.dtype == torch.float32 and rows_RM.is_floating_point()
    chosen = pick_backend("combine", backend, rows_RM, table.row_SK, weight_SK, fits=fits)
    if chosen == "reference":
        padded = torch.cat([rows_RM, rows_RM.new_zeros(1, rows_RM.shape[1])])  # row -1
        wide_SKM = padded[table.row_SK].to(accumulate_dtype(rows_RM.dtype))
        return (wide_SKM * weight_SK[:, :, None]).sum(1).to(rows_RM.dtype)
    return _Combine.apply(*contiguous(rows_RM, weight_SK, table.row_SK, table.entry_R), chosen)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SM, row_SK, entry_R, backend):
        ctx.save_for_backward(row_SK)
        ctx.backend = backend
        if backend == "triton":
            from ._permute_triton import spread_triton

            return spread_triton(x_SM, entry_R, row_SK.shape[1])[0]
        rows_RM = x_SM.new_empty(len(entry_R), x_SM.shape[1])
        operations().dispatch.default(x_SM, entry_R, row_SK.shape[1], rows_RM)
        return rows_RM

    @staticmethod
    @once_differentiable
    def backward(ctx, d_RM):
        (row_SK,) = ctx.saved_tensors
        return _sum(ctx.backend, d_RM.contiguous(), row_SK, None), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RM, weight_SK, row_SK, entry_R, backend):
        ctx.save_for_backward(rows_RM, weight_SK, entry_R)
        ctx.backend = backend
        return _sum(backend, rows_RM, row_SK, weight_SK)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_SM):
        saved = rows_RM, weight_SK, entry_R = ctx.saved_tensors  # once: recomputation allows no more
        d_SM = d_SM.contiguous()
        if ctx.backend == "triton":
            from ._permute_triton import spread_triton

            d_RM, d_weight_SK = spread_triton(d_SM, entry_R, weight_SK.shape[1], weight_SK, rows_RM)
        else:
            need_rows, need_weight = ctx.needs_input_grad[:2]
            d_RM = torch.empty_like(rows_RM) if need_rows else None
            d_weight_SK = torch.empty_like(weight_SK) if need_weight else None
            operations().combine_backward.default(d_SM, *saved, d_RM, d_weight_SK)
        return d_RM, d_weight_SK, None, None, None


def _sum(backend, rows_RM, row_SK, weight_SK):
    """Return the sums of the tokens' rows, [S, M], weighted if there are weights."""
    if backend == "triton":
        from ._permute_triton import sum_triton

        return sum_triton(rows_RM, row_SK, weight_SK)
    y_SM = rows_RM.new_empty(len(row_SK), rows_RM.shape[1])
    operations().combine.default(rows_RM, row_SK, weight_SK, y_SM)
    return y_SM
