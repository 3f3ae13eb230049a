"""Measure the spread over seeds (beyond the paper, which gives one run per arm).

Shows: the standard deviation of the final loss over seeds, of a single arm and of the difference of two arms with the
same seed (same shared weights, same data order), and how many seeds an effect needs to be seen.

Fixed before the first run: the seeds of the experiments that share these runs, first 3, later 5. The pair of PR-MoE and
MoE-128 was added after its runs were seen.
"""

from __future__ import annotations

import math

from moelab.design import comparison, power
from moelab.design.experiment import Experiment, twin_scales
from moelab.lazy import pd

ARMS = {
    "Dense": "350M",
    "MoE-32": "350M+MoE-32",
    "PR-MoE-32/64": "350M+PR-MoE-32/64",
    "MoE-128": "350M+MoE-128",
}
PAIRS = (("MoE-128", "Dense"), ("MoE-32", "Dense"), ("MoE-128", "MoE-32"), ("PR-MoE-32/64", "MoE-128"))


def deviations(final: pd.DataFrame) -> pd.DataFrame:
    """Return standard deviations over seeds of the difference of two arms, of pairs that have two seeds or more.

    Columns: what (the pair), mean, paired, unpaired (if seeds were not shared), seeds, and the seeds of each arm with
    which one look tells an effect of 0.03 or 0.01 nats with 80 % power, unpaired as claims are judged
    (`moelab.design.power`); None is more than `MAX_SEEDS`.
    """
    table = comparison.by_arm(final)
    rows = []
    for left, right in PAIRS:
        if left in table and right in table and len(both := table[[left, right]].dropna()) > 1:
            gap = both[left] - both[right]
            spreads = {left: both[left].std(), right: both[right].std()}
            unpaired, weights = math.hypot(*spreads.values()), {left: 1.0, right: -1.0}
            needed = [power.of_contrasts([(weights, e)], spreads, looks=False).at_once for e in (0.03, 0.01)]
            rows.append([f"{left} − {right}", gap.mean(), gap.std(), unpaired, len(both), *needed])
    columns = ["what", "mean", "paired", "unpaired", "seeds", "seeds for 0.03", "seeds for 0.01"]
    return pd.DataFrame(rows, columns=columns)


def headline(table: pd.DataFrame) -> str:
    """Return, in one line, how sharing seeds changes the spread of the first pair and of that which it helps most.

    `table` comes from `deviations`.
    """
    if not len(table):
        return "no pair of arms has finished two seeds"
    most = table.loc[(table["paired"] / table["unpaired"]).idxmin()]
    pairs = {row["what"]: f"{row['what']} {row['paired']:.3f} / {row['unpaired']:.3f}" for row in (table.iloc[0], most)}
    return (
        f"Standard deviation of a difference, same seeds / other seeds: {', '.join(pairs.values())} nats "
        f"({most['seeds']:.0f} seeds)"
    )


EXPERIMENT = Experiment(
    name="seeds",
    number=23,
    title="Spread over seeds",
    paper="beyond the paper",
    question="How many seeds does a difference need?",
    paper_answer="Not examined; one run an arm.",
    scales=twin_scales(4),
    arms=ARMS,
)
