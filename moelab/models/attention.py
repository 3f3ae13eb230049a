"""Compute causal multi-head self-attention.

    x_BTM -> qkv -> attention -> out -> y_BTM

Short sequences on a CPU use `short_attention`, which keeps the attention probabilities for its backward pass, in bf16
and where oneDNN computes fp32 products (`moelab.models.products`); all others use `F.scaled_dot_product_attention`.
Letters as in `moelab.config`; B sequences.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moelab.config import ModelConfig
from moelab.models import products
from moelab.models.layers import Linear

SHORT = 256
"""Longest sequence for `short_attention`, in tokens.

Measured forward and backward on one Zen 4 core, 4,096 tokens in all, 1 to 4 heads of size 32 or 64. In bf16 it is 2.3
to 2.7 times as fast as `F.scaled_dot_product_attention` at 128 tokens, 1.6 times at 256, equal at 1,024. In fp32 it is
0.9 to 1.1 times as fast with MKL's products, so that fp32 uses it with oneDNN's alone.
"""


class Past(Protocol):
    """Hold one layer's keys and values of earlier tokens (implemented in `moelab.inference`)."""

    def attend(self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        """Store the new tokens' keys and values; return their attention over all visible tokens, [B, H, T, D].

        Keys and values may have fewer heads than the queries, see `moelab.models.grouped_attention`.
        """
        ...


class Attention(nn.Module):
    """Compute causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_size, self.dropout = config.heads, config.head_size, config.dropout
        self.qkv = Linear(config.hidden, 3 * config.hidden)
        self.out = Linear(config.hidden, config.hidden)

    def forward(
        self, x_BTM: Tensor, past: Past | None = None, rotation: None = None, add: Tensor | None = None
    ) -> Tensor:
        """Return the attention's output, with `add` added, both [B, T, M].

        With `past`, tokens also attend to the earlier ones it holds. `rotation` is not used: positions are embedded.
        """
        B, T, _ = x_BTM.shape
        qkv_BT3HD = self.qkv.forward(x_BTM).view(B, T, 3, self.heads, self.head_size)
        dropout = self.dropout if self.training else 0.0
        if past is None and not dropout and T <= SHORT and takes_short_attention(qkv_BT3HD):
            return self.out.forward(short_attention(qkv_BT3HD).flatten(2), add=add)
        q, k, v = qkv_BT3HD.permute(2, 0, 3, 1, 4).unbind()
        if past is not None:
            y_BHTD = past.attend(q, k, v)
        else:
            y_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out.forward(y_BHTD.transpose(1, 2).flatten(2), add=add)


def takes_short_attention(x: Tensor) -> bool:
    """Return whether `short_attention` is the faster one for short sequences of the device and dtype of `x`."""
    if x.device.type != "cpu":
        return False
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and products.computed_by_onednn())


def uses_short_attention(config: ModelConfig, context: int) -> bool:
    """Return whether a model that trains on sequences of `context` tokens may use `short_attention`."""
    return not config.dropout and context <= SHORT


def short_attention(qkv_BT3HD: Tensor) -> Tensor:
    """Return causal self-attention, [B, T, H, D] in the input's dtype, keeping the T * T probabilities of each head.

    Scores and softmax are computed in at least fp32, the other products in the input's dtype; in bf16, the result is as
    exact as the fused kernel's. Differentiable once.
    """
    return _ShortAttention.apply(qkv_BT3HD)


class _ShortAttention(torch.autograd.Function):
    """Compute N = H * B sequences of one head each, copied once into a contiguous tensor, by batched products."""

    @staticmethod
    def forward(ctx, qkv_BT3HD: Tensor) -> Tensor:
        # Autocast would compute the products of fp32 scores in bf16.
        with torch.autocast(qkv_BT3HD.device.type, enabled=False):
            return _ShortAttention._forward(ctx, qkv_BT3HD)

    @staticmethod
    def _forward(ctx, qkv_BT3HD: Tensor) -> Tensor:
        B, T, _, H, D = qkv_BT3HD.shape
        wide = torch.promote_types(qkv_BT3HD.dtype, torch.float32)
        q_NTD, k_NTD, v_NTD = qkv_BT3HD.permute(2, 3, 0, 1, 4).reshape(3, H * B, T, D)
        future_TT = torch.full((T, T), -torch.inf, dtype=wide, device=qkv_BT3HD.device).triu_(1)
        scores_NTT = torch.baddbmm(future_TT, q_NTD.to(wide), k_NTD.to(wide).transpose(1, 2), alpha=D**-0.5)
        p_NTT = torch.softmax(scores_NTT, -1).to(qkv_BT3HD.dtype)
        ctx.save_for_backward(q_NTD, k_NTD, v_NTD, p_NTT)
        return torch.bmm(p_NTT, v_NTD).view(H, B, T, D).permute(1, 2, 0, 3).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHD: Tensor) -> Tensor:
        q_NTD, k_NTD, v_NTD, p_NTT = ctx.saved_tensors
        B, T, H, D = dy_BTHD.shape
        dy_NTD = dy_BTHD.permute(2, 0, 1, 3).reshape(H * B, T, D)
        dp_NTT = torch.bmm(dy_NTD, v_NTD.transpose(1, 2))
        dscores_NTT = torch._softmax_backward_data(dp_NTT, p_NTT, -1, p_NTT.dtype)
        dqkv_3NTD = torch.empty(3, H * B, T, D, dtype=dy_NTD.dtype, device=dy_NTD.device)
        torch.bmm(dscores_NTT, k_NTD, out=dqkv_3NTD[0])
        torch.bmm(dscores_NTT.transpose(1, 2), q_NTD, out=dqkv_3NTD[1])
        dqkv_3NTD[:2].mul_(D**-0.5)
        torch.bmm(p_NTT.transpose(1, 2), dy_NTD, out=dqkv_3NTD[2])
        # In the projection's memory order, so that the projection's backward pass does not copy.
        return dqkv_3NTD.view(3, H, B, T, D).permute(2, 3, 0, 1, 4).contiguous()
