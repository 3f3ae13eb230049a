"""The terminal's side of a batch run: executes the notebook and shows, from the runs' own files, how far it is."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from moelab import paths, terminal
from moelab.experiments import Experiment
from moelab.files import read_json
from moelab.notebook import execute as notebooks
from moelab.report import site
from moelab.report.publication import SUMMARY
from moelab.report.summary import compared
from moelab.runs import records
from moelab.runs.progress import Estimate, Snapshot, table
from moelab.runs.store import Run, RunStore

GO_ON = "stopped; run the same command again to go on, with unfinished runs from their last checkpoints"


def execute_watched(
    experiment: Experiment, values: Mapping[str, Any], *, publish: bool = False, page: bool = True
) -> bool:
    """Execute an experiment, show progress with the time left, name notebook, figures and page; False if it failed.

    Args:
        publish: into the published results instead of the user's own.
        page: bring the results' page up to date.

    Raises:
        KeyboardInterrupt: stopped; `GO_ON` is what to say of it.
    """
    console = Console()
    console.print(f"[bold]{escape(experiment.title)}[/] · {escape(experiment.paper)}")
    console.print(f"paper: {experiment.paper_answer}", markup=False)
    failure = ""
    with watching(console) as plan:
        try:
            result = notebooks.execute(experiment, values, plan, publish=publish)
        except notebooks.NotebookFailed as error:
            failure = f"[red]failed:[/] {escape(str(error))}"
    if failure:
        console.print(failure, soft_wrap=True)
        return False
    summary = read_json(result / SUMMARY)
    console.print(f"[bold green]{escape(summary['title'])}[/]")

    def show(name: str, path: Path) -> None:
        console.print(f"{name:>9}  {paths.short(path)}", soft_wrap=True, markup=False, highlight=False)

    show("notebook", result / "notebook.ipynb")
    for figure in summary["figures"]:
        show("figure", result / f"{figure['name']}.svg")
    if page:  # last: the result stands, also where the pages are another user's
        show("page", site.update(publish=publish).index)
    if not publish and (line := compared(summary)):
        terminal.say(line)
    if publish and (line := not_packed(summary)):
        terminal.say(line)
    if summary["missing"]:
        console.print(
            f"[red]without a result:[/] {escape(', '.join(summary['missing']))}; the notebook says why", soft_wrap=True
        )
        return False
    return True


def not_packed(summary: Mapping[str, Any]) -> str:
    """Return in one line which runs of a published result have no record with all their numbers; empty without any."""
    with contextlib.suppress(ValueError, OSError):  # a damaged record or run is told where it is packed
        used = list(dict.fromkeys(run["id"] for run in summary["runs"]))
        if late := records.not_published(used, RunStore()):
            return (
                f"{len(late)} of its {len(used)} runs are not in {paths.short(records.folder())} as they are now; "
                f"`moelab runs export --publish {' '.join(late)}` packs them"
            )
    return ""


@contextlib.contextmanager
def watching(console: Console) -> Iterator[Path]:
    """Show how far runs are: on a terminal a table, in a log one line each half minute.

    Yields:
        the file in which the process that trains the runs lists them (`environment.PLAN`).
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(plan, done, console), daemon=True)
        watcher.start()
        try:
            yield plan
        finally:
            done.set()
            watcher.join()


def _watch(plan: Path, done: threading.Event, console: Console) -> None:
    from rich.live import Live

    runs: list[Run] = []
    with Live("starting", console=console, auto_refresh=False, transient=True) as live:
        while not done.wait(1.0 if console.is_terminal or not runs else 30.0):
            if not runs and (listed := read_json(plan)):
                runs = [Run.at(Path(path)) for path in listed]
                estimate = Estimate(Snapshot.of(runs))
            if runs:
                snapshot = Snapshot.of(runs)
                left = estimate.seconds_left(snapshot)
                live.update(table(runs, snapshot, left, most=console.height - 6), refresh=True)
                if not console.is_terminal:
                    console.print(snapshot.describe(left))
