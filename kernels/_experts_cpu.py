"""Compute the experts on CPU: a loop of matrix products over contiguous slices.

Many small groups are shared out among threads, an expert to a thread, instead of splitting each product: its bits are
then those of one thread.
"""

from __future__ import annotations

import itertools

import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _buffers, _pool
from ._common import APPROXIMATE

_ROWS = 128  # per expert on average, up to which each expert has a thread of its own
_gelu_out = torch.ops.aten.gelu.out
_gelu_backward_out = torch.ops.aten.gelu_backward.grad_input


def _product(x, w, b, out):
    """out = x @ w (+ b)."""
    if b is None:
        torch.mm(x, w, out=out)
    else:
        torch.addmm(b, x, w, out=out)


def _groups(offsets_E1):
    """[(e, first row, row past the last)] of the experts that have rows, and the largest group."""
    bounds = offsets_E1.tolist()
    groups = [(e, a, b) for e, (a, b) in enumerate(itertools.pairwise(bounds)) if b > a]
    return groups, max((b - a for _, a, b in groups), default=0), bounds[-1]


def _gradients(groups, like: torch.Tensor | None, wanted: bool):
    """A buffer for the gradient of ``like``, zero for the experts without rows; None if it is not wanted."""
    if like is None or not wanted:
        return None
    grad = _buffers.empty(like.shape, like.dtype)
    if len(groups) < len(like):
        busy = {e for e, _, _ in groups}
        for e in range(len(like)):
            if e not in busy:
                grad[e].zero_()
    return grad


def _each(work, groups, KN: int) -> None:
    """``work(groups)``: in this thread, each operation on all of PyTorch's threads, or each expert on one thread.

    The second where it was measured to be faster: many small groups, none of them longer than a thread's share of the
    rows, but with products (of KN multiply-adds a row) that take longer than their dispatch, which Python serialises.
    It is not used under a dispatch mode (a FLOP counter, say), which would not see what other threads do.
    """
    threads, rows = torch.get_num_threads(), sum(j - i for _, i, j in groups)
    if (
        threads > 1
        and len(groups) >= 8 * threads
        and rows <= _ROWS * len(groups)
        and rows * KN >= len(groups) << 20
        and max(j - i for _, i, j in groups) * threads <= rows
        and _get_current_dispatch_mode() is None
    ):
        _pool.share(work, sorted(groups, key=lambda g: g[1] - g[2]), threads)  # the longest first
    else:
        work(groups)


class CPUExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, offsets_E1, activation, keep):
        groups, largest, end = _groups(offsets_E1)
        act = activation != "none"
        y = _buffers.empty((len(x), w2.shape[2]), x.dtype)
        pre = _buffers.empty((len(x), w1.shape[2]), x.dtype) if keep else None

        def work(groups):
            pre_any = None if keep else x.new_empty(largest, w1.shape[2])
            h = x.new_empty(largest, w1.shape[2]) if act else None
            for e, i, j in groups:
                pre_e = pre[i:j] if keep else pre_any[: j - i]
                _product(x[i:j], w1[e], None if b1 is None else b1[e], pre_e)
                h_e = pre_e
                if act:
                    h_e = h[: j - i]
                    _gelu_out(pre_e, approximate=APPROXIMATE[activation], out=h_e)
                _product(h_e, w2[e], None if b2 is None else b2[e], y[i:j])

        _each(work, groups, w1[0].numel())
        y[end:].zero_()
        if keep:
            ctx.save_for_backward(x, w1, b1, w2, b2, pre)
            ctx.groups, ctx.largest, ctx.activation = groups, largest, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, w1, b1, w2, b2, pre = ctx.saved_tensors
        groups, dy = ctx.groups, dy.contiguous()
        act = ctx.activation != "none"
        approximate = APPROXIMATE.get(ctx.activation, "none")
        need = ctx.needs_input_grad
        dx = _buffers.empty(x.shape, x.dtype) if need[0] else None
        dw1, db1 = _gradients(groups, w1, need[1]), _gradients(groups, b1, need[2])
        dw2, db2 = _gradients(groups, w2, need[3]), _gradients(groups, b2, need[4])

        def work(groups):
            h = pre.new_empty(ctx.largest, pre.shape[1]) if act and dw2 is not None else None
            d_pre = pre.new_empty(ctx.largest, pre.shape[1])
            for e, i, j in groups:
                x_e, dy_e, pre_e, d_e = x[i:j], dy[i:j], pre[i:j], d_pre[: j - i]
                if db2 is not None:
                    torch.sum(dy_e, 0, out=db2[e])
                if dw2 is not None:
                    h_e = pre_e
                    if act:
                        h_e = h[: j - i]
                        _gelu_out(pre_e, approximate=approximate, out=h_e)
                    torch.mm(h_e.T, dy_e, out=dw2[e])
                torch.mm(dy_e, w2[e].T, out=d_e)
                if act:
                    _gelu_backward_out(d_e, pre_e, approximate=approximate, grad_input=d_e)
                if dx is not None:
                    torch.mm(d_e, w1[e].T, out=dx[i:j])
                if dw1 is not None:
                    torch.mm(x_e.T, d_e, out=dw1[e])
                if db1 is not None:
                    torch.sum(d_e, 0, out=db1[e])

        _each(work, groups, w1[0].numel())
        if dx is not None:
            dx[groups[-1][2] if groups else 0 :].zero_()
        return dx, dw1, db1, dw2, db2, None, None, None
