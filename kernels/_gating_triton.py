"""Compute the gate in Triton: the semantics of ``gating.py``.

A small batch takes one launch of one program. A larger one takes three kernels: *choose* (softmax, top-k and histograms
of each block of tokens), *scan* (the first slots of each block) and *place* (slots, weights, losses). Random selection
adds *select* (one program per expert, which does nothing unless the expert overflows) and, for normalised weights,
*weigh*. Sums across blocks run in a fixed order, so that results are bitwise reproducible. The numbers of tokens and
of blocks do not specialise the kernels, so that a new batch size needs no compilation.
"""

from __future__ import annotations

import torch

from ._common import next_power_of_2
from ._hash import hash_keys
from ._selection_triton import gate_select_kernel, priority
from ._triton import tl, triton


@triton.jit
def _sortable(x):
    """Return int32 keys in the order of the floats; both zeros get the same key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _softmax_tile(logits_p, rows, cols, S, E):
    """Return (p [BS, BE], lse [BS], ok [BS], logits): p is zero outside the matrix, ok false without a softmax."""
    inside = (rows[:, None] < S) & (cols[None, :] < E)
    at = rows[:, None].to(tl.int64) * E + cols[None, :]
    x = tl.load(logits_p + at, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=1)
    top = tl.where(rows < S, top, 0.0)
    ex = tl.exp(x - top[:, None])  # 0 outside, where x is -inf
    total = tl.sum(ex, axis=1)
    ok = (rows < S) & (total == total)
    return ex / tl.where(rows < S, total, 1.0)[:, None], top + tl.log(total), ok, x


@triton.jit
def _choice_keys(choice_p, x, ok, rows, cols, S, E, HAS_CHOICE: tl.constexpr):
    """Return (keys, ok): the top-k ranks the keys; rows with a NaN are not ok, columns past E rank below everything."""
    inside = (rows[:, None] < S) & (cols[None, :] < E)
    if HAS_CHOICE:
        x = tl.load(choice_p + rows[:, None].to(tl.int64) * E + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        ok = ok & (tl.sum((x != x).to(tl.int32), axis=1) == 0)
    return tl.where(cols[None, :] < E, _sortable(x), -0x80000000), ok


@triton.jit(do_not_specialize=["S", "CAP", "low", "high"])
def _gate_small_kernel(
    logits_p, choice_p, expert_p, slot_p, weight_p, first_p, load_p, kept_p, losses_p,
    S, E, CAP, low, high,
    K: tl.constexpr, HAS_CHOICE: tl.constexpr, RANDOM: tl.constexpr, NORMALIZE: tl.constexpr, EPS: tl.constexpr,
    BS: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the whole gate in one program: S <= BS, E <= BE, K <= BK; with RANDOM, compare all pairs of entries."""
    rows = tl.arange(0, BS)
    cols = tl.arange(0, BE)
    ks = tl.arange(0, BK)
    p, lse, ok, x = _softmax_tile(logits_p, rows, cols, S, E)
    keys, ok = _choice_keys(choice_p, x, ok, rows, cols, S, E, HAS_CHOICE)

    expert = tl.zeros([BS, BK], tl.int32)
    raw = tl.zeros([BS, BK], tl.float32)
    load = tl.zeros([BE], tl.int32)
    for k in range(K):
        _, best = tl.max(keys, axis=1, return_indices=True)
        taken = cols[None, :] == best[:, None]
        keys = tl.where(taken, -0x80000000, keys)
        raw = tl.where(ks[None, :] == k, tl.sum(tl.where(taken, p, 0.0), axis=1)[:, None], raw)
        expert = tl.where(ks[None, :] == k, tl.where(ok, best, k)[:, None].to(tl.int32), expert)
        count = tl.sum((taken & ok[:, None]).to(tl.int32), axis=0)
        load += count
        if k == 0:
            tl.store(first_p + cols, count, mask=cols < E)
            broken = (rows < S) & (ok == 0)
            poison = tl.where(tl.sum(broken.to(tl.int32), axis=0) > 0, float("nan"), 0.0)
            share = tl.sum(tl.where(ok[:, None], p, 0.0), axis=0) * count.to(tl.float32)
            tl.store(losses_p, tl.sum(share, axis=0) * E / S / S + poison)
            tl.store(losses_p + 1, tl.sum(tl.where(ok, lse * lse, 0.0), axis=0) / S + poison)

    kept = ok[:, None] & (ks[None, :] < K)
    if RANDOM:
        draw = priority(rows[:, None] + ks[None, :] * 0, ks[None, :] + rows[:, None] * 0, low, high)
        e_N = tl.reshape(tl.where(kept, expert, -1), [BS * BK])
        d_N = tl.reshape(draw, [BS * BK])
        n_N = tl.arange(0, BS * BK)
        ahead = (d_N[None, :] > d_N[:, None]) | ((d_N[None, :] == d_N[:, None]) & (n_N[None, :] < n_N[:, None]))
        ahead = ahead & (e_N[None, :] == e_N[:, None])
        kept = kept & tl.reshape(tl.sum(ahead.to(tl.int32), axis=1) < CAP, [BS, BK])
    slot = tl.full([BS, BK], -1, tl.int32)
    counts = tl.zeros([BE], tl.int32)
    for k in range(K):
        here = ks[None, :] == k
        e_S = tl.sum(tl.where(here, expert, 0), axis=1)
        kept_S = tl.sum((here & kept).to(tl.int32), axis=1)
        hot = ((cols[None, :] == e_S[:, None]) & (kept_S[:, None] > 0)).to(tl.int32)
        at = tl.sum((tl.cumsum(hot, axis=0) - 1 + counts[None, :]) * hot, axis=1)
        counts += tl.sum(hot, axis=0)
        slot = tl.where(here & kept, at[:, None], slot)
    slot = tl.where(slot < CAP, slot, -1)
    weight = tl.where(slot >= 0, raw, 0.0)
    if NORMALIZE:
        weight = weight / tl.maximum(tl.sum(weight, axis=1), EPS)[:, None]
    out = rows[:, None] * K + ks[None, :]
    inside = (rows[:, None] < S) & (ks[None, :] < K)
    tl.store(expert_p + out, expert, mask=inside)
    tl.store(slot_p + out, slot, mask=inside)
    tl.store(weight_p + out, weight, mask=inside)
    tl.store(load_p + cols, load, mask=cols < E)
    tl.store(kept_p + cols, tl.minimum(load, CAP), mask=cols < E)


