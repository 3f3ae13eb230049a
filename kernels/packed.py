"""Pack matrices once, for the products of `decode` (``decode.py``) on a CPU.

The operation is C++ (``_cpp/packed.cpp``) for float32 and bfloat16. A matrix is [N, K]; K is a multiple of `MULTIPLE`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cpp
from ._common import MULTIPLE


def pack(weight: Tensor) -> Tensor:
    """Return matrices [N, K] or [..., N, K] in the order in which the products read them.

    It is [matrices, N / 32 rounded up, K, 32], values in an order of its own. Those of a gated activation are two,
    [..., 2, N, K]: gate and up.

    Raises:
        ValueError: K is not a multiple of 16, or this machine cannot compute with them.
    """
    fits = weight.dtype in (torch.float32, torch.bfloat16) and weight.dim() > 1 and weight.shape[-1] % MULTIPLE == 0
    if not fits or weight.device.type != "cpu" or not _cpp.available():
        raise ValueError(
            f"pack: {weight.dtype} {tuple(weight.shape)} on {weight.device.type}: the C++ kernels pack float32 or "
            f"bfloat16 matrices on a CPU whose last size is a multiple of {MULTIPLE}"
        )
    stack = weight.detach().reshape(-1, *weight.shape[-2:])
    return _cpp.operations().pack.default(stack.contiguous())
