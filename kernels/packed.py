"""Compute with matrices that were packed once: products, norm, mix and attention of a decoding step on a CPU.

The operations are C++ (``packed.cpp``, ``residual.cpp``, ``attention.cpp`` of ``_cpp``) for float32 and bfloat16,
accumulated in float32, without gradients; `can_pack` says where they run. An operation does what takes several calls
elsewhere, because a call takes microseconds, as long as reading a small matrix. A row's result has the same bits
whatever the other rows and the number of threads. ``experts.py`` takes packed weights as well. The plain modules of
``moelab.models`` are the reference.

Shapes: R rows, S tokens, E experts, M hidden, F feed-forward; B sequences, H heads, N heads of keys and values, D head
size, T longest sequence. A matrix is [N, K]; K and D are multiples of `MULTIPLE`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _cpp
from ._common import MULTIPLE
from .activations import number_of

LARGEST_HEAD = 512
"""The largest head size."""


def can_pack(weight: Tensor) -> bool:
    """Return whether matrices [..., N, K] of this dtype and size can be packed here."""
    fits = weight.dtype in (torch.float32, torch.bfloat16) and weight.dim() > 1 and weight.shape[-1] % MULTIPLE == 0
    return fits and weight.device.type == "cpu" and _cpp.available()


class Packed(NamedTuple):
    """Hold matrices [N, K] in the order in which the products read them.

    Attributes:
        data: [matrices, N / 32 rounded up, K, 32], values in an order of its own.
        columns: N.
    """

    data: Tensor
    columns: int


def pack(weight: Tensor) -> Packed:
    """Return matrices [N, K] or [..., N, K], packed.

    Those of a gated activation are two, [..., 2, N, K]: gate and up.

    Raises:
        ValueError: K is not a multiple of 16, or this machine cannot compute with them (`can_pack`).
    """
    if not can_pack(weight):
        raise ValueError(
            f"pack: {weight.dtype} {tuple(weight.shape)} on {weight.device.type}: the C++ kernels pack float32 or "
            f"bfloat16 matrices on a CPU whose last size is a multiple of {MULTIPLE}"
        )
    stack = weight.detach().reshape(-1, *weight.shape[-2:])
    return Packed(_cpp.operations().pack.default(stack.contiguous()), weight.shape[-2])


def linear(
    x: Tensor, weight: Packed, bias: Tensor | None = None, activation: str = "none", add: Tensor | None = None
) -> Tensor:
    """Return act(x [..., K] @ W.T + bias [N]) of one matrix, or of two if gated, [..., N] in x's dtype.

    ``add`` [..., N] is added then; with a gated activation, bias is [2 N]. Raises ``ValueError`` for an
    unknown activation and ``RuntimeError`` for shapes or dtypes that do not fit.
    """
    data, columns = weight
    add = None if add is None else add.contiguous()
    number = number_of("linear", activation)
    return _cpp.operations().linear.default(x.contiguous(), data, bias, columns, number, add)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of x [..., K] times the weight [K], in x's dtype; K is a multiple of 16."""
    return _cpp.operations().rms_norm.default(x.contiguous(), weight, eps)


class PackedMix(NamedTuple):
    """Hold the weights of a learned residual mix (``residual.py``) as the operation reads them.

    Attributes:
        difference_M: float32, the first row minus the second.
        bias: the same of the bias.
    """

    difference_M: Tensor
    bias: float


def pack_mix(w_2M: Tensor, b_2: Tensor) -> PackedMix:
    """Return the weights of a learned mix, packed."""
    w_2M, b_2 = w_2M.detach().float(), b_2.detach().float()
    return PackedMix((w_2M[0] - w_2M[1]).contiguous(), float(b_2[0] - b_2[1]))


def mix(moe_SM: Tensor, mlp_SM: Tensor, x_SM: Tensor, weights: PackedMix, add_SM: Tensor | None = None) -> Tensor:
    """Return the learned mix [S, M] as `residual_mix`, with ``add_SM`` added; all tensors are [S, M]."""
    return _cpp.operations().mix.default(
        moe_SM, mlp_SM, None, x_SM.contiguous(), *weights, None if add_SM is None else add_SM.contiguous()
    )


def attend(
    q_BHD: Tensor, k_BND: Tensor, v_BND: Tensor, keys_BNTD: Tensor, values_BNTD: Tensor, positions_B: Tensor
) -> Tensor:
    """Store a new token of each sequence; return its attention over all tokens of the sequence up to it, [B, H, 1, D].

    Args:
        q_BHD, k_BND, v_BND: [B, heads, 1, D], of which a head's values are side by side.
        keys_BNTD, values_BNTD: written at ``positions_B``; they may hold more sequences.
        positions_B: int64, the tokens' places in their sequences.
    """
    return _cpp.operations().attend.default(q_BHD, k_BND, v_BND, keys_BNTD, values_BNTD, positions_B)
