"""Compute the experts on CPU by compiled code (``experts.cpp``)."""

from __future__ import annotations

import functools

import torch
from torch.autograd.function import once_differentiable

from .._cpu import buffers
from ..activations import ACTIVATIONS
from . import load, runs_here

_MULTIPLE = 16
_LARGEST = 64 << 20  # bytes of an expert's weights: each thread holds some of its matrices in another order


def fits(x_RM: torch.Tensor, w2_EFM: torch.Tensor, activation: str) -> bool:
    """Return whether the compiled code takes these rows, weights and activation; other ones are for ``_cpu``."""
    _, F, M = w2_EFM.shape
    dtype = x_RM.dtype == torch.float32 or (x_RM.dtype == torch.bfloat16 and takes_bfloat16())
    bytes_ = (3 if ACTIVATIONS[activation].gated else 2) * F * M * x_RM.element_size()
    sizes = M % _MULTIPLE == F % _MULTIPLE == 0 and bytes_ <= _LARGEST
    return dtype and sizes and ACTIVATIONS[activation].number is not None and runs_here()


@functools.cache
def takes_bfloat16() -> bool:
    """Return whether bfloat16 rows are taken here: where the processor multiplies them, but not by AMX.

    AMX, which oneDNN uses, multiplies several times as fast as the instructions of this code.
    """
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


class CompiledExperts(torch.autograd.Function):
    """Compute the experts and their gradients; kept for the backward pass are the activation and its slopes."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, offsets_E1, activation, keep):
        load()
        (_, M, N), F, R = w1.shape, w2.shape[1], len(x)
        offsets_E1 = offsets_E1.to(torch.int32).contiguous()
        y = buffers.empty((R, M), x.dtype)
        h = buffers.empty((R, F), x.dtype) if keep else None
        slope = buffers.empty((R, N), x.dtype) if keep and activation != "none" else None
        number = ACTIVATIONS[activation].number
        torch.ops.moelab.experts_forward(x, offsets_E1, w1, b1, w2, b2, number, y, h, slope)
        if keep:
            ctx.save_for_backward(x, offsets_E1, w1, w2, h, slope)
            ctx.biases = tuple(None if b is None else (b.shape, b.dtype) for b in (b1, b2))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, offsets_E1, w1, w2, h, slope = ctx.saved_tensors
        b1, b2 = ctx.biases
        shapes = ((x.shape, x.dtype), (w1.shape, w1.dtype), b1, (w2.shape, w2.dtype), b2)
        grads = [buffers.empty(*s) if need else None for s, need in zip(shapes, ctx.needs_input_grad[:5], strict=True)]
        d_pre = buffers.empty((len(x), w1.shape[2]), x.dtype)
        torch.ops.moelab.experts_backward(dy.contiguous(), x, offsets_E1, w1, w2, h, slope, d_pre, *grads)
        return *grads, None, None, None
