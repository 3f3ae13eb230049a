"""The paper's PyTorch baseline: gating by one-hot masks, dispatch and combine as einsums (GShard; DeepSpeed up to 0.19).

It computes what `moelab.kernels` computes, operation by operation as the released code does, and it stands here once: the model's and
the inference mode's `EinsumDispatch`, the exchange with padded slots among ranks (`moelab.engine.padded`) and the benchmarks all use it.
Letters as in `moelab.config`; a mask [S, E, C] has an entry for each token, expert and slot, nearly all of them zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelab.kernels import priorities
from moelab.models.routing import Router, Routing


def mask_gate(
    logits_SE: Tensor,
    top_k: int,
    capacity: int | None = None,
    *,
    seed: int | None = None,
    normalize: bool = False,
    choice_logits_SE: Tensor | None = None,
) -> Routing:
    """Return what `moelab.kernels.gate` returns for finite logits: the same choices, slots, weights and losses.

    Each choice is an argmax and a one-hot mask [S, E]; capacity selects by a top-k over tokens, slots are cumulative sums. Arguments as
    there; nothing is read from the device.
    """
    S, E = logits_SE.shape
    logits_SE = logits_SE.float()
    probs_SE = logits_SE.softmax(1)
    remaining_SE = (logits_SE if choice_logits_SE is None else choice_logits_SE).detach()
    masks_SE: list[Tensor] = []
    for _ in range(top_k):
        masks_SE.append(_one_hot(remaining_SE.argmax(1), E).long())
        if len(masks_SE) < top_k:
            remaining_SE = remaining_SE.masked_fill(masks_SE[-1].bool(), -torch.inf)
    chosen_NE = torch.cat(masks_SE)  # N = K * S entries: all first choices before any second one
    kept_NE = chosen_NE
    if capacity is not None and capacity < S:
        if seed is None:
            kept_NE = chosen_NE * (chosen_NE.cumsum(0) <= capacity)
        else:
            draw_N = priorities(seed, S, top_k, device=logits_SE.device).T.flatten()
            # Equal draws are rare; the order of the entries decides between them.
            rank_N = draw_N * (S * top_k) + torch.arange(S * top_k, 0, -1, device=logits_SE.device)
            top_CE = (chosen_NE * rank_N[:, None]).topk(capacity, dim=0).indices
            kept_NE = chosen_NE * torch.zeros_like(chosen_NE).scatter_(0, top_CE, 1)
    slot_N = ((kept_NE.cumsum(0) - 1) * kept_NE).sum(1)
    slot_N = torch.where(kept_NE.sum(1) > 0, slot_N, -1)
    weight_SK = torch.stack([(probs_SE * kept_SE).sum(1) for kept_SE in kept_NE.view(top_k, S, E)], 1)
    if normalize:
        weight_SK = weight_SK / weight_SK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    if S:
        aux_loss = E * (probs_SE.mean(0) * masks_SE[0].float().mean(0)).sum()
        z_loss = logits_SE.logsumexp(1).square().mean()
    else:
        aux_loss = z_loss = logits_SE.sum()
    expert_SK = torch.stack([mask_SE.argmax(1) for mask_SE in masks_SE], 1)
    counts = (chosen_NE.sum(0).int(), kept_NE.sum(0).int())
    return Routing(expert_SK.int(), slot_N.view(top_k, S).T.int(), weight_SK, *counts, aux_loss, z_loss)


def _one_hot(index_S: Tensor, count: int) -> Tensor:
    """Return bool [S, count]; a negative index has no entry. Unlike torch's own it reads nothing from the device."""
    return index_S[:, None] == torch.arange(count, dtype=index_S.dtype, device=index_S.device)


class MaskRouter(Router):
    """A router with the baseline's gate. It shares the weights of the router that it replaces.

    Args:
        router: the layer's own.
    """

    gate = staticmethod(mask_gate)

    def __init__(self, router: Router) -> None:
        super().__init__(0, router.experts, router.top_k, router.config)
        self.weight, self.pool = router.weight, router.pool


def one_hot_masks(routing: Routing, capacity: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (dispatch_SEC, combine_SEC): 1 where a token has a slot of an expert, and the weight that the slot's result gets.

    Args:
        capacity: C, at least the busiest expert's kept entries; a smaller one is an error that on a GPU only the device notices.
    """
    dispatch_SEC = combine_SEC = None
    choices = zip(routing.expert_SK.T, routing.slot_SK.T, routing.weight_SK.T.to(dtype), strict=True)
    for expert_S, slot_S, weight_S in choices:
        expert_SE = _one_hot(expert_S, len(routing.kept_E)).to(dtype)
        slot_SC = _one_hot(slot_S, capacity).to(dtype)
        taken_SEC = torch.einsum("se,sc->sec", expert_SE, slot_SC)
        weight_SEC = torch.einsum("se,sc->sec", weight_S[:, None] * expert_SE, slot_SC)
        dispatch_SEC = taken_SEC if dispatch_SEC is None else dispatch_SEC + taken_SEC
        combine_SEC = weight_SEC if combine_SEC is None else combine_SEC + weight_SEC
    assert dispatch_SEC is not None and combine_SEC is not None  # K is at least 1
    return dispatch_SEC, combine_SEC


def einsum_dispatch(x_SM: Tensor, dispatch_SEC: Tensor) -> Tensor:
    """Return the tokens in the slots of their experts, [E, C, M]: S * E * C * M multiply-adds, nearly all with zeros."""
    return torch.einsum("sec,sm->ecm", dispatch_SEC, x_SM)


def einsum_combine(rows_ECM: Tensor, combine_SEC: Tensor) -> Tensor:
    """Return the weighted sums of the slots' results by token, [S, M]; as many multiply-adds."""
    return torch.einsum("sec,ecm->sm", combine_SEC, rows_ECM)
