"""Tensor slicing: the linear layers of one rank in a tensor-parallel group (paper section 5.2).

They are Megatron's column and row parallel layers. A column-sliced layer computes some of the outputs, the row-sliced
layer after it takes them as some of its inputs, and one all-reduce adds up the results. Parameters keep their names;
one dim of their local shapes is divided by the group's size.
"""

from __future__ import annotations

from torch import Tensor

from moelab.engine.differentiable import copy_to_group, reduce_from_group
from moelab.engine.groups import Group
from moelab.kernels import activate
from moelab.models.layers import Linear


class ColumnLinear(Linear):
    """Computes this rank's part of a linear layer's outputs."""

    def __init__(self, in_features: int, out_features: int, group: Group, bias: bool = True) -> None:
        super().__init__(in_features, out_features // group.size, bias=bias)
        self.group = group

    def forward(self, x: Tensor, activation: str = "none", add: Tensor | None = None) -> Tensor:
        """Return [..., out_features / group size], this rank's outputs for x [..., in_features], as `Linear`."""
        return super().forward(copy_to_group(x, self.group), activation, add)


class RowLinear(Linear):
    """Computes a linear layer from this rank's part of its inputs; the bias is added once, to the sum over ranks."""

    def __init__(self, in_features: int, out_features: int, group: Group, bias: bool = True) -> None:
        super().__init__(in_features // group.size, out_features, bias=bias)
        self.group = group

    def forward(self, x: Tensor, activation: str = "none", add: Tensor | None = None) -> Tensor:
        """Return [..., out_features], equal on all ranks, for this rank's part of the inputs, as `Linear`."""
        y = reduce_from_group(self.product(x, None), self.group)
        # Autocast makes y bf16; it does not convert the operands of a sum.
        y = activate(y if self.bias is None else y + self.bias.to(y.dtype), activation)
        return y if add is None else y + add
