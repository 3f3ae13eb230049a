"""Compute linear layers and norms, with their own weights or, for inference on a CPU, with packed ones.

A packed weight (`moelab.kernels.packed`) takes the place of a layer's own: `moelab.inference.packing` makes it, and the
layers that use it are the same. Nothing is differentiable then. Letters as in `moelab.config`; a matrix is [N, K].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab.kernels import activate, packed


class Linear(nn.Linear):
    """Compute a linear layer, an activation after it, and a sum.

    Attributes:
        packed: the packed weight, in place of `weight`; with a gated activation two matrices.
    """

    packed: packed.Packed | None = None

    def forward(self, x: Tensor, activation: str = "none", add: Tensor | None = None) -> Tensor:
        """Return act(x @ W.T + bias), with `add` [..., N] added, of x [..., K]; see `moelab.kernels.ACTIVATIONS`."""
        return self.product(x, self.bias, activation, add)

    def product(self, x: Tensor, bias: Tensor | None, activation: str = "none", add: Tensor | None = None) -> Tensor:
        """Compute as `forward`, with a given bias."""
        if self.packed is not None:
            return packed.linear(x, self.packed, bias, activation, add)
        y = activate(F.linear(x, self.weight, bias), activation)
        return y if add is None else y + add


class RMSNorm(nn.RMSNorm):
    """Compute the RMS norm.

    Attributes:
        packed: whether the operation beside the packed products computes it.
    """

    packed = False
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., M]."""
        return packed.rms_norm(x, self.weight, self.eps) if self.packed else super().forward(x)


def sigmoid(x: Tensor) -> Tensor:
    """Return the sigmoid; without gradients on a CPU, an element's bits do not depend on the other elements.

    PyTorch computes whole vectors of elements by one formula, and those after the last whole vector by another; rows of
    a softmax it computes one by one.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return x.sigmoid()
    return torch.stack((x, torch.zeros_like(x)), -1).softmax(-1)[..., 0]
