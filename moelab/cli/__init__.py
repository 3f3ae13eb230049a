"""The `moelab` command: one file per group of commands.

Heavy modules are imported inside the commands, so that `moelab --help` is quick. May import every room.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import moelab
from moelab.cli import bench, experiments, gpu, kernels, models, runs, simulate, slurm, view
from moelab.cli._options import BENCHMARKS, RUNS, SIMULATOR

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reproduce, question and extend the DeepSpeed-MoE paper (arXiv 2201.05596).",
)
# The help shows groups and commands in this order, which is the order of use.
experiments.register(app)
view.register(app)
models.register(app)
app.add_typer(runs.app, name="runs", rich_help_panel=RUNS)
slurm.register(app)
app.command(rich_help_panel=SIMULATOR)(simulate.plan)
app.add_typer(simulate.app, name="simulate", rich_help_panel=SIMULATOR)
app.add_typer(bench.bench, name="bench", rich_help_panel=BENCHMARKS)
app.add_typer(kernels.kernels, name="kernels", rich_help_panel=BENCHMARKS)
gpu.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moelab {moelab.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line.

    Bad input becomes one line on standard error and exit code 2; so does what the system refuses (a folder that is
    read-only, a full disk), with exit code 1.
    """
    try:
        app()
    except ValueError as error:
        print(f"moelab: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        places = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        reason = error.strerror or str(error).partition("\n")[0] or type(error).__name__
        print(f"moelab: {reason}{': ' if places else ''}{places}", file=sys.stderr)
        sys.exit(1)
