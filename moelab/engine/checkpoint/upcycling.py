"""Sparse upcycling: a dense layer's feed-forward becomes each expert of an MoE layer (Komatsuzaki et al. 2022)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

_OF_MOE = re.compile(r"(?P<layer>.*\.ffn)\.(?P<part>experts|mlp|router|mix)\.(?P<name>.+)")
_OF_EXPERTS = {"up": "up.weight", "up_bias": "up.bias", "down": "down.weight", "down_bias": "down.bias"}
"""Parameter of the experts -> of the dense feed-forward, whose weights are transposed."""


def sources(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, str | None]:
    """Return for each parameter of a new MoE layer the stored tensor of the dense layer that fills it.

    A router and a learned mix have None: they keep their initial weights. Parameters of layers that
    are not dense in the checkpoint are left out.

    Args:
        stored: name -> shape of the whole tensor, in the checkpoint.
        wanted: name -> shape of the whole parameter, in the model.
    """
    found: dict[str, str | None] = {}
    for name in wanted:
        match = _OF_MOE.fullmatch(name)
        if match and f"{match['layer']}.up.weight" in stored:
            source = {"experts": _OF_EXPERTS.get(match["name"]), "mlp": match["name"]}.get(match["part"])
            found[name] = source and f"{match['layer']}.{source}"
    return found


def spread(dense: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a dense feed-forward's tensor as the parameter of a given shape: itself, or a view of E copies of it.

    Raises:
        ValueError: one line: the feed-forward has another size.
    """
    copies = dense
    if len(shape) > dense.ndim:
        one = dense.T if dense.ndim == 2 else dense
        if one.ndim == len(shape) - 2 and one.numel() == math.prod(shape[1:]):  # gated: a dim of gate and up
            one = one.reshape(shape[1:])
        copies = one.expand(shape[0], *one.shape)
    if tuple(copies.shape) != tuple(shape):
        raise ValueError(f"a dense feed-forward of {tuple(dense.shape)} does not become {tuple(shape)}")
    return copies
