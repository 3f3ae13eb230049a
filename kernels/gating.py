"""Route tokens: softmax, top-k, capacity, random token selection, slots and both losses in one op (paper 5.4).

Shapes: S tokens, E experts, K experts per token, C capacity. For every token: probabilities ``p = softmax(logits)``
in float32; choices are the top-k of the choice logits (the logits themselves unless noisy ones are given), ties to the
lower expert. An *entry* is one (token, k) pair. Entries are ordered as in GShard: all first choices before any second
one, tokens in order ("k-major"). When more than C entries chose an expert, it keeps:

- with ``seed=None``, the first C in that order (first come, first served).
- with a seed, C random ones (random token selection). The priority of an entry is a 32-bit counter hash of
  (seed, s, k); the C highest priorities are kept, ties to the lower token. The hash is integer arithmetic and
  bit-equal on every backend.

An entry's slot is its number among the expert's kept entries, in k-major order. Dropped entries have slot -1 and
weight 0.

A token whose softmax is undefined (logits with a NaN or +inf, or all -inf) or whose choice logits contain a NaN is not
routed: its ids are 0..K-1, its slots -1, its weights 0, and the load does not count it. Both losses are then NaN, so
that a training loop detects it. The check needs no synchronisation with the device; the gradients of such a token are
unspecified. Without any tokens, both losses are 0.

The Triton implementation is in ``_gating_triton.py``, that for CPU in ``_cpp/gating.cpp``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ._common import Backend, accumulate_dtype, contiguous, pick_backend
from ._cpp import operations
from ._hash import hash_keys, priorities

MAX_EXPERTS = 512


class Gate(NamedTuple):
    """Record where every token goes and with which weight."""

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
    uniform. None where it was left out, as `z_loss`."""
    z_loss: torch.Tensor
    """float32 scalar, differentiable: mean_s logsumexp(logits_s)^2."""


