"""Limit the capacity of experts (beyond the paper, which trains at capacity factor 1.0 without comparing).

Shows: final validation loss and tokens dropped over training of the 350M+MoE-128 twin at capacity factors 0.5, 1.0,
1.25 and 2.0 with random token selection, and drop-free.

Here: validation uses each arm's own capacity factor, as the paper's does. A batch of it has text of one domain, whose
tokens prefer the same experts, so that more of them are dropped than in training, where a batch has text of all
domains. `validation_limits` tells both apart, and what training with a limit does to a model that is validated without
one. The limit applies to a step's 4,096 tokens, 32 for each of 128 experts; the paper's to the 8,192 of a GPU, 64 each.

Fixed before the first run: 3 seeds, all arms on each. At `cpu` seeds 3 to 5, whose drop-free runs are of the machine at
hand, fixed before the first run with a limit. At `full` the paper's own limit and none, one look at seeds 0 to 2: at
`cpu` capacity 1 cost 0.191 nats with a spread of 0.017 over three seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moelab.config import RoutingConfig
from moelab.design import comparison, settings
from moelab.design.experiment import Experiment, twin_scales
from moelab.experiments import validation_limits
from moelab.lazy import pd
from moelab.runs.spec import RunSpec

FACTORS = (0.5, 1.0, 1.25, 2.0)
LIMITS = ("capacity_factor", "capacity_factor_eval", "drop_tokens")
"""Fields of `RoutingConfig` that the arms are named by."""
ARMS = {"drop-free": {"name": "350M+MoE-128"}} | {
    f"capacity {f:g}": {"name": "350M+MoE-128", "routing": RoutingConfig(capacity_factor=f, capacity_factor_eval=f)}
    for f in reversed(FACTORS)
}
"""Arm -> arguments of `settings.spec`."""


def arms(scale: str) -> list[str]:
    """Return the arms of a scale: `full` has the paper's own limit and none."""
    return ["drop-free", "capacity 1"] if scale == "full" else list(ARMS)


def build(scale: str, seed: int, overrides: Mapping[str, Any], *, rate: settings.Rate = "own") -> list[RunSpec]:
    """Return the runs of one seed."""
    if limits := [f"model.routing.{name}" for name in LIMITS if f"model.routing.{name}" in overrides]:
        raise ValueError(f"{limits[0]} is what its arms differ in, so it cannot be set")
    shared: dict[str, Any] = {"scale": scale, "seed": seed, "overrides": overrides, "rate": rate}
    return [settings.spec(**ARMS[label], **shared, label=label) for label in arms(scale)]


def headline(final: pd.DataFrame, measured: list[dict[str, Any]]) -> str:
    """Return the result in one line; arguments as of `validation_limits.costs`."""
    gap = comparison.difference(final, "capacity 1", "drop-free")
    table = validation_limits.costs(final, measured, "drop-free")
    free = table.loc[
        (table["arm"] == "capacity 1") & (table["validation"] == validation_limits.KINDS["without"]), "gap"
    ]
    return f"{gap}; validated without a limit {free.mean():.3f}" if len(free) else gap


EXPERIMENT = Experiment(
    name="capacity",
    number=21,
    title="What a capacity limit costs",
    paper="beyond the paper",
    question="What do dropped tokens cost in loss?",
    paper_answer="Not examined; all runs use capacity factor 1.0.",
    scales=twin_scales(5, full=2),
    build=build,
    measures_on_gpu=("gpu",),
    looks={"full": (3,)},
)
