"""Compute every operation on CPU tensors by C++ of our own, compiled where it is first used.

One source file an operation (``gating.cpp``, ``permute.cpp``, ``experts.cpp``, ``activation.cpp``, ``residual.cpp``,
``packed.cpp``, ``decode.cpp``, ``attention.cpp``, ``head.cpp``). Shared are ``vectors.h`` (vectors of the processor's
width), ``activations.h``, ``products.h`` (blocks of sums in registers, while memory fetches what the next product
needs), ``operands.h`` (the layouts of matrices for products), ``tiles.h`` (products of bfloat16 by AMX), ``packed.h``,
``decode.h`` (what a decoding step is made of) and ``operation.h`` (PyTorch's tensors and threads). The same sources
compile for every instruction set in `INSTRUCTIONS`. A result has the same bits on any number of threads.

The library is kept in ``TORCH_EXTENSIONS_DIR`` or the user's cache (``~/.cache/moelab``), in a folder named after the
digest of what it was made of. That folder appears complete or not at all, and is not replaced while it is whole: beside
the library are its size and digest, which are checked before it is loaded. A process that loaded a library without its
end would be killed by SIGBUS.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

SOURCES = (
    "experts.cpp", "products.cpp", "attention.cpp", "gating.cpp", "residual.cpp", "permute.cpp", "packed.cpp",
    "head.cpp", "decode.cpp", "activation.cpp",
)  # fmt: skip
"""Those that take longest to compile come first."""

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
INSTRUCTIONS = {
    "amx_bf16": (*_AVX512, "avx512bf16", "amx-tile", "amx-bf16"),
    "avx512_bf16": (*_AVX512, "avx512bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "baseline": (),
}
"""Instruction set -> what the compiler may use, the fastest first. "baseline" is any 64-bit processor, also ARM."""

VARIABLE = "MOELAB_INSTRUCTIONS"
"""Environment variable that limits the instruction set to one of `INSTRUCTIONS`, or is "none" for plain PyTorch."""

_WAIT_S = 600.0  # for another process's compilation
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast")
_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable interface of PyTorch 2.11


def compiler() -> str:
    """Return the command of the C++ compiler that is used: ``CXX``, which may have arguments, or g++."""
    return os.environ.get("CXX", "").strip() or "g++"


@functools.cache
def supported() -> tuple[str, ...]:
    """Return the instruction sets that this processor has, the fastest first."""
    bfloat16 = torch.cpu._is_avx512_supported() and torch.cpu._is_avx512_bf16_supported()
    has = {
        # `_init_amx` asks the operating system for the tile registers, which a process may not use without.
        "amx_bf16": bfloat16 and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx(),
        "avx512_bf16": bfloat16,
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
    try:
        library = _library(instructions())
    except RuntimeError:  # a user without a home
        return "there is no home directory to keep the compiled code in; set TORCH_EXTENSIONS_DIR"
    if not _whole(library) and shutil.which(compiler().split()[0]) is None:
        damaged = f"{library} is damaged, and " if library.exists() else ""
        return f"{damaged}there is no C++ compiler {compiler()!r}; install it, or set CXX"
    return None


def why_not_loaded() -> str | None:
    """Load the code, and compile it where that has not been done; return why that fails, or None."""
    try:
        operations()
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def available() -> bool:
    """Return whether the C++ is the default on this machine; if not, print one line on standard error that says why.

    The first call loads the code, and compiles it where that has not been done.
    """
    if reason := why_not_loaded():
        if instructions() != "none":
            print(
                f"moelab: no CPU kernels: {reason}. Plain PyTorch computes instead; "
                "training takes up to 2.4 times as long",
                file=sys.stderr,
                flush=True,
            )
        return False
    return True


@functools.cache
def operations() -> Any:
    """Return the namespace of the operations, ``torch.ops.<name>``, after loading or compiling the code.

    Raises:
        RuntimeError: one line: `why_not`, the last words of a compiler that fails, or why its folder does not do.
    """
    return _load(instructions())


def version() -> dict[str, str]:
    """Return what computes on this CPU, for provenance: the digest of the sources, and the instruction set."""
    fails = why_not() or (available.cache_info().currsize and not available())  # as far as that was tried
    return {"sources": _key("")[:12], "instructions": "none" if fails else instructions()}


@contextlib.contextmanager
def limited(name: str) -> Iterator[None]:
    """Use this instruction set, or "none", while the context lasts (for tests and benchmarks)."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    _forget()
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None) if before is None else os.environ.update({VARIABLE: before})
        _forget()


