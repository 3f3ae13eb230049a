"""The `moelab` command: one file per group of commands.

Heavy modules are imported inside the commands, so that `moelab --help` is quick. May import every room.
"""

from __future__ import annotations

import sys

import typer

from moelab.cli import bench, experiments, gpu, kernels, models, runs, simulate, slurm, view

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
gpu.register(app)
app.add_typer(runs.app, name="runs")
app.add_typer(bench.bench, name="bench")
app.add_typer(simulate.app, name="simulate")
app.add_typer(kernels.kernels, name="kernels")


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
