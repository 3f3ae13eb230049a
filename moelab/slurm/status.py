"""What has been submitted and how far it is: the runs' own word and Slurm's, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab import paths
from moelab.files import read_json
from moelab.runs.progress import duration
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run, RunStore, Status
from moelab.slurm import queue, submit
from moelab.slurm.submit import Part, Submission, outcome, submissions

if TYPE_CHECKING:
    import pandas as pd


_COLORS = {
    "failed": "red",
    "lost": "red",
    "stopped": "yellow",
    "incomplete": "yellow",
    "finished": "green",
    "running": "cyan",
}


@dataclass(frozen=True)
class Row:
    """One run or notebook of a submission.

    Attributes:
        experiment, what, id: for people; `id` is the run's, or ``<submission>/<part>`` of a notebook.
        state: waiting, starting, running, finished, incomplete (a notebook with missing runs), failed, stopped or lost.
        job, slurm, node: Slurm's id, its word, where; empty when it has left the queue.
        step, steps: done, of all (a notebook: cells).
        tokens_per_s, loss: of the last metric row.
        left_s: seconds to go at that speed.
        reason: why it waits, stopped or failed.
    """

    experiment: str
    what: str
    id: str
    state: str
    job: str = ""
    slurm: str = ""
    node: str = ""
    step: int = 0
    steps: int = 0
    tokens_per_s: float | None = None
    loss: float | None = None
    left_s: float | None = None
    reason: str = ""

    @property
    def over(self) -> bool:
        return not self.slurm and self.state in ("finished", "incomplete", "failed", "stopped", "lost")


@dataclass(frozen=True)
class Overview:
    """All rows, and what Slurm said when it could not be asked."""

    rows: tuple[Row, ...]
    trouble: str = ""

    def frame(self) -> pd.DataFrame:
        """The rows as a table."""
        import pandas as pd

        return pd.DataFrame([row.__dict__ for row in self.rows], columns=[f.name for f in fields(Row)])

    def table(self) -> Any:
        """The rows as a rich table, or one line when there are none; shows in terminals and notebooks."""
        from rich.table import Table
        from rich.text import Text

        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.state] = counts.get(row.state, 0) + 1
        title = ", ".join(f"{n} {state}" for state, n in counts.items()) or "nothing submitted (by these names)"
        title += f" · {self.trouble}" if self.trouble else ""
        if not self.rows:
            return Text(title)
        view = Table(title=title, title_justify="left")
        columns: dict[str, Callable[[Row], str]] = {
            "experiment": lambda row: row.experiment,
            "run": lambda row: row.what,
            "state": lambda row: f"[{c}]{row.state}[/]" if (c := _COLORS.get(row.state)) else row.state,
            "Slurm": lambda row: row.slurm,
            "job": lambda row: row.job,
            "node": lambda row: row.node,
            "step": lambda row: f"{row.step}/{row.steps}" if row.steps else "",
            "loss": lambda row: f"{row.loss:.3f}" if row.loss is not None else "",
            "tokens/s": lambda row: f"{row.tokens_per_s:,.0f}" if row.tokens_per_s else "",
            "left": lambda row: duration(row.left_s) if row.left_s is not None else "",
            "why": lambda row: row.reason,
        }
        cells = {name: [text(row) for row in self.rows] for name, text in columns.items()}
        cells = {name: texts for name, texts in cells.items() if any(texts)}
        for name in cells:
            number = name in ("step", "loss", "tokens/s", "left")
            view.add_column(
                name, justify="right" if number else "left", no_wrap=name not in ("run", "why"), overflow="fold"
            )
        for texts in zip(*cells.values(), strict=True):
            view.add_row(*texts)
        return view

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.table()._repr_mimebundle_(**{"include": [], "exclude": [], **options})

    def __rich__(self) -> Any:
        return self.table()


def overview(names: Sequence[str] = (), *, everything: bool = False, store: RunStore | None = None) -> Overview:
    """How all that was submitted stands, from the files and one call to Slurm.

    Args:
        names: only experiments, runs or submissions whose name begins with one of these.
        everything: also submissions in which all is over, but for the newest one, which always shows.
    """
    trouble, jobs = "", {}
    try:
        jobs = queue.jobs()
    except queue.SlurmError as error:
        trouble = str(error)
    store = store or RunStore()
    rows: list[Row] = []
    seen: set[str] = set()
    for newest, submission in enumerate(submissions()):
        own: list[Row] = []
        for part in submission.parts:
            if part.values is not None:
                own.append(_notebook(submission, part, jobs.get((submission.id, part.name, 0)), not trouble))
                continue
            for index, run in enumerate(part.runs):
                if run not in seen:
                    seen.add(run)
                    job = jobs.get((submission.id, part.name, index))
                    own.append(_run(submission, _open(store, run), job, not trouble))
        own = [row for row in own if _named(row, submission, names)]
        if everything or names or newest == 0 or not all(row.over for row in own):
            rows += own
    return Overview(tuple(rows), trouble)


def watch(
    show: Callable[[Overview], None], names: Sequence[str] = (), *, every_s: float = 10.0, store: RunStore | None = None
) -> Overview:
    """Show the overview until everything in it is over; the last one. At most every `every_s` seconds, at first more often."""
    pause = min(1.0, every_s)
    while True:
        now = overview(names, store=store)
        show(now)
        if all(row.over for row in now.rows):
            return now
        time.sleep(pause)
        pause = min(2 * pause, every_s)


def _named(row: Row, submission: Submission, names: Sequence[str]) -> bool:
    return not names or any(
        text.startswith(name) for name in names for text in (row.experiment, row.id, row.what, submission.id)
    )


def _open(store: RunStore, id: str) -> Run:
    path = store.root / id
    return Run(RunSpec.from_json(read_json(path / "spec.json"), where=str(path / "spec.json")), path)


def _run(submission: Submission, run: Run, job: queue.Job | None, answered: bool) -> Row:
    live = job if job and job.live else None
    if live and live.state == "RUNNING":
        # What the run says, without asking for its lock: on some file systems a lock holds on its own node only.
        record = read_json(run.path / "status.json")
        status = Status(**record) if record else Status("new")
        state = status.state if status.state in ("running", "finished") else "starting"
    else:
        status = run.status
        state = "waiting" if live and not run.finished else status.state
        if state in ("new", "running") and not live and answered:
            state = "lost" if state == "new" else "stopped"
    reason = status.reason if state != "finished" else ""
    if live and live.reason not in ("None", ""):
        reason = f"{live.reason}" + (f"; before: {reason}" if reason else "")
    elif state == "lost":
        reason = (
            f"its job ended as {job.state} before it began" if job else "its job left the queue before it began"
        ) + _AGAIN
    elif state == "stopped" and not live:
        reason += _AGAIN
    spec, left = run.spec, None
    if state == "running" and status.tokens_per_s:
        left = (status.steps - status.step) * spec.train.batch_size * spec.data.context / status.tokens_per_s
    return Row(
        submission.experiment,
        f"{spec.title} · seed {spec.train.seed}",
        spec.id,
        state,
        live.id if live else "",
        live.state if live else "",
        live.node if live else "",
        status.step,
        status.steps,
        status.tokens_per_s if state == "running" else None,
        status.loss,
        left,
        reason,
    )


def _notebook(submission: Submission, part: Part, job: queue.Job | None, answered: bool) -> Row:
    live = job if job and job.live else None
    ended = outcome(submission.folder, part.name)
    progress = read_json(submission.folder / f"{part.name}.progress.json") or {}
    reason = ""
    if ended and not live:
        if "error" in ended:
            state, reason = "failed", ended["error"]
        else:
            state = "incomplete" if ended["missing"] else "finished"
            reason = (
                f"without {', '.join(ended['missing'])}" if ended["missing"] else paths.short(Path(ended["result"]))
            )
    elif live:
        state = "running" if live.state == "RUNNING" else "waiting"
        reason = "" if live.reason == "None" else live.reason
    else:
        state = "lost" if answered else "waiting"
        reason = f"its job ended{f' as {job.state}' if job else ''} without an outcome" + _AGAIN if answered else ""
    return Row(
        submission.experiment,
        "notebook" + "".join(f" {k}={v}" for k, v in (part.values or {}).items() if v not in ("", [], 0, False)),
        f"{submission.id}/{part.name}",
        state,
        live.id if live else "",
        live.state if live else "",
        live.node if live else "",
        progress.get("cell", 0),
        progress.get("cells", 0),
        reason=reason,
    )


_AGAIN = "; submit again to go on"


def log_of(name: str, store: RunStore | None = None) -> Path:
    """The log of a run (by the beginning of its id) or of a notebook (``<submission>/<part>``).

    Raises:
        ValueError: one line, when there is none of that name, or several.
    """
    store = store or RunStore()
    submission, _, part = name.partition("/")
    if part:
        found = [p for p in (submit.root() / submission).glob(f"{part}.out")]
    else:
        found = [p for p in store.root.glob(f"{name}*/log.txt")]
    if len(found) != 1:
        ids = ", ".join(p.parent.name for p in found[:5]) if found else "see `moelab status --all`"
        raise ValueError(f"{'several logs' if found else 'no log'} of {name!r}: {ids}")
    return found[0]
