"""`moelab kernels ...`: the Triton kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moelab.cli._options import check_choice

kernels = typer.Typer(no_args_is_help=True, help="Compile the Triton kernels, without a GPU.")


@kernels.command(name="compile")
def kernels_compile(
    arch: Annotated[list[str] | None, typer.Option(help="sm_80 (A100), sm_90 (H100); repeat for several")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file for the table")] = None,
) -> None:
    """Compile every kernel ahead of time; print registers, shared memory, spills, occupancy; exit code 1 on a spill."""
    for name in arch or ():
        check_choice("--arch", name, ("sm_80", "sm_90"))
    from moelab.kernels.compile import main as compile_main

    arguments = [item for name in arch or ["sm_80", "sm_90"] for item in ("--arch", name)]
    raise typer.Exit(compile_main(arguments + (["--out", str(out)] if out else [])))