def _forget() -> None:
    """Clear the caches, so that the next call reads the environment again."""
    available.cache_clear()
    operations.cache_clear()


# -- the library -------------------------------------------------------------------------------------------------------


@functools.cache
def _load(name: str) -> Any:
    """Load the library of an instruction set, which was compiled before or is now."""
    if reason := why_not():
        raise RuntimeError(reason)
    library = _library(name)
    try:
        if not _whole(library):
            _compile(name)
        torch.ops.load_library(str(library))
    except OSError as error:  # nothing can be written there, or be run
        raise RuntimeError(
            f"the compiled code cannot be kept in {_folder()} ({error.__cause__ or error}); set TORCH_EXTENSIONS_DIR "
            "to a folder where files can be written and run"
        ) from None
    return getattr(torch.ops, _namespace(name))


_HERE = Path(__file__).parent


def _folder() -> Path:
    """Return the folder in which libraries are kept; a user without a home is a RuntimeError."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moelab"


def _library(name: str) -> Path:
    """Return where the library of an instruction set is, once it is compiled."""
    return _folder() / f"moelab-kernels-{name}-{_key(name)[:16]}" / "library.so"


def _whole(library: Path) -> bool:
    """Return whether a library has the size and the digest that were written beside it when it was compiled."""
    try:
        return _beside(library).read_text() == _size_and_digest(library)
    except (OSError, ValueError):  # it is not there, or what is beside it is no text
        return False


def _beside(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _size_and_digest(library: Path) -> str:
    content = library.read_bytes()
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}\n"


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
    parts += [b"digest beside it"] if name else []  # a folder without one is of an earlier version
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _compile(name: str) -> None:
    """Compile the library, unless another process does.

    Raises:
        RuntimeError: the compiler fails.
        OSError: the folder cannot be written.
    """
    _folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(_folder() / f"moelab-kernels-{name}.lock")
    # It binds the processes of one node; others compile at the same time, and so do all where files have no locks.
    with contextlib.suppress(Timeout, NotImplementedError), _acquired(lock):
        if not _whole(_library(name)):
            _compile_now(name)
        return
    _compile_now(name)


def _acquired(lock: FileLock) -> AcquireReturnProxy:
    """Acquire the lock, and say so if that means to wait."""
    with contextlib.suppress(Timeout):
        return lock.acquire(timeout=0)
    print("moelab: waiting for another process, which compiles the CPU kernels", file=sys.stderr, flush=True)
    return lock.acquire(timeout=_WAIT_S)


def _compile_now(name: str) -> None:
    library = _library(name)
    if library.exists() and not _whole(library):
        print(f"moelab: {library} is damaged: its size or digest is another than when it was made", file=sys.stderr)
    print(
        f"moelab: compiling the CPU kernels for {name} with {compiler()}, once (some 15 s on two cores)",
        file=sys.stderr,
        flush=True,
    )
    with tempfile.TemporaryDirectory(".tmp", "moelab-kernels-", _folder(), ignore_cleanup_errors=True) as work:
        include = f"-I{Path(torch.__file__).parent / 'include'}"
        objects = [str(Path(work, source).with_suffix(".o")) for source in SOURCES]
        commands = [
            [*compiler().split(), *_flags(name), include, "-c", str(_HERE / source), "-o", to]
            for source, to in zip(SOURCES, objects, strict=True)
        ]
        _run(commands)
        made = Path(work, "made", library.name)
        made.parent.mkdir()
        libraries = f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch"
        _run([[*compiler().split(), "-shared", *objects, "-o", str(made), *libraries]])
        _beside(made).write_text(_size_and_digest(made))
        for file in (made, _beside(made)):  # on the disk before it has its name
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if _key.__wrapped__(name) != _key(name):
            raise RuntimeError("the sources of the CPU kernels changed while they were compiled; start again")
        try:
            # Unlike a file, a folder that is not empty cannot be replaced: where nodes share files, that would end the
            # processes of a node that has loaded its library.
            if library.parent.exists() and not _whole(library):
                os.rename(library.parent, Path(work, "damaged"))
            os.rename(made.parent, library.parent)
        except OSError:
            if not _whole(library):
                raise


def _run(commands: list[list[str]]) -> None:
    """Run compilers side by side, one a core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        run = functools.partial(subprocess.run, capture_output=True, text=True, errors="replace")
        done = list(pool.map(run, commands))
    for process in done:
        if process.returncode:
            lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
            said = next((line for line in lines if "error" in line), " | ".join(lines[-3:]))
            raise RuntimeError(f"compiling the CPU kernels with {compiler()} failed: {said}")
