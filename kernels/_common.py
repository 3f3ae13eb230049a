"""Choose backends and precisions for every op.

Backends: ``auto`` is Triton on CUDA tensors and C++ on CPU tensors; it is the reference where there is no C++ compiler,
and for dtypes that they do not take, such as float64.
``reference`` is the operation in plain PyTorch, on any device, written for readability. ``triton`` on CPU tensors needs
Triton's interpreter, that is ``TRITON_INTERPRET=1`` set before Triton is imported (for tests only, because it is slow).
``cpp`` is C++ for CPU tensors (``_cpp``) of float32 or bfloat16.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _cpp

Backend = Literal["auto", "reference", "triton", "cpp"]
"""Names of an op's implementations; see the module's docstring."""

recording = False
"""True while compile.py records the launches of the ops on meta tensors instead of executing them."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MULTIPLE = 16
"""Sizes that the C++ takes are multiples of this where an op says so (`kMultiple` in ``_cpp/vectors.h``)."""
CPP_DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.int64)


def pick_backend(op: str, backend: Backend, *tensors: torch.Tensor | None, fits: bool = True) -> str:
    """Return the backend that runs ``op`` on these tensors: one of ``Backend``, but not ``auto``.

    ``fits`` says whether the C++ takes them, apart from their dtypes. While PyTorch's operations are counted (a
    dispatch mode is active), ``auto`` is the reference on CPU tensors, because a counter sees no C++. Raises
    ``ValueError`` for an unknown name, for tensors on different devices, and for a backend that cannot run there.
    """
    present = [t for t in tensors if t is not None]
    device = present[0].device
    if any(t.device != device for t in present):
        devices = ", ".join(sorted({str(t.device) for t in present}))
        raise ValueError(f"{op}: tensors are on different devices: {devices}")
    narrow = all(t.dtype in CPP_DTYPES for t in present)
    if backend == "auto" and device.type == "cpu":
        usable = narrow and fits and _get_current_dispatch_mode() is None
        return "cpp" if usable and _cpp.available() else "reference"
    if backend == "auto":
        floats = all(t.dtype in FLOATS for t in present if t.is_floating_point())
        backend = "triton" if device.type == "cuda" and floats else "reference"
    if backend == "cpp":
        if device.type != "cpu":
            raise ValueError(f"{op}: backend 'cpp' is for CPU tensors, these are on {device.type}")
        if not (narrow and fits):
            dtypes = ", ".join(sorted({str(t.dtype) for t in present}))
            raise ValueError(f"{op}: backend 'cpp' does not take these sizes or dtypes ({dtypes}); use 'auto'")
    elif backend == "triton":
        interprets = triton_interprets()
        if interprets is None:
            raise ValueError(f"{op}: backend 'triton' needs the triton package, which this platform lacks")
        if device.type != "cuda" and not interprets and not (recording and device.type == "meta"):
            raise ValueError(
                f"{op}: backend 'triton' needs CUDA tensors, these are on {device.type} (tests: TRITON_INTERPRET=1)"
            )
        for t in present:
            if t.is_floating_point() and t.dtype not in FLOATS:
                raise ValueError(f"{op}: Triton kernels take float32, bfloat16 or float16, not {t.dtype}")
        if device.type == "cuda" and device.index != (current := torch.cuda.current_device()):
            raise ValueError(  # Triton launches on the current one
                f"{op}: tensors are on {device}, the current device is cuda:{current}; call torch.cuda.set_device"
            )
    elif backend != "reference":
        raise ValueError(f"{op}: unknown backend {backend!r}; know {', '.join(get_args(Backend))}")
    return backend


@functools.cache
def triton_interprets() -> bool | None:
    """Return whether Triton interprets its kernels, on CPU tensors; None where there is no Triton."""
    try:
        from ._triton import INTERPRETING
    except ImportError:
        return None
    return INTERPRETING


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 for float64 inputs (gradient checks)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a CUDA device; 2 for other devices, on which kernels are only tested."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def dot_precision(dtype: torch.dtype) -> str:
    """Return how Triton multiplies matrices of ``dtype`` on CUDA: "tf32" or "ieee" (``tl.dot``'s input_precision).

    float32 follows PyTorch's own switch for CUDA products, so that a Triton kernel is as precise as the
    ``torch.matmul`` beside it: exact float32 by default, TF32 (10 bits of mantissa, about 8 times the rate on an A100)
    once a program has requested it, by ``torch.set_float32_matmul_precision("high")`` or by
    ``torch.backends.cuda.matmul.fp32_precision = "tf32"``. After the second, ``torch.get_float32_matmul_precision``
    raises, while ``fp32_precision`` reflects both. Other dtypes have one precision.
    """
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def contiguous(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Return the tensors with contiguous memory, None where one is None: kernels address them by shape alone."""
    return tuple(None if t is None else t.contiguous() for t in tensors)
