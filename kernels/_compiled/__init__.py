"""Compute operations on CPU by C++ of our own, compiled where it is first used.

The other CPU implementation (``_cpu``) consists of calls of PyTorch and NumPy. With many experts and few rows each, the
calls and copies around the products take up to half of the time; here they are loops over data in cache. Products are
of our own too (``products.h``): blocks of sums in registers, while memory fetches what the next product needs.

An operation uses this code where it is asked for (backend ``compiled``) and `why_not` finds nothing in the way. Results
equal those of ``_cpu`` up to rounding, so a run uses one or the other throughout.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from filelock import FileLock

SOURCES = ("experts.cpp", "gating.cpp", "packed.cpp", "permute.cpp")
_ABANDONED_S = 3600.0  # no compilation takes as long
_FLAGS = (  # for any AVX-512, because nodes may share the result; code for bfloat16 alone has its instructions
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mavx2", "-mfma", "-mf16c"),
    *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
)


def compiler() -> str:
    """Return the C++ compiler that is used: ``CXX``, or g++."""
    return os.environ.get("CXX", "g++")


def why_not() -> str | None:
    """Return why this machine cannot compile or run the code, or None if it can."""
    if not torch.cpu._is_avx512_supported():
        return "the processor has no AVX-512"
    if shutil.which(compiler()) is None:
        return f"there is no C++ compiler {compiler()!r}; install it, or set CXX"
    return None


@functools.cache
def runs_here() -> bool:
    """Return whether `why_not` finds nothing; the search for a compiler takes longer than a small gate."""
    return why_not() is None


@functools.cache
def load() -> Path:
    """Compile the code unless that has been done, register its operations as ``torch.ops.moelab``, return its file.

    The file is kept in ``TORCH_EXTENSIONS_DIR``, or where PyTorch keeps extensions. A process that is killed while it
    compiles leaves no file that others would wait for or load.

    Raises:
        RuntimeError: the code cannot be compiled (with the compiler's last lines), or not be loaded.
    """
    from torch.utils import cpp_extension

    here = Path(__file__).parent
    flags = [*_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    texts = [path.read_bytes() for path in sorted(here.glob("*.h")) + [here / source for source in SOURCES]]
    version = subprocess.run([compiler(), "--version"], capture_output=True).stdout
    parts = [*texts, " ".join(flags).encode(), version, torch.__version__.encode()]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    library = folder / f"moelab-kernels-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{library}.lock"):
            if not library.exists():
                _compile(flags, [here / source for source in SOURCES], library)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise RuntimeError(f"the compiled CPU kernels do not fit this PyTorch ({torch.__version__}): {error}") from None
    return library


def _compile(flags: list[str], sources: list[Path], library: Path) -> None:
    """Compile the sources into `library`, which appears complete or not at all, and is never replaced."""
    from torch.utils import cpp_extension

    for old in library.parent.glob("moelab-kernels-*.tmp"):  # of a compilation that was killed
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _ABANDONED_S:
                old.unlink()
    handle, name = tempfile.mkstemp(".tmp", library.stem, library.parent)  # its own, where a lock binds one node only
    os.close(handle)
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    try:
        command = [compiler(), *flags, *include, *map(str, sources), "-o", name, *link]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = " | ".join((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-3:])
            raise RuntimeError(f"compiling the CPU kernels with {compiler()} failed: {said}")
        os.chmod(name, 0o755)
        try:
            os.link(name, library)
        except FileExistsError:
            pass  # another node was faster, and may be using it
        except OSError:  # no hard links here
            os.replace(name, library)
    finally:
        Path(name).unlink(missing_ok=True)
