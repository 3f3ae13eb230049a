"""Compute a training's passes in its dtype."""

from __future__ import annotations

import torch

from moelab.config import TrainConfig


def autocast(config: TrainConfig) -> torch.autocast:
    """Return the context of a forward pass: products in bf16 where the config says so, else all in fp32.

    Casts of weights are not kept: each has one use in a pass, and with `shard` those of all layers would stay in memory
    until its end.
    """
    return torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bf16", cache_enabled=False)
