"""The router: which expert takes which token, at which slot, with which weight (paper section 4, GShard, Switch).

    x_SM -> logits_SE -> gate -> Routing

`Routing` is data (`moelab.kernels.Gate`: expert ids, slots, weights, counts, losses). It is made once a layer and everything
downstream (dispatch, combine, losses, metrics) only reads it. Routing is fp32 whatever the activations are. Letters as in
`moelab.config`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab.config import RoutingConfig
from moelab.kernels import Gate as Routing
from moelab.kernels import gate


class Router(nn.Module):
    """The gate of one MoE layer: a linear map M -> E without bias, and `RoutingConfig`'s rules.

    Attributes:
        pool: averages a tensor over the data ranks; the engine sets it when `aux_scope` is "step" and there are several.
    """

    def __init__(self, hidden: int, experts: int, top_k: int, config: RoutingConfig) -> None:
        super().__init__()
        self.experts, self.top_k, self.config = experts, top_k, config
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.pool: Callable[[Tensor], Tensor] | None = None

    def forward(self, x_SM: Tensor) -> Routing:
        """Route S tokens; noise only in training mode."""
        cfg = self.config
        with torch.autocast(x_SM.device.type, enabled=False):
            x = x_SM.float()
            if self.training and cfg.input_jitter:
                x = x * torch.empty_like(x).uniform_(1 - cfg.input_jitter, 1 + cfg.input_jitter)
            logits_SE = F.linear(x, self.weight.float())
            choice_SE = None
            if self.training and cfg.choice_noise != "none":
                noise = torch.empty_like(logits_SE).exponential_().clamp_(min=1e-20).log_()
                choice_SE = logits_SE.detach() - noise
                if cfg.choice_noise == "gumbel_second" and len(x):
                    choice_SE.scatter_(1, logits_SE.detach().argmax(1, keepdim=True), torch.inf)
            seed = None
            if cfg.drop_tokens and cfg.random_token_selection:
                # Training draws from torch's CPU generator, which the loop seeds at each step; evaluation is always the same.
                seed = int(torch.randint(2**31, ())) if self.training else 0
            normalize = self.top_k > 1 if cfg.normalize_weights is None else cfg.normalize_weights
            capacity = cfg.capacity(len(x_SM), self.experts, self.top_k, self.training)
            routing = gate(logits_SE, self.top_k, capacity, seed=seed, normalize=normalize, choice_logits_SE=choice_SE)
            if self.training and self.pool is not None:
                # Only the probabilities carry a gradient, so each rank's own mean with everyone's shares averages to the whole.
                share_E = self.pool(torch.bincount(routing.expert_SK[:, 0], minlength=self.experts) / len(x_SM))
                aux_loss = self.experts * (logits_SE.softmax(1).mean(0) * share_E).sum()
                routing = routing._replace(aux_loss=aux_loss)
            return routing


__all__ = ["Router", "Routing"]
