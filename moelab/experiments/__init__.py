"""One module per experiment; each ends in an `EXPERIMENT`. Loads no torch."""

from __future__ import annotations

import difflib

from moelab.experiments import (
    all_to_all,
    capacity,
    distillation,
    expert_count,
    gating_kernels,
    half_moe,
    inference_large,
    inference_scaling,
    inference_variants,
    inference_vs_dense,
    learning_rate,
    pr_moe,
    scaling,
    specialisation,
    spread,
    start,
    throughput,
    top2,
    zero_shot,
)
from moelab.experiments.base import Experiment, Scale

_TRAINING = (scaling, half_moe, top2, pr_moe, distillation, throughput, zero_shot)
_INFERENCE = (gating_kernels, all_to_all, inference_scaling, inference_large, inference_variants, inference_vs_dense)
_BEYOND = (expert_count, capacity, specialisation, spread, learning_rate)

EXPERIMENTS: dict[str, Experiment] = {
    m.EXPERIMENT.name: m.EXPERIMENT for m in (start, *_TRAINING, *_INFERENCE, *_BEYOND)
}


def experiment(name: str) -> Experiment:
    """The experiment of that name; ValueError, one line, with what is allowed."""
    if name not in EXPERIMENTS:
        close = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"no experiment {name!r}; allowed: {', '.join(EXPERIMENTS)}{hint}")
    return EXPERIMENTS[name]


__all__ = ["EXPERIMENTS", "Experiment", "Scale", "experiment"]
