"""The settings all training experiments share, so that the same arm of two experiments is the same run.

Scales:

- `smoke`: twins of twins, 24 steps of sotu, seconds: shows that everything runs.
- `cpu`: hidden size / 32, depth / 3, experts / 8 (350M: 32 wide, 8 layers; 1.3B: 64; 6.7B: 128 and 11 layers; 128 experts: 16); 1.02 M
  tokens of mix5 in batches of 8 x 128, BPE of 2048. Chosen for what one core resolves: at width 32 a run takes half a minute to two, so that 3 to
  8 seeds are affordable, and 1 M tokens are about 10 for each of the dense twin's 98 k parameters outside the embedding (the paper: 850), where
  capacity begins to matter; at width 64 it would be 2.5. A vocabulary of 4096 would double the time.
- `gpu`: hidden / 4, depth / 2, experts / 4, 200 M tokens of mix5; one GPU.
- `paper`: the published settings (`moelab.paper.training_settings`) on 64 GPUs, as the scripts: batch, rates, warm-up and decay in tokens, capacity 1.0
  with random token selection. What differs: bf16 for fp16 with loss scaling; the public Pile for the internal blend; the dense models' batch is not
  ramped up; FSDP instead of tensor slicing for the dense 1.3B and 6.7B (one degree less to set, the same mathematics).

Twins are drop-free: in the first 100 k tokens routing is so uneven that capacity 1.0 would drop a third of the tokens, which a 572,000-step run
forgets and a 1,000-step run does not. The experiment `capacity` measures that.

Learning rate: one for all arms on a base, so that no arm is tuned more than another. The `cpu` rates come from sweeps of four rates (experiment
`learning-rate`, `-p base=...`) on a seed that no other experiment uses (`TRAINS`, `SWEPT`). Where there is no sweep, larger bases train at less than the 350M in
the proportion of the paper's dense rates (3e-4, 2e-4 and 1.2e-4 for 350M, 1.3B and 6.7B).
"""

from __future__ import annotations

from dataclasses import replace

from moelab import paper
from moelab.config import DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moelab.config.distill import DistillConfig
from moelab.config.parallel import ParallelConfig
from moelab.runs.spec import RunSpec

SWEEP_SEED = 100
"""The seed of the learning-rate sweep; experiments use seeds from 0."""

SHAPES = {
    "smoke": {"hidden": 32, "depth": 6, "experts": 8, "vocab": 1024, "context": 64, "head_size": 32},
    "cpu": {"hidden": 32, "depth": 3, "experts": 8, "vocab": 2048, "context": 128, "head_size": 32},
    "gpu": {"hidden": 4, "depth": 2, "experts": 4, "vocab": 8192, "context": 512, "head_size": 64},
}
"""Scale -> arguments of `ModelConfig.shrink`."""

