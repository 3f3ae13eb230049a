"""Matrix products over the experts' row groups: uneven, some empty (the expert computation of paper 5.4).

Shapes: R rows in expert order, E experts, K inputs and N outputs of one product, M hidden, F feed-forward. Expert e's rows
are ``offsets[e]`` to ``offsets[e + 1]``; rows past the last offset come out zero.

    grouped_mm:  y = act(x @ W[e] + b[e])                      W [E, K, N], b [E, N]
    expert_ffn:  y = act(x @ W1[e] + b1[e]) @ W2[e] + b2[e]    W1 [E, M, F], W2 [E, F, M]

``expert_ffn`` keeps only the pre-activation for its backward and recomputes the activation from it while the values are in
cache (CPU) or registers (GPU): a third less memory than keeping both. Weight gradients are written expert by
expert into one buffer, in a fixed order: no atomics, the same bits every time.

CPU: a loop of matrix products over contiguous slices; measured against ``F.grouped_mm`` (see results/kernels/README.md) it is
the faster one at every shape tried, so it is the only one. float16 is computed in float32 there, as CPUs lack float16 products.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from . import _buffers
from ._common import Backend, accumulate_dtype, pick_backend

Activation = Literal["none", "gelu", "gelu_tanh"]
"""gelu: exact (erf). gelu_tanh: the tanh approximation, GPT-2's and Megatron's."""

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def grouped_mm(
    x_RK: torch.Tensor,
    w_EKN: torch.Tensor,
    offsets_E1: torch.Tensor,
    b_EN: torch.Tensor | None = None,
    *,
    activation: Activation = "none",
    backend: Backend = "auto",
) -> torch.Tensor:
    """y [R, N] = act(x @ W[e] + b[e]) over each expert's rows, in x's dtype, accumulated in float32.

    ``offsets_E1`` is int32 [E + 1] (RowTable.offsets_E1). Differentiable in x, W and b. Raises ``ValueError`` for shapes or
    dtypes that do not fit.
    """
    _check("grouped_mm", x_RK, offsets_E1, activation, (w_EKN, b_EN))
    chosen = pick_backend("grouped_mm", backend, x_RK, w_EKN, offsets_E1, b_EN)
    if chosen == "reference":
        return _reference(x_RK, offsets_E1, lambda x, e: _activate(_affine(x, w_EKN, b_EN, e), activation), w_EKN)
    if chosen == "torch":
        if x_RK.dtype == torch.float16:
            wide = [None if t is None else t.float() for t in (x_RK, w_EKN, b_EN)]
            return _TorchGroupedMM.apply(*wide, offsets_E1, activation).half()
        return _TorchGroupedMM.apply(x_RK, w_EKN, b_EN, offsets_E1, activation)
    return _TritonGroupedMM.apply(x_RK, w_EKN, b_EN, offsets_E1, activation)


def expert_ffn(
    x_RM: torch.Tensor,
    offsets_E1: torch.Tensor,
    w1_EMF: torch.Tensor,
    b1_EF: torch.Tensor | None,
    w2_EFM: torch.Tensor,
    b2_EM: torch.Tensor | None,
    *,
    activation: Activation = "gelu_tanh",
    backend: Backend = "auto",
) -> torch.Tensor:
    """The experts' feed-forward networks on their rows: [R, M] -> [R, M], in x's dtype. Differentiable in all but the offsets."""
    _check("expert_ffn", x_RM, offsets_E1, activation, (w1_EMF, b1_EF), (w2_EFM, b2_EM))
    chosen = pick_backend("expert_ffn", backend, x_RM, offsets_E1, w1_EMF, b1_EF, w2_EFM, b2_EM)
    if chosen == "reference":

        def ffn(x, e):
            return _affine(_activate(_affine(x, w1_EMF, b1_EF, e), activation), w2_EFM, b2_EM, e)

        return _reference(x_RM, offsets_E1, ffn, w2_EFM)
    if chosen == "torch":
        if x_RM.dtype == torch.float16:
            wide = [None if t is None else t.float() for t in (x_RM, w1_EMF, b1_EF, w2_EFM, b2_EM)]
            return _TorchFFN.apply(*wide, offsets_E1, activation).half()
        return _TorchFFN.apply(x_RM, w1_EMF, b1_EF, w2_EFM, b2_EM, offsets_E1, activation)
    return _TritonFFN.apply(x_RM, w1_EMF, b1_EF, w2_EFM, b2_EM, offsets_E1, activation)


def _check(op, x, offsets_E1, activation, *layers) -> None:
    if activation not in ("none", *_APPROXIMATE):
        raise ValueError(f"{op}: unknown activation {activation!r}; know none, gelu, gelu_tanh")
    if x.dim() != 2:
        raise ValueError(f"{op}: rows must be [R, width], not {tuple(x.shape)}")
    width, E = x.shape[1], len(offsets_E1) - 1
    for w, b in layers:
        if w.dim() != 3 or w.shape[:2] != (E, width):
            raise ValueError(f"{op}: weights {tuple(w.shape)} for {E} experts and rows of width {width}")
        width = w.shape[2]
        if b is not None and b.shape != (E, width):
            raise ValueError(f"{op}: bias {tuple(b.shape)} must be {(E, width)}")
        if w.dtype != x.dtype or (b is not None and b.dtype != x.dtype):
            raise ValueError(f"{op}: rows are {x.dtype}, weights {w.dtype}: one dtype for all (cast the parameters)")
    if offsets_E1.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: offsets must be int32 [E + 1], not {offsets_E1.dtype}")


# --- reference --------------------------------------------------------------------------------------------------------


def _affine(x, w, b, e):
    return x @ w[e] if b is None else x @ w[e] + b[e]


def _activate(x, activation: Activation):
    return x if activation == "none" else F.gelu(x, approximate=_APPROXIMATE[activation])


def _reference(x_RK, offsets_E1, fn, w_last):
    """fn(rows, e) for every group, in float32 (float64 for float64), back in x's dtype; the rest zero."""
    wide = accumulate_dtype(x_RK.dtype)
    bounds = offsets_E1.tolist()
    with torch.autocast(x_RK.device.type, enabled=False):
        parts = [fn(x_RK[a:b], e) for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))]
    tail = x_RK.new_zeros(len(x_RK) - bounds[-1], w_last.shape[2], dtype=wide)
    return torch.cat([*parts, tail]).to(x_RK.dtype)


