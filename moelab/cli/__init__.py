"""The `moelab` command: one file per group of commands.

Heavy modules are imported inside the commands, so that `moelab --help` is quick. May import every room.
"""

from __future__ import annotations

import sys

import typer

from moelab.cli import bench, experiments, kernels, models, runs, simulate, slurm, view

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reproduce, question and extend the DeepSpeed-MoE paper (arXiv 2201.05596).",
)
experiments.register(app)
view.register(app)
models.register(app)
app.command()(simulate.plan)
slurm.register(app)
app.add_typer(runs.app, name="runs")
app.add_typer(bench.bench, name="bench")
app.add_typer(simulate.app, name="simulate")
app.add_typer(kernels.kernels, name="kernels")


def main() -> None:
    """Run the command line: bad input becomes one line on standard error and exit code 2."""
    try:
        app()
    except ValueError as error:
        print(f"moelab: {error}", file=sys.stderr)
        sys.exit(2)
