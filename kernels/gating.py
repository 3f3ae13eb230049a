"""The gate: softmax, top-k, capacity, random token selection, slots and both losses in one op (paper 5.4).

Shapes: S tokens, E experts, K experts per token, C capacity. For every token: probabilities ``p = softmax(logits)``
in float32; choices are the top-k of the choice logits (the clean ones unless noisy ones are given), ties to the lower
expert. An *entry* is one (token, k) pair. Entries count in GShard's order: all first choices before any second one,
tokens in order ("k-major"). What an expert keeps when more than C entries chose it:

- ``seed=None``: the first C in that order (first come, first served).
- with a seed: random token selection. Each entry draws a 32-bit priority, a counter hash of (seed, token_offset + s,
  k); the C highest stay, ties to the lower token. The hash is integer arithmetic and bit-equal on every backend, and
  a token's draw does not depend on the batch or rank it lies in.

Kept entries are then numbered per expert in k-major order: their slots. Dropped ones have slot -1 and weight 0.

A token whose logits make no softmax (a NaN, +inf, or nothing but -inf) or whose choice logits hold a NaN goes
nowhere: ids 0..K-1, slots -1, weights 0, not counted in the load; and both losses become NaN, so that training sees
it. This costs nothing and never synchronises; the gradients of such a token are unspecified. With no tokens at all
both losses are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._common import Backend, accumulate_dtype, next_power_of_2, pick_backend, tl, triton
from ._cpu_gate import SMALL, CPUGate, small_gate
from ._hash import hash_keys, priorities

MAX_EXPERTS = 512


class Gate(NamedTuple):
    """Where every token goes and with which weight."""

    expert_SK: torch.Tensor
    """int32 [S, K]: the chosen experts, best first."""
    slot_SK: torch.Tensor
    """int32 [S, K]: position among the expert's kept entries; -1 where dropped."""
    weight_SK: torch.Tensor
    """float32 [S, K], differentiable: the chosen probability, or its share of the kept ones; 0 where dropped."""
    load_E: torch.Tensor
    """int32 [E]: entries that chose the expert, before dropping."""
    kept_E: torch.Tensor
    """int32 [E]: entries that the expert keeps."""
    aux_loss: torch.Tensor
    """float32 scalar, differentiable: E * sum_e mean_s(p_se) * share_s(first choice is e), before dropping; 1 when
    uniform."""
    z_loss: torch.Tensor
    """float32 scalar, differentiable: mean_s logsumexp(logits_s)^2."""


