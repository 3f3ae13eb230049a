"""Have fp32 products computed by oneDNN on processors whose width MKL does not use.

On a processor that is not Intel's, MKL multiplies with AVX2, 256 bits at a time. AMD's Zen 5 computes 512 bits at a
time, and oneDNN uses that: with one thread, 4,096 rows and matrices of 32 to 2,048 columns, MKL reaches 80 to 110
GFLOP/s and oneDNN 160 to 260. Zen 4 computes AVX-512 in halves of 256 bits; with oneDNN a step takes up to 6 % less.
`moelab bench train` measures both libraries where this module chooses oneDNN.

PyTorch has no option for the library alone. It passes fp32 products to oneDNN where
`torch.backends.mkldnn.matmul.fp32_precision` is "bf16", which permits oneDNN to compute them in bf16. oneDNN does that
in AMX tiles only. So the option is set on processors without AMX, and after a test that the products are exact to fp32.

PyTorch's fused attention takes three times as long with this option, because it multiplies in small blocks. So it is
for models and sequences whose attention our C++ computes (`moelab.models.attention.uses_kernel`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

VENDOR = "AuthenticAMD"
"""Maker on whose processors with AVX-512 oneDNN's fp32 products were measured: faster than MKL's, or no slower."""
_matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch's annotations lack it
_MAX_ERROR = 2.0**-12
"""Rounding to bf16 gives relative errors of 2**-9 and more; those of fp32 sums are some 2**-20."""


@contextlib.contextmanager
def fastest_products(wanted: bool = True) -> Iterator[None]:
    """Use oneDNN for PyTorch's fp32 products on the CPU in this context, where it is faster and exact to fp32.

    A precision that the program has set itself stays. Without `wanted` nothing is changed.
    """
    if not wanted or _matmul.fp32_precision != "none" or not onednn_is_faster():
        yield
        return
    with _option("bf16"):
        yield


@contextlib.contextmanager
def default_products() -> Iterator[None]:
    """Use PyTorch's own choice of library in this context, whatever `fastest_products` would choose."""
    with _option("ieee"):
        yield


@contextlib.contextmanager
def _option(precision: str) -> Iterator[None]:
    """Set PyTorch's option in this context."""
    before, _matmul.fp32_precision = _matmul.fp32_precision, precision
    try:
        yield
    finally:
        _matmul.fp32_precision = before


@functools.cache
def onednn_is_faster() -> bool:
    """Return whether oneDNN's fp32 products are faster on this processor, and exact."""
    from moelab import machine

    wide = torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported()
    if machine.vendor() != VENDOR or not wide:
        return False
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and _error() < _MAX_ERROR


def _error() -> float:
    """Return the largest error of products that oneDNN may compute in bf16, relative to their largest element."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    with _option("bf16"):
        for rows, inner, columns in ((1, 64, 64), (48, 32, 128), (256, 128, 512)):
            x, w = (torch.randn(*shape, generator=generator) for shape in ((rows, inner), (inner, columns)))
            exact = x.double() @ w.double()
            for y in (x @ w, (w.T @ x.T).T, torch.bmm(x[None], w[None])[0]):
                worst = max(worst, float((y - exact).abs().max() / exact.abs().max()))
    return worst
