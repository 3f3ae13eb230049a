"""Describe this machine: its processor, whether it has CUDA devices, its packages. Imports nothing of moelab."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path

FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
"""Flags that decide which kernels a matrix library has, as Linux names them."""


def cpu() -> str:
    """Return the processor's name with family, model and instruction sets, which differ between generations.

    For example "AMD EPYC (family 25, model 17; avx2, avx512f, avx512_bf16)".

    Virtual machines often give the brand alone as the name. Where the system has no /proc/cpuinfo it is the
    platform's own text.
    """
    return describe_cpu(_cpuinfo())


def vendor() -> str:
    """Return the processor's vendor, such as "AuthenticAMD"; an empty text where it is unknown."""
    return _fields(_cpuinfo()).get("vendor_id", "")


def _cpuinfo() -> str:
    """Return the content of /proc/cpuinfo, empty where the system has none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def _fields(cpuinfo: str) -> dict[str, str]:
    """Return what /proc/cpuinfo says of its first processor."""
    lines = (line.partition(":") for line in cpuinfo.strip().partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def describe_cpu(cpuinfo: str) -> str:
    """Return `cpu`'s text from the content of /proc/cpuinfo, of its first processor."""
    fields = _fields(cpuinfo)
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    numbers = ", ".join(
        f"{label} {fields[key]}" for label, key in (("family", "cpu family"), ("model", "model")) if key in fields
    )
    details = "; ".join(part for part in (numbers, ", ".join(f for f in FEATURES if f in flags)) if part)
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({details})" if details else name


def cores() -> int:
    """Return how many cores this process may use: those that it is bound to, or its container's share of their time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such control group, or no quota ("max")
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def cuda_devices() -> int:
    """Return how many CUDA devices torch can use here.

    Loads torch, which takes seconds, only where there is a driver.
    """
    driver = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    with contextlib.suppress(OSError):
        ctypes.CDLL(driver)
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return 0


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those of the packages that are installed."""
    installed = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed
