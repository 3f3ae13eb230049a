"""Describe what surrounds the MoE layers: `DecoderConfig`. The defaults are the paper's GPT-3-like decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from moelab.config._check import check as _check
from moelab.config._check import check_choices
from moelab.config.feed_forward import FunctionName


@dataclass(frozen=True)
class DecoderConfig:
    """Describe the decoder around the MoE layers.

    Attributes:
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        norm_eps: the norms' epsilon.
        qk_norm: RMSNorm of queries and keys before the rotation: of each "head" (Qwen3), or over the width of "all"
            heads together (OLMoE).
        smeared_keys: each token's key is mixed with that of the token before it, ``(1 - s) k_t + s k_(t-1)``, by one
            learned share s a head of keys, which begins at 0.5 (the smeared key of Olsson et al. 2022,
            arXiv 2209.11895). The first token of a sequence keeps its own. A model then copies from its context without
            a second layer of attention.
        positions: "learned" embeddings, or "rotary" (RoPE, halves of a head rotated together).
        rotary_base: the wavelengths of the rotation are ``2 pi base^(2 i / D)``.
        kv_heads: heads of keys and values, each shared by H / kv_heads query heads (grouped-query attention); 0 means
            H.
        head_size: D; 0 means M / H.
        feed_forward: function of all feed-forwards, dense and expert: "gelu" (its tanh approximation), or "swiglu",
            which is gated.
        ffn: feed-forward size of dense layers, F; 0 means 4M.
        biases: linear layers with a bias: "all" (but the router), "qkv" (Qwen2) or "none".
        tied: the output head is the transposed embedding; False gives it weights of its own.
    """

    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    qk_norm: Literal["none", "head", "all"] = "none"
    smeared_keys: bool = False
    positions: Literal["learned", "rotary"] = "learned"
    rotary_base: float = 10_000.0
    kv_heads: int = 0
    head_size: int = 0
    feed_forward: FunctionName = "gelu"
    ffn: int = 0
    biases: Literal["all", "qkv", "none"] = "all"
    tied: bool = True

    def __post_init__(self) -> None:
        for what in ("kv_heads", "head_size", "ffn"):
            value = getattr(self, what)
            _check(value >= 0, f"decoder: {what} must not be negative, got {value}")
        _check(self.norm_eps > 0, f"decoder: norm_eps must be positive, got {self.norm_eps}")
        _check(self.rotary_base > 1, f"decoder: rotary_base must be above 1, got {self.rotary_base}")
        check_choices(self, "decoder")

    @classmethod
    def modern(cls, **changes: Any) -> Self:
        """Return the decoder of most models since Llama: RMSNorm, rotary positions, SwiGLU, no biases, untied head."""
        settings = {"norm": "rms", "positions": "rotary", "feed_forward": "swiglu", "biases": "none", "tied": False}
        return cls(**{**settings, **changes})


def expert_pattern(layers: int, experts: int, *, dense_first: int = 0, every: int = 1) -> tuple[int, ...]:
    """Return `ModelConfig.experts` for `layers` layers: `dense_first` dense ones, then every `every`-th with experts.

    Layers count from 1; layer i has experts if i is above `dense_first` and a multiple of `every`.

    Raises:
        ValueError: no layer would have experts.
    """
    counts = tuple(experts if i > dense_first and i % every == 0 else 0 for i in range(1, layers + 1))
    _check(
        any(counts),
        f"no MoE layer among {layers}: the first {dense_first} are dense, then every {every}th has experts",
    )
    return counts
