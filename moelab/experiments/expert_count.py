"""Vary the number of experts, 1 to 64, at fixed compute (beyond the paper, which compares 32 and 128).

Shows: final validation loss of the 350M twin with 1 (dense), 2, 4, 8, 16, 32 and 64 experts in every second layer, one
expert per token.

Here: the twins of 350M+MoE-16 … 512. FLOPs per token differ by the gate alone (below 4 %); parameters by a factor of
13.

Expect at `cpu` (3 seeds, results/expert-count): a loss that falls to 16 experts and is flat from there on; at 1 M
tokens each of 64 experts sees 16 k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moelab.experiments import comparison
from moelab.experiments.base import Experiment, Scale

if TYPE_CHECKING:
    import pandas as pd

ARMS = {"1 (dense)": "350M"} | {str(n): f"350M+MoE-{8 * n}" for n in (2, 4, 8, 16, 32, 64)}
"""Experts of the `cpu` twin (the paper's model has eight times as many) -> model."""


def experts(arm: str) -> int:
    """Return the number of experts that an arm stands for."""
    return int(arm.split()[0])


def headline(final: pd.DataFrame) -> str:
    """Return the result in one line."""
    if not len(final):
        return "no run has finished"
    means = final.groupby("arm")["validation_loss"].mean()
    best = means.idxmin()
    return f"Lowest mean loss at {best} experts: {comparison.difference(final, best, '1 (dense)')}"


EXPERIMENT = Experiment(
    name="expert-count",
    number=20,
    title="How many experts",
    paper="beyond the paper",
    question="Where does adding experts at fixed compute stop paying?",
    paper_answer="Not examined; 128 experts beat 32 on the 350M base (Fig 4).",
    scales={
        "smoke": Scale("twins of 32 wide, 4 layers; 12 k tokens of sotu", "seconds (tests)"),
        "cpu": Scale("twins 32 wide, 8 layers; 1 M tokens of mix5", "about 6 minutes a seed on one core"),
        "gpu": Scale("twins 256 wide, 12 layers, 4 to 128 experts; 200 M tokens", "not yet run; one GPU"),
    },
    arms=ARMS,
)
