"""Compute the experts' feed-forward networks on their groups of rows, of any sizes, also empty (paper 5.4).

Shapes: R rows in expert order, E experts, M hidden, F feed-forward. Expert e's rows are ``offsets[e]`` to
``offsets[e + 1]``; rows past the last offset come out zero.

    y = act(x @ W1[e] + b1[e]) @ W2[e] + b2[e]    W1 [E, M, F], W2 [E, F, M]

``act`` is one of ``ACTIVATIONS`` (``activations.py``); with a gated one, W1 is [E, M, 2 F].

The forward pass of the Triton kernels keeps the pre-activation for the backward pass, which recomputes the activation
from it; this takes a third less memory than keeping both. On a CPU, the activation and its slope are kept instead.
Weight gradients are written expert by expert, in a fixed order and without atomics, so that they are bitwise
reproducible.

The Triton implementation is in ``_experts_triton.py``, that for CPU in ``_cpp/experts.cpp``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ._common import FLOATS, MULTIPLE, Backend, accumulate_dtype, contiguous, pick_backend
from ._cpp import operations
from .activations import ACTIVATIONS, Activation, named

LARGEST = 64 << 20
"""Most bytes of an expert's weights that the C++ takes: each thread holds some of its matrices in another order."""


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
    (``_common.dot_precision``). ``activation`` is a name in ``ACTIVATIONS``. Raises ``ValueError`` for another one, and
    for shapes or dtypes that do not fit.
    """
    _check(x_RM, offsets_E1, activation, (w1_EMF, b1_EF), (w2_EFM, b2_EM))
    act, tensors = ACTIVATIONS[activation], cast(tuple[Any, ...], (x_RM, w1_EMF, b1_EF, w2_EFM, b2_EM))
    fits = act.number is not None and _fits(x_RM, tensors[3], act.gated)
    chosen = pick_backend("expert_ffn", backend, *tensors, offsets_E1, fits=fits)
    if chosen != "cpp" or x_RM.dtype != torch.bfloat16:  # the C++ converts to bfloat16 by itself
        tensors = tuple(None if t is None else t.to(x_RM.dtype) for t in tensors)
    if chosen == "reference":
        bounds = offsets_E1.tolist()
        if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > len(x_RM):  # as the C++
            raise RuntimeError(f"expert_ffn: offsets must rise from 0 to at most {len(x_RM)}")
        slow = backend == "reference" or x_RM.device.type != "cpu" or _get_current_dispatch_mode() is not None
        run: Callable[..., torch.Tensor] = _reference if slow else _grouped
        return run(offsets_E1, *tensors, act)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if chosen == "cpp":
        return _CppExperts.apply(*contiguous(*tensors), offsets_E1, act, keep)
    from ._experts_triton import TritonExperts

    return TritonExperts.apply(*contiguous(*tensors, offsets_E1), activation, keep)


def _check(x, offsets_E1, activation, *layers) -> None:
    gated = named("expert_ffn", activation).gated
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
        if gated and w is layers[0][0]:
            if width % 2:
                raise ValueError(
                    f"expert_ffn: {activation}'s first weights hold gate and up, so {width} columns must be even"
                )
            width //= 2
    if width != x.shape[1]:
        raise ValueError(f"expert_ffn: second weights {tuple(layers[1][0].shape)} for rows of width {x.shape[1]}")


def _fits(x_RM: torch.Tensor, w2_EFM: torch.Tensor, gated: bool) -> bool:
    """Return whether the C++ takes rows and weights of these sizes, multiples of `MULTIPLE`, and dtypes."""
    _, F, M = w2_EFM.shape
    bytes_ = (3 if gated else 2) * F * M * x_RM.element_size()
    sizes = F > 0 and M % MULTIPLE == F % MULTIPLE == 0 and bytes_ <= LARGEST
    return sizes and x_RM.dtype in (torch.float32, torch.bfloat16)


class _CppExperts(torch.autograd.Function):
    """Compute the experts and their gradients; kept for the backward pass are the activation and its slopes."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, offsets_E1, activation, keep):
        N, F = w1.shape[2], w2.shape[1]
        offsets_E1 = offsets_E1.to(torch.int32).contiguous()
        y = torch.empty_like(x)
        h = x.new_empty(len(x), F) if keep else None
        slope = x.new_empty(len(x), N) if keep and activation.number else None
        operations().experts_forward(x, offsets_E1, w1, b1, w2, b2, activation.number, y, h, slope)
        if keep:
            ctx.save_for_backward(x, offsets_E1, w1, w2, h, slope)
            ctx.biases = b1, b2
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, offsets_E1, w1, w2, h, slope = ctx.saved_tensors
        b1, b2 = ctx.biases
        needed = zip((x, w1, b1, w2, b2), ctx.needs_input_grad[:5], strict=True)
        grads = [torch.empty_like(t) if need else None for t, need in needed]
        d_pre = x.new_empty(len(x), w1.shape[2])
        operations().experts_backward(dy.contiguous(), x, offsets_E1, w1, w2, h, slope, d_pre, *grads)
        return *grads, None, None, None


def _reference(offsets_E1, x_RM, w1_EMF, b1_EF, w2_EFM, b2_EM, activation: Activation):
    """Loop over the experts; return x's dtype, rows past the last offset zero."""
    bounds = offsets_E1.tolist()

    def affine(x, w, b, e):
        return x @ w[e] if b is None else x @ w[e] + b[e]

    parts = []
    with torch.autocast(x_RM.device.type, enabled=False):
        for e, (start, end) in enumerate(itertools.pairwise(bounds)):
            hidden = activation.forward(affine(x_RM[start:end], w1_EMF, b1_EF, e))
            parts.append(affine(hidden, w2_EFM, b2_EM, e))
    return torch.cat([*parts, x_RM.new_zeros(len(x_RM) - bounds[-1], w2_EFM.shape[2])])


def _grouped(offsets_E1, x_RM, w1_EMF, b1_EF, w2_EFM, b2_EM, activation: Activation):
    """Compute the experts by PyTorch's grouped products, for machines without the C++."""
    sizes = {*w1_EMF.shape[1:], *w2_EFM.shape[1:]}
    aligned = all(n > 0 and n * x_RM.element_size() % 16 == 0 for n in sizes)  # rows, which they need
    if x_RM.dtype not in FLOATS or not aligned:
        return _reference(offsets_E1, x_RM, w1_EMF, b1_EF, w2_EFM, b2_EM, activation)
    x_RM, w1_EMF, w2_EFM = contiguous(x_RM, w1_EMF, w2_EFM)
    expert_R = torch.repeat_interleave(offsets_E1.diff())
    ends_E, filled, wide = offsets_E1[1:].int().contiguous(), len(expert_R), accumulate_dtype(x_RM.dtype)

    def affine(x, w, b):
        y = F.grouped_mm(x, w, offs=ends_E)
        if y.requires_grad:
            y.register_hook(torch.Tensor.contiguous)  # its gradient must be, too
        return y if b is None else (y + b.to(wide)[expert_R]).to(y.dtype)  # wide, because b's gradient is a long sum

    with torch.autocast(x_RM.device.type, enabled=False):
        y = affine(activation.forward(affine(x_RM[:filled], w1_EMF, b1_EF)), w2_EFM, b2_EM)
    return F.pad(y, (0, 0, 0, len(x_RM) - filled))
