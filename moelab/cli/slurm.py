"""Queue runs and notebooks, and report on them.

The commands `moelab prepare`, `submit`, `sweep`, `status`, `logs` and `cancel`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from moelab import paths, terminal
from moelab.cli._options import (
    SEVERAL_EXPERIMENTS,
    AsJson,
    Parameters,
    Profile,
    Publish,
    experiment_names,
    parse_parameters,
    print_json,
    run_names,
    would_be_refused,
)
from moelab.runs.spec import closure
from moelab.runs.store import RunStore

if TYPE_CHECKING:
    from moelab.report.sweep import Sweep
    from moelab.slurm.submit import Plan

Name = Annotated[str, typer.Argument(help="experiment, see `moelab list`", autocompletion=experiment_names)]
Experiments = Annotated[list[str], SEVERAL_EXPERIMENTS]
Scale = Annotated[
    str | None, typer.Option(help="smoke, quick, cpu, full, gpu or paper; by default the notebook's, cpu")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the batch scripts, queue nothing")]
Again = Annotated[bool, typer.Option("--again", help="execute notebooks that have a complete result, too")]
Names = Annotated[
    list[str] | None, typer.Argument(help="experiments, runs or submissions, by the start of their names")
]


def prepare(
    names: Experiments,
    scale: Scale = None,
    parameter: Parameters = None,
) -> None:
    """Read and tokenize the texts that experiments train on.

    Where the nodes have no network, do this on the login node before `moelab submit`.
    """
    from moelab.data.preparation import prepare
    from moelab.design.parameters import resolve
    from moelab.experiments import experiment

    given = parse_parameters(parameter, scale)
    specs = [spec for name in names for spec in resolve(experiment(name), given).specs]
    for config in dict.fromkeys(replace(spec.data, part="whole") for spec in closure(specs).values()):
        tokens = prepare(config, paths.home() / "data", print)
        terminal.say(
            f"{config.corpus}, {config.tokenizer}: {tokens.train.size:,} tokens in {paths.short(tokens.folder)}"
        )


def submit(
    names: Experiments,
    scale: Scale = None,
    profile: Profile = None,
    parameter: Parameters = None,
    dry_run: DryRun = False,
    again: Again = False,
    publish: Publish = False,
) -> None:
    """Submit experiments as jobs: unfinished runs, then notebooks.

    What is finished or queued is left alone.
    """
    given = parse_parameters(parameter, scale)
    _submit([(name, [given]) for name in names], profile, dry_run, again, publish)


def sweep(
    name: Name,
    grid: Annotated[
        list[str],
        typer.Option(
            "-g", "--grid", metavar="NAME=V1,V2", help="values of a parameter (lists: separated by ;), repeat for more"
        ),
    ],
    scale: Scale = None,
    profile: Profile = None,
    parameter: Parameters = None,
    dry_run: DryRun = False,
    again: Again = False,
    publish: Publish = False,
) -> None:
    """Submit a notebook for each point of a grid of parameters, and compare the points.

    Runs that points share are trained once. The last notebook to end publishes a table and a figure of all points. The
    same command prints the table.
    """
    fixed = parse_parameters(parameter, scale)
    axes = {}
    for item in grid:
        key, separator, values = item.partition("=")
        between = ";" if ";" in values or values.strip().startswith("[") else ","
        points = list(dict.fromkeys(value.strip() for value in values.split(between) if value.strip()))
        if not separator or not points:
            raise ValueError(f"-g {item}: expected NAME=V1,V2 (or V1;V2 where a value holds commas)")
        if key.strip() in fixed:
            raise ValueError(f"-g {item}: {key.strip()} is given by -p or --scale, too")
        if key.strip() in axes:
            raise ValueError(f"-g {item}: {key.strip()} is given twice; put all of its values into one -g")
        axes[key.strip()] = points
    asked = [{**fixed, **dict(zip(axes, values, strict=True))} for values in itertools.product(*axes.values())]
    _submit([(name, asked)], profile, dry_run, again, publish, varied=tuple(axes))


def status(
    names: Names = None,
    watch: Annotated[bool, typer.Option("--watch", help="keep refreshing until all jobs have ended")] = False,
    everything: Annotated[bool, typer.Option("--all", help="also submissions whose jobs have all ended")] = False,
    every: Annotated[float, typer.Option(min=1, help="seconds between two looks of --watch")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Show what was submitted: state, step, loss, time left.

    The state of each run comes from its files and from Slurm.
    """
    from rich.live import Live

    from moelab.slurm import status as module

    if as_json:
        print_json(module.overview(names or (), everything=everything))
        return
    console = terminal.console()
    if not watch:
        console.print(module.overview(names or (), everything=everything))
        return
    with Live(console=console, auto_refresh=False) as live:
        try:
            module.watch(lambda now: live.update(now, refresh=True), names or (), every_s=every)
        except KeyboardInterrupt:
            console.print("the jobs stay in the queue; moelab status shows them again")


