"""Tokens to the ranks of their experts and back (paper sections 5.2, 5.3): the `LocalDispatch` of `moelab.models` on
many ranks.

    x_SM -> rows by table -> all-to-all -> rows by expert -> experts -> all-to-all back -> weighted sums y_SM

Rows go in chunks, one for each (destination rank, expert there); their sizes are exchanged first, by the same way.
Letters for shapes of counts: N nodes, G places in a node (of those that exchange), C ranks that share tokens, E here
the experts of a rank, W slices. Each rank of the grid (node, place, share) holds E experts; see
`moelab.config.parallel`.

Two hops, of which `flat` makes only the first, with N = 1 and all ranks as one node (Fig 8):

    [C, G, N, E]   outgoing rows, in this order straight from the row table: the first layout transform costs nothing
    -- all-to-all among the G places of the node (near) -->   [G, N, E]   from each place here, for each node
    transposed to [N, G, E]                                   the second layout transform
    -- all-to-all among ranks of equal place (far) -->        [N, G, E]   from each rank, in rank order
    gathered over slices: [W, N * G, E], transposed to [E, W, N * G]: rows by expert

Coordinated (PCC, Fig 9): the C ranks of a share group hold the same tokens; each sends only outgoing[its share], which
is what goes to ranks of its own share, and what comes back is all-gathered among them. Otherwise C = 1 here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moelab import kernels
from moelab.config.parallel import ParallelConfig
from moelab.engine.collectives import Traffic, enter, exchange_rows, gather_rows, gather_shared, scatter_sum
from moelab.engine.mesh import ExpertGroups, Group
from moelab.kernels import RowTable
from moelab.models.dispatch import Dispatch, Dispatched
from moelab.models.routing import Routing


def regroup(counts: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Rows lie chunk by chunk, `counts` [...] rows each, in C order. The index, int64 [rows], that takes them in the C
    order of `counts.transpose(axes)`; within a chunk the order stays."""
    size = counts.ravel()
    start = (np.cumsum(size) - size).reshape(counts.shape).transpose(axes).ravel()
    size = counts.transpose(axes).ravel()
    return np.repeat(start - (np.cumsum(size) - size), size) + np.arange(size.sum())


@dataclass(frozen=True)
class Route:
    """What one rank sends, holds and receives in one exchange, worked out from counts of rows alone.

    Attributes:
        kept: int [N, G, C, E], rows of this rank's tokens by destination and expert; in the order of the experts.
        between: int [G, N, E], what it holds after the near hop: from each place of its node, for each node.
        arrived: int [W, N * G, E], what it and the other slices of its experts hold after the far hop, by source rank.
        share, slice: this rank's place on C and W.
    """

    kept: np.ndarray
    between: np.ndarray
    arrived: np.ndarray
    share: int
    slice: int

    @cached_property
    def outgoing(self) -> np.ndarray:
        """[C, G, N, E]: `kept` in the order in which rows leave."""
        return self.kept.transpose(2, 1, 0, 3)

    @property
    def outgoing_order(self) -> np.ndarray:
        """Brings rows from expert order into `outgoing`'s."""
        return regroup(self.kept, (2, 1, 0, 3))

    @property
    def share_sizes(self) -> list[int]:
        """Rows that each rank of the share group sends and gets back."""
        return self.outgoing.sum((1, 2, 3)).tolist()

    @property
    def mine(self) -> tuple[int, int]:
        """From which to which row, in `outgoing`'s order, this rank sends."""
        start = sum(self.share_sizes[: self.share])
        return start, start + self.share_sizes[self.share]

    @property
    def near(self) -> tuple[list[int], list[int]]:
        """Rows to and from each place of the node."""
        return self.outgoing[self.share].sum((1, 2)).tolist(), self.between.sum((1, 2)).tolist()

    @property
    def far_order(self) -> np.ndarray:
        """Brings rows from [G, N, E] to [N, G, E]."""
        return regroup(self.between, (1, 0, 2))

    @property
    def far(self) -> tuple[list[int], list[int]]:
        """Rows to and from the rank of equal place in each node."""
        nodes = self.between.shape[1]
        arrived = self.arrived[self.slice].reshape(nodes, -1)
        return self.between.sum((0, 2)).tolist(), arrived.sum(1).tolist()

    @property
    def slice_sizes(self) -> list[int]:
        """Rows that arrived at each slice's rank."""
        return self.arrived.sum((1, 2)).tolist()

    @property
    def expert_order(self) -> np.ndarray:
        """Brings rows from [W, N * G, E] to [E, W, N * G]."""
        return regroup(self.arrived, (2, 0, 1))

    @property
    def offsets(self) -> np.ndarray:
        """int32 [E + 1]: each expert's first row among those by expert."""
        return np.concatenate([[0], self.arrived.sum((0, 1)).cumsum()]).astype(np.int32)


