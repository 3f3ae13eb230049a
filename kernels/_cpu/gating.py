"""Compute the gate on CPU: the semantics of ``gating.py`` without masks.

Exponentials that are never divided, one vectorised argmax per choice, sorts for the slots and the random selection, and
one hand-written backward. NumPy does the integer work: its argmax takes 90 us where torch's takes 490 (one core of Zen
4, S = 4096, E = 128; topk 1400), and it sorts 64-bit numbers with vector instructions.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .._common import accumulate_dtype
from .._hash import priorities_numpy
from . import buffers


def _choose(choice_SE: np.ndarray, top_k: int) -> np.ndarray:
    """Return the top-k of every row, int64 [S, K], ties to the lower index.

    K passes of a vectorised argmax are several times faster than a partial sort.
    """
    first_S = choice_SE.argmax(1)
    if top_k == 1:
        return first_S[:, None]
    rows = np.arange(len(choice_SE))
    rest_SE = choice_SE.copy()
    columns = [first_S]
    for _ in range(1, top_k):
        rest_SE[rows, columns[-1]] = -np.inf
        next_S = rest_SE.argmax(1)
        if (rest_SE[rows, next_S] == -np.inf).any():  # a taken expert and one whose logit is -inf look alike
            return np.argsort(-choice_SE, axis=1, kind="stable")[:, :top_k]
        columns.append(next_S)
    return np.stack(columns, 1)


def _by_priority(key_N: np.ndarray, falling_N: np.ndarray) -> np.ndarray:
    """Return the entries sorted by key (expert ids), then falling by ``falling_N`` (uint32), then by number, int64 [N].

    NumPy sorts 64-bit numbers with vector instructions, so that one sort of numbers that hold all keys is faster than
    three radix sorts of 16-bit keys that return an order.
    """
    N = len(key_N)
    bits = np.uint64(max(N - 1, 1).bit_length())
    if bits > 22:  # an expert's id has 10 bits
        return np.lexsort((~falling_N, key_N))
    joint_N = key_N.astype(np.uint64)
    joint_N <<= np.uint64(32)
    joint_N |= ~falling_N
    joint_N <<= bits
    joint_N |= np.arange(N, dtype=np.uint64)
    joint_N.sort()
    joint_N &= (np.uint64(1) << bits) - np.uint64(1)
    return joint_N.view(np.int64)


def _ranks(order_N: np.ndarray, key_N: np.ndarray, count_E: np.ndarray) -> np.ndarray:
    """Return the rank of each entry of ``order_N``, which lists the entries by expert, within its expert, int32."""
    start_E = (np.cumsum(count_E) - count_E).astype(np.int32)
    return np.arange(len(order_N), dtype=np.int32) - start_E[key_N[order_N]]


def _slots(expert_SK: np.ndarray, ok_S, load_E: np.ndarray, capacity, seed):
    """Return (slot [S, K] int32, kept_E int64), by sorts: no masks."""
    S, K = expert_SK.shape
    E = len(load_E)
    key_SK = expert_SK.astype(np.uint8 if E < 256 else np.uint16, order="C")  # NumPy sorts short integers by radix
    if ok_S is not None:
        key_SK[~ok_S] = E  # behind all experts
    kept_E = load_E if capacity is None else np.minimum(load_E, capacity)
    full = capacity is not None and bool((load_E > capacity).any())
    if full and seed is not None:
        by = _by_priority(key_SK.ravel(), priorities_numpy(seed, S, K).ravel())[: int(load_E.sum())]
        key_SK.ravel()[by[_ranks(by, key_SK.ravel(), load_E) >= capacity]] = E
        count_E = kept_E
    else:
        count_E = load_E
    key_N = key_SK.T.ravel()  # k-major: first choices come first
    order_N = key_N.argsort(kind="stable")[: int(count_E.sum())]
    rank_N = _ranks(order_N, key_N, count_E)
    if full and seed is None:
        rank_N[rank_N >= capacity] = -1
    slot_N = np.full(S * K, -1, np.int32)
    slot_N[order_N] = rank_N
    return slot_N.reshape(K, S).T, kept_E


def choose(
    logits_SE: np.ndarray,
    top_k: int,
    normalize: bool = False,
    choice_SE: np.ndarray | None = None,
    scores_SE: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return each token's experts, int64 [S, K], and their weights [S, K], as ``gate`` without capacity does.

    This is all that a decoding step needs of a gate, in few NumPy calls; a row's result does not depend on the other
    rows. ``choice_SE`` decide the choices only. ``scores_SE`` are the weights instead of the softmax of the logits.
    None where a token has a largest logit or any choice that is not finite: ``gate`` has the rules for such tokens.
    """
    S, E = logits_SE.shape
    expert_SK = _choose(logits_SE if choice_SE is None else choice_SE, top_k)
    at_SK = (np.arange(S)[:, None] * E + expert_SK) if S > 1 else expert_SK  # index into the flat arrays
    largest_S1 = logits_SE.take(at_SK[:, :1]) if choice_SE is None else logits_SE.max(1, keepdims=True)
    if not math.isfinite(largest_S1.sum()) or (choice_SE is not None and not math.isfinite(choice_SE.sum())):
        return None
    if scores_SE is None:
        e_SE = np.exp(logits_SE - largest_S1)
        weight_SK = e_SE.take(at_SK) / e_SE.sum(1, keepdims=True)
        if not math.isfinite(weight_SK.sum()):
            return None
    else:
        weight_SK = scores_SE.take(at_SK)
    if normalize:
        weight_SK = weight_SK / np.maximum(weight_SK.sum(1, keepdims=True), np.finfo(np.float32).eps)
    return expert_SK, weight_SK