def gate(
    logits_SE: torch.Tensor,
    top_k: int,
    capacity: int | None = None,
    *,
    seed: int | None = None,
    token_offset: int = 0,
    normalize: bool = False,
    choice_logits_SE: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> Gate:
    """Routes S tokens to ``top_k`` of E experts each (2 <= E <= 512); see the module's text for the semantics.

    ``capacity=None`` drops nothing. ``seed`` selects at random instead of first-come. ``token_offset`` is the global
    index of the first token. ``normalize`` divides the weights of a token's *kept* choices by their sum (at least
    float32's eps), as DeepSpeed's top-2 gate does. ``choice_logits_SE`` decide the choices only; no gradient flows
    into them. Raises ``ValueError`` for shapes, ``top_k`` or ``capacity`` out of range.
    """
    if logits_SE.dim() != 2 or not logits_SE.is_floating_point():
        raise ValueError(f"gate: logits must be floating point [S, E], not {logits_SE.dtype} {tuple(logits_SE.shape)}")
    experts = logits_SE.shape[1]
    if not 2 <= experts <= MAX_EXPERTS:
        raise ValueError(f"gate: 2 to {MAX_EXPERTS} experts, not {experts}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"gate: top_k must be 1 to {experts}, not {top_k}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"gate: capacity must be at least 1 (None drops nothing), not {capacity}")
    if choice_logits_SE is not None:
        if choice_logits_SE.shape != logits_SE.shape:
            raise ValueError(f"gate: choice logits {tuple(choice_logits_SE.shape)} for logits {tuple(logits_SE.shape)}")
        choice_logits_SE = choice_logits_SE.detach()
    chosen = pick_backend("gate", backend, logits_SE, choice_logits_SE)
    if capacity is not None and capacity >= logits_SE.shape[0]:
        capacity = None  # an expert is chosen at most once per token
    if capacity is None:
        seed = None
    if (
        chosen == "torch"
        and 0 < logits_SE.numel() <= SMALL
        and not (torch.is_grad_enabled() and logits_SE.requires_grad)
    ):
        return Gate(*small_gate(logits_SE, choice_logits_SE, top_k, capacity, seed, token_offset, normalize))
    run = {"reference": gate_reference, "torch": CPUGate.apply, "triton": _TritonGate.apply}[chosen]
    return Gate(*run(logits_SE, choice_logits_SE, top_k, capacity, seed, token_offset, normalize))


# --- reference --------------------------------------------------------------------------------------------------------


def gate_reference(logits_SE, choice_SE, top_k, capacity, seed, token_offset, normalize):
    """The semantics in plain, differentiable PyTorch: masks, sorts and cumulative sums, no tuning."""
    S, E = logits_SE.shape
    K = top_k
    logits_SE = logits_SE.to(accumulate_dtype(logits_SE.dtype))
    choice_SE = logits_SE.detach() if choice_SE is None else choice_SE.to(logits_SE.dtype)

    lse_S = logits_SE.logsumexp(1)
    ok_S = lse_S.isfinite() & ~choice_SE.isnan().any(1)
    p_SE = logits_SE.softmax(1)

    expert_SK = choice_SE.sort(dim=1, descending=True, stable=True).indices[:, :K]
    expert_SK = torch.where(ok_S[:, None], expert_SK, torch.arange(K, device=logits_SE.device))
    chosen_SKE = torch.nn.functional.one_hot(expert_SK, E) * ok_S[:, None, None]
    load_E = chosen_SKE.sum((0, 1))

    kept_KSE = chosen_SKE.transpose(0, 1)  # k-major: the order in which entries are counted
    limit = S * K if capacity is None else capacity
    if seed is None:
        before_KSE = (kept_KSE.reshape(K * S, E).cumsum(0)).view(K, S, E) - kept_KSE
        kept_KSE = kept_KSE * (before_KSE < limit)
    else:  # rank by priority, then token: the higher entries of the same expert are those counted before
        order = (
            priorities(seed, S, K, token_offset, logits_SE.device).flatten().sort(descending=True, stable=True).indices
        )
        sorted_NE = chosen_SKE.reshape(S * K, E)[order]
        kept_NE = torch.zeros_like(sorted_NE)
        kept_NE[order] = sorted_NE * (sorted_NE.cumsum(0) - sorted_NE < limit)
        kept_KSE = kept_NE.view(S, K, E).transpose(0, 1)
    kept_SK = kept_KSE.sum(2).T.bool()
    slot_KS = ((kept_KSE.reshape(K * S, E).cumsum(0).view(K, S, E) - 1) * kept_KSE).sum(2)
    slot_SK = torch.where(kept_SK, slot_KS.T, -1)

    weight_SK = torch.where(kept_SK, p_SE.gather(1, expert_SK), 0.0)
    if normalize:
        weight_SK = weight_SK / weight_SK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    if S == 0:
        zero = logits_SE.sum()
        aux_loss, z_loss = zero, zero
    else:
        share_E = chosen_SKE[:, 0].sum(0).to(logits_SE.dtype) / S
        poison = torch.where(ok_S.all(), 0.0, float("nan"))
        aux_loss = E * (p_SE.mean(0) * share_E).sum() + poison
        z_loss = lse_S.square().mean() + poison
    i32 = torch.int32
    return expert_SK.to(i32), slot_SK.to(i32), weight_SK, load_E.to(i32), kept_KSE.sum((0, 1)).to(i32), aux_loss, z_loss


# --- GPU --------------------------------------------------------------------------------------------------------------
#
# Small batches: one launch of one program. Otherwise choose (per block of tokens: softmax, top-k, histograms), scan
# (bases of every block's slots), place (slots, weights, losses); random selection adds select (one program per
# expert, only the overflowing ones work) and, for normalised weights, weigh. Sums across blocks run in a fixed order:
# the same bits every time.


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _priority(token, k, low, high, offset):
    """uint32 priorities; token and k are int32."""
    x = _mix((token.to(tl.uint32) + offset.to(tl.uint32)) ^ low.to(tl.uint32))
    return _mix((x + k.to(tl.uint32) * 0x9E3779B9) ^ high.to(tl.uint32))


@triton.jit
def _sortable(x):
    """int32 keys in the order of the floats; both zeros alike."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _softmax_tile(logits_p, rows, cols, S, E):
    """(p [BS, BE], lse [BS], ok [BS]); zero outside the matrix, rows that make no softmax are not ok."""
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
    """(keys, ok): what the top-k ranks; rows with a NaN are not ok, columns past E rank below everything."""
    inside = (rows[:, None] < S) & (cols[None, :] < E)
    if HAS_CHOICE:
        x = tl.load(choice_p + rows[:, None].to(tl.int64) * E + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        ok = ok & (tl.sum((x != x).to(tl.int32), axis=1) == 0)
    return tl.where(cols[None, :] < E, _sortable(x), -0x80000000), ok


@triton.jit(do_not_specialize=["CAP", "low", "high", "offset"])
def _gate_small_kernel(
    logits_p, choice_p, expert_p, slot_p, weight_p, first_p, load_p, kept_p, losses_p,
    S, E, CAP, low, high, offset,
    K: tl.constexpr, HAS_CHOICE: tl.constexpr, RANDOM: tl.constexpr, NORMALIZE: tl.constexpr, EPS: tl.constexpr,
    BS: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The whole gate in one program: S <= BS, E <= BE, K <= BK; with RANDOM, BS * BK entries are ranked pair by
    pair."""
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
        draw = _priority(rows[:, None] + ks[None, :] * 0, ks[None, :] + rows[:, None] * 0, low, high, offset)
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


@triton.jit
def _gate_choose_kernel(
    logits_p, choice_p, expert_p, slot_p, weight_p, counts_p, mean_p, z_p,
    S, E, K: tl.constexpr, HAS_CHOICE: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Per block of BS tokens: choices, raw probabilities, counts [K, blocks, E], partial sums for the losses.

    slot is 0 for entries that go somewhere and -1 for those of broken tokens."""
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


@triton.jit(do_not_specialize=["CAP"])
def _gate_scan_kernel(
    counts_p, mean_p, first_p, load_p, kept_p, aux_p,
    blocks, S, E, CAP, K: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Per block of experts: counts become the entries before, in k-major order; totals; each expert's part of the aux
    loss."""
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


@triton.jit(do_not_specialize=["CAP"])
def _gate_place_kernel(
    expert_p, slot_p, weight_p, before_p, load_p, list_p, aux_p, z_p, losses_p,
    blocks, S, E, CAP, K: tl.constexpr, RANDOM: tl.constexpr, NORMALIZE: tl.constexpr, EPS: tl.constexpr,
    BS: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Per block of BS tokens: slots in k-major order. With RANDOM nothing is dropped yet, and list gets every
    expert's entries."""
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


@triton.jit
def _highest(list_p, n, wanted, low, high, offset, threshold, K: tl.constexpr, TIES: tl.constexpr, BL: tl.constexpr):
    """The ``wanted``-th highest key among n entries, by its bits from the top: the priorities, or with TIES ~token
    among the entries at ``threshold``."""
    found = threshold * 0
    bit = found + 0x80000000
    while bit > 0:
        attempt = found | bit
        count = tl.zeros([BL], tl.int32)
        for start in range(0, n, BL):
            i = start + tl.arange(0, BL)
            entry = tl.load(list_p + i, mask=i < n, other=0)
            key = _priority(entry // K, entry % K, low, high, offset)
            hit = i < n
            if TIES:
                hit = hit & (key == threshold)
                key = (entry // K).to(tl.uint32) ^ 0xFFFFFFFF
            count += (hit & (key >= attempt)).to(tl.int32)
        found = tl.where(tl.sum(count, axis=0) >= wanted, attempt, found)
        bit = bit >> 1
    return found


@triton.jit(do_not_specialize=["CAP", "low", "high", "offset"])
def _gate_select_kernel(
    load_p, list_p, slot_p, weight_p, E, CAP, low, high, offset, K: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Per expert: keeps the CAP highest priorities of an overflowing expert and numbers them anew."""
    e = tl.program_id(0)
    n = tl.load(load_p + e)
    if n > CAP:
        cols = tl.arange(0, BE)
        list_p += tl.sum(tl.load(load_p + cols, mask=cols < e, other=0), axis=0)
        zero = (n * 0).to(tl.uint32)
        threshold = _highest(list_p, n, CAP, low, high, offset, zero, K, False, BL)
        above = tl.zeros([BL], tl.int32)
        level = tl.zeros([BL], tl.int32)
        for start in range(0, n, BL):
            i = start + tl.arange(0, BL)
            entry = tl.load(list_p + i, mask=i < n, other=0)
            key = _priority(entry // K, entry % K, low, high, offset)
            above += ((i < n) & (key > threshold)).to(tl.int32)
            level += ((i < n) & (key == threshold)).to(tl.int32)
        wanted = CAP - tl.sum(above, axis=0)
        last = zero
        if tl.sum(level, axis=0) > wanted:
            last = _highest(list_p, n, wanted, low, high, offset, threshold, K, True, BL)
        base = n * 0
        for start in range(0, n, BL):
            i = start + tl.arange(0, BL)
            entry = tl.load(list_p + i, mask=i < n, other=0)
            key = _priority(entry // K, entry % K, low, high, offset)
            tied = (key == threshold) & (((entry // K).to(tl.uint32) ^ 0xFFFFFFFF) >= last)
            keep = ((i < n) & ((key > threshold) | tied)).to(tl.int32)
            slot = tl.where(keep > 0, base + tl.cumsum(keep, axis=0) - 1, -1)
            base += tl.sum(keep, axis=0)
            tl.store(slot_p + entry, slot, mask=i < n)
            tl.store(weight_p + entry, tl.zeros([BL], tl.float32), mask=(i < n) & (keep == 0))


@triton.jit
def _gate_weigh_kernel(weight_p, S, EPS: tl.constexpr, K: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr):
    """Weights become their shares of the token's sum."""
    rows = tl.program_id(0) * BS + tl.arange(0, BS)
    ks = tl.arange(0, BK)
    at = rows[:, None].to(tl.int64) * K + ks[None, :]
    inside = (rows[:, None] < S) & (ks[None, :] < K)
    weight = tl.load(weight_p + at, mask=inside, other=0.0)
    tl.store(weight_p + at, weight / tl.maximum(tl.sum(weight, axis=1), EPS)[:, None], mask=inside)


@triton.jit
def _gate_backward_kernel(
    logits_p, expert_p, slot_p, first_p, d_weight_p, d_aux_p, d_z_p, d_logits_p,
    S, E, K: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_AUX: tl.constexpr, HAS_Z: tl.constexpr,
    NORMALIZE: tl.constexpr, EPS: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dL/dlogits = p * (a_e + r_s), plus p_k q_k at the chosen experts, q = dL/dp there; p is computed anew."""
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
                hot = (cols[None, :] == expert[:, None]).to(tl.float32)  # numbers: predicates would be spilled
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


TILE = 4096  # elements of a [tokens, experts] tile: 16 a thread at 8 warps
SMALL_TILE, SMALL_ROWS = 8192, 512  # one program's
SMALL_ENTRIES = 128  # random selection by pairs


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


class _TritonGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_SE, choice_SE, top_k, capacity, seed, token_offset, normalize):
        logits_SE = logits_SE.contiguous()
        S, E = logits_SE.shape
        K, device = top_k, logits_SE.device
        has_choice = choice_SE is not None
        choice_SE = choice_SE.contiguous() if has_choice else logits_SE
        random = seed is not None
        CAP = 2**31 - 1 if capacity is None else capacity
        low, high, offset = (_signed(v) for v in hash_keys(seed or 0, token_offset))
        BE, BK = next_power_of_2(E), next_power_of_2(K)
        eps = torch.finfo(torch.float32).eps

        expert_SK, slot_SK = torch.empty(2, S, K, dtype=torch.int32, device=device).unbind()
        weight_SK = torch.empty(S, K, dtype=torch.float32, device=device)
        first_E, load_E, kept_E = torch.empty(3, E, dtype=torch.int32, device=device).unbind()
        losses = torch.empty(2, dtype=torch.float32, device=device)
        rows = next_power_of_2(S)
        if S == 0:
            first_E.zero_(), load_E.zero_(), kept_E.zero_(), losses.zero_()
        elif rows <= SMALL_ROWS and rows * BE <= SMALL_TILE and (not random or rows * BK <= SMALL_ENTRIES):
            _gate_small_kernel[(1,)](
                logits_SE, choice_SE, expert_SK, slot_SK, weight_SK, first_E, load_E, kept_E, losses,
                S, E, CAP, low, high, offset,
                K=K, HAS_CHOICE=has_choice, RANDOM=random, NORMALIZE=normalize, EPS=eps, BS=rows, BE=BE, BK=BK,
                num_warps=8 if rows * BE >= TILE else 4,
            )  # fmt: skip
        else:
            BS = max((TILE if BE > 32 else TILE // 2) // BE, 1)
            blocks = triton.cdiv(S, BS)
            counts = torch.empty(K, blocks, E, dtype=torch.int32, device=device)
            mean, z = torch.empty(blocks, E, device=device), torch.empty(blocks, device=device)
            aux_E = torch.empty(E, device=device)
            entries = torch.empty(S * K if random else 0, dtype=torch.int32, device=device)
            _gate_choose_kernel[(blocks,)](
                logits_SE, choice_SE, expert_SK, slot_SK, weight_SK, counts, mean, z,
                S, E, K=K, HAS_CHOICE=has_choice, BS=BS, BE=BE, num_warps=8,
            )  # fmt: skip
            scan = min(BE, 32)
            _gate_scan_kernel[(triton.cdiv(E, scan),)](
                counts, mean, first_E, load_E, kept_E, aux_E,
                blocks, S, E, CAP, K=K, BN=min(128, next_power_of_2(blocks)), BE=scan, num_warps=4,
            )  # fmt: skip
            _gate_place_kernel[(blocks,)](
                expert_SK, slot_SK, weight_SK, counts, load_E, entries, aux_E, z, losses,
                blocks, S, E, CAP, K=K, RANDOM=random, NORMALIZE=normalize, EPS=eps,
                BS=BS, BE=BE, BK=BK, BN=128, num_warps=8,
            )  # fmt: skip
            if random:
                _gate_select_kernel[(E,)](
                    load_E, entries, slot_SK, weight_SK, E, CAP, low, high, offset, K=K, BE=BE, BL=1024, num_warps=4
                )
                if normalize:
                    BS = max(1024 // BK, 1)
                    _gate_weigh_kernel[(triton.cdiv(S, BS),)](weight_SK, S, EPS=eps, K=K, BS=BS, BK=BK, num_warps=4)
        ctx.save_for_backward(logits_SE, expert_SK, slot_SK, first_E)
        ctx.normalize = normalize
        ctx.mark_non_differentiable(expert_SK, slot_SK, load_E, kept_E)
        ctx.set_materialize_grads(False)
        return expert_SK, slot_SK, weight_SK, load_E, kept_E, losses[0], losses[1]

    @staticmethod
    def backward(ctx, _expert, _slot, d_weight_SK, _load, _kept, d_aux, d_z):
        logits_SE, expert_SK, slot_SK, first_E = ctx.saved_tensors
        S, E = logits_SE.shape
        d_SE = torch.empty_like(logits_SE)
        if S == 0 or (d_weight_SK is None and d_aux is None and d_z is None):
            return (d_SE.zero_(), *[None] * 6)
        BE = next_power_of_2(E)
        BS = max(min(TILE // 4 // BE, next_power_of_2(S)), 1)  # more values per element than on the way there
        none = first_E  # any pointer
        _gate_backward_kernel[(triton.cdiv(S, BS),)](
            logits_SE, expert_SK, slot_SK, first_E,
            none if d_weight_SK is None else d_weight_SK.contiguous(), none if d_aux is None else d_aux,
            none if d_z is None else d_z, d_SE,
            S, E, K=expert_SK.shape[1], HAS_WEIGHT=d_weight_SK is not None, HAS_AUX=d_aux is not None,
            HAS_Z=d_z is not None,
            NORMALIZE=ctx.normalize, EPS=torch.finfo(torch.float32).eps, BS=BS, BE=BE, num_warps=4,
        )  # fmt: skip
        return (d_SE, *[None] * 6)
