"""Compute the experts on CPU: batched products and products of single groups over slots (``layout.py``).

A task computes everything for some experts while the values are in cache. Experts with many rows are cut into tasks for
the backward pass through their rows, and a second round of tasks computes the gradients of their weights. Threads share
the tasks, each with PyTorch's own threading off, so that a result has the same bits however many threads there are.
Unused slots hold zeros, and so do their gradients: they change no result.

Weights may be float32 where the rows are bfloat16: products are computed in bfloat16, and gradients are converted back.
Sorted blocks copy and convert the weights task by task, in cache; other layouts convert them at once. Both use pooled
memory, because new memory of this size is mapped page by page: that takes longer than the conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import buffers, pool
from .gelu import Gelu
from .layout import Layout, Task, plan, tiles
from .permute import take
from .swiglu import Swiglu

_LARGE = 1 << 30  # an expert's weight gradient of at least this many multiply-adds is cut into ``_PARTS``
_PARTS = 4

T = TypeVar("T")


def _share(work: Callable[[Iterable[T]], None], tasks: Sequence[T], counting: bool) -> None:
    """Run ``work`` over the tasks on PyTorch's number of threads, or with ``counting`` in this thread alone."""
    threads = torch.get_num_threads()
    if threads == 1 or counting:  # a dispatch mode, such as a FLOP counter, does not see other threads
        work(tasks)
    else:
        pool.share(work, tasks, threads)


class _Experts:
    """Hold stacked weights or biases and their views per expert: one ``unbind`` costs less than indexing each."""

    def __init__(self, stack: torch.Tensor | None, layout: Layout) -> None:
        self.stack = stack
        alone = stack is not None and any(task.experts for task in layout.tasks)
        self.each = stack.unbind() if alone else None


def _copy_experts(to: torch.Tensor, source: torch.Tensor, idle: tuple[int, ...]) -> None:
    """Copy stacked weights, without those of the experts that have no rows."""
    if not idle:
        to.copy_(source)
        return
    if busy := sorted(set(range(len(to))).difference(idle)):
        to_E, source_E = to.unbind(), source.unbind()
        torch._foreach_copy_([to_E[e] for e in busy], [source_E[e] for e in busy])


class _Packed:
    """Hold stacked weights as the tasks use them: in the rows' dtype and, for sorted blocks, in the blocks' order."""

    def __init__(self, source: torch.Tensor | None, layout: Layout, dtype: torch.dtype) -> None:
        self.stack = source
        self.each_N = None  # of the weights that `fill` copies
        if source is None:
            return
        if layout.order_N is None:
            if source.dtype != dtype:
                self.stack = buffers.empty(source.shape, dtype)
                _copy_experts(self.stack, source, layout.idle)
        elif source.dim() == 2:  # a bias
            self.stack = source.index_select(0, torch.from_numpy(layout.order_N)).to(dtype)
        else:
            self.stack = buffers.empty((len(layout.order_N), *source.shape[1:]), dtype)
            each = source.unbind()
            self.each_N = [each[e] for e in layout.order_N.tolist()]

    def fill(self, task: Task) -> None:
        """Copy the task's experts."""
        torch._foreach_copy_(self.stack[task.first : task.last].unbind(), self.each_N[task.first : task.last])


class _Gradient:
    """Hold the gradient of stacked weights: ``stack`` for the tasks to write, :meth:`result` in the weights' dtype.

    In sorted blocks a task writes to memory of its own, which :meth:`keep` copies to the experts' places.
    """

    def __init__(self, needed: bool, shape: torch.Size, dtypes: tuple[torch.dtype, torch.dtype], layout: Layout):
        self.stack = self.out = None
        if not needed:
            return
        self.to, self.idle = dtypes[1], layout.idle
        if layout.order_N is not None:
            self.out = buffers.empty(shape, self.to)
            each = self.out.unbind()
            self.each_N = [each[e] for e in layout.order_N.tolist()]
        else:
            self.stack = buffers.empty(shape, dtypes[0])

    def keep(self, task: Task, found: torch.Tensor) -> None:
        """Copy the task's gradients ``found`` [n, ...] to their experts' places."""
        torch._foreach_copy_(self.each_N[task.first : task.last], found.unbind())

    def result(self) -> torch.Tensor | None:
        """Return the gradient, zero for experts without rows."""
        if self.out is None:
            if self.stack is None:
                return None
            if self.stack.dtype == self.to:
                self.out = self.stack
            else:
                self.out = buffers.empty(self.stack.shape, self.to)
                _copy_experts(self.out, self.stack, self.idle)
        if self.idle:
            out_E = self.out.unbind()
            torch._foreach_zero_([out_E[e] for e in self.idle])
        return self.out


