"""Compute operations on CPU by C++ of our own, compiled where it is first used.

The other CPU implementation (``_cpu``) consists of calls of PyTorch and NumPy. With many experts and few rows each, the
calls, copies and transpositions around the products take longer than the products; here they are loops over data in
cache. Products are oneDNN's, by the micro-kernel that PyTorch exports (``products.h``).

An operation uses this code where it is asked for (backend ``compiled``) and `why_not` finds nothing in the way; results
equal those of ``_cpu`` up to rounding, so a run must use one or the other throughout.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import torch

SOURCES = ("experts.cpp", "gating.cpp")
_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c")


def compiler() -> str:
    """Return the C++ compiler that is used: ``CXX``, or g++."""
    return os.environ.get("CXX", "g++")


def why_not() -> str | None:
    """Return why this machine cannot compile or run the code, or None if it can."""
    if not torch.cpu._is_avx512_supported():
        return "the processor has no AVX-512"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    if shutil.which(compiler()) is None:
        return f"there is no C++ compiler {compiler()!r}; install it, or set CXX"
    return None


@functools.cache
def load() -> None:
    """Compile the code, or load it if it is compiled, and register its operations as ``torch.ops.moelab``.

    It is stored where PyTorch stores extensions (``TORCH_EXTENSIONS_DIR``), by PyTorch's version.

    Raises:
        RuntimeError: it cannot be compiled; the compiler's output says why.
    """
    import ninja
    from torch.utils import cpp_extension

    name = f"moelab_{torch.__version__.replace('.', '_').replace('+', '_')}"
    before = os.environ["PATH"]
    os.environ["PATH"] = os.pathsep.join([before, ninja.BIN_DIR])  # where an environment is used without activating it
    try:
        cpp_extension.load(
            name,
            [str(Path(__file__).with_name(source)) for source in SOURCES],
            extra_cflags=["-O3", "-fopenmp", *_FLAGS, "-DCPU_CAPABILITY_AVX512", "-DCPU_CAPABILITY=AVX512"],
            is_python_module=False,
        )
    finally:
        os.environ["PATH"] = before
