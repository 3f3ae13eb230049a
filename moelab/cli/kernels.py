"""`moelab kernels ...`: the Triton kernels."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from moelab import paths, terminal
from moelab.cli._options import check_choice, check_device

kernels = typer.Typer(no_args_is_help=True, help="The Triton kernels: compiled without a GPU, tuned on one.")


@kernels.command(name="compile")
def kernels_compile(
    arch: Annotated[list[str] | None, typer.Option(help="sm_80 (A100), sm_90 (H100); repeat for several")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file for the table")] = None,
) -> None:
    """Compile every kernel ahead of time; print registers, shared memory, spills, occupancy; exit code 1 on a spill."""
    for name in arch or ():
        check_choice("--arch", name, ("sm_80", "sm_90"))
    from moelab.kernels.tools.compile import main as compile_main

    raise typer.Exit(int(not compile_main(tuple(arch or ("sm_80", "sm_90")), out)))


@kernels.command(name="tune")
def kernels_tune(
    minutes: Annotated[float, typer.Option(help="for all ops and shapes; the most valuable come first")] = 4.0,
    out: Annotated[Path | None, typer.Option(help="folder of the table; by default .moelab/tuned")] = None,
) -> None:
    """Measure tile sizes, warps and stages of each kernel on this machine's GPU; write the table that launches read."""
    check_device("cuda")
    import torch

    from moelab.kernels import tuning
    from moelab.kernels.tools import tune

    if minutes <= 0:
        raise ValueError(f"--minutes must be positive, got {minutes:g}")
    name = torch.cuda.get_device_name()
    path = (out or paths.home() / "tuned") / f"{tuning.card(name)}.json"
    console = terminal.console()

    def report(one: tune.Tuned) -> None:
        tune.write([one], path, name)
        best = " ".join(f"{key}={value}" for key, value in one.best.items()) or "own tile kept"
        text = f"{one.key}: {one.own_ms:.3g} ms -> {one.best_ms:.3g} ms, {best}"
        console.print(f"{text} ({one.tried} tried, {one.refused} refused, {one.wrong} wrong)", highlight=False)

    tuned = tune.search("cuda", time.monotonic() + 60 * minutes, report=report)
    console.print(f"{len(tuned)} shape classes measured: {paths.short(path)}", highlight=False)
