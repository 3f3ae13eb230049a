"""Describe the activations of feed-forwards: the one table that dense layers, experts and inference read.

Pre-activations p are [..., F]. Those of a gated activation are [..., 2 F] and hold gate and up side by side, so that
one product computes both (Shazeer, "GLU variants improve Transformer").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import Backend, pick_backend
from ._cpp import operations


@dataclass(frozen=True)
class Activation:
    """Describe an activation h = act(p).

    Attributes:
        name: what `expert_ffn` calls it.
        forward: p [..., F], or [..., 2 F] if gated, to h [..., F], in p's dtype; differentiable.
        slope: p to the derivatives of h, of p's shape and dtype: those to p, or if gated those to the gate and then
            those to up. See `backward`.
        gated: whether half of the pre-activations are gates.
        number: that of the C++ (``_cpp/activations.h``); None if it does not know the activation.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    gated: bool = False
    number: int | None = None

    def backward(self, pre: Tensor, d: Tensor) -> Tensor:
        """Return the gradient of the pre-activations ``pre``, of their shape, from that of h, ``d`` [..., F]."""
        return self.slope(pre) * (torch.cat([d, d], -1) if self.gated else d)


def _gelu_slope(p: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(p * math.sqrt(0.5))) + p * torch.exp(-0.5 * p * p) / math.sqrt(2 * math.pi)


def _gelu_tanh(p: Tensor) -> Tensor:
    return F.gelu(p, approximate="tanh")


def _gelu_tanh_slope(p: Tensor) -> Tensor:
    c, square = math.sqrt(2 / math.pi), p * p
    t = torch.tanh(c * p * (1 + 0.044715 * square))
    return 0.5 * (1 + t) + 0.5 * c * p * (1 - t * t) * (1 + 3 * 0.044715 * square)


def _swiglu(p: Tensor) -> Tensor:
    gate, up = p.chunk(2, -1)
    return F.silu(gate) * up


def _swiglu_slope(p: Tensor) -> Tensor:
    gate, up = p.chunk(2, -1)
    s, silu = torch.sigmoid(gate), F.silu(gate)
    return torch.cat([(s + silu * (1 - s)) * up, silu], -1)


ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("none", lambda p: p, torch.ones_like, number=0),
        Activation("gelu", F.gelu, _gelu_slope, number=1),  # exact, by erf
        Activation("gelu_tanh", _gelu_tanh, _gelu_tanh_slope, number=2),  # GPT-2's and Megatron's
        Activation("swiglu", _swiglu, _swiglu_slope, gated=True, number=3),
    )
}
"""Name -> activation. One without compiled code or a Triton kernel of its own is computed by these functions."""


def named(op: str, name: str) -> Activation:
    """Return the activation of a name; raise ``ValueError`` in ``op``'s name if there is none."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {name!r}; know {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activate(pre: Tensor, activation: str, *, backend: Backend = "auto") -> Tensor:
    """Return h [..., F] of pre-activations [..., F], or [..., 2 F] if gated, in their dtype. Differentiable (once).

    The C++ keeps the slope for the backward pass instead of the pre-activations, and an element has the same bits
    wherever it stands. There is no Triton kernel; on CUDA, PyTorch computes. ``activation`` is a name in
    ``ACTIVATIONS``; raises ``ValueError`` for another one.
    """
    act = named("activate", activation)
    if activation == "none":
        return pre
    fits = act.number is not None and pre.is_floating_point() and pre.dim() > 0
    fits = fits and not (act.gated and pre.shape[-1] % 2)
    if pick_backend("activate", backend, pre, fits=fits) != "cpp":
        return act.forward(pre)
    return _Activate.apply(pre, act, torch.is_grad_enabled() and pre.requires_grad)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre: Tensor, act: Activation, keep: bool) -> Tensor:
        pre = pre.contiguous()
        h = pre.new_empty(*pre.shape[:-1], pre.shape[-1] // (2 if act.gated else 1))
        slope = torch.empty_like(pre) if keep else None
        operations().activate.default(pre, act.number, h, slope)
        if keep:
            ctx.save_for_backward(slope)
            ctx.gated = act.gated
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        d = slope.unflatten(-1, (2, -1)) * dh[..., None, :] if ctx.gated else slope * dh
        return d.view_as(slope), None, None
