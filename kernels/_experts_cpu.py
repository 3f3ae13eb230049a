"""Compute the experts on CPU: batched products and products of single groups over slots (``_layout_cpu.py``).

A task computes everything for some experts while the values are in cache. Experts with many rows are cut into tasks for
the backward pass through their rows, and a second round of tasks computes the gradients of their weights. Threads share
the tasks, each with PyTorch's own threading off, so that a result has the same bits however many threads there are.
Unused slots hold zeros, and so do their gradients: they change no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _buffers, _pool
from ._common import APPROXIMATE
from ._gelu_cpu import Gelu
from ._layout_cpu import Layout, Task, plan
from ._permute_cpu import take
from ._swiglu_cpu import Swiglu

_LARGE = 1 << 30  # an expert's weight gradient of at least this many multiply-adds is cut into ``_PARTS``
_PARTS = 4

T = TypeVar("T")


def _share(work: Callable[[Iterable[T]], None], tasks: Sequence[T], counting: bool) -> None:
    """Run ``work`` over the tasks on PyTorch's number of threads, or with ``counting`` in this thread alone."""
    threads = torch.get_num_threads()
    if threads == 1 or counting:  # a dispatch mode, such as a FLOP counter, does not see other threads
        work(tasks)
    else:
        _pool.share(work, tasks, threads)


class _Experts:
    """Hold stacked weights or biases and their views per expert: one ``unbind`` costs less than indexing each."""

    def __init__(self, stack: torch.Tensor | None, layout: Layout) -> None:
        self.stack = stack
        alone = stack is not None and any(task.experts for task in layout.tasks)
        self.each = stack.unbind() if alone else None


def _products(task: Task, base: int, x, w: _Experts, b: _Experts, out) -> None:
    """Write x @ w (+ b) to ``out``, both of the task's slots; w is [E, K, N]."""
    n = task.last - task.first
    if n:
        experts = slice(task.first, task.last)
        x_nC, out_nC = x[: n * base].view(n, base, -1), out[: n * base].view(n, base, -1)
        if b.stack is None:
            torch.bmm(x_nC, w.stack[experts], out=out_nC)
        else:
            torch.baddbmm(b.stack[experts, None], x_nC, w.stack[experts], out=out_nC)
        x, out = x[n * base :], out[n * base :]
    if task.experts:
        for e, x_g, out_g in zip(task.experts, x.split(task.sizes), out.split(task.sizes), strict=True):
            if b.stack is None:
                torch.mm(x_g, w.each[e], out=out_g)
            else:
                torch.addmm(b.each[e], x_g, w.each[e], out=out_g)


def _weight_gradients(task: Task, base: int, x, dy, dw: _Experts, db: _Experts) -> None:
    """Write x^T dy and the sums of dy over the slots of the task's experts to ``dw`` [E, K, N] and ``db`` [E, N]."""
    n = task.last - task.first
    if n:
        experts = slice(task.first, task.last)
        x_nC, dy_nC = x[: n * base].view(n, base, -1), dy[: n * base].view(n, base, -1)
        if dw.stack is not None:
            torch.bmm(x_nC.mT, dy_nC, out=dw.stack[experts])
        if db.stack is not None:
            torch.sum(dy_nC, 1, out=db.stack[experts])
        x, dy = x[n * base :], dy[n * base :]
    if task.experts:
        for e, x_g, dy_g in zip(task.experts, x.split(task.sizes), dy.split(task.sizes), strict=True):
            if dw.stack is not None:
                if n:
                    dw.each[e].addmm_(x_g.t(), dy_g)
                else:
                    torch.mm(x_g.t(), dy_g, out=dw.each[e])
            if db.stack is not None:
                if n:
                    db.each[e].add_(dy_g.sum(0))
                else:
                    torch.sum(dy_g, 0, out=db.each[e])


