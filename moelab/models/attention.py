"""Compute causal multi-head self-attention.

    x_BTM -> qkv -> attention -> out -> y_BTM

`moelab.kernels.attention` computes whole sequences without dropout of the probabilities: short ones on a CPU by C++,
others by `F.scaled_dot_product_attention`. Letters as in `moelab.config`; B sequences.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from moelab import kernels
from moelab.config import ModelConfig
from moelab.kernels.attention import has_kernel
from moelab.models.layers import Linear


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
        self, x_BTM: Tensor, past: Past | None = None, rotation: Any = None, add: Tensor | None = None
    ) -> Tensor:
        """Return the attention's output, with `add` added, both [B, T, M].

        With `past`, tokens also attend to the earlier ones it holds. `rotation` is not used: positions are embedded.
        """
        B, T, _ = x_BTM.shape
        qkv_BT3HD = self.qkv.forward(x_BTM).view(B, T, 3, self.heads, self.head_size)
        dropout = self.dropout if self.training else 0.0
        if past is None and not dropout:
            return self.out.forward(kernels.attention(qkv_BT3HD).flatten(2), add=add)
        q, k, v = qkv_BT3HD.permute(2, 0, 3, 1, 4).unbind()
        if past is not None:
            y_BHTD = past.attend(q, k, v)
        else:
            y_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out.forward(y_BHTD.transpose(1, 2).flatten(2), add=add)


def uses_kernel(config: ModelConfig, context: int) -> bool:
    """Return whether our C++ computes the attention of sequences of `context` tokens where the model is on a CPU."""
    return not config.dropout and has_kernel(context, config.head_size)
