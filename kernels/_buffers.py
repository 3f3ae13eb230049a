"""Large CPU tensors on memory that stays mapped: what the stacked gradients of many experts need.

The C allocator gives a freed 512 MiB gradient back to the system, and the next step pays again for having every page
of it mapped and zeroed: measured on one core, 220 ms against 18 ms for writing it, more than the matrix product that
fills it. Here a buffer goes back to a pool when the last tensor that uses it dies. Buffers are NumPy's, which asks
for huge pages.

The pool holds at most what was once alive at the same time; :func:`release` gives the free ones back.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch

_MIN_BYTES = 1 << 20
_free: dict[int, list[np.ndarray]] = {}  # append and pop are atomic: finalizers may run in any thread


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous CPU tensor, as ``torch.empty``, on pooled memory when it is large."""
    size = math.prod(shape) * dtype.itemsize
    if size < _MIN_BYTES:
        return torch.empty(shape, dtype=dtype)
    step = 1 << size.bit_length() - 4  # size classes an eighth apart, so that row counts that vary share buffers
    size = -(-size // step) * step
    free = _free.setdefault(size, [])
    try:
        base = free.pop()
    except IndexError:
        base = np.empty(size + 64, np.uint8)
        base = base[-base.ctypes.data % 64 :][:size]
    loan = base[:]  # dies with the last tensor on it
    weakref.finalize(loan, free.append, base).atexit = False
    return torch.from_numpy(loan)[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def release() -> int:
    """Gives all free buffers back to the system; their bytes."""
    released = 0
    for size, free in list(_free.items()):
        while free:
            try:
                free.pop()
            except IndexError:
                break
            released += size
    return released
