"""Collectives that autograd goes through: exchanges of uneven numbers of rows, and Megatron's operators f and g.

Each function returns its input when the group is one rank. Otherwise every rank of the group must call it, in forward
and in backward, also a rank that has no rows.

gloo has no uneven all-gather or reduce-scatter. They are built here from an all-to-all, which sends the same bytes on
every backend and adds in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moelab.engine.collectives import all_reduce, all_to_all
from moelab.engine.groups import Group


def all_to_all_rows(rows_RM: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, kind: str) -> Tensor:
    """Send `send[i]` rows, in order, to rank i of the group; return `receive[i]` rows from each, in rank order."""
    return rows_RM if group.size == 1 else _AllToAll.apply(rows_RM, tuple(send), tuple(receive), group, kind)


def all_gather_rows(
    rows_RM: Tensor, sizes: Sequence[int], group: Group, kind: str, *, sum_gradients: bool = True
) -> Tensor:
    """Return all ranks' rows on every rank; `sizes[i]` of them are rank i's.

    Args:
        sum_gradients: whether the backward pass adds up all ranks' gradients (a reduce-scatter). Pass False where all
            ranks compute the same from the rows: their gradients are equal, and each rank keeps those of its own rows.
    """
    return rows_RM if group.size == 1 else _AllGather.apply(rows_RM, tuple(sizes), group, kind, sum_gradients)


def reduce_scatter_rows(rows_RM: Tensor, sizes: Sequence[int], group: Group, kind: str) -> Tensor:
    """Return this rank's `sizes[i]` rows of the sum of all ranks' rows, added up in rank order, in float32 at least."""
    return rows_RM if group.size == 1 else _ReduceScatter.apply(rows_RM, tuple(sizes), group, kind)


def copy_to_group(x: Tensor, group: Group, kind: str = "activations") -> Tensor:
    """Return `x`, equal on all ranks of the group; the backward pass all-reduces its gradient (Megatron's f)."""
    return x if group.size == 1 else _CopyToGroup.apply(x, group, kind)


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """Return the all-reduced sum of the ranks' partial results; the backward pass is the identity (Megatron's g)."""
    return x if group.size == 1 else _ReduceFromGroup.apply(x, group)


def mean_over_group(x: Tensor, group: Group) -> Tensor:
    """Return the mean of the ranks' tensors on every rank; the backward pass averages the ranks' gradients of it."""
    return copy_to_group(reduce_from_group(x, group), group) / group.size


def _gather(rows: Tensor, sizes: Sequence[int], group: Group, kind: str, backward: bool) -> Tensor:
    send = [len(rows)] * group.size
    return all_to_all(torch.cat([rows] * group.size), group, kind, send=send, receive=sizes, backward=backward)


def _scatter(rows: Tensor, sizes: Sequence[int], group: Group, kind: str, backward: bool) -> Tensor:
    own = sizes[group.index]
    parts = all_to_all(rows, group, kind, send=sizes, receive=[own] * group.size, backward=backward)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return parts.view(group.size, own, *rows.shape[1:]).sum(0, dtype=wide).to(rows.dtype)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, send, receive, group, kind):
        ctx.arguments = send, receive, group, kind
        return all_to_all(rows, group, kind, send=send, receive=receive)

    @staticmethod
    def backward(ctx, grad):
        send, receive, group, kind = ctx.arguments
        return all_to_all(grad, group, kind, send=receive, receive=send, backward=True), None, None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sizes, group, kind, sum_gradients):
        ctx.arguments = sizes, group, kind, sum_gradients
        return _gather(rows, sizes, group, kind, False)

    @staticmethod
    def backward(ctx, grad):
        sizes, group, kind, sum_gradients = ctx.arguments
        if sum_gradients:
            grad = _scatter(grad, sizes, group, kind, True)
        else:
            grad = grad.split(sizes)[group.index].contiguous()
        return grad, None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sizes, group, kind):
        ctx.arguments = sizes, group, kind
        return _scatter(rows, sizes, group, kind, False)

    @staticmethod
    def backward(ctx, grad):
        sizes, group, kind = ctx.arguments
        return _gather(grad, sizes, group, kind, True), None, None, None


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, kind):
        ctx.arguments = group, kind
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        if grad.numel():  # as many on every rank of the group: they hold the same tensor
            all_reduce(grad, *ctx.arguments, backward=True)
        return grad, None, None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        total = x.contiguous().clone()
        all_reduce(total, group, "activations")
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None