def logs(
    name: Annotated[
        str,
        typer.Argument(
            help="run id (its beginning is enough), or SUBMISSION/notebook-0; see `moelab status`",
            autocompletion=run_names,
        ),
    ],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on with what is added, until Ctrl-C")] = False,
    lines: Annotated[int, typer.Option("-n", help="of the end; 0 is all")] = 40,
) -> None:
    """Print the log of a run or of a notebook."""
    from moelab.slurm.status import log_of

    path = log_of(name)
    print(f"{path}:", file=sys.stderr)
    with open(path, errors="replace") as file:
        for line in file.readlines()[-lines:]:
            print(line, end="")
        try:
            while follow:
                sys.stdout.flush()
                if text := file.read():
                    print(text, end="")
                else:
                    time.sleep(0.5)
        except KeyboardInterrupt:
            print()


def cancel(
    names: Names = None,
    everything: Annotated[bool, typer.Option("--all", help="all that moelab has in the queue")] = False,
) -> None:
    """Take runs and notebooks out of the queue.

    Running ones write a checkpoint and can be submitted again. On a terminal, asks before it cancels several by a name.
    """
    from moelab.slurm.status import cancel, overview

    if not names and not everything:
        raise ValueError("cancel what? name experiments, runs or submissions, or give --all")
    now = overview(names or ())
    rows = [row for row in now.rows if row.job]
    if not rows and now.trouble:
        raise ValueError(f"cancel: none of moelab's jobs runs on this machine, and {now.trouble}")
    if not rows:
        terminal.say(
            f"moelab: cancel: nothing in the queue is named so: {', '.join(names or ['--all'])}", file=sys.stderr
        )
        raise typer.Exit(1)
    for row in rows:
        terminal.say(f"{row.job}  {row.experiment}  {row.what}  {row.id}  {row.state}")
    jobs = list(dict.fromkeys(row.job for row in rows))
    if len(rows) > 1 and not everything and sys.stdin.isatty():
        typer.confirm(f"cancel these {len(rows)}?", abort=True)
    cancel(rows)
    terminal.say(f"cancelled {len(jobs)} job{'s' * (len(jobs) != 1)}: {', '.join(jobs)}")
    if now.trouble:
        raise ValueError(now.trouble)


