"""Compute the experts by ``experts.cpp``."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .._common import MULTIPLE
from . import operations

LARGEST = 64 << 20
"""Most bytes of an expert's weights: each thread holds some of its matrices in another order."""


def fits(x_RM: torch.Tensor, w2_EFM: torch.Tensor, gated: bool) -> bool:
    """Return whether the code takes rows and weights of these sizes, multiples of `MULTIPLE`, and dtypes."""
    _, F, M = w2_EFM.shape
    bytes_ = (3 if gated else 2) * F * M * x_RM.element_size()
    sizes = M % MULTIPLE == F % MULTIPLE == 0 and bytes_ <= LARGEST
    return sizes and x_RM.dtype in (torch.float32, torch.bfloat16)


class CppExperts(torch.autograd.Function):
    """Compute the experts and their gradients; kept for the backward pass are the activation and its slopes."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, offsets_E1, activation, keep):
        N, F = w1.shape[2], w2.shape[1]
        offsets_E1 = offsets_E1.to(torch.int32).contiguous()
        y = torch.empty_like(x)
        h = x.new_empty(len(x), F) if keep else None
        slope = x.new_empty(len(x), N) if keep and activation.number else None
        operations().experts_forward(x, offsets_E1, w1, b1, w2, b2, activation.number, y, h, slope)
        if keep:
            ctx.save_for_backward(x, offsets_E1, w1, w2, h, slope)
            ctx.biases = b1, b2
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, offsets_E1, w1, w2, h, slope = ctx.saved_tensors
        b1, b2 = ctx.biases
        needed = zip((x, w1, b1, w2, b2), ctx.needs_input_grad[:5], strict=True)
        grads = [torch.empty_like(t) if need else None for t, need in needed]
        d_pre = x.new_empty(len(x), w1.shape[2])
        operations().experts_backward(dy.contiguous(), x, offsets_E1, w1, w2, h, slope, d_pre, *grads)
        return *grads, None, None, None
