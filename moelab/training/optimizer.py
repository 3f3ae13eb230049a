"""Make the optimizer of a training."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moelab.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only, not on biases and norms, as in GPT-3's recipe."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # the router's balance_bias
            continue
        matrix = parameter.ndim >= 2 and not name.endswith("bias")
        # One fused update cannot mix sharded and whole tensors.
        groups.setdefault((matrix, isinstance(parameter, DTensor)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if matrix else 0.0}
            for (matrix, _), parameters in sorted(groups.items(), reverse=True)
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
