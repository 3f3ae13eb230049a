"""Send tokens to the ranks of their experts and back (paper sections 5.2, 5.3).

`Exchange` does on many ranks what the `LocalDispatch` of `moelab.models` does on one:

    x_SM -> rows by table -> all-to-all -> rows by expert -> experts -> all-to-all back -> weighted sums y_SM

Rows travel in chunks, one for each pair of a destination rank and an expert there. The chunks' sizes are exchanged
first, along the same path. Shapes of counts name the axes of the layer's grid (`moelab.config.parallel`): node, local,
tensor, slice; and "own", the experts of one rank. Here `local` counts the ranks of a node that exchange rows: unless
the exchange is coordinated it includes the axis `tensor`, which then has size 1.

The exchange makes two hops; a `flat` one makes only the first, with all ranks as one node (Fig 8):

    [tensor, local, node, own]            outgoing rows, in this order straight from the row table: the first layout
                                          transform costs nothing
    -- all-to-all inside the node -->     [local, node, own]   from each rank of this node, for each node
    transposed to [node, local, own]                           the second layout transform
    -- all-to-all between nodes -->       [node, local, own]   from each rank, in rank order
    gathered over slices: [slice, node * local, own], transposed to [own, slice, node * local]: rows by expert

Coordinated (PCC, Fig 9): the ranks along `tensor` hold the same tokens; each sends only outgoing[its tensor
coordinate], which is what goes to ranks of its own coordinate, and what comes back is all-gathered among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moelab import kernels
from moelab.config.parallel import ParallelConfig
from moelab.engine.collectives import all_to_all
from moelab.engine.differentiable import all_gather_rows, all_to_all_rows, copy_to_group, reduce_scatter_rows
from moelab.engine.groups import Group
from moelab.engine.mesh import ExpertGroups
from moelab.kernels import RowTable
from moelab.models.dispatch import Dispatch, Dispatched
from moelab.models.routing import Routing


def regroup(counts: Tensor, axes: tuple[int, ...], rows: int) -> Tensor:
    """Return the index, int64 [rows], that brings rows into the C order of `counts.permute(axes)`.

    Before, the rows lie chunk by chunk in the C order of `counts`, whose elements are the chunks' numbers of rows. The
    order within a chunk stays. Nothing is read from the device: `rows` is the sum of `counts`.
    """
    size = counts.flatten()
    start = (size.cumsum(0) - size).view(counts.shape).permute(axes).flatten()
    size = counts.permute(axes).flatten()
    shift = start - (size.cumsum(0) - size)
    return torch.repeat_interleave(shift, size, output_size=rows) + torch.arange(rows, device=counts.device)


class Counts(NamedTuple):
    """The numbers of rows of a `Route`, int32 on the device."""

    kept: Tensor
    between: Tensor
    arrived: Tensor


@dataclass(frozen=True)
class Route:
    """The rows that one rank sends, holds and receives in one exchange, computed from counts of rows alone.

    Attributes:
        kept: int [node, local, tensor, own], rows of this rank's tokens by destination and expert; in the order of the
            experts.
        between: int [local, node, own], rows that this rank holds after the hop inside the node: from each rank of its
            node, for each node.
        arrived: int [slice, node * local, own], rows that this rank and the other slices of its experts hold after the
            hop between nodes, by source rank.
        tensor, slice: this rank's coordinates.
        device: the same numbers on the device, from which the indices are computed there.
    """

    kept: np.ndarray
    between: np.ndarray
    arrived: np.ndarray
    tensor: int
    slice: int
    device: Counts

    @cached_property
    def outgoing(self) -> np.ndarray:
        """`kept` in the order in which rows leave: int [tensor, local, node, own]."""
        return self.kept.transpose(2, 1, 0, 3)

    @property
    def outgoing_order(self) -> Tensor:
        """The index that brings rows from expert order into `outgoing`'s."""
        return regroup(self.device.kept, (2, 1, 0, 3), int(self.kept.sum()))

    @property
    def tensor_sizes(self) -> list[int]:
        """Rows that each of the ranks with the same tokens sends and gets back."""
        return self.outgoing.sum((1, 2, 3)).tolist()

    @property
    def mine(self) -> tuple[int, int]:
        """The first row, and the one after the last, that this rank sends, in the order of `outgoing`."""
        start = sum(self.tensor_sizes[: self.tensor])
        return start, start + self.tensor_sizes[self.tensor]

    @property
    def intra_node(self) -> tuple[list[int], list[int]]:
        """Rows to and from each rank of the node."""
        return self.outgoing[self.tensor].sum((1, 2)).tolist(), self.between.sum((1, 2)).tolist()

    @property
    def inter_node_order(self) -> Tensor:
        """The index that brings rows from [local, node, own] to [node, local, own]."""
        return regroup(self.device.between, (1, 0, 2), int(self.between.sum()))

    @property
    def inter_node(self) -> tuple[list[int], list[int]]:
        """Rows to and from the rank with this one's local coordinate in each node."""
        nodes = self.between.shape[1]
        arrived = self.arrived[self.slice].reshape(nodes, -1)
        return self.between.sum((0, 2)).tolist(), arrived.sum(1).tolist()

    @property
    def slice_sizes(self) -> list[int]:
        """Rows that arrived at each slice's rank."""
        return self.arrived.sum((1, 2)).tolist()

    @property
    def expert_order(self) -> Tensor:
        """The index that brings rows from [slice, node * local, own] to [own, slice, node * local]."""
        return regroup(self.device.arrived, (2, 0, 1), int(self.arrived.sum()))

    @property
    def offsets(self) -> Tensor:
        """int32 [own + 1]: each expert's first row among those by expert."""
        return F.pad(self.device.arrived.sum((0, 1)).cumsum(0), (1, 0)).int()


