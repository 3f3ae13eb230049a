"""Compute activations on a CPU so that an element's bits do not depend on its place among the others.

PyTorch computes GELU and SiLU of whole vectors by one formula and of the elements after the last whole vector by
another, in each thread's part of a tensor. So a token's bits would depend on the number of tokens, on the feed-forward
size and on the number of threads. Here every thread's part consists of whole vectors: a tensor with an odd number of
elements is computed with zeros after it. Which parts PyTorch makes is not documented; tests examine it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moelab import kernels

_VECTORS = 64
"""A number of elements that is whole vectors on every processor: two registers of AVX-512 in bf16."""


def gelu(x: Tensor) -> Tensor:
    """Return GELU's tanh approximation."""
    parts = torch.get_num_threads() if x.numel() > 1 << 14 else 1
    return _of_whole_vectors(kernels.ACTIVATIONS["gelu_tanh"].forward, x, parts)


def swiglu(pre: Tensor) -> Tensor:
    """Return ``silu(g) * u``, [..., F], of pre-activations [..., 2 F] that hold g and u side by side."""
    gate, up = pre.chunk(2, -1)
    return of_elements(F.silu, gate) * up


INVARIANT: dict[str, Callable[[Tensor], Tensor]] = {
    "none": kernels.ACTIVATIONS["none"].forward,
    "gelu_tanh": gelu,
    "swiglu": swiglu,
}
"""Name in `moelab.kernels.ACTIVATIONS` -> the function here; frozen layers compute these activations alone."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return the sigmoid."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def of_elements(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the function of all elements, for one that PyTorch shares out to threads as most are (not GELU)."""
    parts = max(1, min(torch.get_num_threads(), -(-x.numel() // (1 << 15))))
    return _of_whole_vectors(function, x, parts)


def _of_whole_vectors(function: Callable[[Tensor], Tensor], x: Tensor, parts: int) -> Tensor:
    """Return the function of all elements, which PyTorch computes in this number of equal parts."""
    if not x.is_contiguous() and x.shape[-1] % _VECTORS:
        x = x.contiguous()  # otherwise each row would be vectors of its own, and some elements
    n, step = x.numel(), parts * _VECTORS
    if n % step == 0:
        return function(x)
    return function(F.pad(x.reshape(-1), (0, step - n % step)))[:n].view(x.shape)