def gate(
    logits_SE: torch.Tensor,
    top_k: int,
    capacity: int | None = None,
    *,
    seed: int | None = None,
    normalize: bool = False,
    choice_logits_SE: torch.Tensor | None = None,
    losses: bool = True,
    backend: Backend = "auto",
) -> Gate:
    """Route S tokens to ``top_k`` of E experts each (2 <= E <= 512); see the module's text for the semantics.

    ``capacity=None`` drops nothing. ``seed`` selects at random instead of first-come. ``normalize`` divides the weights
    of a token's *kept* choices by their sum (at least float32's eps), as DeepSpeed's top-2 gate does.
    ``choice_logits_SE`` decide the choices only; no gradient flows into them. Differentiable (once) in the logits,
    unless ``losses`` is False, with which a backend may leave the losses out (None), as a decoding step does.
    Raises ``ValueError`` for shapes, ``top_k`` or ``capacity`` out of range.
    """
    if logits_SE.dim() != 2 or not logits_SE.is_floating_point():
        raise ValueError(f"gate: logits must be floating point [S, E], not {logits_SE.dtype} {tuple(logits_SE.shape)}")
    experts = logits_SE.shape[1]
    if not 2 <= experts <= MAX_EXPERTS:
        raise ValueError(f"gate: 2 to {MAX_EXPERTS} experts, not {experts}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"gate: top_k must be 1 to {experts}, not {top_k}")
    if capacity is not None and (isinstance(capacity, float) or capacity < 1):  # 1.25 * S / E is a float
        raise ValueError(f"gate: capacity must be at least 1 and an int (None drops nothing), not {capacity}")
    if choice_logits_SE is not None:
        if choice_logits_SE.shape != logits_SE.shape:
            raise ValueError(f"gate: choice logits {tuple(choice_logits_SE.shape)} for logits {tuple(logits_SE.shape)}")
        choice_logits_SE = choice_logits_SE.detach()
    chosen = pick_backend("gate", backend, logits_SE, choice_logits_SE)
    if capacity is not None and capacity >= logits_SE.shape[0]:
        capacity = None  # an expert is chosen at most once per token
    if capacity is None:
        seed = None
    if chosen == "reference":
        return Gate(*gate_reference(logits_SE, choice_logits_SE, top_k, capacity, seed, normalize))
    if chosen == "cpp":
        logits_SE = logits_SE.float()
        choice_logits_SE = None if choice_logits_SE is None else choice_logits_SE.float()
    logits_SE, choice_logits_SE = contiguous(logits_SE, choice_logits_SE)
    arguments = (logits_SE, choice_logits_SE, top_k, capacity, seed, normalize)
    if chosen == "cpp" and not losses:
        return Gate(*[*_gate_cpp(*arguments, losses=False), None, None])
    return Gate(*_Gate.apply(*arguments, chosen))


class _Gate(torch.autograd.Function):
    """Compute the gate and its gradient; the backward pass computes the probabilities again from the logits."""

    @staticmethod
    def forward(ctx, logits_SE, choice_SE, top_k, capacity, seed, normalize, backend):
        if backend == "triton":
            from ._gating_triton import gate_triton as compute
        else:
            compute = _gate_cpp
        found = compute(logits_SE, choice_SE, top_k, capacity, seed, normalize)
        expert_SK, slot_SK, _, load_E, kept_E, _, _, *more = found
        ctx.save_for_backward(logits_SE, expert_SK, slot_SK, *more)
        ctx.normalize, ctx.backend = normalize, backend
        ctx.mark_non_differentiable(expert_SK, slot_SK, load_E, kept_E)
        ctx.set_materialize_grads(False)
        return tuple(found[:7])

    @staticmethod
    @once_differentiable
    def backward(ctx, _expert, _slot, d_weight_SK, _load, _kept, d_aux, d_z):
        saved = ctx.saved_tensors  # once: recomputation allows no more
        grads, d_SE = contiguous(d_weight_SK, d_aux, d_z), torch.empty_like(saved[0])
        if ctx.backend == "triton":
            from ._gating_triton import gate_backward_triton

            gate_backward_triton(saved, grads, ctx.normalize, d_SE)
        else:
            logits_SE, expert_SK, slot_SK, softmax_3S, share_E = saved
            arguments = (logits_SE, softmax_3S, expert_SK, slot_SK, share_E, *grads, ctx.normalize, d_SE)
            operations().gate_backward.default(*arguments)
        return d_SE, *[None] * 6


def _gate_cpp(logits_SE, choice_SE, top_k, capacity, seed, normalize, losses=True):
    """Return the gate's results and what the backward pass needs; without ``losses``, neither that nor the losses."""
    hash_words = () if seed is None else hash_keys(seed)
    return operations().gate_forward.default(logits_SE, choice_SE, top_k, capacity, hash_words, normalize, losses)


def gate_reference(logits_SE, choice_SE, top_k, capacity, seed, normalize):
    """Compute the gate as the paper's PyTorch baseline does, by one-hot masks [S, E] (DeepSpeed up to 0.19).

    Each choice is an argmax, random selection a top-k over tokens, and slots are cumulative sums. The host reads
    nothing from the device. Differentiable; the losses are always computed.
    """
    S, E = logits_SE.shape
    device = logits_SE.device
    logits_SE = logits_SE.to(accumulate_dtype(logits_SE.dtype))
    probs_SE, lse_S = logits_SE.softmax(1), logits_SE.logsumexp(1)
    remaining_SE = logits_SE.detach()
    if choice_SE is not None:
        remaining_SE = choice_SE.to(logits_SE.dtype)
        lse_S = lse_S.masked_fill(remaining_SE.isnan().any(1), torch.nan)
    ok_S = lse_S.isfinite()

    remaining_SE = remaining_SE.masked_fill(~ok_S[:, None], 0.0)  # so that the choices are 0..K-1
    expert_E = torch.arange(E, device=device)
    experts: list[torch.Tensor] = []
    masks: list[torch.Tensor] = []
    if top_k > 1:
        remaining_SE = remaining_SE.clamp(min=torch.finfo(logits_SE.dtype).min)  # -inf marks the chosen ones
    for k in range(top_k):
        if k:
            remaining_SE = remaining_SE.scatter(1, experts[-1][:, None], -torch.inf)
        experts.append(remaining_SE.argmax(1))
        mask_SE = (experts[-1][:, None] == expert_E) & ok_S[:, None]  # torch's one_hot may wait for the device
        masks.append(mask_SE.long())
    expert_SK = torch.stack(experts, 1)
    chosen_NE = torch.cat(masks)  # N = K * S entries, k-major
    load_E = chosen_NE.sum(0, dtype=torch.int32)
    if seed is not None:
        draw_N = priorities(seed, S, top_k, device).T.flatten()
        # Of equal draws, which are rare, the lower token's comes first; it chooses an expert once at most.
        rank_N = draw_N * S + torch.arange(S, 0, -1, device=device).repeat(top_k)
        top_CE = (chosen_NE * rank_N[:, None]).topk(capacity, dim=0).indices
        chosen_NE = chosen_NE * torch.zeros_like(chosen_NE).scatter_(0, top_CE, 1)
    slot_N = (chosen_NE.cumsum(0) * chosen_NE).sum(1) - 1  # -1 for dropped entries
    if capacity is not None and seed is None:
        slot_N = torch.where(slot_N < capacity, slot_N, -1)
    slot_SK = slot_N.view(top_k, S).T.contiguous()
    kept_E = load_E if capacity is None else load_E.clamp(max=capacity)

    weight_SK = torch.where(slot_SK >= 0, probs_SE.gather(1, expert_SK), 0.0)
    if normalize:
        weight_SK = weight_SK / weight_SK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    if S == 0:
        aux_loss = z_loss = logits_SE.sum()
    else:
        poison = 0.0 * lse_S.detach().mean()  # NaN if a token cannot be routed
        aux_loss = E * (probs_SE.mean(0) * masks[0].to(logits_SE.dtype).mean(0)).sum() + poison
        z_loss = lse_S.square().mean() + poison
    return expert_SK.int(), slot_SK.int(), weight_SK, load_E, kept_E, aux_loss, z_loss
