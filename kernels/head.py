"""Compute the cross-entropy of the output head and its gradients on a CPU, without holding the logits.

Shapes: N tokens, M hidden, V entries of the vocabulary. One pass computes losses and gradients, a group of rows at a
time: logits and softmax are float32, products are accumulated in float32. In memory are the gradients of some 500,000
logits and two copies of the weights. The C++ is ``_cpp/head.cpp``, the reference `moelab.models.loss`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import MULTIPLE, pick_backend
from ._cpp import operations


@dataclass(frozen=True)
class SoftTargets:
    """Hold a teacher's logits; their loss is ``weight * KL(teacher || student)``, summed over the vocabulary, in nats.

    Attributes:
        logits_NV: the teacher's logits of the same tokens.
        temperature: divisor of both models' logits.
        weight: factor of the divergence.
    """

    logits_NV: Tensor
    temperature: float = 1.0
    weight: float = 1.0


def has_kernel(x_NM: Tensor, w_VM: Tensor, soft: SoftTargets | None = None) -> bool:
    """Return whether the C++ computes the head of these rows and weights by default.

    Rows are float32 or bfloat16, weights of the rows' dtype or float32, a teacher's logits of the rows' dtype; both
    sizes are multiples of `MULTIPLE`.
    """
    fits = x_NM.shape[1] % MULTIPLE == len(w_VM) % MULTIPLE == 0 and w_VM.dtype in (x_NM.dtype, torch.float32)
    fits &= x_NM.is_floating_point() and (soft is None or soft.logits_NV.dtype == x_NM.dtype)
    return fits and pick_backend("head", "auto", x_NM, w_VM) == "cpp"


def head(
    x_NM: Tensor, w_VM: Tensor, targets_N: Tensor, for_x: bool, for_w: bool, soft: SoftTargets | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return (the tokens' cross-entropies [N]; the gradients in x and w; their losses of soft targets [N]).

    Losses are float32, in nats. The gradients, in w as float32, are of the sum of all losses. ``targets_N`` is int64,
    in 0 to V - 1 (``RuntimeError`` beyond). What is not asked for is None. Float32 weights beside bfloat16 rows are
    rounded to bfloat16. Raises ``ValueError`` for shapes or dtypes that do not fit (`has_kernel`).
    """
    N, V = len(x_NM), len(w_VM)
    fits = w_VM.shape == (V, x_NM.shape[1]) and targets_N.shape == (N,)
    fits &= soft is None or soft.logits_NV.shape == (N, V)
    if not (fits and has_kernel(x_NM, w_VM, soft)):
        given = [x_NM, w_VM, targets_N, *([] if soft is None else [soft.logits_NV])]
        shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in given)
        raise ValueError(
            f"head: rows, weights, targets and a teacher's logits do not fit or are not computed: {shapes}"
        )
    x_NM, w_VM = x_NM.contiguous(), w_VM.contiguous()
    losses_N = torch.empty(len(x_NM), dtype=torch.float32)
    dx_NM = torch.empty_like(x_NM) if for_x else None
    dw_VM = torch.empty_like(w_VM, dtype=torch.float32) if for_w else None
    teacher_NV, soft_N = (soft.logits_NV.contiguous(), torch.empty_like(losses_N)) if soft else (None, None)
    how = (soft.temperature, soft.weight) if soft else (1.0, 0.0)
    operations().head.default(
        x_NM, w_VM, targets_N.to(torch.int64).contiguous(), losses_N, dx_NM, dw_VM, teacher_NV, soft_N, *how
    )
    return losses_N, dx_NM, dw_VM, soft_N
