"""Make the optimizer of a training."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim.adam import adam

from moelab.config import TrainConfig
from moelab.engine.sharded import is_sharded

_METHODS = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
_STEP = inspect.unwrap(torch.optim.AdamW.step)


class AdamW(torch.optim.AdamW):
    """torch's AdamW without the import of torch's compiler (`torch._dynamo`), which takes a second.

    torch's own step and methods import it with their first call, only to keep it from compiling them; no compiled part
    of a training calls them.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        for wrapper in (*(getattr(torch.optim.Optimizer, name) for name in _METHODS), adam):
            function = inspect.unwrap(wrapper)
            # Where torch looks for the function as its compiler returns it; another torch ignores the attribute.
            function.__dict__.setdefault("__dynamo_disable", function)
        super().__init__(*arguments, **options)

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # training has no closure
        """Update the parameters."""
        with torch.no_grad():
            _STEP(self, closure)


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Return AdamW with weight decay on matrices only, not on biases and norms, as in GPT-3's recipe."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # the router's balance_bias
            continue
        matrix = parameter.ndim >= 2 and not name.endswith("bias")
        # One fused update cannot mix sharded and whole tensors.
        groups.setdefault((matrix, is_sharded(parameter)), []).append(parameter)
    return AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if matrix else 0.0}
            for (matrix, _), parameters in sorted(groups.items(), reverse=True)
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
