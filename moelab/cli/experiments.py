"""`moelab list`, `run`, `claims`: experiments and what they found. Heavy modules are imported inside the commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from moelab.cli import slurm as commands


def list_() -> None:
    """Show the experiments, their scales and what they cost."""
    from moelab import terminal
    from moelab.experiments import EXPERIMENTS

    view = terminal.table("experiment", "paper", "question", "scale", "what", "cost")
    for e in EXPERIMENTS.values():
        for i, (name, scale) in enumerate(e.scales.items()):
            view.add_row(*((e.name, e.paper, e.question) if i == 0 else ("", "", "")), name, scale.what, scale.cost)
    terminal.console().print(view)


def run(
    name: Annotated[str | None, typer.Argument(help="experiment, see `moelab list`")] = None,
    scale: Annotated[str, typer.Option(help="smoke, cpu, gpu or paper")] = "cpu",
    parameter: commands.Parameters = None,
    all_: Annotated[bool, typer.Option("--all", help="every experiment that has the scale")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only say what would be trained, and what it costs")
    ] = False,
    publish: commands.Publish = False,
) -> None:
    """Run an experiment's notebook: train what is not trained yet, show figures and claims on the results page."""
    from moelab.experiments import experiment
    from moelab.notebook import batch
    from moelab.notebook import execute as notebooks
    from moelab.runs import preflight

    if all_ == (name is not None):
        raise ValueError("run: give an experiment's name or --all; see `moelab list`")
    given = commands.parse_parameters(parameter, scale)
    scale = given["scale"]
    if name is not None:
        values = notebooks.check_parameters(experiment(name), given)
        experiment(name).scale(values["scale"])
    wanted = {name: given} if name else batch.chosen(scale, {k: v for k, v in given.items() if k != "scale"})
    checked = [(experiment(e), notebooks.check_parameters(experiment(e), taken)) for e, taken in wanted.items()]
    asked = [(e, e.specs_of(notebooks.resolve(e, taken))) for e, taken in checked]
    if dry_run:
        from moelab.runs.dry_run import planned_runs, show

        show(planned_runs([spec for _, specs in asked for spec in specs]))
        return
    on_gpu = scale == "gpu" and any(e.measures for e, _ in asked)
    preflight.check(
        [spec for e, specs in asked if e.trains for spec in specs], device="cuda" if on_gpu else "cpu", publish=publish
    )
    if name is None:
        from moelab.lab import Lab

        good = batch.run_all(scale, {k: v for k, v in given.items() if k != "scale"}, Lab().run, publish=publish)
    else:
        from moelab.notebook.watch import execute_watched

        good = execute_watched(experiment(name), values, publish=publish)
    if not good:
        raise typer.Exit(1)


def claims(
    as_json: Annotated[bool, typer.Option("--json", help="all of it, as JSON")] = False,
) -> None:
    """Every claim of the paper, ours beside the paper's value, and a verdict; computed from the results."""
    import dataclasses
    import json

    from moelab import paths, terminal
    from moelab.report.ledger import counts, distinct, entries, family, table
    from moelab.report.summary import read_all

    summaries, unreadable = read_all(*paths.all_results())
    for line in unreadable:
        print(f"not readable: {line}", file=sys.stderr)
    ledger = entries(summaries)
    counted, together = counts(ledger), family(ledger)
    if as_json:
        found = {"claims": [e.to_json() for e in ledger], "counts": counted, "family": dataclasses.asdict(together)}
        print(json.dumps(found, indent=2))
        return
    console = terminal.console()
    console.print(table(ledger, console.width))
    console.print(f"{len(distinct(ledger))} claims in {len(ledger)} rows", markup=False)
    for kind, verdicts in counted.items():
        console.print(f"{kind}: {', '.join(f'{n} {verdict}' for verdict, n in verdicts.items())}", markup=False)
    console.print(str(together), markup=False)


def register(app: typer.Typer) -> None:
    """Add these commands to `moelab`."""
    app.command(name="list")(list_)
    app.command()(run)
    app.command()(claims)