# --- CPU --------------------------------------------------------------------------------------------------------------

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
    groups = [(e, a, b) for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)) if b > a]
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


class _TorchGroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, offsets_E1, activation):
        groups, _, end = _groups(offsets_E1)
        act = activation != "none"
        y = _buffers.empty((len(x), w.shape[2]), x.dtype)
        pre = _buffers.empty(y.shape, y.dtype) if act else y
        for e, i, j in groups:
            _product(x[i:j], w[e], None if b is None else b[e], pre[i:j])
            if act:
                _gelu_out(pre[i:j], approximate=_APPROXIMATE[activation], out=y[i:j])
        y[end:].zero_()
        ctx.save_for_backward(x, w, b, pre if act else None)
        ctx.groups, ctx.activation = groups, activation
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, b, pre = ctx.saved_tensors
        groups, dy = ctx.groups, dy.contiguous()
        if pre is not None:
            dy = torch.ops.aten.gelu_backward(dy, pre, approximate=_APPROXIMATE[ctx.activation])
        dx = _buffers.empty(x.shape, x.dtype) if ctx.needs_input_grad[0] else None
        dw = _gradients(groups, w, ctx.needs_input_grad[1])
        db = _gradients(groups, b, ctx.needs_input_grad[2])
        end = 0
        for e, i, j in groups:
            end = j
            if dx is not None:
                torch.mm(dy[i:j], w[e].T, out=dx[i:j])
            if dw is not None:
                torch.mm(x[i:j].T, dy[i:j], out=dw[e])
            if db is not None:
                torch.sum(dy[i:j], 0, out=db[e])
        if dx is not None:
            dx[end:].zero_()
        return dx, dw, db, None, None


class _TorchFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, offsets_E1, activation):
        groups, largest, end = _groups(offsets_E1)
        act = activation != "none"
        y = _buffers.empty((len(x), w2.shape[2]), x.dtype)
        keep = any(ctx.needs_input_grad)
        pre = _buffers.empty((len(x) if keep else largest, w1.shape[2]), x.dtype)
        h = x.new_empty(largest, w1.shape[2]) if act else None
        for e, i, j in groups:
            pre_e = pre[i:j] if keep else pre[: j - i]
            _product(x[i:j], w1[e], None if b1 is None else b1[e], pre_e)
            h_e = pre_e
            if act:
                h_e = h[: j - i]
                _gelu_out(pre_e, approximate=_APPROXIMATE[activation], out=h_e)
            _product(h_e, w2[e], None if b2 is None else b2[e], y[i:j])
        y[end:].zero_()
        if keep:
            ctx.save_for_backward(x, w1, b1, w2, b2, pre)
            ctx.groups, ctx.largest, ctx.activation = groups, largest, activation
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w1, b1, w2, b2, pre = ctx.saved_tensors
        groups, dy = ctx.groups, dy.contiguous()
        act = ctx.activation != "none"
        approximate = _APPROXIMATE.get(ctx.activation, "none")
        need = ctx.needs_input_grad
        dx = _buffers.empty(x.shape, x.dtype) if need[0] else None
        dw1, db1 = _gradients(groups, w1, need[1]), _gradients(groups, b1, need[2])
        dw2, db2 = _gradients(groups, w2, need[3]), _gradients(groups, b2, need[4])
        h = pre.new_empty(ctx.largest, pre.shape[1]) if act and dw2 is not None else None
        d_pre = pre.new_empty(ctx.largest, pre.shape[1])
        end = 0
        for e, i, j in groups:
            end = j
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
        if dx is not None:
            dx[end:].zero_()
        return dx, dw1, db1, dw2, db2, None, None
