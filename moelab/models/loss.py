"""Compute the output head and its loss in one function that never holds all logits.

    x_NM, w_VM -> logits_NV, a chunk of rows at a time -> cross-entropy, and the divergence from a teacher's logits

N tokens; other letters as in `moelab.config`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelab.kernels.head import SoftTargets, has_kernel, head

_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}  # logits per softmax; on a CPU they stay in a core's cache
_WITH_SOFT_TARGETS = 4  # with a teacher, about so many more arrays of this size are in use


def linear_losses(
    x_NM: Tensor, w_VM: Tensor, targets_N: Tensor, reduction: str = "mean", soft: SoftTargets | None = None
) -> tuple[Tensor, Tensor]:
    """Return (cross-entropy plus the loss of soft targets, that loss without gradient), means over the tokens.

    The first is ``F.cross_entropy((x @ w.T).float(), targets)`` within rounding, in nats, at least fp32. Products are
    computed in autocast's dtype if it is on, else in x's; softmax and loss in at least fp32. The forward pass also
    computes the gradients, so that the backward pass needs no logits: the memory is that of one chunk of logits and the
    two gradients. Differentiable once, in x and w.

    Args:
        targets_N: int64 token ids.
        reduction: "mean" over the tokens, or "none": each token's loss [N], without gradient.
        soft: a teacher's logits of the tokens; none with "none".

    Raises:
        ValueError: another reduction, or shapes that do not fit.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"linear_losses: reduction must be 'mean' or 'none', got {reduction!r}")
    if reduction == "none" and soft is not None:
        raise ValueError("linear_losses: soft targets have no value for each token; reduction must be 'mean'")
    if x_NM.dim() != 2 or w_VM.shape[1:] != x_NM.shape[1:] or targets_N.shape != x_NM.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x_NM, w_VM, targets_N))
        raise ValueError(f"linear_losses: x, w and targets must be [N, M], [V, M] and [N], got {shapes}")
    if soft is not None and soft.logits_NV.shape != (len(x_NM), len(w_VM)):
        raise ValueError(
            f"linear_losses: the teacher's logits must be {[len(x_NM), len(w_VM)]}, got {tuple(soft.logits_NV.shape)}"
        )
    device = x_NM.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_NM.dtype
    gradients = torch.is_grad_enabled()
    total, more, losses_N = _LinearLosses.apply(
        x_NM, w_VM, targets_N, soft, dtype, gradients and x_NM.requires_grad, gradients and w_VM.requires_grad
    )
    return (total / len(x_NM), more / len(x_NM)) if reduction == "mean" else (losses_N, more)


def divergence(teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) at a temperature, summed over vocabulary and tokens, and its gradient [N, V].

    Nats, at least fp32, without the factor T^2. The temperature divides both models' logits. The gradient is in the
    student's.
    """
    log_p_NV = F.log_softmax(_cooled(teacher_NV, temperature), -1)
    log_q_NV = F.log_softmax(_cooled(student_NV, temperature), -1)
    difference_NV = log_p_NV - log_q_NV
    p_NV, q_NV = log_p_NV.exp_(), log_q_NV.exp_()
    total = torch.dot(p_NV.flatten(), difference_NV.flatten())
    gradient_NV = q_NV.sub_(p_NV)
    return total, gradient_NV if temperature == 1.0 else gradient_NV.div_(temperature)


def _cooled(logits_NV: Tensor, temperature: float) -> Tensor:
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return logits_NV if temperature == 1.0 else logits_NV / temperature


class _LinearLosses(torch.autograd.Function):
    """Compute the losses summed over tokens, all of them and that of soft targets alone, and each target's."""

    @staticmethod
    def forward(
        ctx,
        x_NM: Tensor,
        w_VM: Tensor,
        targets_N: Tensor,
        soft: SoftTargets | None,
        dtype: torch.dtype,
        for_x: bool,
        for_w: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtypes = x_NM.dtype, w_VM.dtype
        with torch.autocast(x_NM.device.type, enabled=False):
            x_NM = x_NM.to(dtype)
            compute = head if has_kernel(x_NM, w_VM, soft) else _in_chunks
            losses_N, dx_NM, dw_VM, of_soft = compute(x_NM, w_VM, targets_N, for_x, for_w, soft)
            more = losses_N.new_zeros(()) if of_soft is None else of_soft.sum()
        ctx.save_for_backward(dx_NM, dw_VM)
        ctx.mark_non_differentiable(more, losses_N)
        return losses_N.sum() + more, more, losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dx_NM, dw_VM = ctx.saved_tensors
        dx_NM = None if dx_NM is None else dx_NM.to(ctx.dtypes[0]) * dtotal
        dw_VM = None if dw_VM is None else (dw_VM * dtotal).to(ctx.dtypes[1])
        return dx_NM, dw_VM, None, None, None, None, None


def _in_chunks(
    x_NM: Tensor, w_VM: Tensor, targets_N: Tensor, for_x: bool, for_w: bool, soft: SoftTargets | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Return what `moelab.kernels.head.head` returns, the losses of soft targets summed, on any device and dtype."""
    N, V, dtype = len(x_NM), len(w_VM), x_NM.dtype
    wide = torch.promote_types(dtype, torch.float32)
    w_MV, targets_N1 = w_VM.to(dtype).T.contiguous(), targets_N[:, None]
    losses_N1 = x_NM.new_empty(N, 1, dtype=wide)
    dx_NM = torch.empty_like(x_NM) if for_x else None
    dw_MV = torch.zeros_like(w_MV, dtype=wide) if for_w else None
    more = x_NM.new_zeros((), dtype=wide)
    size = _CHUNK.get(x_NM.device.type, _CHUNK["cuda"]) // (_WITH_SOFT_TARGETS if soft else 1)
    rows = max(1, size // V)
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
            if soft is not None:
                value, gradient_CV = divergence(soft.logits_NV[at:end], p_CV, soft.temperature)
                more += value * soft.weight
            target_C1 = targets_N1[at:end]
            # The loss is taken from the largest logit on: the logarithm of the target's own probability may be inexact.
            top_C1, likeliest_C1 = p_CV.max(-1, keepdim=True)
            behind_C1 = top_C1 - p_CV.gather(1, target_C1)
            torch.softmax(p_CV, -1, out=p_CV)
            torch.sub(behind_C1, p_CV.gather(1, likeliest_C1).log_(), out=losses_N1[at:end])
            if for_x or for_w:  # softmax - one-hot is the gradient of the logits
                p_CV.scatter_(1, target_C1, p_CV.gather(1, target_C1) - 1)
                if soft is not None:
                    p_CV.add_(gradient_CV, alpha=soft.weight)
                if dtype != wide:
                    chunk_CV.copy_(p_CV)
        if dx_NM is not None:
            torch.mm(logits_GV, w_MV.T, out=dx_NM[start : start + group])
        if dw_MV is not None and dtype == wide:
            dw_MV.addmm_(x_GM.T, logits_GV)
        elif dw_MV is not None:
            dw_MV += x_GM.T @ logits_GV
    return losses_N1[:, 0], dx_NM, None if dw_MV is None else dw_MV.T, more
