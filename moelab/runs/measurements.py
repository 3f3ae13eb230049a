"""Keep measurements like runs: read back what the same code measured with the same arguments on the same machine.

    .moelab/measurements/<function>-<digest>.json      arguments, code, machine, when, provenance, value

The digest is of all that a measurement depends on, so a changed source file, another processor, another version of
torch or CPU kernels that are missing measure again. The store lets one measurement run at a time, because two on one
machine would slow each other down.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from moelab import paths
from moelab.config import DataConfig
from moelab.files import read_json, sha256_of, write_json
from moelab.runs.provenance import hardware, provenance, versions
from moelab.runs.store import Run

FORMAT = 1
_NEEDED = ("function", "arguments", "measured", "seconds", "code", "machine", "provenance", "value")
"""What a record of the store has besides its format."""
EVALUATIONS = "measured"
"""Folder of a run, see `moelab.runs.evaluations`."""
_KINDS = (".py", ".cpp", ".h", ".json", ".yaml", ".csv")
_SETTINGS = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS"),
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"),
)
"""Environment variables that limit the threads and the instruction sets of PyTorch and its libraries."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One value, and how it came about.

    Attributes:
        id: file name without its ending.
        function, arguments: what was called.
        measured: when, UTC.
        seconds: that it took.
        provenance: see `moelab.runs.provenance.provenance`.
        value: what the function returned, as JSON has it.
        read_back: it was measured by an earlier call.
    """

    id: str
    function: str
    arguments: list[Any]
    measured: str
    seconds: float
    provenance: dict[str, Any]
    value: Any
    read_back: bool

    def summary(self) -> dict[str, Any]:
        """All but the value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "value"}

    def __str__(self) -> str:
        commit = (self.provenance.get("commit") or "unknown")[:7]
        how = "read back, measured" if self.read_back else "measured"
        return f"{self.function.rpartition('.')[2]}: {how} {self.measured} at commit {commit} in {self.seconds:.1f} s"


class MeasurementStore:
    """All measurements below one folder, that of the home when this object is made."""

    def __init__(self) -> None:
        self.root = paths.home() / "measurements"
        code()  # now, while the files are still those that this process imports

    def measure(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        again: bool = False,
        before: Callable[[], None] = lambda: None,
    ) -> Measurement:
        """Return what `function(*arguments)` returns, from the store if it is there.

        A value is not kept, and one line on standard error says so, where it cannot be written, or where files of
        moelab have changed since this process began: it may be of code that no file has, or of several versions.

        Args:
            function: of a module of moelab; returns what JSON can hold (tuples come back as lists).
            arguments: numbers, texts, dataclasses, runs, and lists or dicts of them.
            again: measure although it is stored; the new value replaces the old one.
            before: called when the function is about to be called, before the wait for other measurements.

        Raises:
            ValueError: one line: a function or an argument by which nothing can be stored.
        """
        plain, key = _identity(function, arguments)
        file = self.root / f"{key}.json"
        if not again and (stored := self._read(key)):
            return stored
        self.root.mkdir(parents=True, exist_ok=True)
        before()
        with FileLock(self.root / f".{socket.gethostname()}.lock"):
            if not again and (stored := self._read(key)):  # by whoever held the lock
                return stored
            record = call(function, arguments, arguments=plain) | {"machine": machine()}
            why = ", because files of moelab have changed since this process began; restart the kernel"
            if source() == record["code"]:
                try:
                    write_json(file, record)
                    why = ""
                except OSError as error:  # the disk is full, say; the value is good
                    why = f": {error.strerror}: {self.root}"
            if why:
                print(f"{function.__name__}: not kept{why}", file=sys.stderr)
        return _of(key, record, read_back=False)

    def _read(self, key: str) -> Measurement | None:
        record = read_record(self.root / f"{key}.json", _NEEDED)
        return _of(key, record, read_back=True) if record else None


def call(function: Callable[..., Any], given: Sequence[Any], *, arguments: Any, **others: Any) -> dict[str, Any]:
    """Call a function, and return the record of that: its value, when, by which code, and how long it took.

    Args:
        given: what it is called with, besides `others`.
        arguments: what the record names them by, as JSON values.
    """
    began, started = time.time(), time.perf_counter()
    value = json.loads(json.dumps(function(*given, **others)))
    return {
        "format": FORMAT,
        "function": f"{function.__module__}.{function.__qualname__}",
        "arguments": arguments,
        "measured": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(began)),
        "seconds": round(time.perf_counter() - started, 3),
        "code": code(),
        "provenance": provenance(),
        "value": value,
    }


