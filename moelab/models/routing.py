"""Route tokens: choose their experts, slots and weights (paper section 4, GShard, Switch).

    x_SM -> scores -> logits_SE -> noise, capacity, gate -> Routing

`Routing` is data (`moelab.kernels.Gate`: expert ids, slots, weights, counts, losses). It is computed once per layer;
dispatch, combine, losses and metrics only read it. Routing is computed in fp32 for activations of any dtype. Letters as
in `moelab.config`.

To add a kind of noise, write a function of the logits here, enter it in `NOISE`, and add its name to
`RoutingConfig.choice_noise`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab import kernels
from moelab.config import RoutingConfig
from moelab.kernels import Gate as Routing


def gumbel(logits_SE: Tensor) -> Tensor:
    """Add Gumbel noise to all logits, so that experts are sampled in proportion to their probabilities."""
    return logits_SE - torch.empty_like(logits_SE).exponential_().clamp_(min=1e-20).log_()


def gumbel_second(logits_SE: Tensor) -> Tensor:
    """Add Gumbel noise to all logits but the largest, which remains the first choice."""
    choice_SE = gumbel(logits_SE)
    return choice_SE.scatter_(1, logits_SE.argmax(1, keepdim=True), torch.inf) if len(logits_SE) else choice_SE


NOISE: dict[str, Callable[[Tensor], Tensor]] = {"gumbel": gumbel, "gumbel_second": gumbel_second}
"""`RoutingConfig.choice_noise` -> function from the gate's logits to those that decide the choice of experts."""


class Router(nn.Module):
    """Compute a MoE layer's routing by a linear map M -> E without bias and `RoutingConfig`'s rules.

    Attributes:
        gate: function that computes the routing from logits and rules, by default `moelab.kernels.gate`.
        pool: function that averages a tensor over the data ranks; the engine sets it when `aux_scope` is "step" and
            there are several.
    """

    gate = staticmethod(kernels.gate)

    def __init__(self, hidden: int, experts: int, top_k: int, config: RoutingConfig) -> None:
        super().__init__()
        self.experts, self.top_k, self.config = experts, top_k, config
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.pool: Callable[[Tensor], Tensor] | None = None

    def forward(self, x_SM: Tensor) -> Routing:
        """Route S tokens by their activations [S, M]; add noise only in training mode."""
        with torch.autocast(x_SM.device.type, enabled=False):
            return self.route(self.scores(x_SM.float()))

    def scores(self, x_SM: Tensor) -> Tensor:
        """Return the logits [S, E] of fp32 activations."""
        if self.training and (jitter := self.config.input_jitter):
            x_SM = x_SM * torch.empty_like(x_SM).uniform_(1 - jitter, 1 + jitter)
        return F.linear(x_SM, self.weight.float())

    def route(self, logits_SE: Tensor) -> Routing:
        """Route S tokens by their fp32 logits and all of `RoutingConfig`'s rules; add noise only in training mode."""
        cfg, S = self.config, len(logits_SE)
        noisy = self.training and cfg.choice_noise != "none"
        choice_SE = NOISE[cfg.choice_noise](logits_SE.detach()) if noisy else None
        seed = None
        if cfg.drop_tokens and cfg.random_token_selection:
            # Training draws from torch's CPU generator, which the loop seeds for each micro-batch; evaluation always
            # uses the same seed.
            seed = int(torch.randint(2**31, ())) if self.training else 0
        normalize = self.top_k > 1 if cfg.normalize_weights is None else cfg.normalize_weights
        capacity = cfg.capacity(S, self.experts, self.top_k, self.training)
        routing = self.gate(logits_SE, self.top_k, capacity, seed=seed, normalize=normalize, choice_logits_SE=choice_SE)
        if self.training and self.pool is not None:
            # Only the probabilities carry a gradient. So the mean over ranks of (a rank's mean probabilities times all
            # ranks' shares) is the loss of the whole step.
            first_SE = routing.expert_SK[:, :1] == torch.arange(self.experts, device=logits_SE.device)
            share_E = self.pool(first_SE.sum(0) / S)  # `bincount` would read its largest value from the device
            aux_loss = self.experts * (logits_SE.softmax(1).mean(0) * share_E).sum()
            routing = routing._replace(aux_loss=aux_loss)
        return routing


__all__ = ["NOISE", "Router", "Routing"]
