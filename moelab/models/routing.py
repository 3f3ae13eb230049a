"""The gate: which expert takes which token, at which slot, with which weight (paper section 4, GShard, Switch).

    x_SM -> Router -> Routing

`Routing` is data. It is made once a layer and everything downstream (dispatch, combine, losses, metrics) only reads it.
All arithmetic here is fp32. Letters as in `moelab.config`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab.config import RoutingConfig


@dataclass(frozen=True)
class Routing:
    """Where each of S tokens goes.

    Attributes:
        expert_SK: int64, the chosen experts, best first; ties go to the lower expert.
        slot_SK: int64, the token's place among those its expert keeps, or -1 where it was dropped.
        weight_SK: fp32, what the expert's output is multiplied by; 0 where dropped. Carries the gradient to the gate.
        load_E: int64, tokens that chose each expert, before dropping.
        kept_E: int64, tokens that each expert keeps.
        aux_loss: fp32 scalar, load-balancing loss ``E * sum_e mean_s(p_se) * share_s(first choice = e)``; 1 when uniform.
        z_loss: fp32 scalar, ``mean_s logsumexp_e(logits)^2``.
    """

    expert_SK: Tensor
    slot_SK: Tensor
    weight_SK: Tensor
    load_E: Tensor
    kept_E: Tensor
    aux_loss: Tensor
    z_loss: Tensor

    @property
    def dropped_share(self) -> Tensor:
        """Share of the S x K choices that found no slot; fp32 scalar."""
        chosen = self.load_E.sum()
        return (chosen - self.kept_E.sum()) / chosen.clamp(min=1)


def priority(seed: int, tokens: int, top_k: int, device: torch.device | None = None) -> Tensor:
    """Random priority of each choice, a 32-bit counter hash of (seed, token, k): int64 [S, K] in [0, 2**32).

    A hash of the position rather than a generator's stream: the same on every device and however tokens are split.
    """
    counter = torch.arange(tokens * top_k, device=device, dtype=torch.int64).view(tokens, top_k)
    h = (counter + seed * 0x9E3779B9) & 0xFFFFFFFF
    for shift, factor in (
        (16, 0x7FEB352D),
        (15, 0x846CA68B),
    ):  # lowbias32, an avalanche hash without multiplicative bias
        h = h ^ (h >> shift)
        h = (h * factor) & 0xFFFFFFFF
    return h ^ (h >> 16)


def route(
    logits_SE: Tensor,
    top_k: int,
    capacity: int | None = None,
    *,
    seed: int | None = None,
    normalize: bool = False,
    choice_logits_SE: Tensor | None = None,
) -> Routing:
    """Route S tokens by their gate logits.

    Args:
        logits_SE: the gate's logits, any float dtype; computed in fp32.
        top_k: experts a token takes.
        capacity: most tokens an expert keeps; None drops nothing.
        seed: None keeps the earliest tokens, first choices before second ones (GShard); a number keeps a random selection
            (random token selection, RTS).
        normalize: divide a token's K weights by their sum (before dropping).
        choice_logits_SE: perturbed logits that make the choice; weights stay those of the clean ones.

    Raises:
        ValueError: when top_k is larger than E.
    """
    logits_SE = logits_SE.float()
    S, E = logits_SE.shape
    if not 1 <= top_k <= E:
        raise ValueError(f"routing: top_k must be between 1 and the {E} experts, got {top_k}")
    probs_SE = F.softmax(logits_SE, dim=-1)
    choice_SE = logits_SE if choice_logits_SE is None else choice_logits_SE.float()
    if top_k == 1:
        expert_SK = choice_SE.argmax(dim=-1, keepdim=True)  # takes the first of equals, unlike topk
    else:
        expert_SK = choice_SE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weight_SK = probs_SE.gather(1, expert_SK)
    if normalize:
        weight_SK = weight_SK / weight_SK.sum(dim=-1, keepdim=True)

    # Slots: stable sort of the choices, k-major, by expert; the place within the expert's group is the slot.
    flat = expert_SK.t().reshape(-1)  # [K * S], all first choices before all second ones
    load_E = torch.bincount(flat, minlength=E)
    keep = None
    if capacity is not None and bool((load_E > capacity).any()):
        if seed is None:
            keep = _place(flat, load_E) < capacity
        else:
            rank = priority(seed, S, top_k, flat.device).t().reshape(-1)
            keep = _place(flat, load_E, descending_key=rank) < capacity
    if keep is None:
        kept_E, slot = load_E, _place(flat, load_E)
    else:
        kept_E = torch.bincount(flat[keep], minlength=E)
        slot = torch.full_like(flat, -1)
        slot[keep] = _place(flat[keep], kept_E)
        weight_SK = weight_SK * keep.view(top_k, S).t()
    slot_SK = slot.view(top_k, S).t()

    first_share_E = torch.bincount(expert_SK[:, 0], minlength=E) / max(S, 1)
    aux_loss = E * (probs_SE.sum(dim=0) / max(S, 1) * first_share_E).sum()
    z_loss = logits_SE.logsumexp(dim=-1).square().sum() / max(S, 1)
    return Routing(expert_SK, slot_SK.contiguous(), weight_SK, load_E, kept_E, aux_loss, z_loss)


def _place(expert_N: Tensor, count_E: Tensor, descending_key: Tensor | None = None) -> Tensor:
    """Place of each entry among those of its expert: in order of appearance, or by falling key (ties: appearance). int64 [N]."""
    if descending_key is None:
        order = expert_N.argsort(stable=True)
    else:
        order = (expert_N * 2**32 + (2**32 - 1 - descending_key)).argsort(stable=True)
    start_E = count_E.cumsum(0) - count_E
    place = torch.empty_like(expert_N)
    place[order] = torch.arange(len(expert_N), device=expert_N.device) - start_E[expert_N[order]]
    return place


class Router(nn.Module):
    """The gate of one MoE layer: a linear map M -> E without bias, and `RoutingConfig`'s rules."""

    def __init__(self, hidden: int, experts: int, top_k: int, config: RoutingConfig) -> None:
        super().__init__()
        self.experts, self.top_k, self.config = experts, top_k, config
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x_SM: Tensor) -> Routing:
        cfg = self.config
        with torch.autocast(x_SM.device.type, enabled=False):
            x = x_SM.float()
            if self.training and cfg.input_jitter:
                x = x * torch.empty_like(x).uniform_(1 - cfg.input_jitter, 1 + cfg.input_jitter)
            logits_SE = F.linear(x, self.weight.float())
            choice_SE = None
            if self.training and cfg.choice_noise == "gumbel":
                noise = torch.empty_like(logits_SE).exponential_().clamp_(min=1e-20).log_()
                choice_SE = logits_SE.detach() - noise
            seed = None
            if cfg.drop_tokens and cfg.random_token_selection:
                # Training draws from torch's CPU generator, which the loop seeds at each step; evaluation is always the same.
                seed = int(torch.randint(2**31, ())) if self.training else 0
            normalize = self.top_k > 1 if cfg.normalize_weights is None else cfg.normalize_weights
            capacity = cfg.capacity(len(x_SM), self.experts, self.top_k, self.training)
            return route(logits_SE, self.top_k, capacity, seed=seed, normalize=normalize, choice_logits_SE=choice_SE)
