"""Compute every operation on CPU tensors by C++ of our own, compiled where it is first used.

One source file an operation (``gating.cpp``, ``permute.cpp``, ``experts.cpp``, ``activation.cpp``, ``residual.cpp``,
``packed.cpp``, ``attention.cpp``). Shared are ``vectors.h`` (vectors of the processor's width), ``activations.h``,
``products.h`` (blocks of sums in registers, while memory fetches what the next product needs), ``packed.h`` and
``operation.h`` (PyTorch's tensors and threads). The same sources compile for every instruction set in `INSTRUCTIONS`. A
result has the same bits on any number of threads.

The library is kept in ``TORCH_EXTENSIONS_DIR`` or the user's cache (``~/.cache/moelab``), or, where nothing can be
written or run there, in the folder of temporary files; one that a wheel brings lies in this package. Its file name
holds the digest of what it was made of and that of its own content, so that one which is truncated, stale or foreign is
never loaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

SOURCES = ("experts.cpp", "packed.cpp", "gating.cpp", "permute.cpp", "residual.cpp", "attention.cpp", "activation.cpp")
"""Those that take longest to compile come first."""

INSTRUCTIONS = {
    "avx512_bf16": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16"),
    "avx512": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx2": ("avx2", "fma", "f16c"),
    "baseline": (),
}
"""Instruction set -> what the compiler may use, the fastest first. "baseline" is any 64-bit processor, also ARM."""

VARIABLE = "MOELAB_INSTRUCTIONS"
"""Environment variable that limits the instruction set to one of `INSTRUCTIONS`, or is "none" for plain PyTorch."""

_ABANDONED_S = 3600.0  # no compilation takes as long
_WAIT_S = 600.0  # for another process's compilation
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast")
_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable interface of PyTorch 2.11


def compiler() -> str:
    """Return the C++ compiler that is used: ``CXX``, or g++."""
    return os.environ.get("CXX", "g++")


@functools.cache
def supported() -> tuple[str, ...]:
    """Return the instruction sets that this processor has, the fastest first."""
    has = {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_avx512_supported(),
        "avx512": torch.cpu._is_avx512_supported(),
        "avx2": torch.cpu._is_avx2_supported(),
        "baseline": True,
    }
    return tuple(name for name in INSTRUCTIONS if has[name])


def instructions() -> str:
    """Return the instruction set that is used: the fastest one here, or what `VARIABLE` says.

    Raises:
        ValueError: one line: the variable names none, or one that this processor lacks.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted and wanted not in (*supported(), "none"):
        raise ValueError(f"{VARIABLE} must be one of {', '.join((*supported(), 'none'))} here, got {wanted!r}")
    return wanted or supported()[0]


def why_not() -> str | None:
    """Return why this machine cannot use the code, or None if it can (compiling it may still fail)."""
    if instructions() == "none":
        return f"{VARIABLE} is 'none'"
    if shutil.which(compiler()) is None and not any(_found(instructions(), folder) for folder in _folders()):
        return f"there is no C++ compiler {compiler()!r}; install it, or set CXX"
    return None


@functools.cache
def available() -> bool:
    """Return whether the code is used where nobody asks for another; if not, say so in one line on standard error.

    The first call loads the code, and compiles it where that has not been done.
    """
    reason = why_not()
    if reason is None:
        try:
            operations()
        except RuntimeError as error:
            reason = str(error)
    if reason is None:
        return True
    if instructions() != "none":
        print(
            f"moelab: no CPU kernels: {reason}. Plain PyTorch computes instead; with 128 experts a training step takes "
            "two to four times as long",
            file=sys.stderr,
            flush=True,
        )
    return False


def operations() -> Any:
    """Return the namespace of the operations, ``torch.ops.<name>``, after loading or compiling the code.

    Raises:
        RuntimeError: the code cannot be compiled (with the compiler's last lines), or no folder takes it.
    """
    return _load(instructions())


def version() -> dict[str, str]:
    """Return what computes on this CPU, for provenance: the digest of the sources, and the instruction set."""
    return {"sources": _key("")[:12], "instructions": "none" if why_not() else instructions()}


