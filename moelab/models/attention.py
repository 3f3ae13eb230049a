"""Compute causal self-attention: the paper's, and that of today's decoders (grouped queries, rotation, norms).

    x_BTM -> qkv -> (norm) -> (smear) -> (rotation) -> attention -> out -> y_BTM

Each of the `kv_heads` N heads of keys and values serves H / N consecutive query heads; the paper's decoder has N = H,
no norms and no rotation. `moelab.kernels.attention` computes whole sequences without dropout of the probabilities:
short ones on a CPU by C++, others by `F.scaled_dot_product_attention`. Letters as in `moelab.config`; B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab import kernels
from moelab.config import ModelConfig
from moelab.kernels.attention import has_kernel

Rotation = tuple[Tensor, Tensor]
"""(cos, sin), fp32 [B or 1, T, D]: the angles by which the two halves of each head are rotated together."""


class Past(Protocol):
    """Hold one layer's keys and values of earlier tokens (implemented in `moelab.inference`)."""

    def attend(self, q_BHTD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor) -> Tensor:
        """Store the new tokens' keys and values; return their attention over all visible tokens, [B, H, T, D]."""
        ...

    def before(self, k_BTND: Tensor) -> Tensor:
        """Return the unmixed key of the token before each new one (of a first token its own), and store the new."""
        ...


def rotation_at(positions_BT: Tensor, head_size: int, base: float) -> Rotation:
    """Return the rotation of tokens at these positions (Su et al. 2021; the halves of a head form the pairs).

    Pair i of D / 2 turns by ``position / base^(2 i / D)``.
    """
    exponent_D = torch.arange(0, head_size, 2, device=positions_BT.device, dtype=torch.float32) / head_size
    angle_BTD = positions_BT[..., None].float() * (1.0 / base**exponent_D)
    angle_BTD = torch.cat((angle_BTD, angle_BTD), -1)
    return angle_BTD.cos(), angle_BTD.sin()


def rotate(x_BTHD: Tensor, rotation: Rotation) -> Tensor:
    """Return queries or keys [B, T, heads, D] rotated by their positions, in their own dtype."""
    cos, sin = (t.unsqueeze(2).to(x_BTHD.dtype) for t in rotation)
    first, second = x_BTHD.chunk(2, -1)
    return x_BTHD * cos + torch.cat((-second, first), -1) * sin


def smear(k_BTND: Tensor, before_BTND: Tensor, logit_N: Tensor) -> Tensor:
    """Return keys mixed with those of the tokens before, in their own dtype, see `DecoderConfig.smeared_keys`.

    Args:
        before_BTND: the key before each one.
        logit_N: the logit of the share that the key before has, for each head.
    """
    share_N1 = logit_N.sigmoid()[:, None].to(k_BTND.dtype)
    return torch.lerp(k_BTND, before_BTND, share_N1)


