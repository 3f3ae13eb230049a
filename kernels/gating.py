"""The gate: softmax, top-k, capacity, random token selection, slots and both losses in one op (paper 5.4, notes 2, 3, 10).

Shapes: S tokens, E experts, K experts per token, C capacity. For every token: probabilities ``p = softmax(logits)`` in
float32; choices are the top-k of the choice logits (the clean ones unless noisy ones are given), ties to the lower expert.
An *entry* is one (token, k) pair. Entries count in GShard's order: all first choices before any second one, tokens in order
("k-major"). What an expert keeps when more than C entries chose it:

- ``seed=None``: the first C in that order (first come, first served).
- with a seed: random token selection. Each entry draws a 32-bit priority, a counter hash of (seed, token_offset + s, k); the
  C highest stay, ties to the lower token. The hash is integer arithmetic and bit-equal on every backend, and a token's draw
  does not depend on the batch or rank it lies in.

Kept entries are then numbered per expert in k-major order: their slots. Dropped ones have slot -1 and weight 0.

A token whose logits make no softmax (a NaN, +inf, or nothing but -inf) or whose choice logits hold a NaN goes nowhere: ids
0..K-1, slots -1, weights 0, not counted in the load; and both losses become NaN, so that training sees it. This costs
nothing and never synchronises; the gradients of such a token are unspecified. With no tokens at all both losses are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ._common import Backend, accumulate_dtype, pick_backend

MAX_EXPERTS = 512
_torch_missing = None
_M32 = 0xFFFFFFFF


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
    """float32 scalar, differentiable: E * sum_e mean_s(p_se) * share_s(first choice is e), before dropping; 1 when uniform."""
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

    ``capacity=None`` drops nothing. ``seed`` selects at random instead of first-come. ``token_offset`` is the global index
    of the first token. ``normalize`` divides the weights of a token's *kept* choices by their sum (at least float32's eps),
    as DeepSpeed's top-2 gate does. ``choice_logits_SE`` decide the choices only; no gradient flows into them.
    Raises ``ValueError`` for shapes, ``top_k`` or ``capacity`` out of range.
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
    run = {"reference": gate_reference, "torch": _TorchGate.apply, "triton": _torch_missing}[chosen]
    return Gate(*run(logits_SE, choice_logits_SE, top_k, capacity, seed, token_offset, normalize))


# --- the hash ---------------------------------------------------------------------------------------------------------


def _mix32(x: int) -> int:
    """Murmur3's 32-bit finaliser: a bijection on 32 bits in which every input bit reaches every output bit."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & _M32
    x ^= x >> 13
    x = x * 0xC2B2AE35 & _M32
    return x ^ x >> 16


def hash_keys(seed: int, token_offset: int) -> tuple[int, int, int]:
    """The per-call words of the priority hash, in [0, 2^32): two from the 64-bit seed, and the token offset."""
    low = _mix32((seed & _M32) ^ 0x9E3779B9)
    return low, _mix32((seed >> 32 & _M32) ^ low ^ 0x7F4A7C15), token_offset & _M32


def priorities(seed: int, tokens: int, top_k: int, token_offset: int = 0, device="cpu") -> torch.Tensor:
    """int64 [S, K] in [0, 2^32): the entries' priorities in random token selection. For one k, no two tokens draw the same."""
    low, high, offset = hash_keys(seed, token_offset)

    def mix(x):
        x = x ^ x >> 16
        x = x * 0x85EBCA6B & _M32
        x = x ^ x >> 13
        x = x * 0xC2B2AE35 & _M32
        return x ^ x >> 16

    token_S1 = torch.arange(tokens, device=device)[:, None] + offset & _M32
    k_1K = torch.arange(top_k, device=device)[None, :] * 0x9E3779B9
    return mix(mix(token_S1 ^ low) + k_1K & _M32 ^ high)


def _priorities_numpy(seed: int, tokens: int, top_k: int, token_offset: int) -> np.ndarray:
    """uint32 [S, K]: the same bits as :func:`priorities`."""
    low, high, offset = (np.uint32(v) for v in hash_keys(seed, token_offset))

    def mix(x):
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x85EBCA6B)
        x ^= x >> np.uint32(13)
        x *= np.uint32(0xC2B2AE35)
        x ^= x >> np.uint32(16)
        return x

    token_S1 = np.arange(tokens, dtype=np.uint32)[:, None]
    token_S1 += offset
    token_S1 ^= low
    k_1K = np.arange(top_k, dtype=np.uint32)[None, :] * np.uint32(0x9E3779B9)
    x_SK = mix(token_S1) + k_1K
    x_SK ^= high
    return mix(x_SK)


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
        order = priorities(seed, S, K, token_offset, logits_SE.device).flatten().sort(descending=True, stable=True).indices
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


# --- CPU --------------------------------------------------------------------------------------------------------------


def _choose(choice_SE: np.ndarray, first_S: np.ndarray, top_k: int) -> np.ndarray:
    """int64 [S, K]: top-k per row, ties to the lower index. K passes of a vectorised argmax beat partial sorts by far."""
    if top_k == 1:
        return first_S[:, None]
    rows = np.arange(len(choice_SE))
    rest_SE = choice_SE.copy()
    columns = [first_S]
    for _ in range(1, top_k):
        rest_SE[rows, columns[-1]] = -np.inf
        next_S = rest_SE.argmax(1)
        if (rest_SE[rows, next_S] == -np.inf).any():  # what was taken and what was -inf cannot be told apart
            return np.argsort(-choice_SE, axis=1, kind="stable")[:, :top_k]
        columns.append(next_S)
    return np.stack(columns, 1)


