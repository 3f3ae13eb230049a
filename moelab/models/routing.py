"""Route tokens: choose their experts, slots and weights (paper section 4, GShard, Switch).

    x_SM -> logits_SE -> noise, scores, capacity, gate -> Routing

`Routing` is data (expert ids, slots, weights, counts, losses). It is computed once per layer; dispatch, combine and
metrics only read it. Routing is computed in fp32 for activations of any dtype. Letters as in `moelab.config`.

To add a kind of noise, write a function of the logits here, enter it in `NOISE`, and add its name to
`RoutingConfig.choice_noise`; a kind of scores is added in the same way to `SCORES` and `RoutingConfig.scores`, a loss
to `LOSSES` and, its weight, to `RoutingConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab import kernels
from moelab.config import RoutingConfig
from moelab.kernels import Gate


def gumbel(logits_SE: Tensor) -> Tensor:
    """Add Gumbel noise to all logits, so that experts are sampled in proportion to their probabilities."""
    return logits_SE - torch.empty_like(logits_SE).exponential_().clamp_(min=1e-20).log_()


def gumbel_second(logits_SE: Tensor) -> Tensor:
    """Add Gumbel noise to all logits but the largest, which remains the first choice."""
    choice_SE = gumbel(logits_SE)
    return choice_SE.scatter_(1, logits_SE.argmax(1, keepdim=True), torch.inf) if len(logits_SE) else choice_SE


NOISE: dict[str, Callable[[Tensor], Tensor]] = {"gumbel": gumbel, "gumbel_second": gumbel_second}
"""`RoutingConfig.choice_noise` -> function from the gate's logits to those that decide the choice of experts."""

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_SE: logits_SE.softmax(1),
    "sigmoid": torch.sigmoid,
}
"""`RoutingConfig.scores` -> function from logits to scores, positive and growing with the logits of a token."""

LOSSES: dict[str, Callable[[Tensor, Gate], Tensor]] = {
    "z_loss": lambda logits_SE, routing: routing.z_loss,
}
"""Weight in `RoutingConfig` -> function from the gate's fp32 logits and the routing to a loss, a mean over tokens.

These are added to the load-balancing loss. Over micro-batches and data ranks the mean of each is taken.
"""


class Routing(Gate):
    """Record where every token goes (see `moelab.kernels.Gate`), and what the router adds to the training loss.

    Attributes:
        loss: fp32 scalar, differentiable: the load-balancing loss and `LOSSES`, weighted; missing where `Router.losses`
            is off.
    """

    loss: Tensor