TRAINS = {
    "smoke": TrainConfig(
        tokens=12_288,
        batch_size=8,
        warmup_tokens=2_048,
        eval_every=8,
        eval_tokens=4_096,
        log_every=4,
        checkpoint_every=8,
    ),
    "cpu": TrainConfig(
        tokens=1_024_000,
        batch_size=8,
        lr=16e-3,
        min_lr=1.6e-3,
        warmup_tokens=51_200,
        eval_every=100,
        eval_tokens=4_096,
        log_every=20,
        checkpoint_every=200,
    ),
    "gpu": TrainConfig(
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
}

SWEPT = {"cpu": {"1.3B": 5.333e-3, "6.7B": 3.2e-3}}
"""Scale -> larger base -> the peak rate at which its arms end lowest on average in their sweep; the 350M's is in `TRAINS`."""

DATA = {
    "smoke": DataConfig(tokenizer="bpe-1024", context=64, max_bytes=3_000_000),
    "cpu": DataConfig(corpus="mix5", tokenizer="bpe-2048", context=128),
    "gpu": DataConfig(corpus="mix5", tokenizer="bpe-8192", context=512),
    "paper": DataConfig(corpus="hf:monology/pile-uncopyrighted", tokenizer="gpt2", context=2048),
}

SCALES = ("smoke", "cpu", "gpu", "paper")

GPUS = 64
"""Of the paper's training scripts."""


def spec(
    name: str,
    scale: str,
    seed: int = 0,
    *,
    label: str = "",
    run: str = "",
    tokens: int = 0,
    corpus: str = "",
    lr: float = 0.0,
    routing: RoutingConfig | None = None,
    residual_mix: str = "learned",
    ranks: int = 1,
    teacher: RunSpec | None = None,
    distill: DistillConfig | None = None,
) -> RunSpec:
    """One training of a paper model, or of its twin.

    Args:
        name: of the model, such as ``350M+MoE-128``.
        run: whose published settings the `paper` scale takes; the model's by default, the 350M+MoE-128 recipe of its base if it has none.
        tokens: 0 is the scale's own number.
        corpus: see `DataConfig`; empty is the scale's own.
        lr: peak learning rate, with a tenth of it at the end; 0 is `peak_rate`. Not at `paper` scale, which has published ones.
        routing: other than the scale's own.
        ranks: processes (GPUs) of a twin; the batch is then cut into one micro-batch a rank, which makes it another run.

    Raises:
        ValueError: one line: an unknown scale or model, or a number out of range.
    """
    if scale not in SCALES:
        raise ValueError(f"no scale {scale!r}; allowed: {', '.join(SCALES)}")
    if tokens < 0:
        raise ValueError(f"tokens must not be negative (0 is the scale's own number), got {tokens}")
    data = replace(DATA[scale], corpus=corpus or DATA[scale].corpus)
    if scale == "paper":
        made = _published(name, run or name, data)
        train = replace(made.train, seed=seed, tokens=tokens or made.train.tokens)
        model = replace(made.model, routing=routing or made.model.routing, residual_mix=residual_mix)
        return replace(made, model=model, train=train, label=label, teacher=teacher, distill=distill)
    train = TRAINS[scale]
    if ranks < 1 or train.batch_size % ranks:
        raise ValueError(f"ranks must divide the batch of {train.batch_size} sequences, got {ranks}")
    peak = peak_rate(name, scale)
    train = replace(
        train,
        seed=seed,
        tokens=tokens or train.tokens,
        lr=lr or peak,
        min_lr=lr / 10 if lr else round(train.min_lr * peak / train.lr, 7),
        micro_batch=train.batch_size // ranks if ranks > 1 else train.micro_batch,
    )
    model = ModelConfig.parse(name).shrink(**SHAPES[scale])
    model = replace(model, routing=routing or RoutingConfig(drop_tokens=False), residual_mix=residual_mix)
    return RunSpec(
        model=model,
        train=train,
        data=data,
        parallel=ParallelConfig(data=ranks),
        teacher=teacher,
        distill=distill,
        label=label,
    )


def base_of(name: str) -> str:
    """The dense model that a model grows from: ``1.3B`` of ``1.3B+MoE-128``."""
    return name.split("+")[0]


def of_base(name: str) -> float:
    """Learning rate of a model's base over that of the 350M, as the paper trains them dense; 1 for a base it does not train."""
    rates = {row.run: row.lr for row in paper.all_training_settings()}
    return rates.get(base_of(name), rates["350M"]) / rates["350M"]


def peak_rate(name: str, scale: str) -> float:
    """The peak learning rate of a twin: what its base's sweep chose, else the scale's own in the proportion of the paper's dense rates."""
    swept = SWEPT.get(scale, {}).get(base_of(name))
    return swept or round(TRAINS[scale].lr * of_base(name), 6)


def check_seeds(experiment: str, seeds: int) -> range:
    """Seeds 0 .. seeds - 1; ValueError for none."""
    if seeds < 1:
        raise ValueError(f"{experiment}: seeds must be at least 1, got {seeds}")
    return range(seeds)


def _published(name: str, run: str, data: DataConfig) -> RunSpec:
    """A model at its own size with the settings of the paper's scripts."""
    known = {row.run for row in paper.all_training_settings()}
    base = base_of(name)
    s = paper.training_settings(run if run in known else f"{base}+MoE-128" if "MoE" in name else base)
    routing = RoutingConfig()
    if s.capacity_factor_train is not None:
        routing = RoutingConfig(
            capacity_factor=s.capacity_factor_train,
            capacity_factor_eval=s.capacity_factor_eval,
            min_capacity=s.min_capacity,
            drop_tokens=s.drop_tokens,
            random_token_selection=s.random_token_selection,
            aux_loss=s.aux_coefficient,
            choice_noise="gumbel_second" if "Top2" in name else "none",
        )
    model = ModelConfig.parse(name, init_std=s.init_std, dropout=s.dropout, routing=routing)
    step = s.batch_seqs * s.seq_len
    train = TrainConfig(
        tokens=s.train_tokens,
        batch_size=s.batch_seqs,
        micro_batch=s.micro_batch_seqs,
        lr=s.lr,
        min_lr=s.min_lr,
        warmup_tokens=s.warmup_tokens,
        decay_tokens=s.decay_tokens,
        betas=(s.adam_beta1, s.adam_beta2),
        weight_decay=s.weight_decay,
        clip=s.grad_clip,
        dtype="bf16",
        device="cuda",
        eval_every=max(1, 1_000_000_000 // step),
        eval_tokens=1_000_000,
        checkpoint_every=500,
    )
    layout = ParallelConfig(data=GPUS, shard=not model.is_moe and base != "350M", recompute=s.activation_checkpointing)
    return RunSpec(model=model, train=train, data=data, parallel=layout)
