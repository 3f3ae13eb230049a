"""Compute with matrices that were packed once: products, experts and attention of a decoding step on a CPU.

The operations are compiled code (``_compiled/packed.cpp``) for float32 and bfloat16, accumulated in float32, without
gradients; `why_not` says where they do not run. An operation does what takes several calls elsewhere, because a call
takes microseconds, as long as reading a small matrix. A row's result has the same bits whatever the other rows and the
number of threads. The plain modules of ``moelab.models`` are the reference.

Shapes: R rows, S tokens, E experts, K choices of a token, M hidden, F feed-forward; B sequences, H heads, N heads of
keys and values, D head size, T longest sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._compiled import load
from ._compiled import why_not as _why_not

MULTIPLE = 16
"""The width of rows, and the size of a head, are multiples of this."""
LARGEST_HEAD = 512
"""The largest head size."""


def why_not(dtype: torch.dtype) -> str | None:
    """Return why this machine cannot compute with packed matrices of this dtype, or None if it can."""
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        return "the processor has no AVX512_BF16, which bfloat16 needs"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"packed matrices are float32 or bfloat16, not {dtype}"
    return _why_not()


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

    Raises:
        ValueError: K is not a multiple of 16, or this machine cannot compute with them (`why_not`).
    """
    if weight.shape[-1] % MULTIPLE:
        raise ValueError(f"pack: the last size must be a multiple of {MULTIPLE}, got {tuple(weight.shape)}")
    if reason := why_not(weight.dtype):
        raise ValueError(f"pack: {reason}")
    load()
    stack = weight.detach().reshape(-1, *weight.shape[-2:])
    return Packed(torch.ops.moelab.pack(stack.contiguous()), weight.shape[-2])


def linear(
    x: Tensor, weight: Packed, bias: Tensor | None = None, activation: str = "none", add: Tensor | None = None
) -> Tensor:
    """Return x [..., K] @ W.T + bias [N] of one matrix, [..., N] in x's dtype.

    ``activation``, "none" or "gelu_tanh", is applied to it, ``add`` [..., N] is added then. Raises ``ValueError`` for
    another activation.
    """
    if activation not in ("none", "gelu_tanh"):
        raise ValueError(f"linear: activation must be 'none' or 'gelu_tanh', got {activation!r}")
    return torch.ops.moelab.linear(x, weight.data, bias, weight.columns, activation == "gelu_tanh", add)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of x [..., K] times the weight [K], in x's dtype; K is a multiple of 16."""
    return torch.ops.moelab.rms_norm(x, weight, eps)


def experts(
    x_SM: Tensor,
    expert_SK: Tensor,
    weight_SK: Tensor,
    up: Packed,
    up_bias: Tensor | None,
    down: Packed,
    down_bias: Tensor | None,
    add_SM: Tensor | None = None,
) -> Tensor:
    """Return the weighted sums [S, M] of the chosen experts' outputs, in x's dtype, with ``add_SM`` added.

    Args:
        expert_SK: int64 [S, K], the experts of each token.
        weight_SK: float32 [S, K].
        up: [E, F, M] for GELU's tanh approximation, or [E, 2, F, M] for SwiGLU.
        up_bias: [E, F] or [E, 2, F].
        down: [E, M, F].
        down_bias: [E, M].
    """
    return torch.ops.moelab.experts(
        x_SM, expert_SK, weight_SK, up.data, up_bias, down.data, down_bias, up.columns, add_SM
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
    return torch.ops.moelab.attend(q_BHD, k_BND, v_BND, keys_BNTD, values_BNTD, positions_B)
