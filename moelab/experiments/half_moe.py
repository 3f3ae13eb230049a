"""Place experts in deep or in shallow layers: Half-MoE (paper section 4.1.1, Fig 2 left, "Phenomenon I").

Shows: validation loss of the 350M base with 32 experts in the first half of its layers only, in the second half only,
in all (every second), in none.

Here: twins, paired by seed; both halves have the same number of experts, parameters and FLOPs. The paper does not state
the number of experts and their spacing; 32 and every second layer are assumed. At `full` on the paper's own tokens a
parameter, at each arm's own peak rate and at a shared one.

Fixed before the first run: 3 seeds, all arms on each. Fixed on 2026-11-26, after three seeds at `cpu` had left the
halves 0.065 nats apart with an interval of ±0.119: seeds 3 and 4 for all arms. Five is the end at `cpu`; `full` has the
looks of `pr-moe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moelab.design import comparison, settings
from moelab.design.experiment import Experiment, twin_scales
from moelab.design.verdicts import Verdict
from moelab.lazy import pd
from moelab.runs.spec import RunSpec

ARMS = {
    "Dense": "350M",
    "First half": "350M+FirstHalf-MoE-32",
    "Second half": "350M+SecondHalf-MoE-32",
    "MoE-32": "350M+MoE-32",
}
"""Arm -> the paper's model."""


def build(
    scale: str, seed: int, overrides: Mapping[str, Any], *, base: str = "350M", rate: settings.Rate = "own"
) -> list[RunSpec]:
    """Return the runs of one seed, on one of `settings.BASES`."""
    return settings.of_arms(ARMS, scale, seed, overrides, base=base, rate=rate)


def verdicts(final: pd.DataFrame, scale: str, base: str = "350M") -> list[Verdict]:
    """Judge the paper's claim on the two halves."""
    note = comparison.how_compared(scale, base)
    return comparison.judge_losses("half-moe", final, ARMS, scale, note=note, **EXPERIMENT.plan(scale, base))


EXPERIMENT = Experiment(
    name="half-moe",
    number=2,
    title="Half-MoE: experts early or late",
    paper="Fig 2 left (section 4.1.1)",
    question="Do deep layers profit more from experts than shallow ones?",
    paper_answer="Yes: experts in the second half of the layers lower the loss clearly more than in the first.",
    scales=twin_scales(4, "350M base with 32 experts; 300 B tokens", full=5),
    arms=ARMS,
    build=build,
    looks={"cpu": (3, 5)},
)
