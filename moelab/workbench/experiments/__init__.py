"""One module per experiment of the paper; each ends in an `EXPERIMENT`. Loads no torch."""

from __future__ import annotations

import difflib

from moelab.workbench.experiments import (
    inference_large,
    inference_scaling,
    inference_variants,
    inference_vs_dense,
    pr_moe,
)
from moelab.workbench.experiments.base import Experiment, Scale

_INFERENCE = (inference_scaling, inference_large, inference_variants, inference_vs_dense)

EXPERIMENTS: dict[str, Experiment] = {m.EXPERIMENT.name: m.EXPERIMENT for m in (pr_moe, *_INFERENCE)}


def experiment(name: str) -> Experiment:
    """The experiment of that name; ValueError, one line, with what is allowed."""
    if name not in EXPERIMENTS:
        close = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"no experiment {name!r}; allowed: {', '.join(EXPERIMENTS)}{hint}")
    return EXPERIMENTS[name]


__all__ = ["EXPERIMENTS", "Experiment", "Scale", "experiment"]