class Trip(NamedTuple):
    """The state of `Exchange`: how this call's rows came, so that their results go back the same way.

    Attributes:
        route: how many rows went where.
        table, weight_SK: which row holds which token, and with which weight.
        far_back: brings rows by node back into the near hop's order, and its inverse; None without a far hop.
        expert_back: brings rows by expert back into order of arrival, and its inverse; None where the two orders are
            the same.
    """

    route: Route
    table: RowTable
    weight_SK: Tensor
    far_back: tuple[Tensor, Tensor] | None
    expert_back: tuple[Tensor, Tensor] | None


class Exchange(Dispatch[Trip]):
    """Dispatch and combine of one MoE layer over ranks; `config.exchange` says how tokens travel.

    Every rank of the layer's groups must call it equally often, and run backward through it equally often, whatever its
    tokens: none, none for some expert, all for one. Sizes are uneven and exact, nothing is padded; capacity or not is
    the gate's affair. Row counts must be known to the host: on GPUs each call synchronises once. With expert slicing
    the experts' outputs are partial sums, which combine adds up.

    Args:
        groups: of this layer.
        config: `exchange` is read.
        traffic: counts what is sent, if given.
    """

    def __init__(self, groups: ExpertGroups, config: ParallelConfig, traffic: Traffic | None = None) -> None:
        alone = Group((groups.expert.ranks[groups.expert.index],), 0, None)
        self.groups, self.traffic = groups, traffic
        self._share = groups.share if config.coordinated else alone
        self._near, self._far = groups.spread if config.coordinated else groups.expert, alone
        if config.hierarchical and groups.layout.nodes > 1:
            self._near, self._far = groups.near, groups.far

    def dispatch(self, x_SM: Tensor, routing: Routing) -> Dispatched[Trip]:
        """Bring this rank's tokens to the ranks of their experts.

        Args:
            x_SM: this rank's tokens, S >= 0, S differing from rank to rank; within a share group (coordinated) the same
                tokens.
            routing: of these tokens over all E * X experts; in a share group the same.

        Returns:
            Rows of this rank's experts, which all ranks sent, and offsets int32 [E + 1].
        """
        far, share = self._far, self._share
        route = self._route(routing.kept_E)

        def index(order: np.ndarray) -> Tensor:
            return torch.from_numpy(order).to(x_SM.device, non_blocking=True)

        table = kernels.row_table(routing, rows=int(route.kept.sum()))
        if far.size > 1 or share.size > 1:
            table = _reordered(table, index(route.outgoing_order))
        rows = enter(x_SM, share, "share", self.traffic)
        rows = kernels.dispatch(rows, table if share.size == 1 else _narrowed(table, *route.mine))
        rows = exchange_rows(rows, *route.near, self._near, "dispatch", self.traffic)
        far_back = expert_back = None
        if far.size > 1:
            rows, far_back = _reorder(rows, index(route.far_order))
            rows = exchange_rows(rows, *route.far, far, "dispatch", self.traffic)
        rows = gather_rows(rows, route.slice_sizes, self.groups.slices, "slices", self.traffic)
        if _is_transposed(route.arrived):
            rows, expert_back = _reorder(rows, index(route.expert_order))
        return Dispatched(rows, index(route.offsets), Trip(route, table, routing.weight_SK, far_back, expert_back))

    def combine(self, rows_RM: Tensor, state: Trip) -> Tensor:
        """Bring the outputs of experts back to their tokens' ranks: this rank's [S, M], in the rows' dtype."""
        route, rows = state.route, rows_RM
        if state.expert_back is not None:
            rows = _Reorder.apply(rows, *state.expert_back)
        rows = scatter_sum(rows, route.slice_sizes, self.groups.slices, "slices", self.traffic)
        if state.far_back is not None:
            rows = exchange_rows(rows, *reversed(route.far), self._far, "combine", self.traffic)
            rows = _Reorder.apply(rows, *state.far_back)
        rows = exchange_rows(rows, *reversed(route.near), self._near, "combine", self.traffic)
        rows = gather_shared(rows, route.share_sizes, self._share, "share", self.traffic)
        return kernels.combine(rows, state.table, state.weight_SK)

    def reads_device(self, tokens: int) -> bool:
        return True

    @torch.no_grad()
    def _route(self, kept_E: Tensor) -> Route:
        """Tell the others how many rows will come, by the way the rows will take; int32, always all destinations."""
        near, far, share, slices = self._near, self._far, self._share, self.groups.slices
        shape = (far.size, near.size, share.size, self.groups.layout.experts_per_rank)
        outgoing = kept_E.view(shape)[:, :, share.index].transpose(0, 1)
        between = self._swap(outgoing, near)
        arrived = self._swap(between.transpose(0, 1), far) if far.size > 1 else between
        arrived = arrived.reshape(1, -1, shape[-1])
        if slices.size > 1:
            arrived = self._swap(arrived.expand(slices.size, -1, -1), slices)
        parts = [kept_E.flatten(), between.flatten(), arrived.flatten()]
        numbers = torch.cat(parts).cpu().numpy().astype(np.int64)  # the synchronisation
        kept, between_, arrived_ = np.split(numbers, np.cumsum([len(p) for p in parts[:2]]))
        return Route(
            kept.reshape(shape),
            between_.reshape(between.shape),
            arrived_.reshape(arrived.shape),
            share.index,
            slices.index,
        )

    def _swap(self, counts: Tensor, group: Group) -> Tensor:
        """Even all-to-all along the first dim."""
        counts = counts.contiguous()
        if group.size == 1:
            return counts
        if self.traffic is not None:
            self.traffic.add("counts", group, [counts[0].nbytes] * group.size, backward=False)
        out = torch.empty_like(counts)
        dist.all_to_all_single(out, counts, group=group.handle)
        return out


