"""The paper's baseline among ranks (section 5.4, GShard): padded slots, whoever uses them, in one flat all-to-all there and one back.

    x_SM -> one-hot masks -> [E, C, M] -> all-to-all -> each expert's slots of all ranks -> experts -> all-to-all back -> masks -> y_SM

Every rank sends every expert C slots, full or empty, and with tensor slicing each of the ranks that hold the same tokens sends all of them. C is the
busiest expert's load on any rank that shares the experts, which is what DeepSpeed's drop-free gate agrees on (sharded_moe.py).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moelab.engine.collectives import Traffic, exchange_rows, gather_rows, scatter_sum
from moelab.engine.mesh import ExpertGroups
from moelab.models.moe import masks
from moelab.models.routing import Routing


class PaddedExchange:
    """Stands in for `moelab.engine.exchange.Exchange` in baseline mode: the same results, by masks and padding, flat whatever the layout says.

    Args:
        groups: of this layer.
        traffic: counts what is sent, if given; the agreement on C, one number, is left out.
    """

    def __init__(self, groups: ExpertGroups, traffic: Traffic | None = None) -> None:
        self.groups, self.traffic = groups, traffic

    def __call__(self, x_SM: Tensor, routing: Routing, experts: nn.Module) -> Tensor:
        """As `Exchange.__call__`."""
        expert, slices = self.groups.expert, self.groups.slices
        X, W, own, M = expert.size, slices.size, self.groups.layout.experts_per_rank, x_SM.shape[1]
        C = self._capacity(routing.kept_E)
        dispatch_SEC, combine_SEC = masks(routing, C, x_SM.dtype)
        rows = torch.einsum("sec,sm->ecm", dispatch_SEC, x_SM).flatten(0, 1)  # by expert, so by rank
        even = [own * C] * X
        rows = exchange_rows(rows, even, even, expert, "dispatch", self.traffic)
        arrived = [len(rows)] * W
        rows = gather_rows(rows, arrived, slices, "slices", self.traffic)
        by_expert = rows.view(W * X, own, C, M).transpose(0, 1).reshape(-1, M)
        offsets_E1 = torch.arange(own + 1, dtype=torch.int32, device=x_SM.device) * (W * X * C)
        rows = experts(by_expert, offsets_E1).view(own, W * X, C, M).transpose(0, 1).reshape(-1, M)
        rows = scatter_sum(rows, arrived, slices, "slices", self.traffic)
        rows = exchange_rows(rows, even, even, expert, "combine", self.traffic)
        return torch.einsum("sec,ecm->sm", combine_SEC, rows.view(X * own, C, M))

    def _capacity(self, kept_E: Tensor) -> int:
        """C: the busiest expert's load on any of the ranks, at least 1."""
        most = kept_E.max().clamp(min=1)
        for group in (self.groups.expert, self.groups.slices):
            if group.size > 1:
                dist.all_reduce(most, dist.ReduceOp.MAX, group=group.handle)
        return int(most)