class DispatchState(NamedTuple):
    """The state between dispatch and combine: how this call's rows came, so that their results take the same way back.

    Attributes:
        route: how many rows went where.
        table, weight_SK: which row holds which token, and with which weight.
        inter_node_back: the index that brings rows by node back into the order of the hop inside the node, and its
            inverse; None without a hop between nodes.
        expert_back: the index that brings rows by expert back into the order of arrival, and its inverse; None where
            the two orders are the same.
    """

    route: Route
    table: RowTable
    weight_SK: Tensor
    inter_node_back: tuple[Tensor, Tensor] | None
    expert_back: tuple[Tensor, Tensor] | None


class Exchange(Dispatch[DispatchState]):
    """Dispatches and combines the tokens of one MoE layer over ranks; `config.exchange` says how tokens travel.

    Every rank of the layer's groups must call it equally often, and run backward through it equally often, whatever its
    tokens: none, none for some expert, all for one. Numbers of rows are exact and uneven, without padding; the gate
    decides whether a capacity limits them. The host must know the row counts: on GPUs each call synchronises once. With
    expert slicing the experts' outputs are partial sums, which combine adds up.

    Args:
        groups: the groups of this layer.
        config: the layout; only `exchange` is read.
    """

    def __init__(self, groups: ExpertGroups, config: ParallelConfig) -> None:
        alone = Group.alone(groups.expert.rank)
        self.groups = groups
        self._tensor = groups.tensor if config.coordinated else alone
        self._intra_node, self._inter_node = groups.expert_coordinated if config.coordinated else groups.expert, alone
        if config.hierarchical and groups.layout.nodes > 1:
            self._intra_node, self._inter_node = groups.intra_node, groups.inter_node

    def dispatch(self, x_SM: Tensor, routing: Routing) -> Dispatched[DispatchState]:
        """Bring this rank's tokens to the ranks of their experts.

        Args:
            x_SM: this rank's tokens, S >= 0, S differing from rank to rank; along `tensor` (coordinated) the same
                tokens.
            routing: of these tokens over all experts of the layer; along `tensor` the same.

        Returns:
            Rows of this rank's experts, which all ranks sent, and offsets int32 [own + 1].
        """
        inter_node, tensor = self._inter_node, self._tensor
        route = self._route(routing)
        table = kernels.row_table(routing, rows=int(route.kept.sum()))
        if inter_node.size > 1 or tensor.size > 1:
            table = _reordered(table, route.outgoing_order)
        rows = copy_to_group(x_SM, tensor, "tensor")
        rows = kernels.dispatch(rows, table if tensor.size == 1 else _narrowed(table, *route.mine))
        rows = all_to_all_rows(rows, *route.intra_node, self._intra_node, "dispatch")
        inter_node_back = expert_back = None
        if inter_node.size > 1:
            rows, inter_node_back = _reorder(rows, route.inter_node_order)
            rows = all_to_all_rows(rows, *route.inter_node, inter_node, "dispatch")
        rows = all_gather_rows(rows, route.slice_sizes, self.groups.slices, "slices")
        if _is_transposed(route.arrived):
            rows, expert_back = _reorder(rows, route.expert_order)
        return Dispatched(
            rows, route.offsets, DispatchState(route, table, routing.weight_SK, inter_node_back, expert_back)
        )

    def combine(self, rows_RM: Tensor, state: DispatchState) -> Tensor:
        """Return the experts' outputs, weighted and summed, on their tokens' ranks: [S, M], in the rows' dtype."""
        route, rows = state.route, rows_RM
        if state.expert_back is not None:
            rows = _Reorder.apply(rows, *state.expert_back)
        rows = reduce_scatter_rows(rows, route.slice_sizes, self.groups.slices, "slices")
        if state.inter_node_back is not None:
            rows = all_to_all_rows(rows, *route.inter_node[::-1], self._inter_node, "combine")
            rows = _Reorder.apply(rows, *state.inter_node_back)
        rows = all_to_all_rows(rows, *route.intra_node[::-1], self._intra_node, "combine")
        rows = all_gather_rows(rows, route.tensor_sizes, self._tensor, "tensor", sum_gradients=False)
        return kernels.combine(rows, state.table, state.weight_SK)

    def baseline(self, static_tokens: int = 0) -> Dispatch:
        """Return the exchange of padded slots, which are never static."""
        from moelab.engine.padded import PaddedExchange

        return PaddedExchange(self.groups)

    def reads_device(self, tokens: int) -> bool:
        """Return whether a call waits for values from the device; always, because the host needs the row counts."""
        return True

    @torch.no_grad()
    def _route(self, routing: Routing) -> Route:
        """Exchange the numbers of rows along the path of the rows; int32, always for all destinations.

        Raises:
            RuntimeError: ranks along `tensor` have routed the same tokens differently; they would wait for rows that
                are never sent.
        """
        kept_E = routing.kept_E
        intra_node, inter_node, tensor, slices = self._intra_node, self._inter_node, self._tensor, self.groups.slices
        shape = (inter_node.size, intra_node.size, tensor.size, self.groups.layout.experts_per_rank)
        kept = kept_E.view(shape)
        outgoing = kept[:, :, tensor.index].transpose(0, 1)
        between = self._swap(outgoing, intra_node)
        arrived = self._swap(between.transpose(0, 1), inter_node) if inter_node.size > 1 else between
        arrived = arrived.reshape(1, -1, shape[-1])
        if slices.size > 1:
            arrived = self._swap(arrived.expand(slices.size, -1, -1), slices)
        parts = [part.flatten() for part in (kept, between, arrived)]
        if tensor.size > 1:
            parts.append(all_to_all(_fingerprint(routing).expand(tensor.size), tensor, "check"))
        numbers = torch.cat(parts).cpu().numpy().astype(np.int64)  # the synchronisation
        *host, prints = np.split(numbers, np.cumsum([len(p) for p in parts[:3]]))
        if len(set(prints.tolist())) > 1:
            raise RuntimeError(
                f"exchange: the {tensor.size} ranks with the same tokens have routed them differently (one of them "
                "computes other values); continue from the last checkpoint"
            )
        shapes = (shape, between.shape, arrived.shape)
        there, across, here = (part.reshape(sizes) for part, sizes in zip(host, shapes, strict=True))
        return Route(there, across, here, tensor.index, slices.index, Counts(kept, between, arrived))

    def _swap(self, counts: Tensor, group: Group) -> Tensor:
        """Exchange equal parts along dim 0."""
        return counts if group.size == 1 else all_to_all(counts, group, "counts")


