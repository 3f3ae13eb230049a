"""Mix two branches on CPU."""

from __future__ import annotations

import torch

from .._common import accumulate_dtype


def mix_cpu(moe, mlp, a_S2):
    """Return a_0 moe + a_1 mlp in moe's dtype."""
    wide = a_S2.dtype if moe.dtype == torch.float64 else torch.float32
    a_S2 = a_S2.to(wide)
    y = moe * a_S2[:, :1]  # in float32, the coefficients' dtype
    return y.addcmul_(mlp.to(wide), a_S2[:, 1:]).to(moe.dtype)


def mix_backward_cpu(dy, moe, mlp, a_S2):
    """Return (d moe, d mlp, d a [S, 2] in float32)."""
    wide = accumulate_dtype(dy.dtype)
    dy_wide = dy.to(wide)
    da_S2 = torch.stack([torch.linalg.vecdot(dy_wide, t.to(wide)) for t in (moe, mlp)], 1)
    a_S2 = a_S2.to(wide)
    return (dy_wide * a_S2[:, :1]).to(dy.dtype), (dy_wide * a_S2[:, 1:]).to(dy.dtype), da_S2
