"""Describe how the experts of a run begin as copies of its trunk's feed-forwards: `UpcycleConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moelab.config._check import check as _check


@dataclass(frozen=True)
class UpcycleConfig:
    """Describe the copies in layers that have more experts than the trunk's.

    A dense layer becomes an MoE layer (sparse upcycling, Komatsuzaki et al. 2022, arXiv 2212.05055): every expert is a
    copy of its feed-forward, and the router begins with initial weights. An MoE layer of E experts grows to a multiple
    of E (expert upcycling, arXiv 2604.19835): expert j and its row of the router are copies of those of expert j mod E.
    With softmax scores, which E' experts divide among them, the copied bias of loss-free balancing is multiplied by
    E / E'; with sigmoid scores it stays.

    Attributes:
        noise: standard deviation of the normal noise that is added to each copied tensor, as a share of that tensor's
            standard deviation. The first E experts of a layer that grows, and their rows, stay exact. Their copies
            need noise, because of equal scores the lowest expert is always chosen.
        scale: factor of the experts' output weights and biases. With top-1 softmax, whose weights are not normalised,
            a new layer's output is the feed-forward's times the largest of E probabilities, which is above their mean
            1 / E (2.8 times at E = 32 in `moelab.experiments.upcycling`); a layer that grows to E' experts divides a
            token's weight among E' / E copies. The inverse of that share makes up for it.
    """

    noise: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(0 <= self.noise and math.isfinite(self.noise), f"upcycle: noise must not be negative, got {self.noise}")
        _check(0 < self.scale and math.isfinite(self.scale), f"upcycle: scale must be positive, got {self.scale}")
