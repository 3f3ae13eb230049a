"""The paper's baseline on many ranks (section 5.4, GShard): padded slots and two flat all-to-alls.

    x_SM -> one-hot masks -> [E, C, M] -> all-to-all -> each expert's slots of all ranks -> experts -> all-to-all back
    -> masks -> y_SM

Every rank sends every expert C slots, full or empty, and with tensor slicing each of the ranks that hold the same
tokens sends all of them. C is the busiest expert's load on any rank of the expert-parallel group, which is what
DeepSpeed's drop-free gate agrees on (sharded_moe.py); with expert slicing, on any rank of all slices' groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from moelab.engine.collectives import all_reduce
from moelab.engine.differentiable import all_gather_rows, all_to_all_rows, reduce_scatter_rows
from moelab.engine.mesh import ExpertGroups
from moelab.models.baseline import einsum_combine, einsum_dispatch, one_hot_masks
from moelab.models.dispatch import Dispatch, Dispatched
from moelab.models.routing import Routing


class PaddedExchange(Dispatch[Tensor]):
    """Stands in for `moelab.engine.exchange.Exchange` in baseline mode.

    It returns the same results, computed by masks and padding; its all-to-alls are flat under any layout.

    Args:
        groups: the groups of this layer.
    """

    def __init__(self, groups: ExpertGroups) -> None:
        self.groups = groups

    def dispatch(self, x_SM: Tensor, routing: Routing) -> Dispatched[Tensor]:
        """Dispatch as `Exchange.dispatch` does; the state is the combine mask."""
        expert, slices, own = self.groups.expert, self.groups.slices, self.groups.layout.experts_per_rank
        C = self._capacity(routing.kept_E)
        dispatch_SEC, combine_SEC = one_hot_masks(routing, C, x_SM.dtype)
        rows = einsum_dispatch(x_SM, dispatch_SEC).flatten(0, 1)  # ordered by expert and therefore by rank
        even = [own * C] * expert.size
        rows = all_to_all_rows(rows, even, even, expert, "dispatch")
        rows = all_gather_rows(rows, [len(rows)] * slices.size, slices, "slices")
        sources = slices.size * expert.size
        rows = rows.view(sources, own, C, -1).transpose(0, 1).reshape(own * sources * C, -1)
        offsets_E1 = torch.arange(own + 1, dtype=torch.int32, device=x_SM.device) * (sources * C)
        return Dispatched(rows, offsets_E1, combine_SEC)

    def combine(self, rows_RM: Tensor, state: Tensor) -> Tensor:
        """Combine as `Exchange.combine` does."""
        expert, slices, own = self.groups.expert, self.groups.slices, self.groups.layout.experts_per_rank
        _, E, C = state.shape
        sources = slices.size * expert.size
        rows = rows_RM.view(own, sources, C, -1).transpose(0, 1).reshape(len(rows_RM), -1)
        rows = reduce_scatter_rows(rows, [E * C] * slices.size, slices, "slices")
        even = [own * C] * expert.size
        rows = all_to_all_rows(rows, even, even, expert, "combine")
        return einsum_combine(rows.view(E, C, -1), state)

    def reads_device(self, tokens: int) -> bool:
        """Return whether a call waits for values from the device; always, because the host needs the capacity."""
        return True

    def _capacity(self, kept_E: Tensor) -> int:
        """Return C, the busiest expert's load on any of the ranks, at least 1."""
        most = kept_E.max().clamp(min=1)
        for group in (self.groups.expert, self.groups.slices):
            all_reduce(most, group, "capacity", op=ReduceOp.MAX)
        return int(most)
