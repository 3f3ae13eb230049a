"""Compute causal self-attention of whole sequences for training on a CPU.

Shapes: B sequences, T tokens, H heads, D head size. The C++ (``_cpp/attention.cpp``) keeps the T * T probabilities of
each head for the backward pass; it is for short sequences. The reference is PyTorch's
``scaled_dot_product_attention``, which keeps none. Scores and softmax are float32, products are accumulated in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _cpp
from ._common import MULTIPLE, Backend, pick_backend
from ._cpp import operations

LONGEST = 256
"""Longest sequence, in tokens, for which the C++ is used where nobody asks for it."""


def has_kernel(T: int, D: int) -> bool:
    """Return whether the C++ computes T tokens and heads of D, both multiples of `MULTIPLE`, here by default."""
    return _fits(T, D) and T <= LONGEST and _cpp.available()


def _fits(T: int, D: int) -> bool:
    return T % MULTIPLE == D % MULTIPLE == 0


def attention(qkv_BT3HD: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return the attention's output [B, T, H, D] in the input's dtype. Differentiable (once).

    Raises ``ValueError`` for another shape or integers.
    """
    if qkv_BT3HD.dim() != 5 or qkv_BT3HD.shape[2] != 3 or not qkv_BT3HD.is_floating_point():
        raise ValueError(
            f"attention: queries, keys and values must be floating point [B, T, 3, H, D], not {qkv_BT3HD.dtype} "
            f"{tuple(qkv_BT3HD.shape)}"
        )
    T, D = qkv_BT3HD.shape[1], qkv_BT3HD.shape[4]
    fits = _fits(T, D) and (T <= LONGEST or backend == "cpp")
    if pick_backend("attention", backend, qkv_BT3HD, fits=fits) == "cpp":
        return _Attention.apply(qkv_BT3HD)
    q, k, v = qkv_BT3HD.permute(2, 0, 3, 1, 4)
    # Autocast returns its own dtype. It is not switched off here: some devices, such as meta, have none.
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).to(qkv_BT3HD.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_BT3HD: Tensor) -> Tensor:
        qkv_BT3HD = qkv_BT3HD.contiguous()
        B, T, _, H, D = qkv_BT3HD.shape
        p_BHTT, y_BTHD = qkv_BT3HD.new_empty(B, H, T, T), qkv_BT3HD.new_empty(B, T, H, D)
        operations().attention.default(qkv_BT3HD, p_BHTT, y_BTHD)
        ctx.save_for_backward(qkv_BT3HD, p_BHTT)
        return y_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHD: Tensor) -> Tensor:
        qkv_BT3HD, p_BHTT = ctx.saved_tensors
        d_qkv = torch.empty_like(qkv_BT3HD)
        operations().attention_backward.default(dy_BTHD.contiguous(), qkv_BT3HD, p_BHTT, d_qkv)
        return d_qkv