def _transposed(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Return x^T of x [n, K] for a product with a matrix of ``columns`` columns.

    With AMX, oneDNN takes longer for a transposed view than for a copy of it and the copying; a wide x^T of many rows
    is not worth the copy.
    """
    return x.t().contiguous() if x.shape[1] < columns and tiles(x.dtype) else x.t()


def _products(task: Task, x, w: _Experts, b: _Experts, out) -> None:
    """Write x @ w (+ b) to ``out``, both of the task's slots; w is [E, K, N]."""
    n, base = task.last - task.first, task.base
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


def _sorted_gradients(task: Task, x, dy, dw: _Gradient, db: _Gradient, scratch: torch.Tensor | None) -> None:
    """Compute x^T dy and the sums of dy over the slots of a sorted block, by way of ``scratch``."""
    n = task.last - task.first
    x_nC, dy_nC = x.view(n, task.base, -1), dy.view(n, task.base, -1)
    if dw.out is not None:
        shape = n, x.shape[1], dy.shape[1]
        found = scratch[: math.prod(shape)].view(shape)
        torch.bmm(x_nC.mT, dy_nC, out=found)
        dw.keep(task, found)
    if db.out is not None:
        db.keep(task, dy_nC.sum(1))


def _weight_gradients(task: Task, x, dy, dw: _Experts, db: _Experts) -> None:
    """Write x^T dy and the sums of dy over the slots of the task's experts to ``dw`` [E, K, N] and ``db`` [E, N]."""
    n, base = task.last - task.first, task.base
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
                    dw.each[e].addmm_(_transposed(x_g, dy_g.shape[1]), dy_g)
                else:
                    torch.mm(_transposed(x_g, dy_g.shape[1]), dy_g, out=dw.each[e])
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
        torch.mm(_transposed(x[i:j, columns], dy.shape[1]), dy[i:j], out=dw.each[e][columns])
    if db.stack is not None and number == 0:
        torch.sum(dy[i:j], 0, out=db.each[e])


def _activation(name: str, dtype: torch.dtype) -> Gelu | Swiglu | None:
    """Return the activation function with memory for one thread."""
    if name == "swiglu":
        return Swiglu(dtype)
    return None if name == "none" else Gelu(dtype, "tanh" if name == "gelu_tanh" else "none")


class CPUExperts(torch.autograd.Function):
    """Compute the experts and their gradients; see the module's docstring."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, offsets_E1, activation, keep):
        R, (_, M, N), F = len(x), w1.shape, w2.shape[1]  # N = 2 F with gates, else F
        counting = _get_current_dispatch_mode() is not None
        converts = w1.dtype != x.dtype
        layout = plan(offsets_E1.tolist(), R, M, N, x.dtype, pad=not counting, converts=converts)
        apart = layout.row_P is not None
        x_P = take(x, layout.row_P) if apart else x
        y_P = buffers.empty((layout.slots if apart else R, M), x.dtype)
        pre = buffers.empty((layout.slots, N), x.dtype) if keep else None
        packed = [_Packed(t, layout, x.dtype) for t in (w1, b1, w2, b2)]
        # GELU's value and slope are kept: another [slots, F], for a backward pass without exponentials.
        sloped = keep and activation == "gelu_tanh"
        h = buffers.empty(pre.shape, x.dtype) if sloped else None
        by_task = [p for p in packed if p.each_N is not None]
        weights = [_Experts(p.stack, layout) for p in packed]

        def work(tasks):
            longest = max((t.end - t.start for t in layout.tasks), default=0)
            act = _activation(activation, x.dtype)
            pre_any = None if keep else buffers.empty((longest, N), x.dtype)
            h_any = None if act is None or sloped else buffers.empty((longest, F), x.dtype)
            for task in tasks:
                for p in by_task:
                    p.fill(task)
                here = slice(task.start, task.end)
                pre_t = pre[here] if keep else pre_any[: task.end - task.start]
                _products(task, x_P[here], *weights[:2], pre_t)
                h_t = pre_t
                if sloped:
                    h_t = h[here]
                    act.forward_with_slope(pre_t, h_t)
                elif act is not None:
                    h_t = h_any[: task.end - task.start]
                    act.forward(pre_t, h_t)
                _products(task, h_t, *weights[2:], y_P[here])

        _share(work, layout.tasks, counting)
        if keep:
            ctx.save_for_backward(x_P, packed[0].stack, packed[2].stack, pre, h)
            ctx.shapes = [None if t is None else (t.shape, (x.dtype, t.dtype)) for t in (w1, b1, w2, b2)]
            ctx.layout, ctx.activation, ctx.rows = layout, activation, R
        if apart:
            return take(y_P, layout.slot_R)
        y_P[layout.slots :].zero_()
        return y_P

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_P, w1, w2, pre, h = ctx.saved_tensors  # with h, pre holds the activation's slope
        layout, need, sloped = ctx.layout, ctx.needs_input_grad, h is not None
        act = ctx.activation != "none" and not sloped  # whether the activation is computed again
        F, N, counting = w2.shape[1], pre.shape[1], _get_current_dispatch_mode() is not None
        gated = F != N
        apart, in_order = layout.row_P is not None, layout.order_N is not None
        dy_P = take(dy.contiguous(), layout.row_P) if apart else dy.contiguous()
        dx_P = buffers.empty(x_P.shape, x_P.dtype) if need[0] else None
        grads = [_Gradient(n, *(s or (None, None)), layout) for n, s in zip(need[1:5], ctx.shapes, strict=True)]
        dw1, db1, dw2, db2 = grads if in_order else (_Experts(g.stack, layout) for g in grads)
        w1_T, w2_T, none = _Experts(w1.mT, layout), _Experts(w2.mT, layout), _Experts(None, layout)
        save_h = act and need[3]
        if not sloped:
            h = pre  # without an activation function; else it is computed below, if w2's gradient is needed

        def rows(task, function, d_t, h_t, dh_any):
            """Compute d pre (and h) of the task's slots, and dx; without gates, d pre replaces dh in its memory."""
            here = slice(task.start, task.end)
            dh_t = dh_any[: task.end - task.start] if gated else d_t
            _products(task, dy_P[here], w2_T, none, dh_t)
            if gated:
                function.backward(pre[here], dh_t, d_t, h_t)
            elif sloped:
                d_t.mul_(pre[here])
            elif function is not None:
                function.backward(pre[here], d_t, h_t)
            if dx_P is not None:
                _products(task, d_t, w1_T, none, dx_P[here])

        def new_function():
            """Return the activation function, and memory for dh if it needs its own."""
            dh_any = buffers.empty((longest, F), pre.dtype) if gated else None
            return _activation(ctx.activation, pre.dtype) if act else None, dh_any

        longest = max((t.end - t.start for t in layout.tasks), default=0)
        if layout.cut:
            d_pre = buffers.empty(pre.shape, pre.dtype)
            if save_h:
                h = buffers.empty((len(pre), F), pre.dtype)

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
            most = max((t.last - t.first for t in layout.tasks), default=0)

            def work(tasks):
                function, dh_any = new_function()
                d_any = buffers.empty((longest, N), pre.dtype)
                h_any = buffers.empty((longest, F), pre.dtype) if save_h else None
                scratch = buffers.empty((most * w1[0].numel(),), pre.dtype) if in_order else None
                for task in tasks:
                    here, n = slice(task.start, task.end), task.end - task.start
                    d_t = d_any[:n]
                    h_t = h_any[:n] if save_h else None
                    rows(task, function, d_t, h_t, dh_any)
                    for x_t, dy_t, dw, db in (
                        (x_P[here], d_t, dw1, db1),
                        (h[here] if h_t is None else h_t, dy_P[here], dw2, db2),
                    ):
                        if in_order:
                            _sorted_gradients(task, x_t, dy_t, dw, db, scratch)
                        else:
                            _weight_gradients(task, x_t, dy_t, dw, db)

            _share(work, layout.tasks, counting)
        dx = dx_P
        if dx_P is not None and apart:
            dx = take(dx_P, layout.slot_R)
        elif dx_P is not None:
            dx[layout.slots :].zero_()
        return dx, *(g.result() for g in grads), None, None, None