def _slots(expert_SK: np.ndarray, ok_S, load_E: np.ndarray, capacity, seed, token_offset):
    """(slot [S, K] int32, kept_E int64) by radix sorts on 16-bit keys: linear in the entries, no masks."""
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
        # entries from the highest priority to the lowest, token-major so that stability breaks ties, then by expert
        falling_SK = ~_priorities_numpy(seed, S, K, token_offset)
        token_key = key_N.reshape(K, S).T.ravel() if K > 1 else key_N
        falling_N = falling_SK.ravel()
        by = np.argsort(falling_N.astype(np.uint16), kind="stable")
        by = by[np.argsort((falling_N >> np.uint32(16)).astype(np.uint16)[by], kind="stable")]
        by = by[np.argsort(token_key[by], kind="stable")][: len(order)]
        kept_N = np.zeros(S * K, bool)
        kept_N[by] = rank - start_E.astype(np.int32)[sorted_key] < capacity  # same experts in the same places
        if K > 1:
            kept_N = kept_N.reshape(S, K).T.ravel()
        order = order[kept_N[order]]
        start_E = np.cumsum(kept_E) - kept_E
        slot_N[order] = np.arange(len(order), dtype=np.int32) - start_E.astype(np.int32)[key_N[order]]
    return slot_N.reshape(K, S).T, kept_E


class _TorchGate(torch.autograd.Function):
    """CPU: a softmax, an argmax per choice, radix sorts on 16-bit keys, and one hand-written backward."""

    @staticmethod
    def forward(ctx, logits_SE, choice_SE, top_k, capacity, seed, token_offset, normalize):
        S, E = logits_SE.shape
        dtype = accumulate_dtype(logits_SE.dtype)
        wide_SE = logits_SE.to(dtype)
        p_SE = wide_SE.softmax(1)
        lse_S = wide_SE.amax(1) - p_SE.amax(1).log() if S else wide_SE.new_zeros(0)
        choice_np = (wide_SE if choice_SE is None else choice_SE.to(dtype)).numpy()

        first_np = choice_np.argmax(1)
        expert_np = _choose(choice_np, first_np, top_k)
        ok_np = None
        healthy = bool(lse_S.sum().isfinite())
        if choice_SE is not None and healthy:
            healthy = not np.isnan(choice_np[np.arange(S), first_np]).any()  # argmax takes a NaN first
        if not healthy:
            ok_np = lse_S.isfinite().numpy() & ~np.isnan(choice_np).any(1)
            expert_np[~ok_np] = np.arange(top_k)
            healthy = bool(ok_np.all())  # finite values whose sum is not
        counted = expert_np if ok_np is None else expert_np[ok_np]
        load_E = np.bincount(counted.ravel(), minlength=E)
        first_E = load_E if top_k == 1 else np.bincount(counted[:, 0], minlength=E)
        slot_np, kept_E = _slots(expert_np, ok_np, load_E, capacity, seed, token_offset)

        expert_SK = torch.from_numpy(expert_np)
        slot_SK = torch.from_numpy(np.ascontiguousarray(slot_np))
        raw_SK = p_SE.gather(1, expert_SK)
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
    def backward(ctx, _expert, _slot, d_weight_SK, _load, _kept, d_aux, d_z):
        p_SE, lse_S, expert_SK, raw_SK, weight_SK, share_E = ctx.saved_tensors
        S, E = p_SE.shape
        if S == 0 or (d_weight_SK is None and d_aux is None and d_z is None):
            return (torch.zeros_like(p_SE, dtype=ctx.dtype), *[None] * 6)
        # dL/dlogit = p * (a_e + r_s), plus p_k * q_k at the chosen experts, with q = dL/dp there
        r_S = torch.zeros(S, dtype=p_SE.dtype)
        if d_z is not None:
            r_S.add_(lse_S * (2.0 / S * d_z))
        a_E = None
        if d_aux is not None:
            a_E = share_E * (d_aux * (E / S))
            r_S.sub_(p_SE @ a_E)
        if d_weight_SK is not None:
            if ctx.normalize:
                total_S1 = raw_SK.sum(1, keepdim=True)
                eps = torch.finfo(torch.float32).eps
                inner_S1 = (d_weight_SK * weight_SK).sum(1, keepdim=True) * (total_S1 > eps)
                at_SK = raw_SK * (d_weight_SK - inner_S1) / total_S1.clamp(min=eps)
            else:
                at_SK = raw_SK * d_weight_SK
            r_S.sub_(at_SK.sum(1))
        if a_E is None:
            d_SE = p_SE * r_S[:, None]
        else:
            d_SE = torch.add(r_S[:, None], a_E).mul_(p_SE)
        if d_weight_SK is not None:
            d_SE.scatter_add_(1, expert_SK, at_SK)
        return (d_SE.to(ctx.dtype), *[None] * 6)
