"""Compute GELU's tanh approximation (as in GPT-2 and Megatron) fast for training dense feed-forwards on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelab import kernels

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR
_CHUNK = 1 << 18  # elements: the fp32 temporaries of one chunk stay in a core's cache


def gelu(x: Tensor) -> Tensor:
    """Return ``F.gelu(x, approximate="tanh")`` within rounding, same shape and dtype. Differentiable once.

    If a gradient is needed on a CPU, the forward pass keeps the derivative instead of the input. This takes one
    exponential instead of two hyperbolic tangents, and half the time.
    """
    if torch.compiler.is_compiling():  # fused there, and an exponential is cheaper than a hyperbolic tangent
        v = x.to(torch.promote_types(x.dtype, torch.float32))
        return (v * torch.sigmoid(v * (_LINEAR + _CUBIC * v * v))).to(x.dtype)
    if x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled():
        return _Gelu.apply(x)
    return F.gelu(x, approximate="tanh")


def dense(activation: str) -> Callable[[Tensor], Tensor]:
    """Return the function by which dense feed-forwards compute an activation of `moelab.kernels.ACTIVATIONS`."""
    return gelu if activation == "gelu_tanh" else kernels.ACTIVATIONS[activation].forward


class _Gelu(torch.autograd.Function):
    """Compute y = x s and dy/dx = s + s (1 - s) x z'; s = sigmoid(z) and z = 2 sqrt(2 / pi) (x + 0.044715 x^3)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        y, slope = torch.empty_like(x), torch.empty_like(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        linear, minus_twice = (torch.tensor(value, dtype=wide) for value in (_LINEAR, -2 * _LINEAR))
        for x_, y_, slope_ in zip(*(t.view(-1).split(_CHUNK) for t in (x, y, slope)), strict=True):
            v = x_.to(wide)
            ratio = v * v
            torch.add(linear, ratio, alpha=_CUBIC, out=ratio)  # z / x
            s = torch.mul(ratio, v).sigmoid_()
            torch.add(minus_twice, ratio, alpha=3, out=ratio).mul_(v)  # x z'
            slope_.copy_(torch.ops.aten.sigmoid_backward(ratio, s).add_(s))
            y_.copy_(s.mul_(v))
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        return dy * ctx.saved_tensors[0]
