"""Compute the output head and its loss in one function that never holds all logits.

    x_NM, w_VM -> logits_NV, a chunk of rows at a time -> cross-entropy

N tokens; other letters as in `moelab.config`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}  # logits per softmax; on a CPU they stay in a core's cache
_LEAST = 1e-30  # smaller fp32 probabilities are too inexact for their logarithm


def linear_cross_entropy(x_NM: Tensor, w_VM: Tensor, targets_N: Tensor, reduction: str = "mean") -> Tensor:
    """Return ``F.cross_entropy((x @ w.T).float(), targets)`` within rounding, in nats, at least fp32.

    Products are computed in autocast's dtype if it is on, else in x's; softmax and loss in at least fp32. The forward
    pass also computes the gradients, so that the backward pass needs no logits: the memory is that of one chunk of
    logits and the two gradients. Differentiable once, in x and w.

    Args:
        targets_N: int64 token ids.
        reduction: "mean" over the tokens, or "sum".

    Raises:
        ValueError: another reduction, or shapes that do not fit.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"linear_cross_entropy: reduction must be 'mean' or 'sum', got {reduction!r}")
    if x_NM.dim() != 2 or w_VM.shape[1:] != x_NM.shape[1:] or targets_N.shape != x_NM.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x_NM, w_VM, targets_N))
        raise ValueError(f"linear_cross_entropy: x, w and targets must be [N, M], [V, M] and [N], got {shapes}")
    device = x_NM.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_NM.dtype
    gradients = torch.is_grad_enabled()
    total = _LinearCrossEntropy.apply(
        x_NM, w_VM, targets_N, dtype, gradients and x_NM.requires_grad, gradients and w_VM.requires_grad
    )
    return total / len(x_NM) if reduction == "mean" else total


class _LinearCrossEntropy(torch.autograd.Function):
    """Compute the loss summed over tokens."""

    @staticmethod
    def forward(
        ctx, x_NM: Tensor, w_VM: Tensor, targets_N: Tensor, dtype: torch.dtype, for_x: bool, for_w: bool
    ) -> Tensor:
        ctx.dtypes = x_NM.dtype, w_VM.dtype
        with torch.autocast(x_NM.device.type, enabled=False):
            return _forward(ctx, x_NM, w_VM, targets_N, dtype, for_x, for_w)

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dx_NM, dw_MV = ctx.saved_tensors
        dx_NM = None if dx_NM is None else dx_NM.to(ctx.dtypes[0]) * dtotal
        dw_VM = None if dw_MV is None else (dw_MV.T * dtotal).to(ctx.dtypes[1])
        return dx_NM, dw_VM, None, None, None, None


def _forward(
    ctx, x_NM: Tensor, w_VM: Tensor, targets_N: Tensor, dtype: torch.dtype, for_x: bool, for_w: bool
) -> Tensor:
    N, V = len(x_NM), len(w_VM)
    wide = torch.promote_types(dtype, torch.float32)
    x_NM, w_MV, targets_N1 = x_NM.to(dtype), w_VM.to(dtype).T.contiguous(), targets_N[:, None]
    p_N1 = x_NM.new_empty(N, 1, dtype=wide)  # the targets' probabilities
    dx_NM = torch.empty_like(x_NM) if for_x else None
    dw_MV = torch.zeros_like(w_MV, dtype=wide) if for_w else None
    rows = max(1, _CHUNK.get(x_NM.device.type, _CHUNK["cuda"]) // V)
    # If products have a dtype below fp32, dw needs an extra addition in fp32, so that several chunks share one.
    group = rows if dtype == wide else 4 * rows
    logits = x_NM.new_empty(min(N, group), V)
    scratch = logits if dtype == wide else x_NM.new_empty(min(N, rows), V, dtype=wide)
    for start in range(0, N, group):
        x_GM = x_NM[start : start + group]
        logits_GV = torch.mm(x_GM, w_MV, out=logits[: len(x_GM)])
        for at, chunk_CV in zip(range(start, N, rows), logits_GV.split(rows), strict=False):
            end = at + len(chunk_CV)
            p_CV = chunk_CV if dtype == wide else scratch[: len(chunk_CV)].copy_(chunk_CV)
            torch.softmax(p_CV, -1, out=p_CV)
            target_C1 = targets_N1[at:end]
            p_C1 = torch.gather(p_CV, 1, target_C1, out=p_N1[at:end])
            if for_x or for_w:  # softmax - one-hot is the gradient of the logits
                chunk_CV.copy_(p_CV).scatter_(1, target_C1, (p_C1 - 1).to(dtype))
        if for_x:
            torch.mm(logits_GV, w_MV.T, out=dx_NM[start : start + group])
        if for_w and dtype == wide:
            dw_MV.addmm_(x_GM.T, logits_GV)
        elif for_w:
            dw_MV += x_GM.T @ logits_GV
    ctx.save_for_backward(dx_NM, dw_MV)
    losses_N = p_N1[:, 0].log().neg_()
    if len(unlikely := (p_N1[:, 0] < _LEAST).nonzero()[:, 0]):
        logits_UV = (x_NM[unlikely] @ w_MV).to(wide)
        losses_N[unlikely] = F.cross_entropy(logits_UV, targets_N[unlikely], reduction="none")
    return losses_N.sum()
