"""Compute the mixture-of-experts feed-forward layer and its residual form (paper sections 3, 4 and 5.4).

    x_SM -> Router -> Routing -> dispatch -> experts -> combine -> y_SM (+ residual mix)

Start reading at `MoE`, at the end. `routing.py` has the router, `dispatch.py` the copying of tokens to their experts
and back, `baseline.py` the paper's PyTorch baseline. In a built layer, the engine replaces the experts by a module with
the same interface, inference the router's gate, and both the dispatch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelab import kernels
from moelab.config import FeedForward, ModelConfig
from moelab.kernels.gating import MAX_EXPERTS
from moelab.models.dispatch import Dispatch, LocalDispatch
from moelab.models.routing import Router, Routing


class MLP(nn.Module):
    """Compute a dense feed-forward M -> F -> M.

    If gated, the rows of `up.weight` [2 F, M] are those of the gate and then those of the other matrix.
    """

    def __init__(self, shape: FeedForward) -> None:
        super().__init__()
        self.activation = shape.activation
        self.up = nn.Linear(shape.hidden, shape.inner, bias=shape.biases)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=shape.biases)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [..., M] of x [..., M]."""
        return self.down(kernels.activate(self.up(x), self.activation))


class Experts(nn.Module):
    """Compute E feed-forwards of one shape, with their weights stacked along the first dim: expert e is row e.

    The parameters are those of `FeedForward.tensors`. If gated, `up` [E, M, 2, F] holds gate and up side by side, so
    that one grouped product computes both.
    """

    up: nn.Parameter
    down: nn.Parameter
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(self, experts: int, shape: FeedForward) -> None:
        super().__init__()
        self.activation = shape.activation
        self.up_bias = self.down_bias = None
        for name, weight in shape.tensors().items():
            setattr(self, name, nn.Parameter(torch.empty(experts, *weight.shape)))

    def forward(self, rows_RM: Tensor, offsets_E1: Tensor) -> Tensor:
        """Return the outputs [R, M] of rows in expert order.

        Expert e's rows are `offsets_E1[e]` to `offsets_E1[e + 1]` (int32).
        """
        w1, b1, w2, b2 = self.weights()
        if self.up.dtype != torch.float32:  # else the kernel converts them
            w1, w2 = w1.to(rows_RM.dtype), w2.to(rows_RM.dtype)
            b1, b2 = (None if b is None else b.to(rows_RM.dtype) for b in (b1, b2))
        return kernels.expert_ffn(rows_RM, offsets_E1, w1, b1, w2, b2, activation=self.activation)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return (w1 [E, M, N], b1 [E, N], w2 [E, F, M], b2 [E, M]) of `expert_ffn`: N is F, with a gate 2 F."""
        up_bias = None if self.up_bias is None else self.up_bias.flatten(1)
        return self.up.flatten(2), up_bias, self.down, self.down_bias


class Mix(nn.Linear):
    """Mix the residual form's branches by a learned two-way softmax per token, the first weight for the routed one."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 2)

    def forward(  # type: ignore[override]  # a linear map only by its parameters
        self, routed_SM: Tensor, fixed_SM: Tensor, x_SM: Tensor
    ) -> Tensor:
        """Return the branches' weighted sum by the layer's input `x_SM`, [S, M]."""
        weight, bias = self.weight.to(x_SM.dtype), self.bias.to(x_SM.dtype)
        return kernels.residual_mix(routed_SM, fixed_SM, x_SM, weight, bias)


class SharedGate(nn.Linear):
    """Add the shared experts' output to the routed one, times a learned sigmoid per token (Qwen2-MoE)."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 1, bias=False)

    def forward(  # type: ignore[override]  # a linear map only by its parameters
        self, routed_SM: Tensor, fixed_SM: Tensor, x_SM: Tensor
    ) -> Tensor:
        """Return the branches' sum, [S, M]; the layer's input `x_SM` gives the coefficient."""
        return routed_SM + fixed_SM * torch.sigmoid(super().forward(x_SM))


class MoE(nn.Module):
    """Compute a routed feed-forward layer, with a fixed MLP beside it if it is residual or has shared experts.

    Residual-MoE (the paper): the released code mixes the two branches by learned coefficients (`Mix`), the paper's text
    adds them; `ModelConfig.residual_mix` selects one. Shared experts (`ExpertConfig`) form one MLP, whose output is
    added, or added times a learned gate (`SharedGate`). A dropped token still gets the fixed MLP's output.

    Attributes:
        own: the dispatch to where this layer's experts are; the engine sets another one if they are on several ranks.
        dispatcher: the dispatch in use, `own` or (inference in baseline mode) `own.baseline()`; results do not depend
            on it.
    """

    def __init__(self, config: ModelConfig, experts: int) -> None:
        if experts > MAX_EXPERTS:
            raise ValueError(f"model: a layer of {experts} experts; the gate takes up to {MAX_EXPERTS}")
        super().__init__()
        self.router = Router(config.hidden, experts, config.top_k, config.routing)
        self.experts = Experts(experts, config.expert_feed_forward)
        self.mlp = None if config.fixed_feed_forward is None else MLP(config.fixed_feed_forward)
        self.mix: Mix | SharedGate | None = None
        if config.residual and config.residual_mix == "learned":
            self.mix = Mix(config.hidden)
        elif config.expert.shared_gate:
            self.mix = SharedGate(config.hidden)
        self.own: Dispatch = LocalDispatch()
        self.dispatcher: Dispatch = self.own

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Return (y [..., M], the routing) of x [..., M]; S is the product of the leading dims."""
        x_SM = x.reshape(-1, x.shape[-1])
        sequences = x.shape[0] if x.dim() == 3 else 1
        routing = self.router(x_SM, sequences)
        if torch.is_autocast_enabled(x.device.type):  # our kernels compute in their input's dtype
            x_SM = x_SM.to(torch.get_autocast_dtype(x.device.type))
        y_SM = self.dispatcher(x_SM, routing, self.experts)
        if self.mlp is not None:
            fixed_SM = self.mlp(x_SM)
            y_SM = y_SM + fixed_SM if self.mix is None else self.mix(y_SM, fixed_SM, x_SM)
        return y_SM.view(x.shape), routing
