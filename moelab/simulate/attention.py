"""What attention of a model reads, keeps and computes: grouped queries by default, or a latent (MLA) as DeepSeek's.

A `LatentModel` keeps one latent vector and one rotated key a token instead of keys and values (DeepSeek-V2, arXiv
2405.04434, section 2.1). In decoding, the matrices that would expand the latent are absorbed into the query's and the
output's, so each head multiplies with the latent itself; a prefill expands it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moelab.config import ModelConfig
from moelab.simulate.layouts import Array


@dataclass(frozen=True)
class LatentModel(ModelConfig):
    """A model with latent attention; `decoder.head_size` is the size D of a head's part without positions.

    Attributes:
        query_rank: width of the latent of queries.
        latent: width of the latent of keys and values, which is cached.
        rotated: size of the part of queries and of the one shared key that is rotated; the key is cached.
        value_size: size of a head's value.
    """

    query_rank: int = 1536
    latent: int = 512
    rotated: int = 64
    value_size: int = 128

    @property
    def attention_weights(self) -> int:
        """Return the elements of one layer's attention matrices, latents' and heads'."""
        M, H, D = self.hidden, self.heads, self.head_size
        queries = M * self.query_rank + self.query_rank * H * (D + self.rotated)
        keys = M * (self.latent + self.rotated) + self.latent * H * (D + self.value_size)
        return queries + keys + output_weights(self)


def output_weights(model: ModelConfig) -> int:
    """Return the elements of the matrix after the heads."""
    size = model.value_size if isinstance(model, LatentModel) else model.head_size
    return model.hidden * model.heads * size


def cached_numbers(model: ModelConfig) -> int:
    """Return the numbers that one layer caches for a token."""
    if isinstance(model, LatentModel):
        return model.latent + model.rotated
    return 2 * model.kv_heads * model.head_size


def cache_slices(model: ModelConfig, tensor: Array) -> Array:
    """Return over how many of `tensor` ranks the cache is divided: by its heads. A latent serves all heads."""
    return np.minimum(tensor, 1 if isinstance(model, LatentModel) else model.kv_heads)


def pair_flops(model: ModelConfig, *, decoding: bool) -> int:
    """Return the FLOPs of one query with one cached token, over all heads: the score, and the weighted value."""
    if not isinstance(model, LatentModel):
        return 4 * model.heads * model.head_size
    if decoding:
        return 2 * model.heads * (2 * model.latent + model.rotated)
    return 2 * model.heads * (model.head_size + model.rotated + model.value_size)
