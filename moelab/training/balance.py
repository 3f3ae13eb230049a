"""Measure how evenly a router uses its experts; every training row of an MoE run has these numbers.

For one MoE layer, c_e is the number of tokens that chose expert e (all K choices, before dropping) since the last row,
of all ranks, and m their mean over the E experts:

    max_violation     max_e c_e / m - 1, computed for each step, then averaged over steps; 0 is perfect balance
                      (MaxVio of Wang et al. 2024, arXiv 2408.15664). Tokens that are dealt out at random have more, see
                      `random_max_violation`: compare only equal numbers of experts, choices and tokens a step
    busiest_rank      max_r (sum of c_e over the experts of rank r) / mean over ranks - 1: the same for ranks instead
                      of experts; only with expert parallelism
    load_variation    standard deviation of c_e / m: the coefficient of variation
    dead_experts      share of experts with c_e < m / 100
    load_entropy      - sum_e p_e log p_e / log E with p_e = c_e / sum c: 1 is uniform, 0 is one expert
    load_percentiles  percentiles of c_e / m, see `PERCENTILES`, by layer
    router_entropy    mean over tokens of - sum_e p_e log p_e / log E for the router's probabilities (scores divided by
                      their sum) at the row's last step: 1 is undecided, 0 is certain. Compare only equal kinds of
                      scores
    dropped_share     share of the choices that found no room

The numbers of a row are means over the MoE layers; `balance` has them by layer. Compare runs only at equal shares of
their schedules: balance and entropy change as training goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

PERCENTILES = (0, 10, 50, 90, 100)
DEAD = 0.01
"""An expert is dead below this fraction of the mean load."""


def max_violation(load: Mapping[str, Sequence[int]]) -> float:
    """Return the mean over layers of the busiest expert's excess over the mean load; 0 without tokens."""
    violations = [max(counts) * len(counts) / total - 1 for counts in load.values() if (total := sum(counts))]
    return sum(violations) / len(violations) if violations else 0.0


@functools.cache
def random_max_violation(tokens: int, experts: int, top_k: int = 1) -> float:
    """Return the mean `max_violation` of steps, 32 draws, whose tokens choose top_k experts at random."""
    rng = np.random.default_rng(0)
    violations = []
    for _ in range(32):
        chosen_SK = rng.random((tokens, experts)).argpartition(top_k - 1, axis=1)[:, :top_k]
        violations.append(max_violation({"": np.bincount(chosen_SK.ravel(), minlength=experts).tolist()}))
    return float(np.mean(violations))


def layer_statistics(load: Sequence[int], ranks: int = 1) -> dict[str, float]:
    """Return the statistics of one layer's load [E]; see the module's docstring.

    Args:
        ranks: ranks over which the experts are distributed.
    """
    load_E = np.asarray(load, float)
    mean, E = load_E.mean(), len(load_E)
    relative_E = load_E / mean if mean else np.ones(E)
    share_E = relative_E / E
    entropy = float(-(share_E * np.log(np.where(share_E > 0, share_E, 1))).sum() / np.log(E))
    values = {
        "load_variation": float(relative_E.std()),
        "dead_experts": float((relative_E < DEAD).mean()),
        "load_entropy": entropy,
    }
    if ranks > 1:
        values["busiest_rank"] = float(relative_E.reshape(ranks, -1).mean(1).max() - 1)
    return values


def percentiles(load: Sequence[float]) -> list[float]:
    """Return the `PERCENTILES` of a layer's load relative to its mean (the nearest expert, without interpolation)."""
    mean = sum(load) / len(load) or 1.0
    return [float(x) / mean for x in np.percentile(load, PERCENTILES, method="nearest")]


def statistics(load: Mapping[str, Sequence[int]], ranks: Mapping[str, int]) -> dict[str, object]:
    """Return the statistics of all layers as parts of a metric row: means over layers, and `balance` by layer.

    Args:
        load: layer -> tokens that chose each expert.
        ranks: layer -> ranks over which its experts are distributed.
    """
    by_layer = {layer: layer_statistics(counts, ranks.get(layer, 1)) for layer, counts in load.items()}
    names = dict.fromkeys(name for one in by_layer.values() for name in one)
    means = {name: float(np.mean([one[name] for one in by_layer.values() if name in one])) for name in names}
    return {
        **means,
        "balance": by_layer,
        "load_percentiles": {layer: percentiles(counts) for layer, counts in load.items()},
    }
