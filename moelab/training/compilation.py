"""Compile the parts of a training step (`TrainConfig.compile`).

`torch.compile` compiles the attention half of each block and each dense feed-forward (also a residual layer's fixed
one); all layers share the code. On a CPU with AVX-512, gate, dispatch and experts are computed by C++ of our own
(`moelab.kernels._compiled`), which is compiled once for all models. Not compiled are the head with its loss, which has
a function of its own, and evaluation, whose last batches have other shapes.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moelab import kernels, paths
from moelab.config import ParallelConfig, TrainConfig
from moelab.models.dispatch import LocalDispatch
from moelab.models.gpt import GPT
from moelab.models.moe import MLP, Experts, MoE
from moelab.models.routing import Router


def compile_parts(model: GPT, config: TrainConfig, parallel: ParallelConfig) -> None:
    """Make `model` run compiled code in training mode; the first step compiles it.

    The code is stored in the workspace, or in `TORCHINDUCTOR_CACHE_DIR` and `TORCH_EXTENSIONS_DIR` if they are set, so
    that later runs start in seconds: with torch's parts those of the same shapes, with ours all.

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
    paths.keep_compiled_kernels()
    inductor.compile_threads = 1  # starting a pool of processes takes longer than compiling the few files
    inductor.cpp.threads = config.threads  # explicit, because the default is not part of the cache's key
    if config.device == "cpu" and kernels.why_not_compiled() is None:
        try:
            kernels.load_compiled()  # here, so that what is missing is said before the first step
        except RuntimeError as error:
            raise ValueError(f"train: compile: {error}; leave compile off") from None
    for block in model.blocks:
        block.attend = _compiled_in_training(block, block.attend)
        for module in block.modules():
            if isinstance(module, MLP):
                module.forward = _compiled_in_training(module, module.forward)
            elif isinstance(module, Experts) and config.device == "cpu":
                module.ffn = _kernel_in_training(module, module.ffn)
            elif isinstance(module, Router) and config.device == "cpu":
                module.gate = _kernel_in_training(module, module.gate)
            elif isinstance(module, MoE) and config.device == "cpu" and isinstance(module.dispatcher, LocalDispatch):
                module.dispatcher = LocalDispatch(functools.partial(_backend, module))


def _backend(module: nn.Module) -> kernels.Backend:
    return "compiled" if module.training else "auto"


def _compiled_in_training(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=False)
    return lambda *arguments: (compiled if module.training else function)(*arguments)


def _kernel_in_training(module: nn.Module, operation: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs our compiled code of an operation in training mode, if this machine and sizes fit."""
    compiled = functools.partial(operation, backend="compiled")
    return lambda *arguments, **options: (compiled if module.training else operation)(*arguments, **options)
