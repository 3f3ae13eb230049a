"""Compute new tokens of some sequences through a whole decoder, from ids to logits, in one call on a CPU.

The operation is C++ (``_cpp/decode.cpp``), built of the functions of the other operations, for float32 and bfloat16,
accumulated in float32, without gradients. A sequence's logits have the same bits whatever the other sequences and the
number of threads. The plain modules of ``moelab.models`` are the reference.

Shapes: R tokens, B sequences, V vocabulary, L layers, E experts, M hidden, H heads, N heads of keys and values, D head
size, T longest sequence. All widths are multiples of 16. Matrices are packed (`pack` of ``packed.py``), those of a
gated activation two each. Weights have the model's dtype, unless it is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._cpp import operations

LARGEST_HEAD = 512
"""The largest head size."""
HEAD_NORMS = ("none", "head", "all")
SCORES = ("softmax", "sigmoid")
MIXES = ("sum", "learned", "shared_gate")
PARTS = ("attention", "gate", "experts", "feed-forward", "head", "rest")
"""Parts whose seconds `decode` adds up; experts: with dispatch and combine. attention: with its norm."""


class LayerWeights(NamedTuple):
    """Hold the weights of a layer, in the order of ``LayerWeight`` in ``_cpp/decode.cpp``; None where there is none.

    Those of experts are stacked, [E * matrices, ...] packed and biases [E, ...]. ``shares`` is float32 [N]: the part of
    a smeared key that the key before it has. ``router`` is float32, packed; ``balance`` is float32 [E]; ``mix`` float32
    [M]: of a learned mix the difference of its rows, of a shared gate its only row.
    """

    attention_norm: Tensor | None
    attention_norm_bias: Tensor | None = None
    qkv: Tensor | None = None
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    shares: Tensor | None = None
    out: Tensor | None = None
    out_bias: Tensor | None = None
    norm: Tensor | None = None
    norm_bias: Tensor | None = None
    router: Tensor | None = None
    balance: Tensor | None = None
    up: Tensor | None = None
    up_bias: Tensor | None = None
    down: Tensor | None = None
    down_bias: Tensor | None = None
    mlp_up: Tensor | None = None
    mlp_up_bias: Tensor | None = None
    mlp_down: Tensor | None = None
    mlp_down_bias: Tensor | None = None
    mix: Tensor | None = None


class LayerSizes(NamedTuple):
    """Hold the numbers of a layer: its experts, the activations' numbers, the kind of mix (a place in `MIXES`)."""

    experts: int = 0
    activation: int = 0
    mlp_activation: int = 0
    mix: int = 0


class Sizes(NamedTuple):
    """Hold the numbers of a model: head_norm and scores are places in `HEAD_NORMS` and `SCORES`."""

    heads: int
    kv_heads: int
    head_size: int
    head_norm: int
    rms: int
    top_k: int
    normalize: int
    scores: int


@dataclass(frozen=True)
class Decoder:
    """Hold a decoder's packed weights as `decode` takes them.

    Attributes:
        weights: embedding [V, M], position embedding or None, the last norm's weight and bias or None, the head's
            packed matrix; then those of each layer.
        sizes: `Sizes`, then the `LayerSizes` of each layer.
        numbers: the norms' epsilon, then for each layer the bias of a learned mix (the first one minus the second).
    """

    weights: list[Tensor | None]
    sizes: list[int]
    numbers: list[float]


class Sequences(NamedTuple):
    """Describe new tokens: for each sequence its slot in the cache, the place of its first one, and their number."""

    slots: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]


def decode(
    model: Decoder,
    tokens_R: Tensor,
    sequences: Sequences,
    keys: Tensor,
    values: Tensor,
    last: Tensor | None = None,
    angles: Tensor | None = None,
    seconds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the logits after each sequence's last token and the likeliest tokens; write keys and values to the cache.

    Args:
        tokens_R: int64 ids of all new tokens, sequence by sequence.
        keys, values: [L, slots, N, T, D].
        last: with smeared keys, the newest key of each slot as it was before it was mixed, [L, slots, N, D].
        angles: with rotation, float32 [T, D]: the D / 2 cosines of each place, then the sines.
        seconds: float64 [8], to which the seconds of `PARTS` are added, then the number of experts with tokens, summed
            over layers, and the number of layers with experts.

    Returns:
        The logits [B, V], and int64 [B] the lowest token with the largest logit, or -1 where that is infinite or any is
        NaN.

    Raises:
        RuntimeError: a token, slot or place that does not exist, or tensors that do not fit.
    """
    lists = (list(part) for part in sequences)
    return operations().decode.default(
        tokens_R, *lists, keys, values, last, angles, model.weights, model.sizes, model.numbers, seconds
    )


def angles_of(cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Return the `angles` of `decode`; both halves of each row are the same."""
    half = cos_TD.shape[-1] // 2
    return torch.cat((cos_TD[:, :half], sin_TD[:, :half]), 1).float().contiguous()
