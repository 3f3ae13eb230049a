"""Copy tokens to rows and back by ``permute.cpp``."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from . import operations


class CppDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SM, row_SK, entry_R):
        ctx.save_for_backward(row_SK)
        rows_RM = x_SM.new_empty(len(entry_R), x_SM.shape[1])
        operations().dispatch.default(x_SM, entry_R, row_SK.shape[1], rows_RM)
        return rows_RM

    @staticmethod
    @once_differentiable
    def backward(ctx, d_RM):
        (row_SK,) = ctx.saved_tensors
        d_SM = d_RM.new_empty(len(row_SK), d_RM.shape[1])
        operations().combine.default(d_RM.contiguous(), row_SK, None, d_SM)
        return d_SM, None, None


class CppCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RM, weight_SK, row_SK, entry_R):
        ctx.save_for_backward(rows_RM, weight_SK, entry_R)
        y_SM = rows_RM.new_empty(len(row_SK), rows_RM.shape[1])
        operations().combine.default(rows_RM, row_SK, weight_SK, y_SM)
        return y_SM

    @staticmethod
    @once_differentiable
    def backward(ctx, d_SM):
        saved = rows_RM, weight_SK, _ = ctx.saved_tensors  # once: recomputation allows no more
        need_rows, need_weight = ctx.needs_input_grad[:2]
        d_RM = torch.empty_like(rows_RM) if need_rows else None
        d_weight_SK = torch.empty_like(weight_SK) if need_weight else None
        operations().combine_backward.default(d_SM.contiguous(), *saved, d_RM, d_weight_SK)
        return d_RM, d_weight_SK, None, None
