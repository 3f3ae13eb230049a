"""Causal multi-head self-attention.

    x_BTM -> qkv -> attention -> out -> y_BTM

Short sequences on a CPU have a path of their own, `short_attention`, which keeps the attention probabilities for its backward pass; all others go
through `F.scaled_dot_product_attention`. Letters as in `moelab.config`; B sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moelab.config import ModelConfig

SHORT = 256
"""Longest sequence for `short_attention`, in tokens. Forward and backward against `F.scaled_dot_product_attention`, one Zen 4 core, 4,096 tokens, 1
to 4 heads of 32 or 64: bf16 2.4 to 3.1 times as fast at 128 tokens, 2 times at 256, equal at 1,024; fp32 1.06 to 1.15 times at 128, equal at 256."""


class Past(Protocol):
    """One layer's keys and values of earlier tokens (`moelab.inference` has them)."""

    def attend(self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        """Keep the new tokens' keys and values; the new tokens' attention over all they may see, [B, H, T, D]."""
        ...


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_size, self.dropout = config.heads, config.head_size, config.dropout
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.out = nn.Linear(config.hidden, config.hidden)

    def forward(self, x_BTM: Tensor, past: Past | None = None) -> Tensor:
        B, T, _ = x_BTM.shape
        qkv_BT3HD = self.qkv(x_BTM).view(B, T, 3, self.heads, self.head_size)
        dropout = self.dropout if self.training else 0.0
        if past is None and not dropout and T <= SHORT and x_BTM.device.type == "cpu":
            return self.out(short_attention(qkv_BT3HD).flatten(2))
        q, k, v = qkv_BT3HD.permute(2, 0, 3, 1, 4)
        if past is not None:
            y_BHTD = past.attend(q, k, v)
        else:
            y_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out(y_BHTD.transpose(1, 2).flatten(2))


def short_attention(qkv_BT3HD: Tensor) -> Tensor:
    """Return causal self-attention, [B, T, H, D] in the input's dtype, for sequences whose T * T probabilities are cheap to keep.

    Scores and softmax are computed in at least fp32, the other products in the input's dtype: in bf16 as exact as the fused kernel.
    Differentiable once.
    """
    return _ShortAttention.apply(qkv_BT3HD)


class _ShortAttention(torch.autograd.Function):
    """Head by head: a head's queries, keys and values are strided views that a batched product takes as they are."""

    @staticmethod
    def forward(ctx, qkv_BT3HD: Tensor) -> Tensor:
        dtype, (_, T, _, _, D) = qkv_BT3HD.dtype, qkv_BT3HD.shape
        wide = torch.promote_types(dtype, torch.float32)
        future_TT = torch.full((T, T), -torch.inf, dtype=wide, device=qkv_BT3HD.device).triu_(1)
        probabilities, outputs = [], []
        for q_BTD, k_BTD, v_BTD in _heads(qkv_BT3HD):
            scores_BTT = torch.baddbmm(future_TT, q_BTD.to(wide), k_BTD.to(wide).transpose(1, 2), alpha=D**-0.5)
            p_BTT = torch.softmax(scores_BTT, -1).to(dtype)
            probabilities.append(p_BTT)
            outputs.append(p_BTT @ v_BTD)
        ctx.save_for_backward(qkv_BT3HD, *probabilities)
        return torch.stack(outputs, 2) if len(outputs) > 1 else outputs[0].unsqueeze(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHD: Tensor) -> Tensor:
        qkv_BT3HD, *probabilities = ctx.saved_tensors
        D = qkv_BT3HD.shape[-1]
        gradients: tuple[list[Tensor], ...] = ([], [], [])
        for (q_BTD, k_BTD, v_BTD), p_BTT, dy_BTD in zip(
            _heads(qkv_BT3HD), probabilities, dy_BTHD.unbind(2), strict=True
        ):
            dp_BTT = dy_BTD @ v_BTD.transpose(1, 2)
            dscores_BTT = torch._softmax_backward_data(dp_BTT, p_BTT, -1, p_BTT.dtype)
            gradients[0].append((dscores_BTT @ k_BTD).mul_(D**-0.5))
            gradients[1].append((dscores_BTT.transpose(1, 2) @ q_BTD).mul_(D**-0.5))
            gradients[2].append(p_BTT.transpose(1, 2) @ dy_BTD)
        # [B, T, 3 * H * D] is how the projection wants it: no copy after this one.
        return torch.cat([t for part in gradients for t in part], -1).view(qkv_BT3HD.shape)


def _heads(qkv_BT3HD: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value of each head, [B, T, D] views."""
    return zip(*(part_BTHD.unbind(2) for part_BTHD in qkv_BT3HD.unbind(2)), strict=True)