SMALL = 4096  # largest number of logits S * E for which a gate without gradients uses `small_gate`


def small_gate(logits_SE, choice_SE, top_k, capacity, seed, normalize):
    """Compute `CPUGate` without a gradient in few NumPy calls, which determine the time of a decoding step.

    A row's result does not depend on the other rows.
    """
    x_SE = logits_SE.detach().to(accumulate_dtype(logits_SE.dtype)).numpy()
    S, E = x_SE.shape
    rows_S1 = np.arange(S)[:, None]
    with np.errstate(invalid="ignore"):
        e_SE = np.exp(x_SE - x_SE.max(1, keepdims=True))
        total_S = e_SE.sum(1)
        ok_S = np.isfinite(total_S) & (total_S > 0)
        if choice_SE is None:
            choice_np = x_SE
        else:
            choice_np = choice_SE.to(accumulate_dtype(logits_SE.dtype)).numpy()
            ok_S &= ~np.isnan(choice_np).any(1)
    expert_SK = _choose(choice_np, top_k)
    healthy = bool(ok_S.all())
    if not healthy:
        expert_SK[~ok_S] = np.arange(top_k)
    counted = expert_SK if healthy else expert_SK[ok_S]
    load_E = np.bincount(counted.ravel(), minlength=E)
    slot_SK, kept_E = _slots(expert_SK, None if healthy else ok_S, load_E, capacity, seed)
    slot_SK = np.ascontiguousarray(slot_SK)
    weight_SK = e_SE[rows_S1, expert_SK] / total_S[:, None]
    if capacity is not None or not healthy:
        weight_SK = np.where(slot_SK >= 0, weight_SK, weight_SK.dtype.type(0))
    if normalize:
        weight_SK = weight_SK / np.maximum(weight_SK.sum(1, keepdims=True), np.finfo(np.float32).eps)
    aux_loss = z_loss = x_SE.dtype.type(np.nan if not healthy else 0)
    if healthy:
        first_E = load_E if top_k == 1 else np.bincount(counted[:, 0], minlength=E)
        aux_loss = ((e_SE / total_S[:, None]).sum(0) @ first_E).astype(x_SE.dtype) * x_SE.dtype.type(E / S / S)
        z_loss = np.square(x_SE.max(1) + np.log(total_S)).mean()
    return (
        torch.from_numpy(expert_SK.astype(np.int32)),
        torch.from_numpy(slot_SK),
        torch.from_numpy(weight_SK),
        torch.from_numpy(load_E.astype(np.int32)),
        torch.from_numpy(kept_E.astype(np.int32)),
        torch.from_numpy(np.asarray(aux_loss, x_SE.dtype)),
        torch.from_numpy(np.asarray(z_loss, x_SE.dtype)),
    )


