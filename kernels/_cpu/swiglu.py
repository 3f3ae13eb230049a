"""Compute SwiGLU and its derivatives on CPU: ``h = silu(g) * u`` for pre-activations with g and u side by side.

``silu(g) = g * sigmoid(g)``. Sums are in float32 (float64 for float64), block of rows by block of rows of a size that
stays in cache.
"""

from __future__ import annotations

import torch

from .._common import accumulate_dtype
from . import buffers

_BLOCK = 1 << 16


class Swiglu:
    """Hold the memory that the passes over tensors of one dtype need; one per thread."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.narrow = dtype not in (torch.float32, torch.float64)
        self.scratch: torch.Tensor | None = None
        self.wide = accumulate_dtype(dtype)

    def _blocks(self, *tensors: torch.Tensor):
        """Yield blocks of rows of all tensors, and six scratch tensors of half the first one's width."""
        F = tensors[0].shape[1] // 2
        rows = max(1, _BLOCK // F)
        if self.scratch is None or self.scratch.shape[2] != F:
            self.scratch = buffers.empty((6, rows, F), self.wide)
        for parts in zip(*(t.split(rows) for t in tensors), strict=True):
            yield *parts, self.scratch[:, : len(parts[0])]

    def forward(self, pre: torch.Tensor, out: torch.Tensor) -> None:
        """Write silu(pre[:, :F]) * pre[:, F:] to ``out`` [R, F], for pre-activations [R, 2 F]."""
        F = out.shape[1]
        for pre_n, out_n, (g, u, s, *_) in self._blocks(pre, out):
            if self.narrow:
                g.copy_(pre_n[:, :F])
                u.copy_(pre_n[:, F:])
            else:
                g, u = pre_n[:, :F], pre_n[:, F:]
            torch.sigmoid(g, out=s)
            s.mul_(g)
            if self.narrow:
                out_n.copy_(s.mul_(u))
            else:
                torch.mul(s, u, out=out_n)

    def backward(self, pre: torch.Tensor, d: torch.Tensor, d_pre: torch.Tensor, h: torch.Tensor | None) -> None:
        """Write the gradient of the pre-activations to ``d_pre`` [R, 2 F], and h to ``h`` [R, F] if it is given.

        ``d`` [R, F] is the gradient of h.
        """
        F = d.shape[1]
        tensors = (pre, d, d_pre) if h is None else (pre, d, d_pre, h)
        for pre_n, d_n, d_pre_n, *rest, (g, u, s, y, t, dw) in self._blocks(*tensors):
            if self.narrow:
                g.copy_(pre_n[:, :F])
                u.copy_(pre_n[:, F:])
                dw.copy_(d_n)
            else:
                g, u, dw = pre_n[:, :F], pre_n[:, F:], d_n
            torch.sigmoid(g, out=s)
            torch.mul(g, s, out=y)  # silu
            if rest:
                if self.narrow:
                    rest[0].copy_(torch.mul(y, u, out=t))
                else:
                    torch.mul(y, u, out=rest[0])
            torch.addcmul(y, y, s, value=-1, out=t)  # g s (1 - s)
            t.add_(s).mul_(u)  # silu'(g) u
            if self.narrow:
                d_pre_n[:, :F].copy_(t.mul_(dw))
                d_pre_n[:, F:].copy_(y.mul_(dw))
            else:
                torch.mul(t, dw, out=d_pre_n[:, :F])
                torch.mul(y, dw, out=d_pre_n[:, F:])
