"""Compute the learning rate from the number of tokens seen."""

from __future__ import annotations

import math

from moelab.config import TrainConfig


def learning_rate(config: TrainConfig, tokens: int) -> float:
    """Return the learning rate of a step.

    After a linear warm-up it follows the cosine decay of the paper's recipe, or with `cooldown_tokens` stays constant
    and then decays linearly.

    Args:
        tokens: tokens seen at the end of the step, so that the first step's rate is above zero.
    """
    if tokens < config.warmup_tokens:
        return config.lr * tokens / config.warmup_tokens
    if config.cooldown_tokens:
        left = min(1.0, max(0.0, (config.tokens - tokens) / config.cooldown_tokens))
        return config.min_lr + (config.lr - config.min_lr) * left
    end = config.decay_tokens or config.tokens
    progress = min(1.0, (tokens - config.warmup_tokens) / max(1, end - config.warmup_tokens))
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def branch_learning_rate(config: TrainConfig, tokens: int, start: int, warmup_tokens: int) -> float:
    """Return the learning rate of a step of a branch: `learning_rate`, times a linear warm-up after its start.

    Args:
        tokens: as for `learning_rate`.
        start: tokens at which the branch starts.
        warmup_tokens: of the branch; 0 means none.
    """
    share = min(1.0, (tokens - start) / warmup_tokens) if warmup_tokens else 1.0
    return learning_rate(config, tokens) * share
