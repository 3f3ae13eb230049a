"""Helpers of the operations' tests."""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-9}


def poison():
    """Leave NaN in the memory that the next tensors are likely to get."""
    held = [torch.full((n,), float("nan")) for n in (64, 512, 4096, 1 << 15, 1 << 17) for _ in range(4)]
    del held


def compare(names, got, want, tolerance):
    """Compare named tensors, also their dtypes and shapes; the tolerance is relative to a tensor's largest value."""
    for name, a, b in zip(names, got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_bits(first, *others):
    for other in others:
        for i, (a, b) in enumerate(zip(first, other, strict=True)):
            assert a.dtype == b.dtype and torch.equal(a, b), f"number {i} differs"


def assert_same_bits_on_any_number_of_threads(call):
    """``call()`` returns tensors, computed from the same arguments each time."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            poison()
            found.append(call())
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*found)


def refused():
    """Expect that the C++ refuses an operation in one line."""
    line = r"^\w+: backend 'cpp' does not take these sizes or dtypes \(.*\); use 'auto'$"
    return pytest.raises(ValueError, match=line)