class Attention(nn.Module):
    """Compute causal self-attention as `DecoderConfig` describes it.

    The rows of `qkv.weight` are those of the queries [H * D], keys [N * D] and values [N * D].

    Attributes:
        pool: function that averages a tensor over the ranks that have the other heads; the engine sets it where these
            are normalised together (`qk_norm` "all") and tensor slicing separates them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        decoder, D = config.decoder, config.head_size
        self.heads, self.kv_heads, self.head_size, self.dropout = config.heads, config.kv_heads, D, config.dropout
        biases = decoder.biases
        self.qkv = nn.Linear(config.hidden, (config.heads + 2 * config.kv_heads) * D, bias=biases != "none")
        self.out = nn.Linear(config.heads * D, config.hidden, bias=biases == "all")
        self.norms_heads = decoder.qk_norm == "head"
        self.q_norm: nn.RMSNorm | None = None
        self.k_norm: nn.RMSNorm | None = None
        self.pool: Callable[[Tensor], Tensor] | None = None
        self.smear = nn.Parameter(torch.empty(config.kv_heads)) if decoder.smeared_keys else None
        if decoder.qk_norm != "none":
            widths = (D, D) if self.norms_heads else (config.heads * D, config.kv_heads * D)
            self.q_norm, self.k_norm = (nn.RMSNorm(width, eps=decoder.norm_eps) for width in widths)

    def forward(self, x_BTM: Tensor, past: Past | None = None, rotation: Rotation | None = None) -> Tensor:
        """Return the attention's output, [B, T, M].

        Args:
            past: earlier tokens to attend to as well.
            rotation: of the tokens' positions; None if positions are embedded.
        """
        B, T, _ = x_BTM.shape
        D = self.head_size
        qkv_BTX = self.qkv(x_BTM)
        whole = past is None and not (self.training and self.dropout)
        if rotation is None and self.q_norm is None and self.smear is None and self.heads == self.kv_heads:
            qkv_BT3HD = qkv_BTX.view(B, T, 3, self.heads, D)
            if whole:
                return self.out(kernels.attention(qkv_BT3HD).flatten(2))
            q, k, v = qkv_BT3HD.permute(2, 0, 3, 1, 4).unbind()
        else:
            q_BTX, k_BTX, v_BTX = qkv_BTX.split([n * D for n in (self.heads, self.kv_heads, self.kv_heads)], -1)
            if self.pool is None:
                q_BTHD, k_BTND = self._normed(q_BTX, self.q_norm), self._normed(k_BTX, self.k_norm)
            else:
                q_BTHD, k_BTND = self._normed_over_ranks(q_BTX, k_BTX, self.pool)
            v_BTND = v_BTX.view(B, T, self.kv_heads, D)
            if self.smear is not None:
                before_BTND = torch.cat((k_BTND[:, :1], k_BTND[:, :-1]), 1) if past is None else past.before(k_BTND)
                k_BTND = smear(k_BTND, before_BTND, self.smear)
            if rotation is not None:
                q_BTHD, k_BTND = rotate(q_BTHD, rotation), rotate(k_BTND, rotation)
            if whole and q_BTHD.device.type == "cpu" and has_kernel(T, D):
                shared = self.heads // self.kv_heads
                keys_values = (t if shared == 1 else t.repeat_interleave(shared, 2) for t in (k_BTND, v_BTND))
                return self.out(kernels.attention(torch.stack((q_BTHD, *keys_values), 2)).flatten(2))
            q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BTND, v_BTND))
        if past is not None:
            y_BHTD = past.attend(q, k, v)
        else:
            grouped, dropout = self.heads != self.kv_heads, self.dropout if self.training else 0.0
            if grouped and q.is_cuda and q.dtype == torch.float32:  # no fused kernel takes both
                k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
                grouped = False
            y_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=grouped)
        return self.out(y_BHTD.transpose(1, 2).flatten(2))

    def _normed(self, x_BTX: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """Return queries or keys by head, [B, T, heads, D], normalised."""
        if norm is not None and not self.norms_heads:
            x_BTX = _rms(x_BTX, norm)
        x_BTHD = x_BTX.unflatten(-1, (-1, self.head_size))
        return _rms(x_BTHD, norm) if norm is not None and self.norms_heads else x_BTHD

    def _normed_over_ranks(self, q_BTX: Tensor, k_BTX: Tensor, pool: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """Iterate over queries and keys by head, normalised over all ranks' heads; one collective serves both."""
        wide = torch.promote_types(q_BTX.dtype, torch.float32)
        squares_BT2 = torch.stack([x.to(wide).square().mean(-1) for x in (q_BTX, k_BTX)], -1)
        means_BT2 = pool(squares_BT2)
        for x, norm, mean_BT in zip((q_BTX, k_BTX), (self.q_norm, self.k_norm), means_BT2.unbind(-1), strict=True):
            assert norm is not None and norm.eps is not None
            y = x.to(wide) * (mean_BT[..., None] + norm.eps).rsqrt() * norm.weight
            yield y.to(x.dtype).unflatten(-1, (-1, self.head_size))


def _rms(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Return norm(x) in x's dtype, also under autocast, which leaves the weight and on CUDA the result in fp32."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps).to(x.dtype)


def uses_kernel(config: ModelConfig, context: int) -> bool:
    """Return whether our C++ computes the attention of sequences of `context` tokens where the model is on a CPU."""
    return not config.dropout and has_kernel(context, config.head_size)
