"""Matrix products over the experts' row groups: uneven, some empty (the expert computation of paper 5.4).

Shapes: R rows in expert order, E experts, K inputs and N outputs of one product, M hidden, F feed-forward. Expert e's
rows are ``offsets[e]`` to ``offsets[e + 1]``; rows past the last offset come out zero.

    grouped_mm:  y = act(x @ W[e] + b[e])                      W [E, K, N], b [E, N]
    expert_ffn:  y = act(x @ W1[e] + b1[e]) @ W2[e] + b2[e]    W1 [E, M, F], W2 [E, F, M]

``expert_ffn`` keeps only the pre-activation for its backward and recomputes the activation from it while the values
are in cache (CPU) or registers (GPU): a third less memory than keeping both. Weight gradients are written expert by
expert into one buffer, in a fixed order: no atomics, the same bits every time.

CPU: a loop of matrix products over contiguous slices; measured against ``F.grouped_mm`` (results/kernels/README.md) it
is faster at every float32 shape tried and at many experts in bfloat16 (equal within noise at E = 8), so it is the only
one. Many small groups are shared out among threads, an expert to a thread, instead of splitting each product: its bits
are then those of one thread. float16 is computed in float32 there, as CPUs lack float16 products.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _buffers, _pool
from ._common import INTERPRETING, Backend, accumulate_dtype, next_power_of_2, pick_backend, tl, triton

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

    ``offsets_E1`` is int32 [E + 1] (RowTable.offsets_E1). Differentiable in x, W and b. Raises ``ValueError`` for
    shapes or dtypes that do not fit.
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
    """The experts' feed-forward networks on their rows: [R, M] -> [R, M], in x's dtype. Differentiable in all but the
    offsets."""
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
        parts = [fn(x_RK[a:b], e) for e, (a, b) in enumerate(itertools.pairwise(bounds))]
    tail = x_RK.new_zeros(len(x_RK) - bounds[-1], w_last.shape[2], dtype=wide)
    return torch.cat([*parts, tail]).to(x_RK.dtype)


# --- CPU --------------------------------------------------------------------------------------------------------------

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


class _TorchGroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, offsets_E1, activation):
        groups, _, end = _groups(offsets_E1)
        act = activation != "none"
        y = _buffers.empty((len(x), w.shape[2]), x.dtype)
        pre = _buffers.empty(y.shape, y.dtype) if act else y

        def work(groups):
            for e, i, j in groups:
                _product(x[i:j], w[e], None if b is None else b[e], pre[i:j])
                if act:
                    _gelu_out(pre[i:j], approximate=_APPROXIMATE[activation], out=y[i:j])

        _each(work, groups, w[0].numel())
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

        def work(groups):
            for e, i, j in groups:
                if dx is not None:
                    torch.mm(dy[i:j], w[e].T, out=dx[i:j])
                if dw is not None:
                    torch.mm(x[i:j].T, dy[i:j], out=dw[e])
                if db is not None:
                    torch.sum(dy[i:j], 0, out=db[e])

        _each(work, groups, w[0].numel())
        if dx is not None:
            dx[groups[-1][2] if groups else 0 :].zero_()
        return dx, dw, db, None, None


class _TorchFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, offsets_E1, activation):
        groups, largest, end = _groups(offsets_E1)
        act = activation != "none"
        y = _buffers.empty((len(x), w2.shape[2]), x.dtype)
        keep = any(ctx.needs_input_grad)
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
                    _gelu_out(pre_e, approximate=_APPROXIMATE[activation], out=h_e)
                _product(h_e, w2[e], None if b2 is None else b2[e], y[i:j])

        _each(work, groups, w1[0].numel())
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
        return dx, dw1, db1, dw2, db2, None, None


# --- GPU --------------------------------------------------------------------------------------------------------------
#
# A tile is BM rows of one group. A first small launch lists the tiles (their number is bounded without asking the
# device), so that the products need no host synchronisation and no search. The tile list serves forward and backward.


@triton.jit
def _schedule_kernel(offsets_p, expert_p, row_p, tiles, R, E, BM: tl.constexpr, BE: tl.constexpr):
    """Program e lists group e's tiles; group E is the rows past the last offset; unused places get expert -1."""
    e = tl.program_id(0)
    cols = tl.arange(0, BE)
    start = tl.load(offsets_p + cols, mask=cols <= E, other=0)
    end = tl.load(offsets_p + cols + 1, mask=cols < E, other=0)
    end = tl.where(cols == E, R, end)
    count = tl.where(cols <= E, (end - start + BM - 1) // BM, 0)
    first = tl.sum(tl.where(cols < e, count, 0), axis=0)
    mine = tl.sum(tl.where(cols == e, count, 0), axis=0)
    row = tl.sum(tl.where(cols == e, start, 0), axis=0)
    for i in range(0, mine, BE):
        at = i + cols
        tl.store(expert_p + first + at, tl.zeros([BE], tl.int32) + e, mask=at < mine)
        tl.store(row_p + first + at, row + at * BM, mask=at < mine)
    if e == E:
        for i in range(first + mine, tiles, BE):
            tl.store(expert_p + i + cols, tl.full([BE], -1, tl.int32), mask=i + cols < tiles)


@triton.jit
def _act(x, EXACT: tl.constexpr):
    """(gelu(x), gelu'(x)) in float32."""
    if EXACT:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    t = 1.0 - 2.0 / (tl.exp(1.5957691216057308 * (x + 0.044715 * x * x * x)) + 1.0)  # tanh by its exponential
    slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return 0.5 * x * (1.0 + t), slope


@triton.jit
def _product_kernel(
    x_p, w_p, b_p, y_p, pre_p, h_p, tile_expert_p, tile_row_p, offsets_p,
    R, K, N, E, tiles, stride_we, stride_wk, stride_wn,
    BIAS: tl.constexpr, ACT: tl.constexpr, EXACT: tl.constexpr, PRE: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of x @ W[e]. ACT 0: y = it + b. 1: y = act(it + b), with PRE also pre = it + b.
    2 (the way back): y = it * act'(pre), with PRE also h = act(pre)."""
    pid = tl.program_id(0)
    across = tl.cdiv(N, BN)
    group = pid // (8 * across)  # eight tiles share their weights' columns in cache
    members = tl.minimum(tiles - group * 8, 8)
    tile = group * 8 + pid % (8 * across) % members
    n = (pid % (8 * across) // members) * BN + tl.arange(0, BN)
    e = tl.load(tile_expert_p + tile)
    if e >= 0:
        row = tl.load(tile_row_p + tile)
        height = tl.minimum((R if e == E else tl.load(offsets_p + e + 1)) - row, BM)
        m = tl.arange(0, BM)
        y_at = m[:, None] * N + n[None, :]
        y_p += row.to(tl.int64) * N  # tile offsets stay within 32 bits, which saves registers
        pre_p += row.to(tl.int64) * N
        h_p += row.to(tl.int64) * N
        inside = (m[:, None] < height) & (n[None, :] < N)
        if e == E:
            tl.store(y_p + y_at, tl.zeros([BM, BN], y_p.dtype.element_ty), mask=inside)
        else:
            k = tl.arange(0, BK)
            x_p += row.to(tl.int64) * K
            w_p += e.to(tl.int64) * stride_we
            x_at = m[:, None] * K + k[None, :]
            w_at = k[:, None] * stride_wk + n[None, :] * stride_wn
            acc = tl.zeros([BM, BN], tl.float32)
            for start in range(0, K, BK):
                if EVEN_K:
                    x = tl.load(x_p + x_at, mask=m[:, None] < height, other=0.0)
                    w = tl.load(w_p + w_at, mask=n[None, :] < N, other=0.0)
                else:
                    x = tl.load(x_p + x_at, mask=(m[:, None] < height) & (start + k[None, :] < K), other=0.0)
                    w = tl.load(w_p + w_at, mask=(n[None, :] < N) & (start + k[:, None] < K), other=0.0)
                if UPCAST:
                    x, w = x.to(tl.float32), w.to(tl.float32)
                acc = tl.dot(x, w, acc, input_precision=PRECISION)
                x_p += BK
                w_p += BK * stride_wk
            if BIAS:
                acc += tl.load(b_p + e * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            if ACT == 1:
                if PRE:
                    tl.store(pre_p + y_at, acc.to(pre_p.dtype.element_ty), mask=inside)
                acc, _ = _act(acc, EXACT)
            if ACT == 2:
                h, slope = _act(tl.load(pre_p + y_at, mask=inside, other=0.0).to(tl.float32), EXACT)
                acc *= slope
                if PRE:
                    tl.store(h_p + y_at, h.to(h_p.dtype.element_ty), mask=inside)
            tl.store(y_p + y_at, acc.to(y_p.dtype.element_ty), mask=inside)


@triton.jit
def _weight_kernel(
    x_p, dy_p, dw_p, db_p, offsets_p, K, N,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile of dW[e] = x^T dy over the group's rows; the first tile of a column also sums its bias gradient."""
    e = tl.program_id(1)
    across = tl.cdiv(N, BN)
    block = tl.program_id(0) // across
    k = block * BK + tl.arange(0, BK)
    n = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
    begin = tl.load(offsets_p + e)
    count = tl.load(offsets_p + e + 1) - begin
    x_p += begin.to(tl.int64) * K
    dy_p += begin.to(tl.int64) * N
    r = tl.arange(0, BR)
    acc = tl.zeros([BK, BN], tl.float32)
    bias = tl.zeros([BN], tl.float32)
    for start in range(0, count, BR):
        left = count - start
        x = tl.load(x_p + r[None, :] * K + k[:, None], mask=(r[None, :] < left) & (k[:, None] < K), other=0.0)
        dy = tl.load(dy_p + r[:, None] * N + n[None, :], mask=(r[:, None] < left) & (n[None, :] < N), other=0.0)
        if BIAS and block == 0:
            bias += tl.sum(dy.to(tl.float32), axis=0)
        if UPCAST:
            x, dy = x.to(tl.float32), dy.to(tl.float32)
        acc = tl.dot(x, dy, acc, input_precision=PRECISION)
        x_p += BR * K
        dy_p += BR * N
    at = dw_p + (e.to(tl.int64) * K + k[:, None]) * N + n[None, :]
    tl.store(at, acc.to(dw_p.dtype.element_ty), mask=(k[:, None] < K) & (n[None, :] < N))
    if BIAS and block == 0:
        tl.store(db_p + e * N + n, bias.to(db_p.dtype.element_ty), mask=n < N)


class _Plan(NamedTuple):
    """The tiles of one call, shared by all its products."""

    expert: torch.Tensor
    row: torch.Tensor
    offsets: torch.Tensor
    BM: int


def _plan(x, offsets_E1) -> _Plan:
    R, E = len(x), len(offsets_E1) - 1
    average = R // E
    BM = 16 if average <= 16 else 32 if average <= 32 else 64 if average <= 64 or x.dtype == torch.float32 else 128
    tiles = R // BM + E + 1
    offsets_E1 = offsets_E1.int()
    expert, row = torch.empty(2, tiles, dtype=torch.int32, device=x.device).unbind()
    _schedule_kernel[(E + 1,)](offsets_E1, expert, row, tiles, R, E, BM=BM, BE=next_power_of_2(E + 1), num_warps=1)
    return _Plan(expert, row, offsets_E1, BM)


def _precision(dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _product_config(BM: int, N: int, K: int, dtype: torch.dtype, act: int) -> dict:
    """Tile of a forward or input-gradient product: what compiles for sm_80 without spills. Widths that are no
    multiple of 16 need masks and single loads, act 2 holds a second tile; both take a narrower one."""
    odd = N % 16 or K % 16
    BN = min(max(next_power_of_2(N), 16), 64 if dtype == torch.float32 or odd or act == 2 else 128)
    BK = min(max(next_power_of_2(K), 16), 32 if dtype == torch.float32 or odd else 64)
    return dict(BM=BM, BN=BN, BK=BK, num_warps=8 if BM == 128 else 4, num_stages=3)


def _weight_config(N: int, K: int, dtype: torch.dtype) -> dict:
    """Tile of a weight-gradient product."""
    odd = N % 16 or K % 16
    BK, BN = (min(max(next_power_of_2(n), 16), 64 if dtype == torch.float32 or odd else 128) for n in (K, N))
    return dict(BK=BK, BN=BN, BR=32, num_warps=8 if BK * BN >= 16384 else 4, num_stages=3)


def _mm(plan: _Plan, x, w, b, *, transpose=False, act=0, exact=False, pre=None, save=False):
    """y, and with ``save`` the pre-activation (act 1) or the activation (act 2)."""
    R, K = x.shape
    E = len(w)
    N = w.shape[1] if transpose else w.shape[2]
    y = x.new_empty(R, N)
    extra = x.new_empty(R, N) if save else None
    if R and N:
        config = _product_config(plan.BM, N, K, x.dtype, act)
        tiles = len(plan.expert)
        _product_kernel[(tiles * triton.cdiv(N, config["BN"]),)](
            x, w, x if b is None else b, y, (extra if save else x) if act != 2 else pre, extra if save else x,
            plan.expert, plan.row, plan.offsets,
            R, K, N, E, tiles, w.stride(0), *((w.stride(2), w.stride(1)) if transpose else (w.stride(1), w.stride(2))),
            BIAS=b is not None, ACT=act, EXACT=exact, PRE=save, EVEN_K=K % config["BK"] == 0,
            PRECISION=_precision(x.dtype), UPCAST=INTERPRETING, **config,
        )  # fmt: skip
    return (y, extra) if save else y


def _weight_gradient(plan: _Plan, x, dy, w, b):
    """(dW, db or None)."""
    E, K, N = w.shape
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    db = None if b is None else torch.empty_like(b, memory_format=torch.contiguous_format)
    config = _weight_config(N, K, x.dtype)
    _weight_kernel[(triton.cdiv(K, config["BK"]) * triton.cdiv(N, config["BN"]), E)](
        x, dy, dw, dw if db is None else db, plan.offsets, K, N,
        BIAS=db is not None, PRECISION=_precision(x.dtype), UPCAST=INTERPRETING, **config,
    )  # fmt: skip
    return dw, db


class _TritonGroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, offsets_E1, activation):
        x = x.contiguous()
        b = None if b is None else b.contiguous()
        plan, act, exact = _plan(x, offsets_E1), int(activation != "none"), activation == "gelu"
        keep = bool(act) and any(ctx.needs_input_grad)
        y = _mm(plan, x, w, b, act=act, exact=exact, save=keep)
        y, pre = y if keep else (y, None)
        ctx.save_for_backward(x, w, b, pre)
        ctx.plan, ctx.exact = plan, exact
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, b, pre = ctx.saved_tensors
        need, dy = ctx.needs_input_grad, dy.contiguous()
        if pre is not None:
            approximate = "none" if ctx.exact else "tanh"
            dy = torch.ops.aten.gelu_backward(dy, pre, approximate=approximate)
        dx = _mm(ctx.plan, dy, w, None, transpose=True) if need[0] else None
        dw, db = _weight_gradient(ctx.plan, x, dy, w, b) if need[1] or need[2] else (None, None)
        return dx, dw if need[1] else None, db, None, None


class _TritonFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, offsets_E1, activation):
        x = x.contiguous()
        b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
        plan, act, exact = _plan(x, offsets_E1), int(activation != "none"), activation == "gelu"
        keep = any(ctx.needs_input_grad)
        h = _mm(plan, x, w1, b1, act=act, exact=exact, save=bool(act) and keep)
        h, pre = h if act and keep else (h, h)
        y = _mm(plan, h, w2, b2)
        if keep:
            ctx.save_for_backward(x, w1, b1, w2, b2, pre)
            ctx.plan, ctx.act, ctx.exact = plan, act, exact
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w1, b1, w2, b2, pre = ctx.saved_tensors
        plan, need, dy = ctx.plan, ctx.needs_input_grad, dy.contiguous()
        second = need[3] or need[4]
        h = pre
        if ctx.act:
            d_pre = _mm(plan, dy, w2, None, transpose=True, act=2, exact=ctx.exact, pre=pre, save=second)
            d_pre, h = d_pre if second else (d_pre, None)
        else:
            d_pre = _mm(plan, dy, w2, None, transpose=True)
        dw2, db2 = _weight_gradient(plan, h, dy, w2, b2) if second else (None, None)
        dw1, db1 = _weight_gradient(plan, x, d_pre, w1, b1) if need[1] or need[2] else (None, None)
        dx = _mm(plan, d_pre, w1, None, transpose=True) if need[0] else None
        return dx, dw1 if need[1] else None, db1, dw2 if need[3] else None, db2, None, None
