"""The terminal's side of a batch run: executes the notebook and shows, from the runs' own files, how far it is."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from moelab import paths
from moelab.experiments import Experiment
from moelab.files import read_json
from moelab.notebook import execute as notebooks
from moelab.report import site
from moelab.report.publication import SUMMARY
from moelab.runs.progress import Estimate, Snapshot
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run


def execute_watched(
    experiment: Experiment, values: Mapping[str, Any], *, publish: bool = False, page: bool = True
) -> bool:
    """Execute an experiment, show progress with the time left, name notebook, figures and page; False if it failed.

    Args:
        publish: into the published results instead of the user's own.
        page: bring the results' page up to date.
    """
    console = Console()
    console.print(f"[bold]{escape(experiment.title)}[/] · {escape(experiment.paper)}")
    console.print(f"paper: {experiment.paper_answer}", markup=False)
    failure = ""
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(plan, done, console), daemon=True)
        watcher.start()
        try:
            result = notebooks.execute(experiment, values, plan, publish=publish)
        except notebooks.NotebookFailed as error:
            failure = f"[red]failed:[/] {escape(str(error))}"
        except KeyboardInterrupt:
            failure = _stopped(plan)
        finally:
            done.set()
            watcher.join()
    if failure:
        console.print(failure, soft_wrap=True)
        return False
    index = site.update(publish=publish).index if page else None
    summary = read_json(result / SUMMARY)
    console.print(f"[bold green]{escape(summary['title'])}[/]")
    for name, path in (
        ("notebook", result / "notebook.ipynb"),
        *(("figure", result / f"{f['name']}.svg") for f in summary["figures"]),
        *([("page", index)] if index else []),
    ):
        console.print(f"{name:>9}  {paths.short(path)}", soft_wrap=True, markup=False, highlight=False)
    if summary["missing"]:
        console.print(
            f"[red]without a result:[/] {escape(', '.join(summary['missing']))}; the notebook says why", soft_wrap=True
        )
        return False
    return True


def _stopped(plan: Path) -> str:
    """Return what a command that was interrupted says of its runs."""
    runs = [Path(path) for path in read_json(plan) or ()]
    saved = [path for path in runs if not (path / "result.json").exists() and any(path.glob("checkpoints/step-*"))]
    if saved:
        return "stopped; unfinished runs wrote a checkpoint, the same command goes on from there"
    return "stopped; no run was in the midst of its training, the same command starts again"


def _watch(plan: Path, done: threading.Event, console: Console) -> None:
    """Bars on a terminal; in a log, one line each half minute."""
    from rich.progress import BarColumn, Progress, TextColumn

    every = 1.0 if console.is_terminal else 30.0
    runs: list[Run] = []
    estimate: Estimate | None = None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        tasks: list[Any] = []
        total = bars.add_task("starting", total=1.0, note="kernel and text")
        while not done.wait(1.0 if not runs else every):
            if not runs and (listed := read_json(plan)):
                runs = [Run(RunSpec.from_json(read_json(Path(p) / "spec.json")), Path(p)) for p in listed]
                estimate = Estimate(Snapshot.of(runs))
                names = [escape(f"  {r.spec.title} s{r.spec.train.seed}") for r in runs]
                tasks = [bars.add_task(name, total=1.0, note="") for name in names]
            if not runs or estimate is None:
                continue
            snapshot = Snapshot.of(runs)
            words = snapshot.describe(estimate.seconds_left(snapshot))
            for task, s, share in zip(tasks, snapshot.statuses, snapshot.shares, strict=True):
                going = s.state in ("running", "finished") and s.loss is not None
                note = f"training loss {s.loss:.3f}" if going else s.state
                bars.update(task, completed=share, note=note)
            bars.update(total, description="all runs", completed=snapshot.done, note=words)
            if not console.is_terminal:
                console.print(words)