class Router(nn.Module):
    """Compute an MoE layer's routing by a linear map M -> E without bias and `RoutingConfig`'s rules.

    Attributes:
        gate: function that computes the routing from logits and rules, by default `moelab.kernels.gate`.
        balance_bias: fp32 [E], added to the scores for the choice of experts only; no gradient trains it, but
            `balance`. None without loss-free balancing.
        pool: function that averages a tensor over the data ranks; the engine sets it when `aux_scope` is "step" and
            there are several.
        losses: whether the gate computes its losses; without them they are None.
        entropies: while a list is set, each call appends the router's normalised entropy (see `normalized_entropy`).
    """

    gate: Callable[..., kernels.Gate] = staticmethod(kernels.gate)
    balance_bias: nn.Parameter | None

    def __init__(self, hidden: int, experts: int, top_k: int, config: RoutingConfig) -> None:
        super().__init__()
        self.experts, self.top_k, self.config = experts, top_k, config
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        bias = nn.Parameter(torch.empty(experts), requires_grad=False) if config.balance_rate else None
        self.register_parameter("balance_bias", bias)
        self.pool: Callable[[Tensor], Tensor] | None = None
        self.losses = True
        self.entropies: list[Tensor] | None = None

    def forward(self, x_SM: Tensor, sequences: int = 1) -> Routing:
        """Route S tokens by their activations [S, M]; add noise only in training mode.

        Args:
            sequences: number of sequences of equal length that the tokens form, for `RoutingConfig.aux_scope`.
        """
        if not torch.is_autocast_enabled(x_SM.device.type):  # entering the context takes microseconds
            return self.route(self.logits(x_SM.float()), sequences)
        with torch.autocast(x_SM.device.type, enabled=False):
            return self.route(self.logits(x_SM.float()), sequences)

    def logits(self, x_SM: Tensor) -> Tensor:
        """Return the logits [S, E] of fp32 activations."""
        if self.training and (jitter := self.config.input_jitter):
            x_SM = x_SM * torch.empty_like(x_SM).uniform_(1 - jitter, 1 + jitter)
        x_SM = self.rounded(x_SM)
        return self.rounded(F.linear(x_SM, self.rounded(self.weight.float())))

    def rounded(self, t: Tensor) -> Tensor:
        """Return an fp32 tensor rounded to `RoutingConfig.precision`, again in fp32."""
        return t if self.config.precision == "fp32" else t.bfloat16().float()

    def activate(self, logits_SE: Tensor) -> Tensor:
        """Return the scores [S, E] of logits, see `RoutingConfig.scores`."""
        return SCORES[self.config.scores](logits_SE)

    def route(self, logits_SE: Tensor, sequences: int = 1) -> Routing:
        """Route S tokens by their fp32 logits and all of `RoutingConfig`'s rules; add noise only in training mode."""
        cfg, S = self.config, len(logits_SE)
        noisy = self.training and cfg.choice_noise != "none"
        choice_SE = NOISE[cfg.choice_noise](logits_SE.detach()) if noisy else None
        rescored = cfg.scores != "softmax"  # the gate kernel knows only a softmax
        if self.balance_bias is not None:
            choice_SE = self.activate(logits_SE.detach()) + self.balance_bias
        seed = None
        if cfg.drop_tokens and cfg.random_token_selection:
            # Training draws from torch's CPU generator, which the loop seeds for each micro-batch; evaluation always
            # uses the same seed.
            seed = int(torch.randint(2**31, ())) if self.training else 0
        normalize = cfg.normalizes(self.top_k)
        capacity = cfg.capacity(S, self.experts, self.top_k, self.training)
        rules = {"seed": seed, "normalize": normalize, "choice_logits_SE": choice_SE, "losses": self.losses}
        routing = self.gate(logits_SE, self.top_k, capacity, **rules)
        if rescored:
            routing = routing._replace(weight_SK=_weights(self.activate(logits_SE), routing, normalize))
        pool = self.pool if self.training else None
        special = rescored or cfg.aux_choices == "all" or cfg.aux_scope == "sequence" or pool is not None
        if self.losses and special:
            loss = self._aux_loss(logits_SE, routing.expert_SK, sequences, pool)
            routing = routing._replace(aux_loss=loss + 0 * routing.aux_loss.detach())  # NaN stays: see _loss
        if self.losses:
            routing = Routing(*routing)
            routing.loss = self._loss(logits_SE, routing)
        if self.entropies is not None:
            self.entropies.append(normalized_entropy(self._probabilities(logits_SE.detach())))
        return cast(Routing, routing)

    def _probabilities(self, logits_SE: Tensor) -> Tensor:
        """Return the scores, [S, E], divided by their sum over the experts."""
        scores_SE = self.activate(logits_SE)
        return scores_SE if self.config.scores == "softmax" else scores_SE / scores_SE.sum(1, keepdim=True)

    def _aux_loss(
        self, logits_SE: Tensor, expert_SK: Tensor, sequences: int, pool: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """Return E * sum_e mean(p_e) * share_e over the tokens of `aux_scope`, the mean over sequences if these.

        Only the probabilities carry a gradient. So the mean over ranks of (a rank's mean probabilities times all ranks'
        shares) is the loss of the whole step.
        """
        cfg, S, E = self.config, *logits_SE.shape
        if not S:
            return logits_SE.sum()
        B = sequences if cfg.aux_scope == "sequence" else 1
        if cfg.aux_choices == "first":
            expert_SK = expert_SK[:, :1]
        choices_BN = expert_SK.long().reshape(B, -1)
        share_BE = logits_SE.new_zeros(B, E).scatter_add_(1, choices_BN, torch.ones_like(choices_BN, dtype=torch.float))
        share_BE = share_BE / choices_BN.shape[1]
        if pool is not None:
            share_BE = pool(share_BE)
        mean_BE = self._probabilities(logits_SE).view(B, S // B, E).mean(1)
        return E * (mean_BE * share_BE).sum(1).mean()

    def _loss(self, logits_SE: Tensor, routing: Gate) -> Tensor:
        """Return the weighted load-balancing loss and `LOSSES`; at weight 0 only the first is computed.

        It is NaN where a token cannot be routed, which training must notice.
        """
        total = self.config.aux_loss * routing.aux_loss
        for name, loss in LOSSES.items():
            if (weight := getattr(self.config, name)) and len(logits_SE):
                total = total + weight * loss(logits_SE, routing)
        return total

    @torch.no_grad()
    def balance(self, load_E: Tensor) -> None:
        """Move the bias of each expert by `RoutingConfig.balance_rate` against its deviation from the mean load.

        Args:
            load_E: tokens of one training step, over all data ranks, that chose each expert.
        """
        assert self.balance_bias is not None
        load_E = load_E.to(self.balance_bias.device, torch.float64)
        self.balance_bias.add_(self.config.balance_rate * torch.sign(load_E.mean() - load_E).float())


def _weights(scores_SE: Tensor, routing: Gate, normalize: bool) -> Tensor:
    """Return the kept choices' scores, or their shares of the sum, as `moelab.kernels.gate` does for a softmax."""
    weight_SK = torch.where(routing.slot_SK >= 0, scores_SE.gather(1, routing.expert_SK.long()), 0.0)
    if normalize:
        weight_SK = weight_SK / weight_SK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    return weight_SK


def normalized_entropy(p_SE: Tensor) -> Tensor:
    """Return the mean over tokens of the entropy of their probabilities [S, E], divided by log E: from 0 to 1."""
    return torch.special.entr(p_SE).sum(1).mean() / math.log(p_SE.shape[1])


__all__ = ["LOSSES", "NOISE", "SCORES", "Router", "Routing", "normalized_entropy"]
