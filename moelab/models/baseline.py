"""Compute the paper's PyTorch baseline: a gate by one-hot masks, dispatch and combine by einsums (as in GShard).

The functions compute what `moelab.kernels` computes, by the operations of the released code (DeepSpeed up to 0.19).
`EinsumDispatch`, inference in baseline mode, the exchange with padded slots among ranks (`moelab.engine.padded`) and
the benchmarks use them. Letters as in `moelab.config`; a mask [S, E, C] has an entry for each token, expert and slot,
nearly all of them zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelab.kernels import priorities
from moelab.models.routing import Routing


def mask_gate(
    logits_SE: Tensor,
    top_k: int,
    capacity: int | None = None,
    *,
    seed: int | None = None,
    normalize: bool = False,
    choice_logits_SE: Tensor | None = None,
    losses: bool = True,
) -> Routing:
    """Return what `moelab.kernels.gate` returns for finite logits: the same choices, slots, weights and losses.

    Each choice is an argmax and a one-hot mask [S, E]; random selection is a top-k over tokens, and slots are
    cumulative sums. The arguments are those of `moelab.kernels.gate`; the losses are always computed. The host reads
    nothing from the device.
    """
    S, E = logits_SE.shape
    logits_SE = logits_SE.float()
    probs_SE = logits_SE.softmax(1)
    remaining_SE = (logits_SE if choice_logits_SE is None else choice_logits_SE).detach()
    experts_S: list[Tensor] = []
    masks_SE: list[Tensor] = []
    for k in range(top_k):
        if k:
            remaining_SE = remaining_SE.masked_fill(masks_SE[-1].bool(), -torch.inf)
        experts_S.append(remaining_SE.argmax(1))
        masks_SE.append(_one_hot(experts_S[-1], E).long())
    chosen_NE = torch.cat(masks_SE)  # N = K * S entries: all first choices before any second one
    load_E = chosen_NE.sum(0, dtype=torch.int32)
    limit = capacity if capacity is not None and capacity < S else None
    if limit is not None and seed is not None:
        draw_N = priorities(seed, S, top_k, device=logits_SE.device).T.flatten()
        # If draws are equal, which is rare, the lower token comes first; it chooses an expert once at most.
        rank_N = draw_N * S + torch.arange(S, 0, -1, device=logits_SE.device).repeat(top_k)
        top_CE = (chosen_NE * rank_N[:, None]).topk(limit, dim=0).indices
        chosen_NE = chosen_NE * torch.zeros_like(chosen_NE).scatter_(0, top_CE, 1)
    slot_N = (chosen_NE.cumsum(0) * chosen_NE).sum(1) - 1  # -1 for dropped entries
    if limit is not None and seed is None:
        slot_N = torch.where(slot_N < limit, slot_N, -1)
    slot_SK = slot_N.view(top_k, S).T
    expert_SK = torch.stack(experts_S, 1)
    weight_SK = probs_SE.gather(1, expert_SK) * (slot_SK >= 0)
    if normalize:
        weight_SK = weight_SK / weight_SK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    if S:
        aux_loss = E * (probs_SE.mean(0) * masks_SE[0].float().mean(0)).sum()
        z_loss = logits_SE.logsumexp(1).square().mean()
    else:
        aux_loss = z_loss = logits_SE.sum()
    kept_E = load_E if limit is None else load_E.clamp(max=limit)
    return Routing(expert_SK.int(), slot_SK.int(), weight_SK, load_E, kept_E, aux_loss, z_loss)


def _one_hot(index_S: Tensor, count: int) -> Tensor:
    """Return bool [S, count], all False for a negative index; unlike torch's one_hot it never waits for the device."""
    return index_S[:, None] == torch.arange(count, dtype=index_S.dtype, device=index_S.device)


def one_hot_masks(routing: Routing, capacity: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (dispatch_SEC, combine_SEC), the masks of the slots that tokens occupy.

    dispatch_SEC is bool, True where a token occupies an expert's slot; combine_SEC is the weight of the slot's result,
    in `dtype`. As in the released code, a slot with weight exactly 0 counts as empty; neither results nor gradients
    depend on it.

    Args:
        capacity: C, at least the busiest expert's kept entries; entries with a higher slot are lost.
    """
    combine_SEC = torch.zeros(())
    for k in range(routing.expert_SK.shape[1]):
        expert_SE = _one_hot(routing.expert_SK[:, k], len(routing.kept_E))
        slot_SC = _one_hot(routing.slot_SK[:, k], capacity).to(dtype)
        choice_SEC = torch.einsum("se,sc->sec", routing.weight_SK[:, k, None].to(dtype) * expert_SE, slot_SC)
        combine_SEC = combine_SEC + choice_SEC if k else choice_SEC
    return combine_SEC.bool(), combine_SEC


def einsum_dispatch(x_SM: Tensor, dispatch_SEC: Tensor) -> Tensor:
    """Return the tokens in their experts' slots, [E, C, M], by S * E * C * M multiply-adds, nearly all with zeros."""
    return torch.einsum("sec,sm->ecm", dispatch_SEC.to(x_SM.dtype), x_SM)


def einsum_combine(rows_ECM: Tensor, combine_SEC: Tensor) -> Tensor:
    """Return each token's weighted sum of its slots' results, [S, M], by S * E * C * M multiply-adds."""
    return torch.einsum("sec,ecm->sm", combine_SEC, rows_ECM)
