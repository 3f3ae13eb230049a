"""`moelab kernels ...`: the Triton kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moelab.cli._options import check_choice

kernels = typer.Typer(no_args_is_help=True, help="The Triton kernels, compiled without a GPU.")


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
