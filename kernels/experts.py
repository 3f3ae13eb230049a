"""Compute the experts' feed-forward networks on their groups of rows, of any sizes, also empty (paper 5.4).

Shapes: R rows in expert order, E experts, M hidden, F feed-forward. Expert e's rows are ``offsets[e]`` to
``offsets[e + 1]``; rows past the last offset come out zero.

    y = act(x @ W1[e] + b1[e]) @ W2[e] + b2[e]    W1 [E, M, F], W2 [E, F, M]

``act`` is one of ``ACTIVATIONS`` (``activations.py``); with a gated one, W1 is [E, M, 2 F].

The forward pass keeps the pre-activation for the backward pass, which recomputes the activation from it; this takes a
third less memory than keeping both. With ``gelu_tanh``, the CPU keeps the activation and its slope instead, and its
compiled code does so for all activations. Weight gradients are written expert by expert, in a fixed order and without
atomics, so that they are bitwise reproducible.

The Triton implementation is in ``_experts_triton.py``, the CPU implementations in ``_cpu/experts.py`` and
``_compiled/experts.cpp``.
"""

from __future__ import annotations

import itertools

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ._common import Backend, accumulate_dtype, contiguous, pick_backend
from ._compiled import experts as compiled
from ._cpu.experts import CPUExperts
from ._experts_triton import TritonExperts
from .activations import ACTIVATIONS


def expert_ffn(
    x_RM: torch.Tensor,
    offsets_E1: torch.Tensor,
    w1_EMF: torch.Tensor,
    b1_EF: torch.Tensor | None,
    w2_EFM: torch.Tensor,
    b2_EM: torch.Tensor | None,
    *,
    activation: str = "gelu_tanh",
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return the outputs [R, M] of the experts on their rows [R, M], in x's dtype, accumulated in float32.

    ``offsets_E1`` is int32 [E + 1] (RowTable.offsets_E1). All other tensors have one dtype, or the rows bfloat16 or
    float16 and all weights float32: these are then converted to the rows' dtype, and their gradients back.
    Differentiable (once) in all but the offsets. On CUDA, float32 products are exact unless TF32 is on
    (``_common.dot_precision``); on CPU, float16 is computed in float32. ``activation`` is a name in ``ACTIVATIONS``.
    Raises ``ValueError`` for another one, and for shapes or dtypes that do not fit.
    """
    _check(x_RM, offsets_E1, activation, (w1_EMF, b1_EF), (w2_EFM, b2_EM))
    chosen = pick_backend("expert_ffn", backend, x_RM, offsets_E1, w1_EMF, b1_EF, w2_EFM, b2_EM)
    tensors = (x_RM, w1_EMF, b1_EF, w2_EFM, b2_EM)
    if chosen in ("torch", "compiled") and ACTIVATIONS[activation].number is None:
        chosen = "reference"  # the CPU implementations have no such activation
    on_cpu = chosen in ("torch", "compiled")
    if not on_cpu or x_RM.dtype != torch.bfloat16:  # the CPU implementations convert to bfloat16 by themselves
        tensors = tuple(None if t is None else t.to(x_RM.dtype) for t in tensors)
    if chosen == "reference":
        return _reference(offsets_E1, *tensors, activation)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    counting = _get_current_dispatch_mode() is not None  # a counter of operations sees no compiled code
    if chosen == "compiled" and not counting and compiled.fits(x_RM, w2_EFM, activation):
        return compiled.CompiledExperts.apply(*contiguous(*tensors), offsets_E1, activation, keep)
    if on_cpu:
        wide = [None if t is None else t.float() for t in tensors] if x_RM.dtype == torch.float16 else tensors
        return CPUExperts.apply(*contiguous(*wide), offsets_E1, activation, keep).to(x_RM.dtype)
    return TritonExperts.apply(*contiguous(*tensors, offsets_E1), activation, keep)


def _check(x, offsets_E1, activation, *layers) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"expert_ffn: unknown activation {activation!r}; know {', '.join(ACTIVATIONS)}")
    if x.dim() != 2:
        raise ValueError(f"expert_ffn: rows must be [R, M], not {tuple(x.shape)}")
    if offsets_E1.dim() != 1 or offsets_E1.dtype not in (torch.int32, torch.int64):
        shape = tuple(offsets_E1.shape)
        raise ValueError(f"expert_ffn: offsets must be int32 [E + 1], not {offsets_E1.dtype} {shape}")
    width, E = x.shape[1], len(offsets_E1) - 1
    half = x.dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if half and layers[0][0].dtype == torch.float32 else x.dtype  # of all weights
    for w, b in layers:
        if w.dim() != 3 or w.shape[:2] != (E, width):
            raise ValueError(f"expert_ffn: weights {tuple(w.shape)} for {E} experts and rows of width {width}")
        width = w.shape[2]
        if b is not None and b.shape != (E, width):
            raise ValueError(f"expert_ffn: bias {tuple(b.shape)} must be {(E, width)}")
        if w.dtype != dtype or (b is not None and b.dtype != dtype):
            raise ValueError(
                f"expert_ffn: rows are {x.dtype}, weights {w.dtype}: one dtype for all (cast the parameters)"
            )
        if ACTIVATIONS[activation].gated and w is layers[0][0]:
            if width % 2:
                raise ValueError(
                    f"expert_ffn: {activation}'s first weights hold gate and up, so {width} columns must be even"
                )
            width //= 2


def _reference(offsets_E1, x_RM, w1_EMF, b1_EF, w2_EFM, b2_EM, activation: str):
    """Loop over the experts in float32 (float64 for float64); return x's dtype, rows past the last offset zero."""
    wide, act = accumulate_dtype(x_RM.dtype), ACTIVATIONS[activation].forward
    bounds = offsets_E1.tolist()

    def affine(x, w, b, e):
        return x @ w[e] if b is None else x @ w[e] + b[e]

    parts = []
    with torch.autocast(x_RM.device.type, enabled=False):
        for e, (start, end) in enumerate(itertools.pairwise(bounds)):
            hidden = act(affine(x_RM[start:end], w1_EMF, b1_EF, e))
            parts.append(affine(hidden, w2_EFM, b2_EM, e))
    tail = x_RM.new_zeros(len(x_RM) - bounds[-1], w2_EFM.shape[2], dtype=wide)
    return torch.cat([*parts, tail]).to(x_RM.dtype)
