"""Tensor slicing: the linear layers of one rank in a tensor-parallel group (paper section 5.2).

They are Megatron's column and row parallel layers. A column-sliced layer computes some of the outputs, the row-sliced
layer after it takes them as some of its inputs, and one all-reduce adds up the results. Parameters keep their names;
one dim of their local shapes is divided by the group's size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moelab.engine.differentiable import copy_to_group, reduce_from_group
from moelab.engine.groups import Group


class ColumnLinear(nn.Linear):
    """Computes this rank's part of a linear layer's outputs."""

    def __init__(self, in_features: int, out_features: int, group: Group, bias: bool = True) -> None:
        super().__init__(in_features, out_features // group.size, bias=bias)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features / group size], this rank's outputs for x [..., in_features]."""
        return super().forward(copy_to_group(x, self.group))


class RowLinear(nn.Linear):
    """Computes a linear layer from this rank's part of its inputs; the bias is added once, to the sum over ranks."""

    def __init__(self, in_features: int, out_features: int, group: Group, bias: bool = True) -> None:
        super().__init__(in_features // group.size, out_features, bias=bias)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features], equal on all ranks, for this rank's part of the inputs."""
        y = reduce_from_group(F.linear(x, self.weight), self.group)
        # Autocast makes y bf16; it does not convert the operands of a sum.
        return y if self.bias is None else y + self.bias.to(y.dtype)
