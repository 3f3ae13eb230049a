"""Limit the capacity of experts (beyond the paper, which trains at capacity factor 1.0 without comparing).

Shows: final validation loss and tokens dropped over training of the 350M+MoE-128 twin at capacity factors 0.5, 1.0,
1.25 and 2.0 with random token selection, and drop-free.

Here: validation uses each arm's own capacity factor, as the paper's does.

Fixed before the first run: 3 seeds, all arms on each. At `cpu` seeds 3 to 5, whose drop-free runs are of the machine at
hand, fixed before the first run with a limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moelab.config import RoutingConfig
from moelab.design import comparison
from moelab.design.experiment import Experiment, twin_scales

if TYPE_CHECKING:
    import pandas as pd

FACTORS = (0.5, 1.0, 1.25, 2.0)
ARMS = {"drop-free": {"name": "350M+MoE-128"}} | {
    f"capacity {f:g}": {"name": "350M+MoE-128", "routing": RoutingConfig(capacity_factor=f, capacity_factor_eval=f)}
    for f in reversed(FACTORS)
}
"""Arm -> arguments of `settings.spec`."""


def headline(final: pd.DataFrame) -> str:
    """Return the result in one line."""
    return comparison.difference(final, "capacity 1", "drop-free")


EXPERIMENT = Experiment(
    name="capacity",
    number=21,
    title="What a capacity limit costs",
    paper="beyond the paper",
    question="What do dropped tokens cost in loss?",
    paper_answer="Not examined; all runs use capacity factor 1.0.",
    scales=twin_scales(5),
    arms=ARMS,
)
