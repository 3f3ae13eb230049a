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

from moelab.config import DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moelab.workbench.experiments.base import Experiment, Scale
from moelab.workbench.specs import RunSpec

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
) -> list[RunSpec]:
    """The runs, seed by seed so that a stopped batch has whole seeds.

    Args:
        seeds: seeds 0 .. seeds - 1.
        arms: names from `ARMS`.
        tokens: training tokens of a run; 0 is the scale's own number.
        corpus: see `DataConfig`; empty is the scale's own.
        drop_tokens: capacity factor 1.0 with random token selection, as the paper trains, instead of drop-free.
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
    train = replace(train, tokens=tokens or train.tokens)
    data = replace(data, corpus=corpus or data.corpus)
    models = {arm: replace(ModelConfig.parse(ARMS[arm]).shrink(**shape), routing=routing) for arm in arms}
    return [
        RunSpec(model=model, train=replace(train, seed=seed), data=data, label=arm)
        for seed in range(seeds)
        for arm, model in models.items()
    ]


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
