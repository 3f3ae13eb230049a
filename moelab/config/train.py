"""Describe a training: `TrainConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moelab.config._check import check as _check
from moelab.config._check import check_choices

if TYPE_CHECKING:
    from moelab.config.model import ModelConfig
    from moelab.config.parallel import ParallelConfig

Dtype = Literal["fp32", "bf16"]
Device = Literal["cpu", "cuda"]
MAX_THREADS = 1024
"""torch ends the process where threads cannot be started."""


@dataclass(frozen=True)
class TrainConfig:
    """Describe one training: tokens, optimiser, evaluation.

    The defaults suit a twin (a scaled-down model); the paper's settings come from `moelab.paper`.

    Attributes:
        tokens: training tokens; the run takes ``tokens // (batch_size * context)`` steps.
        batch_size: sequences per step, over all ranks.
        micro_batch: sequences per forward pass; 0 means the whole batch. Part of a run's identity, because capacity and
            the load-balancing loss are computed per micro-batch, as in the paper.
        lr, min_lr: peak and final learning rate.
        warmup_tokens: linear warm-up; then cosine decay until `decay_tokens` (0: until `tokens`), then `min_lr`.
        cooldown_tokens: above 0, the rate stays at `lr` after the warm-up (the stable phase of a WSD schedule) and
            decays linearly to `min_lr` over the last `cooldown_tokens` tokens, so that a shorter run equals a longer
            one until its cooldown begins. 0 means the cosine.
        betas, eps, weight_decay, clip: AdamW's settings and the largest gradient norm (0: no clipping). Biases and
            norms are not decayed.
        dtype: ``fp32``, or ``bf16`` for autocast matrix products over fp32 weights.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads of the run. Part of its identity, because the order of sums depends on it.
        seed: seed of initial weights, data order, dropout and random token selection.
        eval_every: steps between evaluations on at most `eval_tokens` validation tokens per domain. After the last
            step, all validation tokens are, at most 100 million of each domain.
        log_every: steps between metric rows.
        checkpoint_every: steps between checkpoints (0: only at the end or when told to stop). Not part of a run's
            identity.
        keep_at: tokens after which a checkpoint is written and kept, so that other runs can start from it
            (`moelab.runs.spec.Start`); the others are removed, but for the newest two. Not part of a run's identity.
        tensorboard: also write TensorBoard events. Not part of a run's identity.
        compile: True in specs of earlier versions, in which it chose other kernels; new runs refuse it.
    """

    tokens: int = 1_000_000
    batch_size: int = 4
    micro_batch: int = 0
    lr: float = 4e-3
    min_lr: float = 4e-4
    warmup_tokens: int = 50_000
    decay_tokens: int = 0
    cooldown_tokens: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: Dtype = "fp32"
    device: Device = "cpu"
    threads: int = 1
    seed: int = 0
    eval_every: int = 100
    eval_tokens: int = 16_384
    log_every: int = 20
    checkpoint_every: int = field(default=100, metadata={"identity": False})
    keep_at: tuple[int, ...] = field(default=(), compare=False, metadata={"identity": False})
    tensorboard: bool = field(default=False, metadata={"identity": False})
    compile: bool = False

    def __post_init__(self) -> None:
        for what in ("tokens", "batch_size", "lr", "eval_every", "eval_tokens", "log_every", "threads"):
            value = getattr(self, what)
            _check(value > 0, f"train: {what} must be positive, got {value}")
        _check(self.eps > 0, f"train: eps must be positive, got {self.eps}")
        _check(self.threads <= MAX_THREADS, f"train: threads must be at most {MAX_THREADS}, got {self.threads}")
        two = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _check(two, f"train: betas must be two numbers from 0 up to, not including, 1, got {list(self.betas)}")
        for what in (
            "micro_batch",
            "min_lr",
            "warmup_tokens",
            "decay_tokens",
            "cooldown_tokens",
            "weight_decay",
            "clip",
            "checkpoint_every",
            "seed",
        ):
            value = getattr(self, what)
            _check(value >= 0, f"train: {what} must not be negative, got {value}")
        _check(
            not self.micro_batch or self.batch_size % self.micro_batch == 0,
            f"train: micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}",
        )
        _check(
            not self.cooldown_tokens or not self.decay_tokens,
            f"train: decay_tokens {self.decay_tokens} is of the cosine, cooldown_tokens {self.cooldown_tokens} "
            "replaces it; give one",
        )
        _check(
            not self.decay_tokens or self.warmup_tokens < self.decay_tokens,
            f"train: the cosine begins after warmup_tokens {self.warmup_tokens}, so decay_tokens must be more, "
            f"or 0 (as tokens), got {self.decay_tokens}",
        )
        _check(
            not self.cooldown_tokens or self.warmup_tokens + self.cooldown_tokens <= self.tokens,
            f"train: warmup_tokens {self.warmup_tokens} and cooldown_tokens {self.cooldown_tokens} are more than "
            f"tokens {self.tokens}",
        )
        _check(self.min_lr <= self.lr, f"train: min_lr {self.min_lr} is above lr {self.lr}")
        check_choices(self, "train")

    def check_layout(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Check that a model can be trained in a layout; ValueError, one line, if not."""
        model.check_layout(parallel)
        B, micro_batch, ranks = self.batch_size, self.micro_batch or self.batch_size, parallel.data
        count = B // micro_batch
        _check(
            count % ranks == 0,
            f"train: {count} micro-batches a step (batch_size {B}, micro_batch {micro_batch}) do not spread over "
            f"{ranks} data ranks; choose a micro_batch that divides {B // math.gcd(B, ranks)}",
        )
        _check(
            parallel.tensor == 1 or not model.dropout,
            "train: dropout with tensor slicing is not supported, its masks would depend on the layout",
        )
        _check(
            model.routing.aux_scope != "step" or count == ranks,
            f"train: aux_scope 'step' needs one micro-batch per data rank, got {count} on {ranks} data ranks",
        )

    def step_at(self, tokens: int, context: int, what: str) -> int:
        """Return the steps that take `tokens` tokens.

        Raises:
            ValueError: one line that begins with `what`: it is no whole number of steps.
        """
        a_step = self.batch_size * context
        step = tokens // a_step
        _check(
            tokens > 0 and tokens % a_step == 0,
            f"{what} must be a multiple of a step's {a_step} tokens and above 0, got {tokens}; "
            f"nearest: {max(1, step) * a_step} and {(max(1, step) + 1) * a_step}",
        )
        return step

    def steps(self, context: int) -> int:
        """Return the number of optimiser steps for sequences of `context` tokens; ValueError if less than one."""
        steps = self.tokens // (self.batch_size * context)
        _check(
            steps >= 1,
            f"train: {self.tokens} tokens are less than one step of {self.batch_size} x {context} = "
            f"{self.batch_size * context} tokens",
        )
        return steps