@triton.jit(do_not_specialize=["S"])
def _gate_choose_kernel(
    logits_p, choice_p, expert_p, slot_p, weight_p, counts_p, mean_p, z_p,
    S, E, K: tl.constexpr, HAS_CHOICE: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Choose for a block of BS tokens: experts, raw probabilities, counts [K, blocks, E], partial sums of the losses.

    slot becomes 0 for routed entries and -1 for those of tokens without a softmax.
    """
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    rows = block * BS + tl.arange(0, BS)
    cols = tl.arange(0, BE)
    p, lse, ok, x = _softmax_tile(logits_p, rows, cols, S, E)
    keys, ok = _choice_keys(choice_p, x, ok, rows, cols, S, E, HAS_CHOICE)
    broken = tl.sum(((rows < S) & (ok == 0)).to(tl.int32), axis=0)
    poison = tl.where(broken > 0, float("nan"), 0.0)
    tl.store(mean_p + block * E + cols, tl.sum(tl.where(ok[:, None], p, 0.0), axis=0) + poison, mask=cols < E)
    tl.store(z_p + block, tl.sum(tl.where(ok, lse * lse, 0.0), axis=0) + poison)
    for k in range(K):
        _, best = tl.max(keys, axis=1, return_indices=True)
        taken = cols[None, :] == best[:, None]
        keys = tl.where(taken, -0x80000000, keys)
        at = rows.to(tl.int64) * K + k
        tl.store(expert_p + at, tl.where(ok, best, k).to(tl.int32), mask=rows < S)
        tl.store(slot_p + at, tl.where(ok, 0, -1), mask=rows < S)
        tl.store(weight_p + at, tl.where(ok, tl.sum(taken.to(tl.float32) * p, axis=1), 0.0), mask=rows < S)
        count = tl.sum((taken & ok[:, None]).to(tl.int32), axis=0)
        tl.store(counts_p + (k * blocks + block) * E + cols, count, mask=cols < E)


@triton.jit(do_not_specialize=["blocks", "S", "CAP"])
def _gate_scan_kernel(
    counts_p, mean_p, first_p, load_p, kept_p, aux_p,
    blocks, S, E, CAP, K: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Replace counts by the numbers of entries before them in k-major order; sum loads and terms of the aux loss."""
    cols = tl.program_id(0) * BE + tl.arange(0, BE)
    steps = tl.arange(0, BN)
    load = tl.zeros([BE], tl.int32)
    mean = tl.zeros([BE], tl.float32)
    for start in range(0, blocks, BN):
        inside = ((start + steps)[:, None] < blocks) & (cols[None, :] < E)
        mean += tl.sum(tl.load(mean_p + (start + steps)[:, None] * E + cols[None, :], mask=inside, other=0.0), axis=0)
    for k in range(K):
        for start in range(0, blocks, BN):
            inside = ((start + steps)[:, None] < blocks) & (cols[None, :] < E)
            at = (k * blocks + start + steps)[:, None] * E + cols[None, :]
            count = tl.load(counts_p + at, mask=inside, other=0)
            tl.store(counts_p + at, load[None, :] + tl.cumsum(count, axis=0) - count, mask=inside)
            load += tl.sum(count, axis=0)
        if k == 0:
            tl.store(first_p + cols, load, mask=cols < E)
            tl.store(aux_p + cols, mean * load.to(tl.float32) * E / S / S, mask=cols < E)
    tl.store(load_p + cols, load, mask=cols < E)
    tl.store(kept_p + cols, tl.minimum(load, CAP), mask=cols < E)


@triton.jit(do_not_specialize=["blocks", "S", "CAP"])
def _gate_place_kernel(
    expert_p, slot_p, weight_p, before_p, load_p, list_p, aux_p, z_p, losses_p,
    blocks, S, E, CAP, K: tl.constexpr, RANDOM: tl.constexpr, NORMALIZE: tl.constexpr, EPS: tl.constexpr,
    BS: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Assign slots in k-major order, write weights and losses; with RANDOM, drop nothing yet and list the entries."""
    block = tl.program_id(0)
    rows = block * BS + tl.arange(0, BS)
    cols = tl.arange(0, BE)
    ks = tl.arange(0, BK)
    if RANDOM:
        load = tl.load(load_p + cols, mask=cols < E, other=0)
        list_start = tl.cumsum(load, axis=0) - load
    slots = tl.full([BS, BK], -1, tl.int32)
    for k in range(K):
        at = rows.to(tl.int64) * K + k
        expert = tl.load(expert_p + at, mask=rows < S, other=0)
        alive = tl.load(slot_p + at, mask=rows < S, other=-1) == 0
        hot = ((cols[None, :] == expert[:, None]) & alive[:, None]).to(tl.int32)
        before = tl.load(before_p + (k * blocks + block) * E + cols, mask=cols < E, other=0)
        slot = tl.sum((tl.cumsum(hot, axis=0) - 1 + before[None, :]) * hot, axis=1)
        if RANDOM:
            place = slot + tl.sum(list_start[None, :] * hot, axis=1)
            tl.store(list_p + place, at.to(tl.int32), mask=alive)
        slot = tl.where(alive & (RANDOM | (slot < CAP)), slot, -1)
        slots = tl.where(ks[None, :] == k, slot[:, None], slots)
    out = rows[:, None].to(tl.int64) * K + ks[None, :]
    inside = (rows[:, None] < S) & (ks[None, :] < K)
    tl.store(slot_p + out, slots, mask=inside)
    if not RANDOM:
        weight = tl.where(slots >= 0, tl.load(weight_p + out, mask=inside, other=0.0), 0.0)
        if NORMALIZE:
            weight = weight / tl.maximum(tl.sum(weight, axis=1), EPS)[:, None]
        tl.store(weight_p + out, weight, mask=inside)
    if block == 0:
        tl.store(losses_p, tl.sum(tl.load(aux_p + cols, mask=cols < E, other=0.0), axis=0))
        z = tl.zeros([BN], tl.float32)
        for start in range(0, blocks, BN):
            b = start + tl.arange(0, BN)
            z += tl.load(z_p + b, mask=b < blocks, other=0.0)
        tl.store(losses_p + 1, tl.sum(z, axis=0) / S)


@triton.jit(do_not_specialize=["S"])
def _gate_weigh_kernel(weight_p, S, EPS: tl.constexpr, K: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr):
    """Divide the weights of a token by their sum."""
    rows = tl.program_id(0) * BS + tl.arange(0, BS)
    ks = tl.arange(0, BK)
    at = rows[:, None].to(tl.int64) * K + ks[None, :]
    inside = (rows[:, None] < S) & (ks[None, :] < K)
    weight = tl.load(weight_p + at, mask=inside, other=0.0)
    tl.store(weight_p + at, weight / tl.maximum(tl.sum(weight, axis=1), EPS)[:, None], mask=inside)


@triton.jit(do_not_specialize=["S"])
def _gate_backward_kernel(
    logits_p, expert_p, slot_p, first_p, d_weight_p, d_aux_p, d_z_p, d_logits_p,
    S, E, K: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_AUX: tl.constexpr, HAS_Z: tl.constexpr,
    NORMALIZE: tl.constexpr, EPS: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Compute dL/dlogits = p * (a_e + r_s), plus p_k q_k at the chosen experts, q = dL/dp there; p is recomputed."""
    rows = tl.program_id(0) * BS + tl.arange(0, BS)
    cols = tl.arange(0, BE)
    p, lse, _, _ = _softmax_tile(logits_p, rows, cols, S, E)
    r = tl.zeros([BS], tl.float32)
    if HAS_Z:
        r += lse * (2.0 * tl.load(d_z_p) / S)
    coefficient = tl.zeros([BS, BE], tl.float32)
    if HAS_AUX:
        first = tl.load(first_p + cols, mask=cols < E, other=0).to(tl.float32)
        a = first * (tl.load(d_aux_p) * E / S / S)
        r -= tl.sum(p * a[None, :], axis=1)
        coefficient += a[None, :]
    if HAS_WEIGHT:
        total = tl.full([BS], 1.0, tl.float32)
        inner = tl.zeros([BS], tl.float32)
        if NORMALIZE:
            total = tl.zeros([BS], tl.float32)
            for k in range(K):
                at = rows.to(tl.int64) * K + k
                expert = tl.load(expert_p + at, mask=rows < S, other=0)
                kept = tl.load(slot_p + at, mask=rows < S, other=-1) >= 0
                hot = (cols[None, :] == expert[:, None]).to(tl.float32)  # float32, because predicates would be spilled
                raw = tl.where(kept, tl.sum(hot * p, axis=1), 0.0)
                total += raw
                inner += raw * tl.load(d_weight_p + at, mask=rows < S, other=0.0)
            inner = tl.where(total > EPS, inner / total, 0.0)
            total = tl.maximum(total, EPS)
        for k in range(K):
            at = rows.to(tl.int64) * K + k
            expert = tl.load(expert_p + at, mask=rows < S, other=0)
            kept = tl.load(slot_p + at, mask=rows < S, other=-1) >= 0
            hot = (cols[None, :] == expert[:, None]).to(tl.float32)
            q = (tl.load(d_weight_p + at, mask=rows < S, other=0.0) - inner) / total
            q = tl.where(kept, q, 0.0)
            r -= q * tl.sum(hot * p, axis=1)
            coefficient += hot * q[:, None]
    d = p * (coefficient + r[:, None])
    inside = (rows[:, None] < S) & (cols[None, :] < E)
    tl.store(
        d_logits_p + rows[:, None].to(tl.int64) * E + cols[None, :], d.to(d_logits_p.dtype.element_ty), mask=inside
    )


TILE = 4096  # elements of a [tokens, experts] tile: 16 per thread with 8 warps
SMALL_TILE, SMALL_ROWS = 8192, 512  # largest tile and number of tokens for the single-program kernel
SMALL_ENTRIES = 128  # largest number of entries for random selection by comparing all pairs


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def gate_triton(logits_SE, choice_SE, top_k, capacity, seed, normalize):
    """Return the gate's results, and the numbers of first choices [E], which the backward pass needs."""
    S, E = logits_SE.shape
    K, device = top_k, logits_SE.device
    has_choice, random = choice_SE is not None, seed is not None
    choice_SE = choice_SE if has_choice else logits_SE
    CAP = 2**31 - 1 if capacity is None else capacity
    low, high = (_signed(v) for v in hash_keys(seed or 0))
    BE, BK = next_power_of_2(E), next_power_of_2(K)
    eps = torch.finfo(torch.float32).eps

    # Each its own memory: Triton compiles anew for an address that is no multiple of 16 bytes.
    expert_SK, slot_SK = (torch.empty(S, K, dtype=torch.int32, device=device) for _ in range(2))
    weight_SK = torch.empty(S, K, dtype=torch.float32, device=device)
    first_E, load_E, kept_E = torch.empty(3, E, dtype=torch.int32, device=device).unbind()
    losses = torch.empty(2, dtype=torch.float32, device=device)
    rows = next_power_of_2(S)
    if S == 0:
        first_E.zero_(), load_E.zero_(), kept_E.zero_(), losses.zero_()
    elif rows <= SMALL_ROWS and rows * BE <= SMALL_TILE and (not random or rows * BK <= SMALL_ENTRIES):
        _gate_small_kernel[(1,)](
            logits_SE, choice_SE, expert_SK, slot_SK, weight_SK, first_E, load_E, kept_E, losses,
            S, E, CAP, low, high,
            K=K, HAS_CHOICE=has_choice, RANDOM=random, NORMALIZE=normalize, EPS=eps, BS=rows, BE=BE, BK=BK,
            num_warps=8 if rows * BE >= TILE else 4,
        )  # fmt: skip
    else:
        sizes = {"tile": TILE if BE > 32 else TILE // 2, "num_warps": 8}
        BS, warps = max(sizes["tile"] // BE, 1), sizes["num_warps"]
        blocks = triton.cdiv(S, BS)
        counts = torch.empty(K, blocks, E, dtype=torch.int32, device=device)
        mean, z, aux_E = (torch.empty(n, dtype=torch.float32, device=device) for n in (blocks * E, blocks, E))
        entries = torch.empty(S * K if random else 0, dtype=torch.int32, device=device)
        _gate_choose_kernel[(blocks,)](
            logits_SE, choice_SE, expert_SK, slot_SK, weight_SK, counts, mean, z,
            S, E, K=K, HAS_CHOICE=has_choice, BS=BS, BE=BE, num_warps=warps,
        )  # fmt: skip
        scan = min(BE, 32)
        _gate_scan_kernel[(triton.cdiv(E, scan),)](
            counts, mean, first_E, load_E, kept_E, aux_E,
            blocks, S, E, CAP, K=K, BN=min(128, next_power_of_2(blocks)), BE=scan, num_warps=4,
        )  # fmt: skip
        _gate_place_kernel[(blocks,)](
            expert_SK, slot_SK, weight_SK, counts, load_E, entries, aux_E, z, losses,
            blocks, S, E, CAP, K=K, RANDOM=random, NORMALIZE=normalize, EPS=eps,
            BS=BS, BE=BE, BK=BK, BN=128, num_warps=warps,
        )  # fmt: skip
        if random:
            gate_select_kernel[(E,)](
                load_E, entries, slot_SK, weight_SK, E, CAP, low, high, K=K, BE=BE, BL=1024, num_warps=4
            )
            if normalize:
                BS = max(1024 // BK, 1)
                _gate_weigh_kernel[(triton.cdiv(S, BS),)](weight_SK, S, EPS=eps, K=K, BS=BS, BK=BK, num_warps=4)
    return expert_SK, slot_SK, weight_SK, load_E, kept_E, losses[0], losses[1], first_E


def gate_backward_triton(saved, grads, normalize, d_SE):
    """Write the gradient of the logits.

    Args:
        saved: the logits, and of the gate's results the experts, the slots and the numbers of first choices.
        grads: of the weights and both losses, None where there is none.
    """
    logits_SE, expert_SK, slot_SK, first_E = saved
    d_weight_SK, d_aux, d_z = grads
    S, E = logits_SE.shape
    if S == 0 or (d_weight_SK is None and d_aux is None and d_z is None):
        d_SE.zero_()
        return
    BE = next_power_of_2(E)
    sizes = {"tile": TILE // 4, "num_warps": 4}  # the backward pass holds more values per element
    BS = max(min(sizes["tile"] // BE, next_power_of_2(S)), 1)
    none = first_E  # unused by the kernel
    _gate_backward_kernel[(triton.cdiv(S, BS),)](
        logits_SE, expert_SK, slot_SK, first_E,
        none if d_weight_SK is None else d_weight_SK, none if d_aux is None else d_aux,
        none if d_z is None else d_z, d_SE,
        S, E, K=expert_SK.shape[1], HAS_WEIGHT=d_weight_SK is not None, HAS_AUX=d_aux is not None,
        HAS_Z=d_z is not None,
        NORMALIZE=normalize, EPS=torch.finfo(torch.float32).eps, BS=BS, BE=BE, num_warps=sizes["num_warps"],
    )  # fmt: skip
