"""Import Triton for the files of kernels (``_*_triton.py``).

Importing it takes a fifth of a second. So only those files do, and the ops import them when they first call a kernel:
a process that computes on a CPU never loads Triton, and needs none.
"""

import triton
import triton.language as tl

INTERPRETING = bool(triton.knobs.runtime.interpret)
"""Whether Triton interprets the kernels, on CPU tensors."""

__all__ = ["INTERPRETING", "tl", "triton"]
