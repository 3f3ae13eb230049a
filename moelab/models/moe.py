"""Compute the mixture-of-experts feed-forward layer and its residual form (paper sections 3, 4 and 5.4).

    x_SM -> Router -> Routing -> dispatch -> experts -> combine -> y_SM (+ residual mix)

Start reading at `MoE`, at the end. `routing.py` has the router, `dispatch.py` the copying of tokens to their experts
and back, `baseline.py` the paper's PyTorch baseline. Inference and the engine replace parts of a built layer (router,
experts, mix) by modules with the same interface, and its dispatch by `MoE.set_dispatch`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelab import kernels
from moelab.config import ModelConfig
from moelab.models.dispatch import Dispatch, DispatchFactory, make_dispatch
from moelab.models.gelu import gelu
from moelab.models.routing import Router, Routing


class MLP(nn.Module):
    """Compute a dense feed-forward M -> F -> M with GELU."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, ffn)
        self.down = nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [..., M] of x [..., M]."""
        return self.down(gelu(self.up(x)))


class Experts(nn.Module):
    """Compute E feed-forwards of one shape, with their weights stacked along the first dim: expert e is row e."""

    def __init__(self, experts: int, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(experts, hidden, ffn))
        self.up_bias = nn.Parameter(torch.empty(experts, ffn))
        self.down = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.down_bias = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, rows_RM: Tensor, offsets_E1: Tensor) -> Tensor:
        """Return the outputs [R, M] of rows in expert order.

        Expert e's rows are `offsets_E1[e]` to `offsets_E1[e + 1]` (int32).
        """
        weights = (w.to(rows_RM.dtype) for w in (self.up, self.up_bias, self.down, self.down_bias))
        return kernels.expert_ffn(rows_RM, offsets_E1, *weights)


class Mix(nn.Linear):
    """Mix the residual form's branches by a learned two-way softmax per token, the first weight for the routed one."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 2)

    def forward(self, routed_SM: Tensor, fixed_SM: Tensor, x_SM: Tensor) -> Tensor:
        """Return the branches' weighted sum, [S, M]; the coefficients are computed from the layer's input `x_SM`."""
        weight, bias = self.weight.to(x_SM.dtype), self.bias.to(x_SM.dtype)
        return kernels.residual_mix(routed_SM, fixed_SM, x_SM, weight, bias)


class MoE(nn.Module):
    """Compute a routed feed-forward layer; with `config.residual`, with a fixed MLP beside it.

    The released code mixes the two branches by learned coefficients (`Mix`), the paper's text adds them;
    `ModelConfig.residual_mix` selects one. A dropped token still gets the fixed MLP's output.
    """

    def __init__(self, config: ModelConfig, experts: int) -> None:
        super().__init__()
        self.router = Router(config.hidden, experts, config.top_k, config.routing)
        self.experts = Experts(experts, config.hidden, config.ffn)
        self.mlp = MLP(config.hidden, config.ffn) if config.residual else None
        self.mix = Mix(config.hidden) if config.residual and config.residual_mix == "learned" else None
        self.set_dispatch(config.dispatch, make_dispatch)

    def set_dispatch(self, name: str, factory: DispatchFactory | None = None, static_tokens: int = 0) -> None:
        """Choose the dispatch; the layer's results do not depend on it.

        Args:
            name: as `ModelConfig.dispatch`.
            factory: function that makes the dispatch, in this call and in later calls without a factory. The engine
                passes one for experts on several ranks; at first it is `make_dispatch`, for experts in this process.
            static_tokens: see `moelab.models.dispatch.EinsumDispatch`.
        """
        if factory is not None:
            self._factory = factory
        self.dispatcher: Dispatch = self._factory(name, static_tokens)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Return (y [..., M], the routing) of x [..., M]; S is the product of the leading dims."""
        x_SM = x.reshape(-1, x.shape[-1])
        routing = self.router(x_SM)
        if torch.is_autocast_enabled(x.device.type):  # our kernels compute in their input's dtype
            x_SM = x_SM.to(torch.get_autocast_dtype(x.device.type))
        y_SM = self.dispatcher(x_SM, routing, self.experts)
        if self.mlp is not None:
            fixed_SM = self.mlp(x_SM)
            y_SM = y_SM + fixed_SM if self.mix is None else self.mix(y_SM, fixed_SM, x_SM)
        return y_SM.view_as(x), routing
