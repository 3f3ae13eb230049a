"""Compute the gate on CPU: the semantics of ``gating.py`` without masks.

A softmax, one vectorised argmax per choice, radix sorts on 16-bit keys for the slots and the random selection, and one
hand-written backward. NumPy does the integer work: its argmax and its 16-bit sort are several times faster than torch's
(one core, S = 4096, E = 128: argmax 90 against 490 us, stable sort of the expert ids 10 against 60 us, topk 1400 us).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from . import _buffers
from ._common import accumulate_dtype
from ._hash import priorities_numpy


def _softmax(x_SE: torch.Tensor) -> torch.Tensor:
    """Return softmax(x), on pooled memory: fresh pages cost as much as the arithmetic.

    Many short rows are computed by elementwise operations, because torch's softmax processes one row at a time
    (S = 4096, E = 8: 590 us against 130 us).
    """
    p_SE = _buffers.empty(x_SE.shape, x_SE.dtype)
    if x_SE.shape[1] >= 16 or x_SE.shape[0] < 128:
        return torch.ops.aten._softmax.out(x_SE, 1, False, out=p_SE)
    torch.sub(x_SE, x_SE.amax(1, keepdim=True), out=p_SE).exp_()
    return p_SE.div_(p_SE.sum(1, keepdim=True))


def _choose(choice_SE: np.ndarray, first_S: np.ndarray | None, top_k: int) -> np.ndarray:
    """Return the top-k of every row, int64 [S, K], ties to the lower index; ``first_S`` is the argmax if known.

    K passes of a vectorised argmax are several times faster than a partial sort.
    """
    if first_S is None:
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


def _slots(expert_SK: np.ndarray, ok_S, load_E: np.ndarray, capacity, seed):
    """Return (slot [S, K] int32, kept_E int64), by radix sorts on 16-bit keys: linear in the entries, no masks."""
    S, K = expert_SK.shape
    E = len(load_E)
    key_N = expert_SK.T.astype(np.int16).ravel()  # k-major
    if ok_S is not None:
        key_N[~np.tile(ok_S, K)] = E
    order = np.argsort(key_N, kind="stable")[: int(load_E.sum())]
    kept_E = load_E if capacity is None else np.minimum(load_E, capacity)
    slot_N = np.full(S * K, -1, np.int32)
    start_E = np.cumsum(load_E) - load_E
    rank = np.arange(len(order), dtype=np.int32)
    sorted_key = key_N[order]
    if kept_E is load_E or (kept_E == load_E).all():
        slot_N[order] = rank - start_E.astype(np.int32)[sorted_key]
    elif seed is None:
        rank = rank - start_E.astype(np.int32)[sorted_key]
        slot_N[order] = np.where(rank < capacity, rank, np.int32(-1))
    else:
        # Sort entries by falling priority, then stably by expert. They start token-major, so that ties go to the lower
        # token.
        falling_SK = ~priorities_numpy(seed, S, K)
        token_key = key_N.reshape(K, S).T.ravel() if K > 1 else key_N
        falling_N = falling_SK.ravel()
        by = np.argsort(falling_N.astype(np.uint16), kind="stable")
        by = by[np.argsort((falling_N >> np.uint32(16)).astype(np.uint16)[by], kind="stable")]
        by = by[np.argsort(token_key[by], kind="stable")][: len(order)]
        kept_N = np.zeros(S * K, bool)
        # `by` and `order` list the same experts in the same order.
        kept_N[by] = rank - start_E.astype(np.int32)[sorted_key] < capacity
        if K > 1:
            kept_N = kept_N.reshape(S, K).T.ravel()
        order = order[kept_N[order]]
        start_E = np.cumsum(kept_E) - kept_E
        slot_N[order] = np.arange(len(order), dtype=np.int32) - start_E.astype(np.int32)[key_N[order]]
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
    None where ``gate`` does not route a token (logits or choices that are not finite).
    """
    S, E = logits_SE.shape
    expert_SK = _choose(logits_SE if choice_SE is None else choice_SE, None, top_k)
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
    expert_SK = _choose(choice_np, choice_np.argmax(1), top_k)
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
    """Compute the gate by a softmax, an argmax per choice, radix sorts of 16-bit keys and a hand-written backward."""

    @staticmethod
    def forward(ctx, logits_SE, choice_SE, top_k, capacity, seed, normalize):
        S, E = logits_SE.shape
        dtype = accumulate_dtype(logits_SE.dtype)
        wide_SE = logits_SE.to(dtype)
        choice_np = (wide_SE if choice_SE is None else choice_SE.to(dtype)).numpy()
        p_SE = _softmax(wide_SE)
        first_np = choice_np.argmax(1)
        expert_np = _choose(choice_np, first_np, top_k)
        expert_SK = torch.from_numpy(expert_np)
        raw_SK = p_SE.gather(1, expert_SK)
        if choice_SE is None:  # the first choice has the largest logit
            lse_S = (wide_SE.gather(1, expert_SK[:, :1]) - raw_SK[:, :1].log())[:, 0]
        else:
            lse_S = wide_SE.amax(1) - p_SE.amax(1).log()
        ok_np = None
        healthy = bool(lse_S.sum().isfinite())
        if choice_SE is not None and healthy:
            healthy = not np.isnan(choice_np[np.arange(S), first_np]).any()  # argmax returns the first NaN
        if not healthy:
            ok_np = lse_S.isfinite().numpy() & ~np.isnan(choice_np).any(1)
            expert_np[~ok_np] = np.arange(top_k)
            raw_SK = p_SE.gather(1, expert_SK)
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
            aux_loss = E * ((p_SE.sum(0) / S) @ share_E)
            z_loss = lse_S.square().mean()
            if not healthy:
                aux_loss, z_loss = aux_loss + torch.nan, z_loss + torch.nan
        else:
            aux_loss, z_loss = p_SE.new_zeros(()), p_SE.new_zeros(())

        expert_32, load_32, kept_32 = expert_SK.int(), torch.from_numpy(load_E).int(), torch.from_numpy(kept_E).int()
        ctx.save_for_backward(p_SE, lse_S, expert_SK, raw_SK, weight_SK, share_E)
        ctx.normalize, ctx.dtype = normalize, logits_SE.dtype
        ctx.mark_non_differentiable(expert_32, slot_SK, load_32, kept_32)
        ctx.set_materialize_grads(False)
        return expert_32, slot_SK, weight_SK, load_32, kept_32, aux_loss, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx, _expert, _slot, d_weight_SK, _load, _kept, d_aux, d_z):
        p_SE, lse_S, expert_SK, raw_SK, weight_SK, share_E = ctx.saved_tensors
        S, E = p_SE.shape
        if S == 0 or (d_weight_SK is None and d_aux is None and d_z is None):
            return (torch.zeros_like(p_SE, dtype=ctx.dtype), *[None] * 5)
        # dL/dlogit = p * (a_e + r_s), plus p_k * q_k at the chosen experts, with q = dL/dp there
        r_S = torch.zeros(S, dtype=p_SE.dtype)
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
        d_SE = _buffers.empty((S, E), p_SE.dtype)
        if d_aux is None:
            torch.mul(p_SE, r_S[:, None], out=d_SE)
        else:
            a_E = share_E * (d_aux * (E / S))
            torch.add(r_S.addmv_(p_SE, a_E, alpha=-1)[:, None], a_E, out=d_SE).mul_(p_SE)
        if at_SK is not None:
            d_SE.scatter_add_(1, expert_SK, at_SK)
        return (d_SE.to(ctx.dtype), *[None] * 5)
