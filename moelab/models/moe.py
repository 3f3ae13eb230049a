"""The mixture-of-experts feed-forward layer, and its residual form (paper sections 3, 4 and 5.4).

    x_SM -> Router -> Routing -> dispatch -> experts -> combine -> y_SM (+ residual mix)

Read from `MoE` at the end. Dispatch brings tokens into expert order, combine brings the experts' outputs back and weighs them.
Two ways to do it, the same results: `local` copies rows by table (`moelab.kernels`), `einsum` is the paper's PyTorch baseline, kept
because experiments compare with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab import kernels
from moelab.config import ModelConfig
from moelab.models.routing import Router, Routing


class MLP(nn.Module):
    """A dense feed-forward M -> 4M -> M with GELU."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, ffn)
        self.down = nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Experts(nn.Module):
    """E feed-forwards of one shape, their weights stacked along the first dim, so that global expert e is row e everywhere."""

    def __init__(self, experts: int, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(experts, hidden, ffn))
        self.up_bias = nn.Parameter(torch.empty(experts, ffn))
        self.down = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.down_bias = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, rows_RM: Tensor, offsets_E1: Tensor) -> Tensor:
        """Rows in expert order, expert e's from `offsets_E1[e]` (int32) to `offsets_E1[e + 1]` -> outputs, same order, [R, M]."""
        weights = (w.to(rows_RM.dtype) for w in (self.up, self.up_bias, self.down, self.down_bias))
        return kernels.expert_ffn(rows_RM, offsets_E1, *weights)


def local(x_SM: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Dispatch, experts and combine by table: every kept token is copied once there and once back, S * K * M each."""
    table = kernels.row_table(routing)
    rows_RM = experts(kernels.dispatch(x_SM, table), table.offsets_E1)
    return kernels.combine(rows_RM, table, routing.weight_SK)


def einsum(x_SM: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """The baseline: one-hot masks [S, E, C] and two products of S * E * C * M multiply-adds, nearly all with zeros (GShard)."""
    E = len(routing.kept_E)
    capacity = max(int(routing.kept_E.max()), 1)
    dispatch_SEC, combine_SEC = masks(routing, capacity, x_SM.dtype)
    rows_ECM = torch.einsum("sec,sm->ecm", dispatch_SEC, x_SM)
    offsets_E1 = torch.arange(E + 1, dtype=torch.int32, device=x_SM.device) * capacity
    rows_ECM = experts(rows_ECM.flatten(0, 1), offsets_E1).view(E, capacity, -1)
    return torch.einsum("sec,ecm->sm", combine_SEC, rows_ECM)


def masks(routing: Routing, capacity: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[S, E, C] twice: 1 where a token has a slot of an expert, and the weight that the slot's result gets. C is at least the busiest expert's load."""
    kept_SK = routing.slot_SK >= 0
    expert_SKE = F.one_hot(routing.expert_SK.long(), len(routing.kept_E)).to(dtype)
    slot_SKC = F.one_hot(routing.slot_SK.long().clamp(min=0), capacity).to(dtype) * kept_SK[:, :, None]
    combine_SEC = torch.einsum("sk,ske,skc->sec", routing.weight_SK.to(dtype), expert_SKE, slot_SKC)
    return torch.einsum("ske,skc->sec", expert_SKE, slot_SKC), combine_SEC


DISPATCH = {"local": local, "einsum": einsum}


class MoE(nn.Module):
    """A routed feed-forward layer; with `config.residual`, a fixed MLP beside it.

    The released code mixes the branches by a learned, per-token softmax over two coefficients, the first on the routed branch;
    the paper's text adds them up. Both are here (`ModelConfig.residual_mix`). A dropped token still gets the fixed MLP.
    """

    def __init__(self, config: ModelConfig, experts: int) -> None:
        super().__init__()
        self.router = Router(config.hidden, experts, config.top_k, config.routing)
        self.experts = Experts(experts, config.hidden, config.ffn)
        self.mlp = MLP(config.hidden, config.ffn) if config.residual else None
        self.mix = nn.Linear(config.hidden, 2) if config.residual and config.residual_mix == "learned" else None
        self.flow = DISPATCH[config.dispatch]  # the engine puts its exchange here

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x [..., M] -> (y [..., M], how it was routed); S is the product of the leading dims."""
        x_SM = x.reshape(-1, x.shape[-1])
        routing = self.router(x_SM)
        if torch.is_autocast_enabled(x.device.type):  # our kernels compute in their input's dtype
            x_SM = x_SM.to(torch.get_autocast_dtype(x.device.type))
        y_SM = self.flow(x_SM, routing, self.experts)
        if self.mlp is not None:
            mix = (x_SM, self.mix.weight.to(x_SM.dtype), self.mix.bias.to(x_SM.dtype)) if self.mix is not None else ()
            y_SM = kernels.residual_mix(y_SM, self.mlp(x_SM), *mix)
        return y_SM.view_as(x), routing
