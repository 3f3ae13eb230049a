"""Switch a model to a mode of inference: the fast one, or the paper's baseline.

**baseline** (section 5.4): gating by one-hot masks, dispatch and combine by einsum, and every expert computes as many
rows as the busiest one (`moelab.models.baseline`). Among ranks, all slots, also empty ones, are sent in flat
all-to-alls (`moelab.engine.padded`).

**optimised**: the kernels that training uses, without losses. On CUDA these are the fused gate, table and grouped
experts. On a CPU, a `Generator` packs the weights of a model in this mode once and computes a step in one C++ call
(`moelab.inference.packing`), in which a sequence has the same bits in any batch. Without a compiler, in another dtype
than fp32 and bf16, or with a width that is no multiple of 16, the model's modules compute, whose bits may depend on the
other sequences of the batch.
"""

from __future__ import annotations

from dataclasses import replace

from moelab import kernels
from moelab.models import GPT
from moelab.models.baseline import mask_gate
from moelab.models.moe import MoE

MODES = ("optimised", "baseline")
STATIC_TOKENS = 64
"""On CUDA, the baseline uses a fixed number of slots up to this many tokens, so that a graph can capture the step."""


def set_mode(model: GPT, mode: str = "optimised", *, drop_free: bool = True) -> GPT:
    """Switch the model to a mode and to evaluation, in place, and return it.

    Args:
        mode: one of `MODES`.
        drop_free: False keeps the routing's evaluation capacity, with which a token may be dropped depending on the
            other tokens of the batch.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"inference: mode must be {' or '.join(map(repr, MODES))}, got {mode!r}")
    model.mode = mode
    static_tokens = STATIC_TOKENS if model.token_embedding.weight.device.type == "cuda" else 0
    for moe in [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]:
        if drop_free:
            moe.router.config = replace(moe.router.config, drop_tokens=False)
        moe.router.losses = mode == "baseline"
        if mode == "baseline":
            moe.router.gate, moe.dispatcher = mask_gate, moe.own.baseline(static_tokens)
        else:
            moe.router.gate, moe.dispatcher = kernels.gate, moe.own
    return model.eval()
