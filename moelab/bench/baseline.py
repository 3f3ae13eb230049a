"""The paper's PyTorch baseline: gating by one-hot masks, dispatch and combine by einsum (GShard; DeepSpeed up to 0.19)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_gate(logits_SE: Tensor, capacity: int, random: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Top-1 with capacity, random token selection and the load-balancing loss: (aux_loss, combine [S, E, C], dispatch [S, E, C])."""
    E = logits_SE.shape[1]
    probs_SE = F.softmax(logits_SE.float(), dim=1)
    mask_SE = F.one_hot(probs_SE.argmax(dim=1), E)
    aux_loss = E * (probs_SE.mean(0) * mask_SE.float().mean(0)).sum()
    priority_SE = mask_SE * torch.rand_like(probs_SE) if random else mask_SE
    top_CE = priority_SE.topk(min(capacity, len(logits_SE)), dim=0).indices
    mask_SE = mask_SE * torch.zeros_like(mask_SE).scatter_(0, top_CE, 1)
    slot_S = ((mask_SE.cumsum(0) - 1) * mask_SE).sum(1)
    weight_SE = probs_SE * mask_SE
    combine_SEC = torch.einsum("se,sc->sec", weight_SE, F.one_hot(slot_S, capacity).float())
    return aux_loss, combine_SEC, combine_SEC.bool()


def einsum_dispatch(x_SM: Tensor, dispatch_SEC: Tensor) -> Tensor:
    """Tokens in the slots of their experts: [E, C, M]."""
    return torch.einsum("sec,sm->ecm", dispatch_SEC.to(x_SM.dtype), x_SM)


def einsum_combine(rows_ECM: Tensor, combine_SEC: Tensor) -> Tensor:
    """Back to tokens, weighted: [S, M]."""
    return torch.einsum("sec,ecm->sm", combine_SEC.to(rows_ECM.dtype), rows_ECM)


def einsum_layer(
    x_SM: Tensor, logits_SE: Tensor, capacity: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor]:
    """One MoE layer: (y [S, M], aux_loss)."""
    aux_loss, combine_SEC, dispatch_SEC = mask_gate(logits_SE, capacity)
    rows_ECM = einsum_dispatch(x_SM, dispatch_SEC)
    hidden_ECF = F.gelu(torch.baddbmm(b1[:, None], rows_ECM, w1), approximate="tanh")
    rows_ECM = torch.baddbmm(b2[:, None], hidden_ECF, w2)
    return einsum_combine(rows_ECM, combine_SEC), aux_loss
