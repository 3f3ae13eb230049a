"""Switch a model to a mode of inference: fast, compiled, batch-invariant, or the paper's baseline.

**baseline** (section 5.4): gating by one-hot masks, dispatch and combine by einsum, and every expert computes as many
rows as the busiest one (`moelab.models.baseline`). Among ranks, all slots, also empty ones, are sent in flat
all-to-alls (`moelab.engine.padded`).

**optimised**: on CUDA, the fused gate, table and grouped kernels that training uses as well. On a CPU, each matrix is
frozen for fast products of few rows, by few calls (`moelab.inference.frozen`, `frozen_blocks`).

**compiled** (CPU with AVX-512 and a C++ compiler): as optimised, with our own compiled code for products, experts and
the attention of a decoding step (`moelab.kernels.packed`). The fastest, in bf16 above all, and batch-invariant while
all tokens are finite; the code is compiled once on a machine, which takes half a minute.

**invariant** (CPU): as optimised, and a sequence has the same bits in any batch, because the products of a row do not
depend on the other rows. Evaluations use it. In bf16 the optimised mode has this property as well.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moelab import kernels, paths
from moelab.inference.frozen import can_freeze
from moelab.inference.frozen_blocks import freeze, is_frozen
from moelab.kernels import packed
from moelab.models import GPT
from moelab.models.baseline import MaskRouter
from moelab.models.moe import MoE

MODES = ("optimised", "compiled", "invariant", "baseline")
STATIC_TOKENS = 64
"""On CUDA, the baseline uses a fixed number of slots up to this many tokens, so that a graph can capture the step."""


def set_mode(model: GPT, mode: str = "optimised", *, drop_free: bool = True) -> GPT:
    """Switch the model to a mode and to evaluation, in place, and return it; once, where the mode freezes the model.

    Args:
        mode: one of `MODES`.
        drop_free: False keeps the routing's evaluation capacity, with which a token may be dropped depending on the
            other tokens of the batch.

    Raises:
        ValueError: unknown mode, "invariant" or "compiled" where it is not possible (`can_be_invariant`,
            `why_not_compiled`) or its code cannot be compiled, or the model is frozen.
    """
    if mode not in MODES:
        raise ValueError(f"inference: mode must be {', '.join(map(repr, MODES[:-1]))} or {MODES[-1]!r}, got {mode!r}")
    if is_frozen(model):
        raise ValueError(
            f"inference: mode {mode!r} needs a model with its weights, and an earlier set_mode has packed those of "
            "this one; build or load it again"
        )
    weight = model.token_embedding.weight
    if mode == "invariant" and not can_be_invariant(weight):
        raise ValueError(
            f"inference: mode 'invariant' needs a CPU whose oneDNN computes in the weights' dtype, "
            f"got {weight.dtype} on {weight.device.type}; 'optimised' works everywhere"
        )
    if mode == "compiled" and (reason := why_not_compiled(weight)):
        raise ValueError(f"inference: mode 'compiled' does not work here: {reason}; 'optimised' works everywhere")
    if mode == "compiled":
        paths.keep_compiled_kernels()
        try:
            kernels.load_compiled()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"inference: mode 'compiled': {error}; 'optimised' works everywhere") from None
    for moe in [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]:
        if drop_free:
            moe.router.config = replace(moe.router.config, drop_tokens=False)
        if mode == "baseline":
            moe.router = MaskRouter(moe.router)
            moe.set_dispatch("einsum", static_tokens=STATIC_TOKENS if weight.device.type == "cuda" else 0)
        else:
            moe.set_dispatch("local")
    if mode != "baseline" and weight.device.type == "cpu" and (mode == "compiled" or can_freeze(weight.dtype)):
        freeze(model, "fastest" if mode == "optimised" else mode)
    return model.eval()


def can_be_invariant(weight: Tensor) -> bool:
    """Return whether a model with this weight can be switched to the mode "invariant"."""
    return weight.device.type == "cpu" and can_freeze(weight.dtype)


def why_not_compiled(weight: Tensor) -> str | None:
    """Return why a model with this weight cannot be switched to the mode "compiled", or None if it can."""
    if weight.device.type != "cpu":
        return f"it is for CPUs, and the weights are on {weight.device.type}"
    return packed.why_not(weight.dtype)
