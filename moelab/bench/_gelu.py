"""The activation that `moelab.bench.kernel_peers` hands to triton_kernels; imported where Triton is installed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu_tanh(x):
    """Return GELU in its tanh form, of a tile in fp32."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