@contextlib.contextmanager
def limited(name: str) -> Iterator[None]:
    """Use this instruction set, or "none", while the context lasts (for tests and benchmarks)."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    available.cache_clear()
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None) if before is None else os.environ.update({VARIABLE: before})
        available.cache_clear()


# -- the library -------------------------------------------------------------------------------------------------------


@functools.cache
def _load(name: str) -> Any:
    """Load the library of an instruction set, which was compiled before or is now."""
    problems = []
    for folder in _folders():
        try:
            if (library := _found(name, folder)) is None and folder != _HERE:
                library = _compile(name, folder)
            if library is not None:
                torch.ops.load_library(str(library))
                return getattr(torch.ops, _namespace(name))
        except OSError as error:  # nothing can be written there, or be run
            problems.append(f"{folder}: {error}")
    raise RuntimeError(f"no folder takes the compiled code ({'; '.join(problems)})")


_HERE = Path(__file__).parent


def _folders() -> tuple[Path, ...]:
    """Return the folders that may hold the library, in the order in which they are tried."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moelab"
    user = os.getuid() if hasattr(os, "getuid") else 0
    temporary = Path(tempfile.gettempdir()) / f"moelab-kernels-{user}"
    return _HERE, Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache), temporary


def _namespace(name: str) -> str:
    return f"moelab_{name}"


def _flags(name: str) -> list[str]:
    flags = [f"-m{feature}" for feature in INSTRUCTIONS[name]]
    return [*_FLAGS, *flags, _TARGET, f"-DMOELAB_OPERATIONS={_namespace(name)}"]


@functools.cache
def _key(name: str) -> str:
    """Return the digest of what a library is made of."""
    sources = [path.read_bytes() for path in sorted(_HERE.iterdir()) if path.suffix in (".h", ".cpp")]
    parts = [*sources, " ".join(_flags(name) if name else _FLAGS).encode(), platform.machine().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _found(name: str, folder: Path) -> Path | None:
    """Return the library if the folder has it whole; remove what is not whole."""
    for path in folder.glob(f"moelab-kernels-{name}-{_key(name)[:16]}-*.so"):
        if path.stem.endswith(hashlib.sha256(path.read_bytes()).hexdigest()[:16]):
            return path
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _compile(name: str, folder: Path) -> Path:
    """Compile the library into the folder, where it appears complete or not at all, and return it.

    Raises:
        RuntimeError: the compiler fails.
        OSError: the folder cannot be written, or belongs to somebody else.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and folder == _folders()[-1] and folder.stat().st_uid != os.getuid():
        raise PermissionError("belongs to another user")
    lock = FileLock(folder / f"moelab-kernels-{name}.lock", timeout=_WAIT_S)
    with contextlib.suppress(Timeout), lock:  # it binds the processes of one node; others compile at the same time
        return _found(name, folder) or _compile_now(name, folder)
    return _compile_now(name, folder)


def _compile_now(name: str, folder: Path) -> Path:
    print(
        f"moelab: compiling the CPU kernels for {name} with {compiler()}, once (some 15 s on two cores)",
        file=sys.stderr,
        flush=True,
    )
    for old in folder.glob("moelab-kernels-*.tmp"):  # of a compilation that was killed
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(old)
    work = Path(tempfile.mkdtemp(".tmp", "moelab-kernels-", folder))
    try:
        include = f"-I{Path(torch.__file__).parent / 'include'}"
        objects = [str(work / Path(source).with_suffix(".o")) for source in SOURCES]
        commands = [
            [compiler(), *_flags(name), include, "-c", str(_HERE / source), "-o", to]
            for source, to in zip(SOURCES, objects, strict=True)
        ]
        _run(commands)
        library = work / "library.so"
        libraries = f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch"
        _run([[compiler(), "-shared", *objects, "-o", str(library), *libraries]])
        with library.open("rb") as file:  # on the disk before it has its name
            os.fsync(file.fileno())
            digest = hashlib.sha256(file.read()).hexdigest()[:16]
        final = folder / f"moelab-kernels-{name}-{_key(name)[:16]}-{digest}.so"
        os.replace(library, final)
        return final
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(commands: list[list[str]]) -> None:
    """Run compilers side by side, one a core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands))
    for process in done:
        if process.returncode:
            said = " | ".join((process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-3:])
            raise RuntimeError(f"compiling the CPU kernels with {compiler()} failed: {said}")
