"""Compile the parts of a training step (`TrainConfig.compile`).

`torch.compile` compiles the attention half of each block and each dense feed-forward (also a residual layer's fixed
one); all layers share the code. Not compiled are routed layers, which have kernels of their own (`moelab.kernels`), the
head with its loss, which has a function of its own, and evaluation, whose last batches have other shapes.
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
    """Make `model` run compiled code in training mode; the first step compiles it.

    The code is stored in the workspace, or in `TORCHINDUCTOR_CACHE_DIR` if it is set, so that later runs of the same
    shapes start in seconds.

    Raises:
        ValueError: there is no C++ compiler, or the layout changes the parts to be compiled.
    """
    compiler = os.environ.get("CXX", "g++")
    if config.device == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"train: compile needs a C++ compiler, but {compiler!r} is not found; install it, set CXX, "
            "or leave compile off"
        )
    if parallel.tensor > 1 or parallel.shard or parallel.recompute:
        raise ValueError(
            "train: compile knows no tensor slicing, shard or recompute; leave compile off or choose another layout"
        )
    from torch._inductor import config as inductor

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(paths.home() / "compiled"))
    inductor.compile_threads = 1  # starting a pool of processes takes longer than compiling the few files
    inductor.cpp.threads = config.threads  # explicit, because the default is not part of the cache's key
    for block in model.blocks:
        block.attend = _compiled_in_training(block, block.attend)
        for module in block.modules():
            if isinstance(module, MLP):
                module.forward = _compiled_in_training(module, module.forward)


def _compiled_in_training(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=False)
    return lambda *arguments: (compiled if module.training else function)(*arguments)