def _fingerprint(routing: Routing) -> Tensor:
    """Return a hash of every token's experts and slots, int32 [1]; those of different routings hardly ever agree."""
    place_SK = routing.expert_SK.long() * 1_000_003 + routing.slot_SK
    weight = torch.arange(1, place_SK.numel() + 1, device=place_SK.device) * 2_654_435_761
    return (((place_SK.flatten() * weight).sum() >> 16) & 0x7FFFFFFF).int()[None]


def _is_transposed(arrived: np.ndarray) -> bool:
    """Return whether rows by source differ from rows by expert; the shape alone decides, so all ranks agree."""
    return arrived.shape[2] > 1 and arrived.shape[0] * arrived.shape[1] > 1


def _reorder(rows: Tensor, order: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return rows[order], and the arguments with which `_Reorder` brings them back into their former order."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return _Reorder.apply(rows, order, back), (back, order)


def _reordered(table: RowTable, order: Tensor) -> RowTable:
    """Return the table of the same rows, in another order."""
    place = torch.full((len(order) + 1,), -1, dtype=torch.int32, device=order.device)  # index -1 finds -1
    place[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return RowTable(place[table.row_SK.long()], table.entry_R[order], table.offsets_E1)


def _narrowed(table: RowTable, start: int, stop: int) -> RowTable:
    """Return the table of some of the rows."""
    inside = (table.row_SK >= start) & (table.row_SK < stop)
    return RowTable(torch.where(inside, table.row_SK - start, -1), table.entry_R[start:stop], table.offsets_E1)


class _Reorder(torch.autograd.Function):
    """Computes rows[order], and rows[back] in the backward pass; both are saved, so that recomputation frees them."""

    @staticmethod
    def forward(ctx, rows, order, back):
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None
