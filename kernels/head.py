"""Compute the cross-entropy of the output head and its gradients on a CPU, without holding the logits.

Shapes: N tokens, M hidden, V entries of the vocabulary. One pass computes losses and gradients, a group of rows at a
time: logits and softmax are float32, products are accumulated in float32. In memory are the gradients of some 500,000
logits and two copies of the weights. The C++ is ``_cpp/head.cpp``; the reference, which also takes losses of the
logits, is `moelab.models.loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import MULTIPLE, pick_backend
from ._cpp import operations


def has_kernel(x_NM: Tensor, w_VM: Tensor) -> bool:
    """Return whether the C++ computes the head of these rows and weights by default.

    Rows are float32 or bfloat16, weights of the rows' dtype or float32; both sizes are multiples of `MULTIPLE`.
    """
    fits = x_NM.shape[1] % MULTIPLE == len(w_VM) % MULTIPLE == 0 and w_VM.dtype in (x_NM.dtype, torch.float32)
    return fits and pick_backend("head", "auto", x_NM, w_VM) == "cpp"


def head(
    x_NM: Tensor, w_VM: Tensor, targets_N: Tensor, for_x: bool, for_w: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (the tokens' losses [N], float32, in nats; the gradients of their sum in x and, as float32, in w).

    ``targets_N`` is int64, in 0 to V - 1 (``RuntimeError`` beyond). The gradients that are not asked for are None.
    Float32 weights beside bfloat16 rows are rounded to bfloat16.
    """
    x_NM, w_VM = x_NM.contiguous(), w_VM.contiguous()
    losses_N = torch.empty(len(x_NM), dtype=torch.float32)
    dx_NM = torch.empty_like(x_NM) if for_x else None
    dw_VM = torch.empty_like(w_VM, dtype=torch.float32) if for_w else None
    operations().head.default(x_NM, w_VM, targets_N.contiguous(), losses_N, dx_NM, dw_VM)
    return losses_N, dx_NM, dw_VM
