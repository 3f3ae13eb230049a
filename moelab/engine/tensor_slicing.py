"""Tensor slicing: the linear layers of one rank in a tensor group (paper section 5.2; Megatron's column and row parallel layers).

A column-sliced layer computes some of the outputs, the row-sliced one after it takes them as some of its inputs, and one
all-reduce adds up. Parameters keep their names; their local shapes are 1 / L of the whole in one dim.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moelab.engine.collectives import enter
from moelab.engine.mesh import Group


class _Leave(torch.autograd.Function):
    """Adds up the ranks' partial results forward; identity backward, as the sum's gradient is the same on every rank."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        y = x.contiguous().clone()
        dist.all_reduce(y, group=group.handle)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def leave(x: Tensor, group: Group) -> Tensor:
    """Where the slices' partial results become one tensor that all ranks of `group` hold. Same shape."""
    return x if group.size == 1 else _Leave.apply(x, group)


class ColumnLinear(nn.Linear):
    """1 / L of a linear layer's outputs."""

    def __init__(self, in_features: int, out_features: int, group: Group) -> None:
        super().__init__(in_features, out_features // group.size)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(enter(x, self.group))


class RowLinear(nn.Linear):
    """A linear layer over 1 / L of its inputs; the bias is added once, to the sum."""

    def __init__(self, in_features: int, out_features: int, group: Group) -> None:
        super().__init__(in_features // group.size, out_features)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return leave(F.linear(x, self.weight), self.group) + self.bias
