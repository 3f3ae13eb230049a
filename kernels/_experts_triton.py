"""Compute the experts in Triton.

A tile is BM rows of one group. A first small launch lists the tiles (their number is bounded without asking the
device), so that the products need no host synchronisation and no search. The tile list serves forward and backward.
Inside a product, K is the number of inputs and N the number of outputs. A *place* is a tile and a block of BN columns.
The numbers of rows and tiles do not specialise the kernels: they change from step to step.

A product runs in one of two ways, by the setting `programs_per_sm`, which `tuning.py` can override:

- 0: one program for each place that the bound allows. Those past the listed tiles end at once.
- n: *persistent*, n programs for each multiprocessor, each of which computes every (number of programs)-th place. The
  loop over places and the loop over K become one (`flatten`), so that the loads of the next place begin before the
  present one is stored. Loads use cp.async, which sm_80 has, not TMA.

The order of places is the same in both: eight tiles beside each other, then the next columns of these, so that the
programs that run at one time share rows and weights in the L2 cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import tuning
from ._common import dot_precision, multiprocessors, next_power_of_2
from ._triton import INTERPRETING, tl, triton
from .activations import ACTIVATIONS


@triton.jit(do_not_specialize=["tiles", "R"])
def _schedule_kernel(offsets_p, expert_p, row_p, tiles, R, E, BM: tl.constexpr, BE: tl.constexpr):
    """List the tiles of group e in program e; group E is the rows past the last offset.

    Unused entries get expert -1. Behind the lists stand the number of tiles without group E's, and with.
    """
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
        tl.store(expert_p + tiles, first)
        tl.store(row_p + tiles, first + mine)


@triton.jit
def _act(x, EXACT: tl.constexpr):
    """Return (gelu(x), gelu'(x)) in float32."""
    if EXACT:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    t = 1.0 - 2.0 / (tl.exp(1.5957691216057308 * (x + 0.044715 * x * x * x)) + 1.0)  # tanh by exp
    slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return 0.5 * x * (1.0 + t), slope


@triton.jit
def _place(i, tiles, across):
    """Return (tile, block of columns) of the i-th place."""
    group = i // (8 * across)
    members = tl.minimum(tiles - group * 8, 8)
    inside = i % (8 * across)
    return group * 8 + inside % members, inside // members


@triton.jit
def _product_tile(
    e, tile, column, x_p, w_p, b_p, y_p, pre_p, h_p, tile_row_p, offsets_p, K, N, stride_we, stride_wk, stride_wn,
    BIAS: tl.constexpr, ACT: tl.constexpr, EXACT: tl.constexpr, PRE: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute one place of y; see ``_product_kernel``.

    Only scalars depend on the place, and offsets within a tile fit 32 bits: this saves registers, and a flattened loop
    would lose what the compiler knows of the alignment of tensors of pointers, which cp.async needs.
    """
    row = tl.load(tile_row_p + tile)
    height = tl.minimum(tl.load(offsets_p + e + 1) - row, BM)
    width = N - column * BN
    first, left = row.to(tl.int64), (column * BN).to(tl.int64)
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    x_at = m[:, None] * K + k[None, :]
    w_at = k[:, None] * stride_wk + n[None, :] * stride_wn
    w_p += e.to(tl.int64) * stride_we + left * stride_wn
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        x_mask, w_mask = m[:, None] < height, n[None, :] < width
        if not EVEN_K:
            x_mask, w_mask = x_mask & (start + k[None, :] < K), w_mask & (start + k[:, None] < K)
        x = tl.load(x_p + (first * K + start) + x_at, mask=x_mask, other=0.0)
        w = tl.load(w_p + tl.cast(start, tl.int64) * stride_wk + w_at, mask=w_mask, other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(b_p + e * N + left + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    y_from = first * N + left
    y_at = m[:, None] * N + n[None, :]
    inside = (m[:, None] < height) & (n[None, :] < width)
    if ACT == 1:
        if PRE:
            tl.store(pre_p + y_from + y_at, acc.to(pre_p.dtype.element_ty), mask=inside)
        acc, _ = _act(acc, EXACT)
    if ACT == 2:
        h, slope = _act(tl.load(pre_p + y_from + y_at, mask=inside, other=0.0).to(tl.float32), EXACT)
        acc *= slope
        if PRE:
            tl.store(h_p + y_from + y_at, h.to(h_p.dtype.element_ty), mask=inside)
    tl.store(y_p + y_from + y_at, acc.to(y_p.dtype.element_ty), mask=inside)


@triton.jit
def _zero_tile(tile, column, y_p, tile_row_p, R, N, BM: tl.constexpr, BN: tl.constexpr):
    """Store zeros in a place past the last offset."""
    row = tl.load(tile_row_p + tile)
    m, n = tl.arange(0, BM), column * BN + tl.arange(0, BN)
    inside = (m[:, None] < R - row) & (n[None, :] < N)
    y_p += row.to(tl.int64) * N
    tl.store(y_p + m[:, None] * N + n[None, :], tl.zeros([BM, BN], y_p.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R", "tiles"])
def _product_kernel(
    x_p, w_p, b_p, y_p, pre_p, h_p, tile_expert_p, tile_row_p, offsets_p,
    R, K, N, E, tiles, stride_we, stride_wk, stride_wn,
    BIAS: tl.constexpr, ACT: tl.constexpr, EXACT: tl.constexpr, PRE: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Compute y from the product p = x @ W[e], one place in a program or, ``PERSISTENT``, many.

    ACT 0: y = p + b. ACT 1: y = act(p + b); with PRE, also store pre = p + b. ACT 2 (backward): y = p * act'(pre); with
    PRE, also store h = act(pre). In all, rows of y past the last offset come out zero.
    """
    across = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    if PERSISTENT:
        grouped = tl.load(tile_expert_p + tiles)
        for i in tl.range(pid, grouped * across, tl.num_programs(0), flatten=True):
            tile, column = _place(i, grouped, across)
            _product_tile(
                tl.load(tile_expert_p + tile), tile, column,
                x_p, w_p, b_p, y_p, pre_p, h_p, tile_row_p, offsets_p, K, N, stride_we, stride_wk, stride_wn,
                BIAS, ACT, EXACT, PRE, EVEN_K, PRECISION, UPCAST, BM, BN, BK,
            )  # fmt: skip
        for i in range(grouped * across + pid, tl.load(tile_row_p + tiles) * across, tl.num_programs(0)):
            _zero_tile(i // across, i % across, y_p, tile_row_p, R, N, BM, BN)
    else:
        tile, column = _place(pid, tiles, across)
        e = tl.load(tile_expert_p + tile)
        if e == E:
            _zero_tile(tile, column, y_p, tile_row_p, R, N, BM, BN)
        elif e >= 0:
            _product_tile(
                e, tile, column,
                x_p, w_p, b_p, y_p, pre_p, h_p, tile_row_p, offsets_p, K, N, stride_we, stride_wk, stride_wn,
                BIAS, ACT, EXACT, PRE, EVEN_K, PRECISION, UPCAST, BM, BN, BK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _swiglu_kernel(
    pre_p, h_p, d_p, d_pre_p, count, F,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute h = silu(g) * u of pre-activations [R, 2 F], and in the backward pass their gradients from dh ``d``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = at // F
    gate_at = at + row * F
    g = tl.load(pre_p + gate_at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(pre_p + gate_at + F, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    silu = g * s
    if FORWARD:
        tl.store(h_p + at, (silu * u).to(h_p.dtype.element_ty), mask=inside)
    if BACKWARD:
        d = tl.load(d_p + at, mask=inside, other=0.0).to(tl.float32)
        d_g = d * u * (s + silu * (1.0 - s))
        tl.store(d_pre_p + gate_at, d_g.to(d_pre_p.dtype.element_ty), mask=inside)
        tl.store(d_pre_p + gate_at + F, (d * silu).to(d_pre_p.dtype.element_ty), mask=inside)


@triton.jit
def _weight_tile(
    i, x_p, dy_p, dw_p, db_p, offsets_p, K, N,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Compute the i-th tile of the weight gradients; see ``_weight_kernel``."""
    across = tl.cdiv(N, BN)
    here = tl.cdiv(K, BK) * across
    e = i // here
    block = i % here // across
    top, left = block * BK, i % across * BN
    k, n, r = tl.arange(0, BK), tl.arange(0, BN), tl.arange(0, BR)
    height, width = K - top, N - left
    begin = tl.load(offsets_p + e)
    count = tl.load(offsets_p + e + 1) - begin
    x_p += begin.to(tl.int64) * K + top
    dy_p += begin.to(tl.int64) * N + left
    x_at = r[None, :] * K + k[:, None]
    dy_at = r[:, None] * N + n[None, :]
    acc = tl.zeros([BK, BN], tl.float32)
    bias = tl.zeros([BN], tl.float32)
    for start in range(0, count, BR):
        x = tl.load(x_p + x_at, mask=(r[None, :] < count - start) & (k[:, None] < height), other=0.0)
        dy = tl.load(dy_p + dy_at, mask=(r[:, None] < count - start) & (n[None, :] < width), other=0.0)
        if BIAS and block == 0:
            bias += tl.sum(dy.to(tl.float32), axis=0)
        if UPCAST:
            x, dy = x.to(tl.float32), dy.to(tl.float32)
        acc = tl.dot(x, dy, acc, input_precision=PRECISION)
        x_p += BR * K
        dy_p += BR * N
    dw_p += (e.to(tl.int64) * K + top) * N + left
    inside = (k[:, None] < height) & (n[None, :] < width)
    tl.store(dw_p + k[:, None] * N + n[None, :], acc.to(dw_p.dtype.element_ty), mask=inside)
    if BIAS and block == 0:
        tl.store(db_p + e * N + left + n, bias.to(db_p.dtype.element_ty), mask=n < width)


@triton.jit
def _weight_kernel(
    x_p, dy_p, dw_p, db_p, offsets_p, K, N, E,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Compute dW[e] = x^T dy over the group's rows, one tile of it in a program or, ``PERSISTENT``, many.

    Tiles of one group follow each other, so that its rows stay in cache. A column's first tile also sums its bias
    gradient. Groups differ in their steps over rows, so that the two loops cannot be flattened.
    """
    if PERSISTENT:
        total = E * tl.cdiv(K, BK) * tl.cdiv(N, BN)
        for i in tl.range(tl.program_id(0), total, tl.num_programs(0)):
            _weight_tile(i, x_p, dy_p, dw_p, db_p, offsets_p, K, N, BIAS, PRECISION, UPCAST, BK, BN, BR)
    else:
        i = tl.program_id(0)
        _weight_tile(i, x_p, dy_p, dw_p, db_p, offsets_p, K, N, BIAS, PRECISION, UPCAST, BK, BN, BR)


class _Plan(NamedTuple):
    """Hold the tiles of one call; all its products share them.

    Attributes:
        expert, row: int32 [more than tiles], the group and the first row of each tile; see ``_schedule_kernel``.
        tiles: a bound on their number.
    """

    expert: torch.Tensor
    row: torch.Tensor
    offsets: torch.Tensor
    tiles: int
    BM: int


def _plan(x, offsets_E1) -> _Plan:
    """Return the tiles of the groups of rows; BM, the rows of a tile, follows the average group."""
    R, E = len(x), len(offsets_E1) - 1
    average = R // E
    BM = 16 if average <= 16 else 32 if average <= 32 else 64 if average <= 64 or x.dtype == torch.float32 else 128
    BM = tuning.tile("rows", {"BM": BM})["BM"]
    tiles = R // BM + E + 1
    offsets_E1 = offsets_E1.int()
    length = (tiles // 4 + 1) * 4  # more than tiles; both lists aligned to 16 bytes, or kernels would compile anew
    expert, row = torch.empty(2, length, dtype=torch.int32, device=x.device).unbind()
    _schedule_kernel[(E + 1,)](offsets_E1, expert, row, tiles, R, E, BM=BM, BE=next_power_of_2(E + 1), num_warps=1)
    return _Plan(expert, row, offsets_E1, tiles, BM)


def _product_config(BM: int, N: int, K: int, dtype: torch.dtype, act: int) -> dict:
    """Return the tile of a forward or input-gradient product, chosen to compile for sm_80 without register spills."""
    # Narrower for odd widths, which need masks and unvectorised loads, and for act 2, which holds a second tile.
    odd = N % 16 or K % 16
    BN = min(max(next_power_of_2(N), 16), 64 if dtype == torch.float32 or odd or act == 2 else 128)
    BK = min(max(next_power_of_2(K), 16), 32 if dtype == torch.float32 or odd else 64)
    return dict(BM=BM, BN=BN, BK=BK, num_warps=8 if BM >= 128 else 4, num_stages=3, programs_per_sm=0)


def _weight_config(N: int, K: int, dtype: torch.dtype) -> dict:
    """Return the tile of a weight-gradient product."""
    odd = N % 16 or K % 16
    BK, BN = (min(max(next_power_of_2(n), 16), 64 if dtype == torch.float32 or odd else 128) for n in (K, N))
    warps = 8 if BK * BN >= 16384 else 4
    return dict(BK=BK, BN=BN, BR=32, num_warps=warps, num_stages=3, programs_per_sm=0)


def _grid(places: int, config: dict, x: torch.Tensor) -> tuple[tuple[int], dict]:
    """Return the grid for so many places, and the configuration as the kernel takes it."""
    config = dict(config)
    each = config.pop("programs_per_sm")
    programs = min(places, each * multiprocessors(x.device)) if each else places
    return (programs,), config | {"PERSISTENT": each > 0}


def _mm(plan: _Plan, x, w, b, *, transpose=False, act=0, exact=False, pre=None, save=False):
    """Return y, and with ``save`` also the pre-activation (act 1) or the activation (act 2)."""
    R, K = x.shape
    E = len(w)
    N = w.shape[1] if transpose else w.shape[2]
    y = x.new_empty(R, N)
    extra = x.new_empty(R, N) if save else None
    if R and N:
        config = _product_config(plan.BM, N, K, x.dtype, act)
        config = tuning.tile(f"product{act}{'t' * transpose}", config)
        grid, config = _grid(plan.tiles * triton.cdiv(N, config["BN"]), config, x)
        _product_kernel[grid](
            x, w, x if b is None else b, y, (extra if save else x) if act != 2 else pre, extra if save else x,
            plan.expert, plan.row, plan.offsets,
            R, K, N, E, plan.tiles, w.stride(0), *((w.stride(2), w.stride(1)) if transpose else w.stride()[1:]),
            BIAS=b is not None, ACT=act, EXACT=exact, PRE=save, EVEN_K=K % config["BK"] == 0,
            PRECISION=dot_precision(x.dtype), UPCAST=INTERPRETING, **config,
        )  # fmt: skip
    return (y, extra) if save else y


def _weight_gradient(plan: _Plan, x, dy, w, b):
    """Return (dW, db or None)."""
    E, K, N = w.shape
    dw = torch.empty_like(w)
    db = None if b is None else torch.empty_like(b)
    config = tuning.tile("weight", _weight_config(N, K, x.dtype))
    grid, config = _grid(E * triton.cdiv(K, config["BK"]) * triton.cdiv(N, config["BN"]), config, x)
    _weight_kernel[grid](
        x, dy, dw, dw if db is None else db, plan.offsets, K, N, E,
        BIAS=db is not None, PRECISION=dot_precision(x.dtype), UPCAST=INTERPRETING, **config,
    )  # fmt: skip
    return dw, db


def _swiglu(pre, dh=None, *, forward=True):
    """Return h [R, F] (None unless ``forward``) of pre-activations [R, 2 F], and with ``dh`` their gradients."""
    R, F = len(pre), pre.shape[1] // 2
    h = pre.new_empty(R, F) if forward else None
    d_pre = None if dh is None else torch.empty_like(pre)
    if R and F:
        arguments = (pre, h if forward else pre, pre if dh is None else dh, pre if dh is None else d_pre)
        _swiglu_kernel[(triton.cdiv(R * F, 1024),)](
            *arguments, R * F, F, FORWARD=forward, BACKWARD=dh is not None, BLOCK=1024
        )
    return h, d_pre


def _activate(activation: str, pre, dh=None, *, forward=True):
    """Return as `_swiglu` for an activation that no product computes."""
    if activation == "none":
        return pre, dh
    if activation == "swiglu":
        return _swiglu(pre, dh, forward=forward)
    function, wide = ACTIVATIONS[activation], pre.float()
    h = function.forward(wide).to(pre.dtype) if forward else None
    return h, None if dh is None else function.backward(wide, dh.float()).to(pre.dtype)


class TritonExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, offsets_E1, activation, keep):
        plan, exact = _plan(x, offsets_E1), activation == "gelu"
        act = int(activation in ("gelu", "gelu_tanh"))  # part of the product
        h = _mm(plan, x, w1, b1, act=act, exact=exact, save=bool(act) and keep)
        h, pre = h if act and keep else (h, h)
        if not act:
            h, _ = _activate(activation, pre)
        y = _mm(plan, h, w2, b2)
        if keep:
            ctx.save_for_backward(x, w1, b1, w2, b2, pre, offsets_E1)  # of the plan: PyTorch refuses changes in place
            ctx.plan, ctx.act, ctx.exact, ctx.activation = plan, act, exact, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, w1, b1, w2, b2, pre, _ = ctx.saved_tensors
        plan, need, dy = ctx.plan, ctx.needs_input_grad, dy.contiguous()
        second = need[3] or need[4]
        if ctx.act:
            d_pre = _mm(plan, dy, w2, None, transpose=True, act=2, exact=ctx.exact, pre=pre, save=second)
            d_pre, h = d_pre if second else (d_pre, None)
        else:
            dh = _mm(plan, dy, w2, None, transpose=True)
            h, d_pre = _activate(ctx.activation, pre, dh, forward=second)
        dw2, db2 = _weight_gradient(plan, h, dy, w2, b2) if second else (None, None)
        dw1, db1 = _weight_gradient(plan, x, d_pre, w1, b1) if need[1] or need[2] else (None, None)
        dx = _mm(plan, d_pre, w1, None, transpose=True) if need[0] else None
        return dx, dw1 if need[1] else None, db1, dw2 if need[3] else None, db2, None, None, None
