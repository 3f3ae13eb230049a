"""Fill the experts of an MoE layer from a checkpoint of a dense layer, or of one with fewer experts.

`UpcycleConfig` says what is copied and which noise is added.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from moelab.config.upcycle import UpcycleConfig

_OF_MOE = re.compile(r"(?P<layer>.*\.ffn)\.(?P<part>experts|mlp|router|mix)\.(?P<name>.+)")
_OF_EXPERTS = {"up": "up.weight", "up_bias": "up.bias", "down": "down.weight", "down_bias": "down.bias"}
"""Parameter of the experts -> of the dense feed-forward, whose weights are transposed."""


def sources(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, str | None]:
    """Return for each parameter of an MoE layer that is not in the checkpoint as it is the stored tensor that fills it.

    Of a layer that is dense in the checkpoint these are all; router and learned mix have None: they keep their initial
    weights. Of a layer with fewer experts in the checkpoint they are the experts and the router. Parameters of other
    layers are left out.

    Args:
        stored: name -> shape of the whole tensor, in the checkpoint.
        wanted: name -> shape of the whole parameter, in the model.
    """
    origin: dict[str, str | None] = {}
    for name, shape in wanted.items():
        match = _OF_MOE.fullmatch(name)
        if match and f"{match['layer']}.up.weight" in stored:
            source = {"experts": _OF_EXPERTS.get(match["name"]), "mlp": match["name"]}.get(match["part"])
            origin[name] = source and f"{match['layer']}.{source}"
        elif match and match["part"] in ("experts", "router") and name in stored:
            theirs = stored[name]
            if theirs[1:] == shape[1:] and theirs[0] < shape[0] and shape[0] % theirs[0] == 0:
                origin[name] = name
    return origin


class Copies:
    """Make one parameter of an MoE layer from a stored tensor, expert by expert.

    Raises:
        ValueError: one line: the stored feed-forward has another size.
    """

    def __init__(
        self,
        stored: Tensor,
        source: str,
        name: str,
        shape: tuple[int, ...],
        config: UpcycleConfig,
        seed: int,
        scores: str = "softmax",
    ) -> None:
        """Hold what the copies are made of.

        Args:
            stored: the dense feed-forward's tensor, or the parameter of a layer with fewer experts, fp32.
            source: its name, see `sources`.
            name: of the parameter.
            shape: of the whole parameter.
            seed: of the noise, which depends on it, the name and the expert alone, not on the layout.
            scores: `RoutingConfig.scores` of the model.
        """
        self.name, self.config, self.seed = name, config, seed
        self.grows = source == name
        self.fixed = ".mlp." in name  # the fixed branch, which is the dense feed-forward itself
        given = tuple(stored.shape)
        if not (self.grows or self.fixed):
            stored = stored.T if stored.ndim == 2 else stored
            gated = stored.ndim == len(shape) - 2 and stored.numel() == math.prod(shape[1:])  # a dim of gate and up
            stored = (stored.reshape(shape[1:]) if gated else stored)[None]
        if tuple(stored.shape[not self.fixed :]) != tuple(shape[not self.fixed :]):
            raise ValueError(f"a dense feed-forward of {given} does not become {tuple(shape)}")
        self.stored = stored
        self.deviation = float(stored.std(correction=0)) * config.noise
        if name.endswith("balance_bias"):
            self.deviation = 0.0
            if scores == "softmax":  # its sum is 1 over any number of experts; the bias is added to it
                self.stored = stored * (len(stored) / shape[0])

    def part(self, index: tuple[slice, ...]) -> Tensor:
        """Return a part of the parameter."""
        if self.fixed:
            return self.stored[index]
        rows, *inner = index
        return torch.stack([self._expert(e)[tuple(inner)] for e in range(rows.start, rows.stop)])

    def _expert(self, expert: int) -> Tensor:
        """Return the parameter of one expert."""
        kept = len(self.stored)
        one = self.stored[expert % kept]
        exact = self.grows and expert < kept
        if self.deviation and not exact:
            key = hashlib.sha256(f"{self.seed}/upcycle/{self.name}/{expert}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
            one = one + torch.empty(one.shape).normal_(0.0, self.deviation, generator=generator)
        return one * self.config.scale if self.name.endswith(("experts.down", "experts.down_bias")) else one
