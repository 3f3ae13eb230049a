"""Vary the number of experts, 1 to 128, at equal tokens (beyond the paper, which compares 32 and 128).

Shows: final validation loss of the 350M twin with 1 (dense), 16, 32, 64 and 128 experts in every second layer, one
expert per token.

Here: one expert a token, so that FLOPs per token differ by the gate alone. In a narrow twin the gate is a larger part
than in the paper's models: at `cpu` FLOPs are 1, 2, 4 and 8 % above Dense's with 16 to 128 experts, those of the
paper's 350M+MoE-128 0.4 %. Parameters differ by a factor of 26.

Fixed before the first run: 3 seeds, all arms on each. At `cpu` seeds 3 to 5, of which `pr-moe` has runs on one machine
already; fixed before the runs of 16 and 64 experts. At `full` seeds 0 to 2, one look, fixed before the runs of
16 and 64 experts there, after 128 had ended 0.116 below 32.
"""

from __future__ import annotations

from moelab.design import comparison
from moelab.design.experiment import Experiment, twin_scales
from moelab.lazy import pd

ARMS = {"1 (dense)": "350M"} | {str(n): f"350M+MoE-{n}" for n in (16, 32, 64, 128)}
"""Experts of a layer (at `smoke` the twin has an eighth of them) -> model."""


def headline(final: pd.DataFrame) -> str:
    """Return the result in one line."""
    if not len(final):
        return "no run has finished"
    means = comparison.common_means(comparison.by_arm(final)).sort_values()
    best = means.index[0]
    other = means.index[1] if best == "1 (dense)" and len(means) > 1 else "1 (dense)"
    return f"Lowest at {best} experts: {comparison.difference(final, best, other)}"


EXPERIMENT = Experiment(
    name="expert-count",
    number=20,
    title="How many experts",
    paper="beyond the paper",
    question="Where does adding experts stop paying, at equal tokens?",
    paper_answer="Not examined; 128 experts beat 32 on the 350M base (Fig 4).",
    scales=twin_scales(5, full=6),
    arms=ARMS,
    looks={"full": (3,)},
)