def _cut_weight_gradient(part: tuple[int, int, int, int, int], x, dy, dw: _Experts, db: _Experts) -> None:
    """Write a part of the rows of x^T dy, and with the first part the sums of dy."""
    e, i, j, number, parts = part
    if dw.stack is not None:
        K = x.shape[1]
        columns = slice(number * K // parts, (number + 1) * K // parts)
        torch.mm(x[i:j, columns].t(), dy[i:j], out=dw.each[e][columns])
    if db.stack is not None and number == 0:
        torch.sum(dy[i:j], 0, out=db.each[e])


def _activation(name: str, dtype: torch.dtype) -> Gelu | Swiglu | None:
    """Return the activation function with memory for one thread."""
    if name == "swiglu":
        return Swiglu(dtype)
    return None if name == "none" else Gelu(dtype, APPROXIMATE[name])


class CPUExperts(torch.autograd.Function):
    """Compute the experts and their gradients; see the module's docstring."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, offsets_E1, activation, keep):
        R, (_, M, N), F = len(x), w1.shape, w2.shape[1]  # N = 2 F with gates, else F
        counting = _get_current_dispatch_mode() is not None
        layout = plan(offsets_E1.tolist(), R, M, N, x.dtype, pad=not counting)
        apart = layout.row_P is not None
        x_P = take(x, layout.row_P) if apart else x
        y_P = _buffers.empty((layout.slots if apart else R, M), x.dtype)
        pre = _buffers.empty((layout.slots, N), x.dtype) if keep else None
        weights = [_Experts(t, layout) for t in (w1, b1, w2, b2)]

        def work(tasks):
            longest = max((t.end - t.start for t in layout.tasks), default=0)
            act = _activation(activation, x.dtype)
            pre_any = None if keep else _buffers.empty((longest, N), x.dtype)
            h_any = None if act is None else _buffers.empty((longest, F), x.dtype)
            for task in tasks:
                here = slice(task.start, task.end)
                pre_t = pre[here] if keep else pre_any[: task.end - task.start]
                _products(task, layout.base, x_P[here], *weights[:2], pre_t)
                h_t = pre_t
                if act is not None:
                    h_t = h_any[: task.end - task.start]
                    act.forward(pre_t, h_t)
                _products(task, layout.base, h_t, *weights[2:], y_P[here])

        _share(work, layout.tasks, counting)
        if keep:
            ctx.save_for_backward(x_P, w1, b1, w2, b2, pre)
            ctx.layout, ctx.activation, ctx.rows = layout, activation, R
        if apart:
            return take(y_P, layout.slot_R)
        y_P[layout.slots :].zero_()
        return y_P

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_P, w1, b1, w2, b2, pre = ctx.saved_tensors
        layout, need, act = ctx.layout, ctx.needs_input_grad, ctx.activation != "none"
        base, F, N, counting = layout.base, w2.shape[1], pre.shape[1], _get_current_dispatch_mode() is not None
        gated = F != N
        apart = layout.row_P is not None
        dy_P = take(dy.contiguous(), layout.row_P) if apart else dy.contiguous()
        dx_P = _buffers.empty(x_P.shape, x_P.dtype) if need[0] else None
        grads = [
            _buffers.empty(t.shape, t.dtype) if n else None for t, n in zip((w1, b1, w2, b2), need[1:5], strict=True)
        ]
        dw1, db1, dw2, db2 = (_Experts(t, layout) for t in grads)
        w1_T, w2_T, none = _Experts(w1.mT, layout), _Experts(w2.mT, layout), _Experts(None, layout)
        save_h = act and need[3]  # without an activation function, h equals the pre-activation

        def rows(task, function, d_t, h_t, dh_any):
            """Compute d pre (and h) of the task's slots, and dx; without gates, d pre replaces dh in its memory."""
            here = slice(task.start, task.end)
            dh_t = dh_any[: task.end - task.start] if gated else d_t
            _products(task, base, dy_P[here], w2_T, none, dh_t)
            if gated:
                function.backward(pre[here], dh_t, d_t, h_t)
            elif function is not None:
                function.backward(pre[here], d_t, h_t)
            if dx_P is not None:
                _products(task, base, d_t, w1_T, none, dx_P[here])

        def new_function():
            """Return the activation function, and memory for dh if it needs its own."""
            dh_any = _buffers.empty((longest, F), pre.dtype) if gated else None
            return _activation(ctx.activation, pre.dtype), dh_any

        longest = max((t.end - t.start for t in layout.tasks), default=0)
        if layout.cut:
            d_pre = _buffers.empty(pre.shape, pre.dtype)
            h = _buffers.empty((len(pre), F), pre.dtype) if save_h else None if act else pre

            def work_rows(tasks):
                function, dh_any = new_function()
                for task in tasks:
                    h_t = h[task.start : task.end] if save_h else None
                    rows(task, function, d_pre[task.start : task.end], h_t, dh_any)

            def work_weights(parts):
                for part in parts:
                    _cut_weight_gradient(part, x_P, d_pre, dw1, db1)
                    _cut_weight_gradient(part, h, dy_P, dw2, db2)

            _share(work_rows, layout.tasks, counting)
            parts = []
            for e, i, j in layout.groups:
                n = _PARTS if (j - i) * w1[0].numel() >= _LARGE else 1
                parts += [(e, i, j, number, n) for number in range(n)]
            _share(work_weights, parts, counting)
        else:

            def work(tasks):
                function, dh_any = new_function()
                d_any = _buffers.empty((longest, N), pre.dtype)
                h_any = _buffers.empty((longest, F), pre.dtype) if save_h else None
                for task in tasks:
                    here, n = slice(task.start, task.end), task.end - task.start
                    d_t = d_any[:n]
                    h_t = h_any[:n] if save_h else None
                    rows(task, function, d_t, h_t, dh_any)
                    _weight_gradients(task, base, x_P[here], d_t, dw1, db1)
                    _weight_gradients(task, base, pre[here] if h_t is None else h_t, dy_P[here], dw2, db2)

            _share(work, layout.tasks, counting)
        if layout.idle:
            idle = torch.tensor(layout.idle)
            for grad in grads:
                if grad is not None:
                    grad.index_fill_(0, idle, 0)
        dx = dx_P
        if dx_P is not None and apart:
            dx = take(dx_P, layout.slot_R)
        elif dx_P is not None:
            dx[layout.slots :].zero_()
        return dx, *grads, None, None, None
