"""The Triton kernels at the sizes of real layers, against their references on the same device.

Most valuable first: those that decide whether a model works.
"""

import pytest
import torch
from moelab.kernels import row_table, tuning
from moelab.kernels.gating import Gate

from tests.kernels import test_experts, test_gating, test_permute, test_residual
from tests.kernels.helpers import TOLERANCE, compare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE, BACKENDS = "cuda", ("triton", "reference")
TARGET = ("triton", DEVICE, None)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    "S,E,K,capacity,seed,dtype",
    [
        (8192, 128, 1, 64, 1, FP32),
        (1, 128, 1, None, None, FP32),
        (64, 128, 1, 4, 1, FP32),
        (16384, 128, 8, None, None, BF16),
        (8192, 64, 2, 256, None, FP32),
        (16384, 512, 1, 32, None, FP32),
        (512, 16, 2, 64, 5, FP16),
    ],
)
def test_gate(S, E, K, capacity, seed, dtype):
    logits, options = torch.randn(S, E).to(DEVICE, dtype), dict(seed=seed, normalize=K > 1)
    got, want = (test_gating.gradient(logits, K, capacity, backend=b, **options) for b in BACKENDS)
    compare(Gate._fields, got[:-1], want[:-1], TOLERANCE[FP32])
    compare(["gradient"], got[-1:], want[-1:], TOLERANCE[dtype])


@pytest.mark.parametrize(
    "S,E,K,M,dtype", [(8192, 128, 1, 1024, BF16), (8192, 32, 2, 2048, FP16), (333, 64, 2, 100, FP32)]
)
def test_dispatch_and_combine(S, E, K, M, dtype):
    g = test_permute.make(S, E, K, S * K // E, DEVICE)  # some are dropped
    table, same = (row_table(g, rows=S * K, backend=b) for b in BACKENDS)
    assert all(torch.equal(a, b) for a, b in zip(table, same, strict=True))
    x, dy = torch.randn(2, S, M, device=DEVICE).to(dtype)
    got, want = (test_permute.run(x, table, g.weight_SK, dy, b) for b in BACKENDS)
    compare(("rows", "y", "dx", "d rows", "d weight"), got, want, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "counts,M,F,dtype,activation",
    [
        ([64] * 128, 1024, 4096, BF16, "gelu_tanh"),
        ([512] * 128, 2048, 768, BF16, "gelu_tanh"),
        ([1] * 8 + [0] * 56, 2048, 8192, BF16, "gelu_tanh"),
        ([512] * 64, 2048, 1024, BF16, "swiglu"),
        ([512] * 8, 512, 2048, FP32, "gelu_tanh"),
        ([120] * 5, 100, 401, FP16, "gelu"),
    ],
)
@pytest.mark.parametrize("programs", [0, 1, 4])
def test_expert_ffn(programs, counts, M, F, dtype, activation):
    """With one program for each tile, and with persistent programs for each multiprocessor."""
    with torch.device(DEVICE), tuning.persistent(programs):  # numbers are drawn, and memory is poisoned, on the card
        test_experts.check(counts, 3, M, F, dtype, activation, TARGET)


@pytest.mark.parametrize("S,M,dtype", [(8192, 1024, BF16), (8192, 2048, FP16), (333, 100, FP32)])
def test_residual_mix(S, M, dtype):
    test_residual.check(TARGET, S, M, dtype)
