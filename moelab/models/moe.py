"""The mixture-of-experts feed-forward layer, and its residual form (paper sections 3 and 4).

    x_SM -> Router -> Routing -> dispatch -> experts -> combine -> y_SM (+ residual mix)

Read from `MoE` at the end. Dispatch brings tokens into expert order, combine brings the experts' outputs back and weighs them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def forward(self, rows_RM: Tensor, count_E: Tensor) -> Tensor:
        """Rows grouped by expert, `count_E` (int64) of them each -> the experts' outputs in the same order, [R, M]."""
        outputs = []
        # unbind once: indexing the stacked parameter per expert would make its gradient a sum of E full-size tensors.
        weights = zip(self.up.unbind(), self.up_bias.unbind(), self.down.unbind(), self.down_bias.unbind(), strict=True)
        for rows, (up, up_bias, down, down_bias) in zip(rows_RM.split(count_E.tolist()), weights, strict=True):
            outputs.append(F.linear(F.gelu(F.linear(rows, up.t(), up_bias), approximate="tanh"), down.t(), down_bias))
        return torch.cat(outputs)


def dispatch(x_SM: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Tokens in expert order, without padding.

    Returns:
        rows_RM: the R kept choices' tokens, expert by expert, slot by slot.
        row_SK: int64, the row of each choice, R where it was dropped.
    """
    S, K = routing.expert_SK.shape
    start_E = routing.kept_E.cumsum(0) - routing.kept_E
    kept_SK = routing.slot_SK >= 0
    total = int(routing.kept_E.sum())
    row_SK = torch.where(kept_SK, start_E[routing.expert_SK] + routing.slot_SK, total)
    token_R = torch.empty(total + 1, dtype=torch.int64, device=x_SM.device)
    token_R[row_SK] = torch.arange(S, device=x_SM.device)[:, None].expand(S, K)
    return x_SM.index_select(0, token_R[:total]), row_SK


def combine(rows_RM: Tensor, row_SK: Tensor, weight_SK: Tensor) -> Tensor:
    """Each token's weighted sum of its experts' outputs, [S, M]; zero for a token all of whose choices were dropped."""
    rows = torch.cat([rows_RM, rows_RM.new_zeros(1, rows_RM.shape[1])])
    weight_SK = weight_SK.to(rows.dtype)
    y_SM = rows.index_select(0, row_SK[:, 0]) * weight_SK[:, :1]
    for k in range(1, row_SK.shape[1]):
        y_SM = y_SM + rows.index_select(0, row_SK[:, k]) * weight_SK[:, k : k + 1]
    return y_SM


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

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x [..., M] -> (y [..., M], how it was routed); S is the product of the leading dims."""
        x_SM = x.reshape(-1, x.shape[-1])
        routing = self.router(x_SM)
        rows_RM, row_SK = dispatch(x_SM, routing)
        y_SM = combine(self.experts(rows_RM, routing.kept_E), row_SK, routing.weight_SK)
        if self.mlp is not None:
            fixed_SM = self.mlp(x_SM)
            if self.mix is not None:
                coefficient_S2 = F.softmax(self.mix(x_SM).float(), dim=-1).to(y_SM.dtype)
                y_SM = coefficient_S2[:, :1] * y_SM + coefficient_S2[:, 1:] * fixed_SM
            else:
                y_SM = y_SM + fixed_SM
        return y_SM.view_as(x), routing
