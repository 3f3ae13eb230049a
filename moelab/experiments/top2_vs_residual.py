"""Compare top-2 gating with a residual MLP (paper section 4.1.1, Fig 2 right, "Phenomenon II").

Shows: validation loss and training speed of the 350M base with 32 experts and two ways to spend twice the expert
compute: two routed experts per token, or one and a fixed MLP. MoE-32 with one expert is shown beside them. In the paper
the residual form is faster because it sends half the all-to-all volume.

Here: twins, paired by seed. Speed is measured side by side in one process (`moelab.bench.train`): with one rank there
is no all-to-all, so the measurement shows only the cost of routing, copying and smaller products. On 2 and 4 ranks of
this machine (`sessions`) there is one, through memory. The volume is counted from the slots that leave a rank. At
`full` the arms have the paper's own tokens a parameter, at each one's own peak rate and at a shared one.

Fixed before the first run: 3 seeds, all arms on each. Fixed on 2026-11-26, after three seeds had left the losses
undecided: seeds 3 and 4 for all arms, and five is the end (`pr_moe`). Expect of the speed: the residual form as fast
or up to a tenth slower on one rank, where there is no exchange to save, and its fixed MLP and learned mix cost as much
as a second routed expert.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moelab import paper
from moelab.config import ModelConfig, RoutingConfig
from moelab.design import comparison, settings
from moelab.design.experiment import Experiment, twin_scales
from moelab.design.judging import judge, judge_timing
from moelab.design.verdicts import Verdict
from moelab.lazy import pd
from moelab.runs.spec import RunSpec

ARMS = {
    "MoE-32": "350M+MoE-32",
    "Top2-MoE-32": "350M+Top2-MoE-32",
    "Residual-MoE-32": "350M+Residual-MoE-32",
}
"""Arm -> the paper's model."""


def build(
    scale: str, seed: int, overrides: Mapping[str, Any], *, base: str = "350M", rate: settings.Rate = "own"
) -> list[RunSpec]:
    """Return the runs of one seed, on one of `settings.BASES`."""
    return settings.of_arms(ARMS, scale, seed, overrides, base=base, rate=rate)


def layer_flops(model: ModelConfig) -> float:
    """Return forward FLOPs per token of the layers' products, without attention scores and logits (as the paper)."""
    M, T = model.hidden, model.context
    return model.flops_per_token(training=False) - 2 * model.vocab * M - model.layers * 2 * M * (T + 1)


def exchanged_slots(model: ModelConfig, tokens: int) -> int:
    """Return the slots, experts x capacity, that a rank sends to the all-to-all of an MoE layer and micro-batch."""
    experts = max(model.experts)
    return experts * (RoutingConfig().capacity(tokens, experts, model.top_k, training=True) or 0)


def one_session(speeds: Mapping[str, Sequence[float]]) -> list[list[float]]:
    """Return the speed of Residual-MoE-32 over Top2-MoE-32 in each round of one session; empty without both arms.

    `speeds` comes from `moelab.experiments.throughput.speeds`.
    """
    if not {"Top2-MoE-32", "Residual-MoE-32"} <= set(speeds):
        return []
    return [[a / b for a, b in zip(speeds["Residual-MoE-32"], speeds["Top2-MoE-32"], strict=True)]]


def sessions(specs: Sequence[RunSpec], ranks: int, count: int, steps: int, rounds: int) -> list[list[float]]:
    """Measure the training speed of Residual-MoE-32 over Top2-MoE-32 on ranks of this machine, session by session.

    Args:
        specs: one run of each arm.
        ranks, count, steps, rounds: see `moelab.bench.sessions.speed_ratios`.

    Returns:
        The ratio of speeds of each round, by session; empty where an arm is missing, and for runs on a GPU.
    """
    from moelab.bench.sessions import speed_ratios

    arms = {spec.label: spec for spec in specs}
    pair = [arms[label] for label in ("Residual-MoE-32", "Top2-MoE-32") if label in arms]
    if len(pair) < 2 or any(spec.train.device != "cpu" for spec in pair):
        return []
    residual, top2 = ((replace(spec.model, context=spec.data.context), spec.train) for spec in pair)
    return speed_ratios(residual, top2, ranks, count, steps, rounds)


def sessions_table(timed: Mapping[int, Sequence[Sequence[float]]]) -> pd.DataFrame:
    """Return, a row per number of ranks and session, the median, least and greatest ratio of its rounds.

    Args:
        timed: ranks -> `sessions` on them.

    Returns:
        Columns arm (the number of ranks as text), seed (the session), median, least, greatest.
    """
    rows = [
        [f"{n} rank{'' if n == 1 else 's'}", i, statistics.median(r), min(r), max(r)]
        for n, measured in timed.items()
        for i, r in enumerate(measured)
    ]
    return pd.DataFrame(rows, columns=["arm", "seed", "median", "least", "greatest"])


def speed_headline(measured: pd.DataFrame) -> str:
    """Return the least and greatest mean ratio of speeds over numbers of ranks, in one line; from `sessions_table`."""
    if not len(measured):
        return "no speed was measured"
    means = measured.groupby("arm", sort=False)["median"].mean()
    return f"Residual trains at {means.min():.2f} to {means.max():.2f} times the speed of Top-2"


def verdicts(
    final: pd.DataFrame, timed: Mapping[int, Sequence[Sequence[float]]], scale: str, base: str = "350M"
) -> list[Verdict]:
    """Judge the claims: loss on the twins, speed as measured, volume and FLOPs by counting at the paper's size.

    Args:
        timed: ranks -> `sessions` on them.
    """
    ranks = {"residual-faster-than-top2": 1, **{f"residual-faster-than-top2-{n}-ranks": n for n in (2, 4)}}
    judged, shared = [], comparison.how_compared(scale, base)
    for claim in paper.claims("top2-vs-residual"):
        left, right = (ModelConfig.parse(side) for side in (claim.left, claim.right))
        if claim.id in ranks:
            note = "Twins on one rank: no all-to-all, whose volume is what the paper's gain comes from."
            if ranks[claim.id] > 1:
                note = f"Twins on {ranks[claim.id]} ranks of one machine, which has no network."
            judged.append(judge_timing(claim, timed.get(ranks[claim.id], []), note=note, scale=scale))
        elif claim.id == "residual-halves-exchange":
            ratio = exchanged_slots(left, 8192) / exchanged_slots(right, 8192)
            judged.append(
                judge(claim, [ratio], exact=True, note="Slots of a micro-batch of 8192 tokens at capacity 1.")
            )
        elif claim.id == "top2-flops-33pct":
            judged.append(judge(claim, [layer_flops(left) / layer_flops(right)], exact=True, note="Counted."))
        else:
            judged.append(comparison.judge_loss(claim, final, ARMS, scale, note=shared, **EXPERIMENT.plan(scale, base)))
    return judged


EXPERIMENT = Experiment(
    name="top2-vs-residual",
    number=3,
    title="Two experts, or one and a fixed MLP",
    paper="Fig 2 right (section 4.1.1)",
    question="Is a second routed expert worth more than a fixed MLP?",
    paper_answer="No: equal loss, and the residual form trains more than 10 % faster.",
    scales=twin_scales(3, "350M base with 32 experts; 300 B tokens", full=3),
    arms=ARMS,
    build=build,
    measures=True,
    measures_on_gpu=("gpu",),
    looks={"cpu": (3, 5)},
)