class CPUGate(torch.autograd.Function):
    """Compute the gate by exponentials, an argmax per choice, sorts and a hand-written backward."""

    @staticmethod
    def forward(ctx, logits_SE, choice_SE, top_k, capacity, seed, normalize):
        S, E = logits_SE.shape
        dtype = accumulate_dtype(logits_SE.dtype)
        wide_SE = logits_SE.to(dtype)
        choice_np = (wide_SE if choice_SE is None else choice_SE.to(dtype)).numpy()
        expert_np = _choose(choice_np, top_k)
        expert_SK = torch.from_numpy(expert_np)
        # The first choice has the largest logit, unless others decide.
        max_S1 = wide_SE.gather(1, expert_SK[:, :1]) if choice_SE is None else wide_SE.amax(1, keepdim=True)
        # The probabilities are e / total: no pass over [S, E] divides. Fresh pages cost as much as the arithmetic.
        e_SE = torch.sub(wide_SE, max_S1, out=buffers.empty((S, E), dtype)).exp_()
        total_S = e_SE.sum(1)  # MKL's product of a matrix and a vector depends on the number of threads
        over_S1 = total_S.reciprocal()[:, None]
        raw_SK = over_S1.clone() if choice_SE is None and top_k == 1 else e_SE.gather(1, expert_SK).mul_(over_S1)
        lse_S = total_S.log().add_(max_S1[:, 0])
        ok_np = None
        healthy = bool(lse_S.sum().isfinite())
        if choice_SE is not None and healthy:
            healthy = not np.isnan(choice_np[np.arange(S), expert_np[:, 0]]).any()  # argmax returns the first NaN
        if not healthy:
            ok_np = lse_S.isfinite().numpy() & ~np.isnan(choice_np).any(1)
            expert_np[~ok_np] = np.arange(top_k)
            raw_SK = e_SE.gather(1, expert_SK).mul_(over_S1)
            healthy = bool(ok_np.all())  # stays true if only the sum of the finite values overflowed
        counted = expert_np if ok_np is None else expert_np[ok_np]
        load_E = np.bincount(counted.ravel(), minlength=E)
        first_E = load_E if top_k == 1 else np.bincount(counted[:, 0], minlength=E)
        slot_np, kept_E = _slots(expert_np, ok_np, load_E, capacity, seed)

        slot_SK = torch.from_numpy(np.ascontiguousarray(slot_np))
        weight_SK = raw_SK
        if capacity is not None or ok_np is not None:
            raw_SK = weight_SK = torch.where(slot_SK >= 0, raw_SK, 0.0)
        if normalize:
            weight_SK = raw_SK / raw_SK.sum(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).eps)

        share_E = torch.from_numpy(first_E / max(S, 1)).to(dtype)
        if S:
            p_SE = torch.mul(e_SE, over_S1, out=buffers.empty((S, E), dtype))
            aux_loss = p_SE.sum(0) @ share_E * (E / S)
            z_loss = lse_S.square().mean()
            if not healthy:
                aux_loss, z_loss = aux_loss + torch.nan, z_loss + torch.nan
        else:
            aux_loss, z_loss = e_SE.new_zeros(()), e_SE.new_zeros(())

        expert_32, load_32, kept_32 = expert_SK.int(), torch.from_numpy(load_E).int(), torch.from_numpy(kept_E).int()
        ctx.save_for_backward(e_SE, over_S1, lse_S, expert_SK, raw_SK, weight_SK, share_E)
        ctx.normalize, ctx.dtype = normalize, logits_SE.dtype
        ctx.mark_non_differentiable(expert_32, slot_SK, load_32, kept_32)
        ctx.set_materialize_grads(False)
        return expert_32, slot_SK, weight_SK, load_32, kept_32, aux_loss, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx, _expert, _slot, d_weight_SK, _load, _kept, d_aux, d_z):
        e_SE, over_S1, lse_S, expert_SK, raw_SK, weight_SK, share_E = ctx.saved_tensors
        (S, E), dtype = e_SE.shape, e_SE.dtype
        if S == 0 or (d_weight_SK is None and d_aux is None and d_z is None):
            return (torch.zeros_like(e_SE, dtype=ctx.dtype), *[None] * 5)
        # dL/dlogit = p * (a_e + r_s), plus p_k * q_k at the chosen experts, with q = dL/dp there
        r_S = torch.zeros(S, dtype=dtype)
        if d_z is not None:
            r_S.add_(lse_S * (2.0 / S * d_z))
        at_SK = None
        if d_weight_SK is not None:
            if ctx.normalize:
                total_S1 = raw_SK.sum(1, keepdim=True)
                eps = torch.finfo(torch.float32).eps
                inner_S1 = (d_weight_SK * weight_SK).sum(1, keepdim=True) * (total_S1 > eps)
                at_SK = raw_SK * (d_weight_SK - inner_S1) / total_S1.clamp(min=eps)
            else:
                at_SK = raw_SK * d_weight_SK
            r_S.sub_(at_SK.sum(1))
        d_SE = buffers.empty((S, E), dtype)
        if d_aux is None:
            torch.mul(e_SE, r_S[:, None] * over_S1, out=d_SE)
        else:  # (a + r) / total is a product of [S, 2] and [2, E]; r contains -<p, a>
            a_E = share_E * (d_aux * (E / S))
            r_S.addcmul_(torch.mul(e_SE, a_E, out=d_SE).sum(1), over_S1[:, 0], value=-1)
            left_S2 = torch.cat((over_S1, r_S[:, None] * over_S1), 1)
            torch.mm(left_S2, torch.stack((a_E, torch.ones_like(a_E))), out=d_SE).mul_(e_SE)
        if at_SK is not None:
            d_SE.scatter_add_(1, expert_SK, at_SK)
        return (d_SE.to(ctx.dtype), *[None] * 5)
