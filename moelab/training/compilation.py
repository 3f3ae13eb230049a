"""`TrainConfig.compile`: fused code for the parts of a training step between the routed products, by `torch.compile`.

Compiled are the attention half of each block and each dense feed-forward (a residual layer's fixed one, too): the same code in every layer. Routing,
experts, and the head with its loss have functions of their own and stay as they are. So does evaluation, whose last batches have other shapes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moelab import paths
from moelab.config import ParallelConfig, TrainConfig
from moelab.models.gpt import GPT
from moelab.models.moe import MLP


def compile_parts(model: GPT, config: TrainConfig, parallel: ParallelConfig) -> None:
    """Have `model` run compiled code in training mode; it is compiled in the first step.

    The code is kept in the workspace (`TORCHINDUCTOR_CACHE_DIR` overrides where), so that later runs of the same shapes start in seconds.

    Raises:
        ValueError: there is no C++ compiler, or the layout changes the parts that are compiled.
    """
    compiler = os.environ.get("CXX", "g++")
    if config.device == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"train: compile needs a C++ compiler, but {compiler!r} is not found; install it, set CXX, or leave compile off"
        )
    if parallel.tensor > 1 or parallel.shard or parallel.recompute:
        raise ValueError(
            "train: compile knows no tensor slicing, shard or recompute; leave compile off or choose another layout"
        )
    from torch._inductor import config as inductor

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(paths.home() / "compiled"))
    inductor.compile_threads = 1  # a few small files: a pool of compiling processes takes longer to start
    inductor.cpp.threads = config.threads  # part of the cache's key, unlike the number torch would use by itself
    for block in model.blocks:
        block.attend = _compiled_in_training(block, block.attend)
        for module in block.modules():
            if isinstance(module, MLP):
                module.forward = _compiled_in_training(module, module.forward)


def _compiled_in_training(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=False)
    return lambda *arguments: (compiled if module.training else function)(*arguments)
