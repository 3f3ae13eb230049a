"""Compute the gate on CPU by compiled code (``gating.cpp``)."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .._common import contiguous
from .._cpu import buffers
from .._hash import hash_keys
from . import load, runs_here


def fits(logits_SE: torch.Tensor) -> bool:
    """Return whether the compiled code takes these logits; float64 is for ``_cpu``."""
    return logits_SE.dtype != torch.float64 and runs_here()


class CompiledGate(torch.autograd.Function):
    """Compute the gate and its gradient; the backward pass computes the probabilities again from the logits."""

    @staticmethod
    def forward(ctx, logits_SE, choice_SE, top_k, capacity, seed, normalize):
        load()
        logits_SE, choice_SE = contiguous(logits_SE, choice_SE)
        hash_words = () if seed is None else hash_keys(seed)
        *results, softmax_3S, share_E = torch.ops.moelab.gate_forward.default(
            logits_SE, choice_SE, top_k, capacity, hash_words, normalize
        )
        expert_SK, slot_SK, _, load_E, kept_E, _, _ = results
        ctx.save_for_backward(logits_SE, softmax_3S, expert_SK, slot_SK, share_E)
        ctx.normalize = normalize
        ctx.mark_non_differentiable(expert_SK, slot_SK, load_E, kept_E)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, _expert, _slot, d_weight_SK, _load, _kept, d_aux, d_z):
        logits_SE = ctx.saved_tensors[0]
        d_SE = buffers.empty(logits_SE.shape, logits_SE.dtype)
        grads = contiguous(d_weight_SK, d_aux, d_z)
        torch.ops.moelab.gate_backward.default(*ctx.saved_tensors, *grads, ctx.normalize, d_SE)
        return d_SE, *[None] * 5
