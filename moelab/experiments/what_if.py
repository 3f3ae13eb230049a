"""Serve any model on any cluster (notebook 16), and compute the grid of answers that the explorer page shows.

Shows: for each model, cluster, number of GPUs and batch the fastest and the cheapest layout that the simulator finds.

Expect: everything is simulated, so no claim of the paper is judged here. How far to trust it: docs/simulator.md and
notebooks 10 to 14. Models of today stand with the range of such a prediction and the nearest public measurement.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

from moelab import simulate
from moelab.design.experiment import Experiment, Scale, at_least_one
from moelab.lazy import pd
from moelab.simulate import public

TODAY = {"mixtral-8x7b": "bf16", "qwen3-30b": "bf16", "qwen3-235b": "fp8", "deepseek-v3": "fp8"}
"""Published model -> dtype in which an inference engine of today serves it; A100s have no fp8."""
MODELS = {
    "smoke": ("1.3B+MoE-128", "mixtral-8x7b"),
    "cpu": (
        *("1.3B", "6.7B", "175B", "350M+MoE-128", "1.3B+MoE-128", "1.3B+PR-MoE-64/128"),
        *("1.3B+PR-MoE-64/128+L21", "8B+MoE-128", "24B+MoE-128", *TODAY),
    ),
}
GPUS = {"smoke": (8, 16), "cpu": (1, 8, 32, 128, 256)}
BATCHES = {"smoke": (8,), "cpu": (1, 4, 16, 64, 256)}
"""Scale -> what the grid is made of; batches are of a tensor group."""


def grid(scale: str, context: int) -> pd.DataFrame:
    """Return the best layout for each model, cluster, number of GPUs, batch and objective, where one fits.

    Columns: model, cluster, most_gpus, best_by, memory_gib and currency of the cluster, those of
    `moelab.simulate.search.frame`, and for models of today low_ms, high_ms and nearest (`beside_measurements`).

    Args:
        context: tokens of a sequence in the cache.
    """
    from moelab.simulate.search import best, frame

    rows = []
    for name, where in itertools.product(MODELS[scale], simulate.clusters()):
        settings: dict[str, Any] = {"program": "engine", "dtype": TODAY[name]} if name in TODAY else {}
        for most, batch in itertools.product(GPUS[scale], BATCHES[scale]):
            try:
                layouts = best(name, most, where, batch=batch, context=context, **settings)
            except ValueError:  # the GPUs have no fp8
                continue
            for objective, found in layouts.items():
                about = {"model": name, "cluster": where, "most_gpus": most, "best_by": objective}
                of_cluster = {"memory_gib": found.capacity_gib, "currency": found.currency}
                beside = beside_measurements(name, found) if name in TODAY else {}
                rows.append(about | frame([found]).iloc[0].to_dict() | of_cluster | beside)
    if not rows:
        raise ValueError(f"what-if: no model fits any cluster with {context} tokens of a sequence in the cache")
    return pd.DataFrame(rows)


def beside_measurements(name: str, found: simulate.DecodeEstimate) -> dict[str, Any]:
    """Return the range of a step's latency, and the nearest public measurement of the model, empty without one."""
    factor, _, _ = public.experience("decode")
    p = found.parallel
    near = public.nearest("decode", name, found.cluster, batch=found.batch, tensor=p.tensor, expert=p.expert)
    low, high = found.latency_ms / factor, found.latency_ms * factor
    return {"low_ms": low, "high_ms": high, "nearest": near.in_words if near else ""}


def headline(rows: pd.DataFrame) -> str:
    """Return what the grid shows in one line: the largest model's fastest token, and the cluster that it takes."""
    largest = rows[rows["model"] == rows["model"].iloc[-1]]
    best = largest.loc[largest["latency_ms"].idxmin()]
    return (
        f"{best['model']}'s fastest token: {best['latency_ms']:.1f} ms on up to {best['most_gpus']} {best['cluster']} "
        "(simulated)"
    )


EXPERIMENT = Experiment(
    name="what-if",
    number=16,
    title="What if? Any model, cluster and layout",
    paper="beyond the paper",
    question="Which layout serves a model fastest or cheapest, and on how many GPUs?",
    paper_answer="For its own models and cluster: Table 6 and Figs 10 to 15.",
    scales={
        "smoke": Scale("two models on simulated clusters", "seconds (tests)"),
        "cpu": Scale(
            "thirteen models on simulated clusters of up to 256 GPUs", "minutes (computed, nothing is measured)"
        ),
    },
    check=partial(at_least_one, "what-if", ["cached"]),
)