def read_record(file: Path, needed: Collection[str]) -> dict[str, Any] | None:
    """Return the record in a file, None if it is missing, malformed or lacks an entry: it can be measured again."""
    try:
        record = read_json(file)
    except (ValueError, OSError):
        return None
    there = isinstance(record, dict) and record.get("format") == FORMAT and set(needed) <= set(record)
    return record if there else None


def _of(key: str, record: dict[str, Any], *, read_back: bool) -> Measurement:
    stored = {f.name: record[f.name] for f in dataclasses.fields(Measurement) if f.name in record}
    return Measurement(id=key, **stored, read_back=read_back)


def _identity(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[list[Any], str]:
    """Return arguments as JSON, and id."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    if not module.startswith("moelab.") or "<" in name or not name:
        raise ValueError(
            f"measure: {module}.{name} is no function of a module of moelab, whose code a measurement is stored under; "
            "put it into one"
        )
    plain = [as_json(value) for value in arguments]
    whole = json.dumps([FORMAT, module, name, plain, code(), machine()])
    return plain, f"{prefix(function)}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}"


def prefix(function: Callable[..., Any]) -> str:
    """Return the beginning of the ids of a function's measurements."""
    return "-".join((function.__module__.rpartition(".")[2], function.__qualname__)).replace("_", "-")


def as_json(value: Any) -> Any:
    """Return an argument as JSON values that tell it from others; ValueError, one line, where there are none."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Run):  # trained again it has other weights; values name it by its arm
        about = {"run": value.spec.id, "arm": value.spec.title, "result": file_digest(value.path / "result.json")}
        # What was measured with weights that are gone is all there is of them, and a later record may bring more.
        kept = sorted((value.path / EVALUATIONS).glob("*.json"))
        if not kept or value.has_weights:
            return about
        return about | {"measured": [[file.name, file_digest(file)] for file in kept]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {"type": type(value).__qualname__} | {
            f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
        return plain | {"text": _text_now(value)} if isinstance(value, DataConfig) else plain
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [as_json(part) for part in value]
    raise ValueError(f"measure: nothing can be stored by an argument of type {type(value).__name__}")


def _text_now(data: DataConfig) -> str:
    """Return a digest that changes with the files of a user's text; empty for texts that do not change."""
    if not data.corpus.startswith(("folder:", "hf:")):
        return ""
    from moelab.data.corpus import open_corpus

    try:
        state = open_corpus(data, paths.home() / "data").state
    except ValueError:  # it is gone, which is told where it is read
        return ""
    return hashlib.sha256(state.encode()).hexdigest()[:12]


@functools.cache
def code() -> str:
    """Return the digest of moelab's files when this process asked first, which stands for the code that it runs."""
    return source()


def source() -> str:
    """Digest of moelab's source and data files, kernels and their C++ included.

    Hidden files and folders are left out: an editor keeps its locks and copies there.
    """
    hashed = hashlib.sha256()
    places: dict[str, list[str]] = {}
    for package in ("moelab", "moelab.kernels"):
        spec = find_spec(package)
        places[package] = list((spec.submodule_search_locations or ()) if spec else ())
    for name, root in ((name, Path(root)) for name, roots in places.items() for root in roots):
        for file in sorted(file for file in root.rglob("*.*") if file.suffix in _KINDS):
            place = file.relative_to(root)
            if not any(part.startswith(".") for part in place.parts):
                hashed.update(f"{name}/{place}\0".encode() + file.read_bytes() + b"\0")
    return hashed.hexdigest()[:12]


def machine() -> dict[str, Any]:
    """Return what numbers depend on besides the code: processor, cores of this process, GPUs, packages, what computes.

    The CPU kernels are loaded for that, and compiled where they are not yet: whether they work decides what computes.
    """
    from moelab import kernels
    from moelab.models.products import onednn_is_faster

    kernels.cpp_available()
    return _machine() | {
        "settings": {name: value for name in _SETTINGS if (value := os.environ.get(name))},
        "cpu_kernels": kernels.version(),
        "products": "oneDNN" if onednn_is_faster() else "PyTorch's choice",
    }


@functools.cache
def _machine() -> dict[str, Any]:
    """Return the part of `machine` that stays the same in a process."""
    record = hardware()
    return {"cpu": record["cpu"], "cores": record["cores"], "gpus": _gpus(), "versions": versions()}


def _gpus() -> list[str]:
    """As the driver lists them: asking torch would take its import."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = file.read_text(errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        names.append(f"visible: {visible}")
    return names


def file_digest(file: Path) -> str:
    """Return a digest of a file's bytes, or an empty text where there is none."""
    return sha256_of(file)[:12] if file.exists() else ""
