"""Differentiable collectives on rows of uneven number, and the count of what they send.

Each function returns its input when the group is one rank. Otherwise every rank of the group must call it, in forward and in
backward, with however few rows: a rank without rows still takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from moelab.engine.mesh import Group

KINDS = ("counts", "dispatch", "slices", "combine", "share")
"""What travels in an exchange, see `moelab.engine.exchange`: numbers of rows; rows to their experts; between the slices of an expert;
back; among the ranks that hold the same tokens."""


@dataclass
class Sent:
    """What one rank sent: messages and bytes, inside its node and to others."""

    near_messages: int = 0
    near_bytes: int = 0
    far_messages: int = 0
    far_bytes: int = 0


@dataclass
class Traffic:
    """Counts what this rank sends.

    A message is one destination other than this rank that is sent something: in an uneven all-to-all, those with at least one
    row; in an all-gather each of the others; in an all-reduce over n ranks, counted as the ring that sends pieces of 1 / n, 2 (n - 1) messages
    to the next rank.

    Attributes:
        ranks_per_node: G; ranks a and b share a node if a // G == b // G.
        sent: (kind, "forward" or "backward") -> counts; kinds as in `KINDS`.
    """

    ranks_per_node: int
    sent: dict[tuple[str, str], Sent] = field(default_factory=dict)

    def add(self, kind: str, group: Group, bytes_: Sequence[int], backward: bool, messages: int = 1) -> None:
        """One collective: bytes to each rank of the group (its own part is ignored), each in so many messages."""
        entry = self.sent.setdefault((kind, "backward" if backward else "forward"), Sent())
        home = group.ranks[group.index] // self.ranks_per_node
        for index, (rank, size) in enumerate(zip(group.ranks, bytes_, strict=True)):
            if index == group.index or not size:
                continue
            if rank // self.ranks_per_node == home:
                entry.near_messages += messages
                entry.near_bytes += size
            else:
                entry.far_messages += messages
                entry.far_bytes += size

    def total(self, *kinds: str) -> Sent:
        """The sum over directions, of some kinds or of all."""
        chosen = [s for (kind, _), s in self.sent.items() if not kinds or kind in kinds]
        return Sent(*(sum(getattr(s, name) for s in chosen) for name in Sent.__dataclass_fields__))


def exchange_rows(
    rows_RM: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: Group,
    kind: str,
    traffic: Traffic | None = None,
) -> Tensor:
    """All-to-all: `send[i]` rows, in order, to rank i of the group, `receive[i]` from it, in order of the ranks."""
    if group.size == 1:
        return rows_RM
    return _Exchange.apply(rows_RM, tuple(send), tuple(receive), group, kind, traffic)


def gather_rows(
    rows_RM: Tensor, sizes: Sequence[int], group: Group, kind: str, traffic: Traffic | None = None
) -> Tensor:
    """All ranks' rows, `sizes[i]` of them rank i's, on every rank, which uses them in its own way: gradients are summed."""
    return rows_RM if group.size == 1 else _Gather.apply(rows_RM, tuple(sizes), group, kind, traffic, True)


def gather_shared(
    rows_RM: Tensor, sizes: Sequence[int], group: Group, kind: str, traffic: Traffic | None = None
) -> Tensor:
    """As `gather_rows`, where all ranks go on to do the same with the rows: their gradients are equal, and each keeps its part."""
    return rows_RM if group.size == 1 else _Gather.apply(rows_RM, tuple(sizes), group, kind, traffic, False)


def scatter_sum(
    rows_RM: Tensor, sizes: Sequence[int], group: Group, kind: str, traffic: Traffic | None = None
) -> Tensor:
    """Every rank holds all rows as partial sums; each gets the sum of its `sizes[i]` (a reduce-scatter), added up in rank order in
    float32 at least."""
    return rows_RM if group.size == 1 else _ScatterSum.apply(rows_RM, tuple(sizes), group, kind, traffic)


def enter(x: Tensor, group: Group, kind: str = "", traffic: Traffic | None = None) -> Tensor:
    """Where a tensor that all ranks of `group` hold goes into their own parts of the work: the same tensor, gradients are summed."""
    return x if group.size == 1 else _Enter.apply(x, group, kind, traffic)


# gloo has no uneven all-gather or reduce-scatter; the direct form over an all-to-all sends the same bytes on every backend and adds in
# a fixed order.


def _all_to_all(rows: Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: Group) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(receive), list(send), group=group.handle)
    return out


def _gather(rows: Tensor, sizes: tuple[int, ...], group: Group) -> Tensor:
    return _all_to_all(torch.cat([rows] * group.size), (len(rows),) * group.size, sizes, group)


def _scatter_sum(rows: Tensor, sizes: tuple[int, ...], group: Group) -> Tensor:
    mine = sizes[group.index]
    parts = _all_to_all(rows, sizes, (mine,) * group.size, group).view(group.size, mine, *rows.shape[1:])
    wide = torch.promote_types(rows.dtype, torch.float32)
    return parts.sum(0, dtype=wide).to(rows.dtype)


def _note(traffic: Traffic | None, kind: str, group: Group, rows: Tensor, send: Sequence[int], backward: bool) -> None:
    if traffic is not None:
        size = rows.element_size() * rows.shape[1:].numel()
        traffic.add(kind, group, [n * size for n in send], backward)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, send, receive, group, kind, traffic):
        ctx.how = send, receive, group, kind, traffic
        _note(traffic, kind, group, rows, send, False)
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx, grad):
        send, receive, group, kind, traffic = ctx.how
        _note(traffic, kind, group, grad, receive, True)
        return _all_to_all(grad, receive, send, group), None, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sizes, group, kind, traffic, add_up):
        ctx.how = sizes, group, kind, traffic, add_up
        _note(traffic, kind, group, rows, (len(rows),) * group.size, False)
        return _gather(rows, sizes, group)

    @staticmethod
    def backward(ctx, grad):
        sizes, group, kind, traffic, add_up = ctx.how
        if not add_up:
            return grad.split(sizes)[group.index].contiguous(), None, None, None, None, None
        _note(traffic, kind, group, grad, sizes, True)
        return _scatter_sum(grad, sizes, group), None, None, None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sizes, group, kind, traffic):
        ctx.how = sizes, group, kind, traffic
        _note(traffic, kind, group, rows, sizes, False)
        return _scatter_sum(rows, sizes, group)

    @staticmethod
    def backward(ctx, grad):
        sizes, group, kind, traffic = ctx.how
        _note(traffic, kind, group, grad, (len(grad),) * group.size, True)
        return _gather(grad, sizes, group), None, None, None, None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, kind, traffic):
        ctx.how = group, kind, traffic
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        group, kind, traffic = ctx.how
        if traffic is not None:
            steps = 2 * (group.size - 1)
            sizes = [0] * group.size
            sizes[(group.index + 1) % group.size] = steps * grad.nbytes // group.size
            traffic.add(kind, group, sizes, True, messages=steps)
        grad = grad.clone(memory_format=torch.contiguous_format)
        if grad.numel():  # as many on every rank of the group: they hold the same tensor
            dist.all_reduce(grad, group=group.handle)
        return grad, None, None, None
