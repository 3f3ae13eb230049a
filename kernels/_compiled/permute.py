"""Make row tables, and copy tokens to rows and back, on CPU by compiled code (``permute.cpp``)."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .._cpu import buffers
from . import load, runs_here


def fits(*tensors: torch.Tensor) -> bool:
    """Return whether the compiled code takes rows and tokens of these dtypes; float16 and float64 are for ``_cpu``.

    bfloat16 needs instructions for its conversion.
    """
    narrow = torch.cpu._is_avx512_bf16_supported()
    dtypes = (torch.float32, torch.bfloat16) if narrow else (torch.float32,)
    return all(t.dtype in dtypes for t in tensors) and runs_here()


def table_compiled(expert_SK, slot_SK, kept_E, rows: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (row_SK, entry_R, offsets_E1) of the kept entries, int32."""
    load()
    return tuple(torch.ops.moelab.row_table.default(expert_SK, slot_SK, kept_E, rows))


class CompiledDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SM, row_SK, entry_R):
        load()
        ctx.save_for_backward(row_SK)
        rows_RM = buffers.empty((len(entry_R), x_SM.shape[1]), x_SM.dtype)
        torch.ops.moelab.dispatch.default(x_SM, entry_R, row_SK.shape[1], rows_RM)
        return rows_RM

    @staticmethod
    @once_differentiable
    def backward(ctx, d_RM):
        (row_SK,) = ctx.saved_tensors
        d_SM = buffers.empty((len(row_SK), d_RM.shape[1]), d_RM.dtype)
        torch.ops.moelab.sum_rows.default(d_RM.contiguous(), row_SK, None, d_SM)
        return d_SM, None, None


class CompiledCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RM, weight_SK, row_SK, entry_R):
        load()
        ctx.save_for_backward(rows_RM, weight_SK, entry_R)
        y_SM = buffers.empty((len(row_SK), rows_RM.shape[1]), rows_RM.dtype)
        torch.ops.moelab.sum_rows.default(rows_RM, row_SK, weight_SK, y_SM)
        return y_SM

    @staticmethod
    @once_differentiable
    def backward(ctx, d_SM):
        rows_RM, weight_SK, entry_R = ctx.saved_tensors
        need_rows, need_weight = ctx.needs_input_grad[:2]
        d_RM = buffers.empty(rows_RM.shape, rows_RM.dtype) if need_rows else None
        d_weight_SK = torch.empty_like(weight_SK) if need_weight else None
        torch.ops.moelab.combine_backward.default(d_SM.contiguous(), *ctx.saved_tensors, d_RM, d_weight_SK)
        return d_RM, d_weight_SK, None, None