def _submit(
    wanted: Sequence[tuple[str, Sequence[Mapping[str, str]]]],
    profile: str | None,
    dry_run: bool,
    again: bool,
    publish: bool,
    varied: Sequence[str] = (),
) -> None:
    """Submit notebooks and their runs; a dry run shows the scripts, or of a sweep a line for each point."""
    from moelab.design.parameters import resolve
    from moelab.experiments import experiment
    from moelab.report.sweep import Sweep
    from moelab.slurm import preflight, profiles
    from moelab.slurm import submit as module

    cluster = profiles.choose(profile)
    # All of it is checked before any of it is queued.
    batches = {name: [resolve(experiment(name), given) for given in points] for name, points in wanted}
    requests = [request for batch in batches.values() for request in batch]
    measuring = [name for name, batch in batches.items() if any(r.scale in r.experiment.measures_on_gpu for r in batch)]
    asked = [spec for request in requests for spec in request.trained]
    check = partial(preflight.check, asked, cluster, measuring=measuring, publish=publish)
    trouble = ""
    if dry_run:
        trouble = would_be_refused(check)
    else:
        check()
    for name, batch in batches.items():
        notebooks = [(request.values, request.trained) for request in batch]
        sweep = Sweep(tuple(varied), tuple(request.values for request in batch)) if varied else None
        plan = module.submit(name, notebooks, cluster, again=again, publish=publish, dry_run=dry_run, sweep=sweep)
        if dry_run:
            for request, given in zip(batch, dict(wanted)[name], strict=True) if varied else ():
                todo = {spec.id for group in plan.specs.values() for spec in group}
                mine = closure(request.trained)
                point = " ".join(f"{key}={given[key]}" for key in varied)
                terminal.say(f"{point}: {len(mine)} runs, {len(todo & mine.keys())} of them to train")
            _print_scripts(plan, scripts=not varied)
        else:
            _print_submitted(name, plan)
            if sweep:
                _compare(name, sweep, publish, over=not plan.scripts)
    if trouble:
        terminal.say(f"# {trouble}")


def _compare(name: str, sweep: Sweep, publish: bool, *, over: bool) -> None:
    """Print the table of a sweep's points as far as they have ended; if all have, publish it, if it is not yet."""
    from moelab.experiments import experiment
    from moelab.report import site
    from moelab.report import sweep as module
    from moelab.slurm.submission import results

    ended = results(name, sweep.points)
    if over:
        comparison = module.compare(experiment(name), sweep, ended, RunStore())
        module.show(sweep, comparison)
        if all(ended) and (folder := module.publish(experiment(name), sweep, comparison, publish=publish)):
            site.update(publish=publish)
            terminal.say(f"figure: {paths.short(folder / module.NAME)}.svg; it is on the results page, too")
    if not (over and all(ended)):
        terminal.say("when the last of its notebooks has ended, the same command prints the table of all points")


def _print_scripts(plan: Plan, *, scripts: bool = True) -> None:
    for name, text in plan.scripts.items() if scripts else ():
        runs = plan.specs.get(name, ())
        listed = "".join(f"\n#      {i} {run.id}  {run.title}" for i, run in enumerate(runs))
        print(f"# ---- {name}.sbatch{listed}\n{text}")
    if not plan.scripts:
        terminal.say("nothing to submit: all is finished or queued")
        return
    counts = {"run": sum(map(len, plan.specs.values())), "notebook": len(plan.scripts) - len(plan.specs)}
    what = [f"{n} {name}{'s' * (n != 1)}" for name, n in counts.items() if n]
    ids = "; @NAME@ stands for the job's id" if any("dependency=after" in x for x in plan.scripts.values()) else ""
    terminal.say(f"# nothing was queued: {' and '.join(what)} would be{ids}")


def _print_submitted(name: str, plan: Plan) -> None:
    submission = plan.submission
    before = [f"{plan.finished} runs are finished"] * bool(plan.finished)
    before += [f"{plan.queued} are queued already"] * bool(plan.queued)
    if not plan.scripts:
        why = " and ".join([*before, "so is the notebook"]) if before else "all is finished or queued"
        terminal.say(f"{name}: nothing to submit; {why}")
        return
    if before:
        terminal.say(f"{name}: {', '.join(before)}")
    for part in submission.parts:
        runs = f"{len(part.runs)} run{'s' * (len(part.runs) != 1)}"
        terminal.say(f"{name}: job {part.job}: {runs if part.values is None else 'notebook, after its runs'}")
    terminal.say(f"scripts and logs: {paths.short(submission.folder)}", "watch: moelab status --watch")
