"""Compute the gate by ``gating.cpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .._common import contiguous
from .._hash import hash_keys
from . import operations


def gate_without_gradient(logits_SE, choice_SE, top_k, capacity, seed, normalize) -> list[Any]:
    """Return the gate's results without the losses, which are None, for a step that needs no gradients."""
    logits_SE, choice_SE = contiguous(logits_SE, choice_SE)
    hash_words = () if seed is None else hash_keys(seed)
    forward = operations().gate_forward.default
    return [*forward(logits_SE, choice_SE, top_k, capacity, hash_words, normalize, False), None, None]


class CppGate(torch.autograd.Function):
    """Compute the gate and its gradient; the backward pass computes the probabilities again from the logits."""

    @staticmethod
    def forward(ctx, logits_SE, choice_SE, top_k, capacity, seed, normalize):
        logits_SE, choice_SE = contiguous(logits_SE, choice_SE)
        hash_words = () if seed is None else hash_keys(seed)
        *results, softmax_3S, share_E = operations().gate_forward.default(
            logits_SE, choice_SE, top_k, capacity, hash_words, normalize, True
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
        saved = ctx.saved_tensors  # once: recomputation allows no more
        d_SE = torch.empty_like(saved[0])
        grads = contiguous(d_weight_SK, d_aux, d_z)
        operations().gate_backward.default(*saved, *grads, ctx.normalize, d_SE)
        return d_SE, *[None] * 5