def _is_transposed(arrived_WXE: np.ndarray) -> bool:
    """Whether rows by source differ from rows by expert: by the shape alone, so that all ranks answer alike."""
    return arrived_WXE.shape[2] > 1 and arrived_WXE.shape[0] * arrived_WXE.shape[1] > 1


def _reorder(rows: Tensor, order: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """rows[order], and the arguments with which `_Reorder` takes them back."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return _Reorder.apply(rows, order, back), (back, order)


def _reordered(table: RowTable, order: Tensor) -> RowTable:
    """The table of the same rows, in another order."""
    place = torch.full((len(order) + 1,), -1, dtype=torch.int32, device=order.device)  # the last: where -1 leads
    place[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return RowTable(place[table.row_SK.long()], table.entry_R[order], table.offsets_E1)


def _narrowed(table: RowTable, start: int, stop: int) -> RowTable:
    """The table of some of the rows."""
    inside = (table.row_SK >= start) & (table.row_SK < stop)
    return RowTable(torch.where(inside, table.row_SK - start, -1), table.entry_R[start:stop], table.offsets_E1)


class _Reorder(torch.autograd.Function):
    """rows[order]; the backward is rows[back], its inverse. Both are saved for backward, so recomputation frees them."""

    @staticmethod
    def forward(ctx, rows, order, back):
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None
