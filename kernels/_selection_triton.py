"""Select an expert's entries at random, in Triton: the hash and the search for the C-th highest priority."""

from __future__ import annotations

from ._triton import tl, triton


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def priority(token, k, low, high):
    """Return the uint32 priorities of ``_hash.priorities``; token and k are int32."""
    x = _mix(token.to(tl.uint32) ^ low.to(tl.uint32))
    return _mix((x + k.to(tl.uint32) * 0x9E3779B9) ^ high.to(tl.uint32))


@triton.jit
def _highest(list_p, n, wanted, low, high, threshold, K: tl.constexpr, TIES: tl.constexpr, BL: tl.constexpr):
    """Return the ``wanted``-th highest priority of n entries; with TIES, of ~token at priority ``threshold``."""
    found = threshold * 0
    bit = found + 0x80000000
    while bit > 0:
        attempt = found | bit
        count = tl.zeros([BL], tl.int32)
        for start in range(0, n, BL):
            i = start + tl.arange(0, BL)
            entry = tl.load(list_p + i, mask=i < n, other=0)
            key = priority(entry // K, entry % K, low, high)
            hit = i < n
            if TIES:
                hit = hit & (key == threshold)
                key = (entry // K).to(tl.uint32) ^ 0xFFFFFFFF
            count += (hit & (key >= attempt)).to(tl.int32)
        found = tl.where(tl.sum(count, axis=0) >= wanted, attempt, found)
        bit = bit >> 1
    return found


@triton.jit(do_not_specialize=["CAP", "low", "high"])
def gate_select_kernel(
    load_p, list_p, slot_p, weight_p, E, CAP, low, high, K: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Keep the CAP highest priorities of an overflowing expert and number its entries anew."""
    e = tl.program_id(0)
    n = tl.load(load_p + e)
    if n > CAP:
        cols = tl.arange(0, BE)
        list_p += tl.sum(tl.load(load_p + cols, mask=cols < e, other=0), axis=0)
        zero = (n * 0).to(tl.uint32)
        threshold = _highest(list_p, n, CAP, low, high, zero, K, False, BL)
        above = tl.zeros([BL], tl.int32)
        level = tl.zeros([BL], tl.int32)
        for start in range(0, n, BL):
            i = start + tl.arange(0, BL)
            entry = tl.load(list_p + i, mask=i < n, other=0)
            key = priority(entry // K, entry % K, low, high)
            above += ((i < n) & (key > threshold)).to(tl.int32)
            level += ((i < n) & (key == threshold)).to(tl.int32)
        wanted = CAP - tl.sum(above, axis=0)
        last = zero
        if tl.sum(level, axis=0) > wanted:
            last = _highest(list_p, n, wanted, low, high, threshold, K, True, BL)
        base = n * 0
        for start in range(0, n, BL):
            i = start + tl.arange(0, BL)
            entry = tl.load(list_p + i, mask=i < n, other=0)
            key = priority(entry // K, entry % K, low, high)
            tied = (key == threshold) & (((entry // K).to(tl.uint32) ^ 0xFFFFFFFF) >= last)
            keep = ((i < n) & ((key > threshold) | tied)).to(tl.int32)
            slot = tl.where(keep > 0, base + tl.cumsum(keep, axis=0) - 1, -1)
            base += tl.sum(keep, axis=0)
            tl.store(slot_p + entry, slot, mask=i < n)
            tl.store(weight_p + entry, tl.zeros([BL], tl.float32), mask=(i < n) & (keep == 0))
