"""Show the state of all that was submitted: from the files of the runs, and from Slurm.

A file that cannot be read becomes a row "unreadable" and does not affect other rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from moelab import paths
from moelab.runs.states import after
from moelab.runs.store import Run, RunStore, ended
from moelab.slurm import local, queue
from moelab.slurm.rows import Overview, Row
from moelab.slurm.submission import (
    CANCELLED,
    Outcome,
    Part,
    Submission,
    Unreadable,
    outcome,
    progress,
    records,
    root,
    set_outcome,
)


def overview(names: Sequence[str] = (), *, everything: bool = False, store: RunStore | None = None) -> Overview:
    """Return the state of all that was submitted, from the files and one call to Slurm.

    Args:
        names: only experiments, runs or submissions whose name begins with one of these.
        everything: also show submissions in which all is over; the newest one is always shown.
        store: where the runs are; by default the store of MOELAB_HOME.

    Raises:
        ValueError: a name is empty, which every name begins with.
    """
    if "" in names:
        raise ValueError("a name is empty: name experiments, runs or submissions")
    store = store or RunStore()
    known = list(records())
    readable = [record for record in known if isinstance(record, Submission)]
    trouble, jobs = "", local.jobs(readable, store)
    if any(isinstance(record, Unreadable) or record.cluster == "slurm" for record in known) or not known:
        try:
            jobs |= queue.jobs(_ANSWER_S)
        except queue.SlurmError as error:
            trouble = str(error)
    rows: list[Row] = []
    seen: set[str] = set()
    for newest, record in enumerate(known):
        if isinstance(record, Unreadable):
            own = _unreadable(record, jobs)
        else:
            own = list(_rows(record, jobs, store, seen, answered=not trouble or record.cluster == "local"))
        own = [row for row in own if _named(row, record.id, names)]
        if everything or names or newest == 0 or not all(row.over for row in own):
            rows += own
    return Overview(tuple(rows), trouble)


def watch(
    show: Callable[[Overview], None], names: Sequence[str] = (), *, every_s: float = 10.0, store: RunStore | None = None
) -> Overview:
    """Show the overview every `every_s` seconds, at first more often, until all in it is over, and return the last."""
    pause = min(1.0, every_s)
    while True:
        now = overview(names, store=store)
        show(now)
        if all(row.over for row in now.rows):
            return now
        time.sleep(pause)
        pause = min(2 * pause, every_s)


def cancel(rows: Sequence[Row], store: RunStore | None = None) -> None:
    """Cancel the jobs of these rows, and record it where no process would: with notebooks and runs that wait.

    Raises:
        queue.SlurmError: Slurm does not answer.
    """
    store = store or RunStore()
    for row in rows:
        submission, _, part = row.id.partition("/")
        if part:
            set_outcome(root() / submission, part, Outcome(error=CANCELLED))
        elif row.state == "waiting":
            run = Run.files(store.root / row.id)
            if (status := run.recorded).state != "finished" and not run.locked:
                run.move("cancel", CANCELLED, before=status.moved("queue"))
    queue.cancel(local.cancel(dict.fromkeys(row.job for row in rows)))


def _named(row: Row, submission: str, names: Sequence[str]) -> bool:
    hash = "" if "/" in row.id else row.id.rpartition("-")[2]  # as the column "log" shows it
    return not names or any(
        text.startswith(name) for name in names for text in (row.experiment, row.id, row.what, submission, hash)
    )


def _rows(
    submission: Submission,
    jobs: Mapping[tuple[str, str, int], queue.Job],
    store: RunStore,
    seen: set[str],
    answered: bool,
) -> Iterator[Row]:
    """Yield the rows of a submission, without runs, and notebooks that were not executed, that a newer one has too."""
    points = _points(submission)
    for part in submission.parts:
        if part.values is not None:
            job = jobs.get((submission.id, part.name, 0))
            row = partial(_notebook, submission, part, job, answered)
            id = f"{submission.id}/{part.name}"
            shown = _try(row, Row(submission.experiment, "notebook", id, "unreadable"), job)
            if (name := f"{submission.experiment} {part.values}") not in seen or shown.state not in ("lost", "stopped"):
                yield shown
            seen.add(name)
            continue
        for index, run in enumerate(part.runs):
            if run not in seen:
                seen.add(run)
                job = jobs.get((submission.id, part.name, index))
                row = partial(_run, submission, store.root / run, job, answered, points.get(run, ""))
                yield _try(row, Row(submission.experiment, run, run, "unreadable"), job)


def _points(submission: Submission) -> dict[str, str]:
    """Return run id -> the points of a sweep that use it, as ``hidden=64`` or ``hidden=64, 128``.

    A run that all points share is in none of them.
    """
    if submission.sweep is None:
        return {}
    parts = [part for part in submission.parts if part.values is not None]
    found: dict[str, str] = {}
    for run in dict.fromkeys(run for part in parts for run in part.runs):
        users = [submission.sweep.at(part.values or {}) for part in parts if run in part.runs]
        if len(users) < len(parts):
            values = {name: dict.fromkeys(str(point[name]) for point in users) for name in submission.sweep.varied}
            found[run] = " ".join(f"{name}={', '.join(of)}" for name, of in values.items())
    return found


def _settings(values: Mapping[str, Any]) -> str:
    """Return parameters of a notebook as `` name=value``, those that override a spec too; without empty ones."""
    own = {name: value for name, value in values.items() if not isinstance(value, dict)}
    inner = {name: value for part in values.values() if isinstance(part, dict) for name, value in part.items()}
    given = {name: value for name, value in (own | inner).items() if value not in ("", [], 0, False)}
    texts = (",".join(map(str, value)) if isinstance(value, list | tuple) else value for value in given.values())
    return "".join(f" {name}={text}" for name, text in zip(given, texts, strict=True))


def _try(row: Callable[[], Row], instead: Row, job: queue.Job | None) -> Row:
    """Return a row or, where a file cannot be read, a row that names the file and the live job, so it can be ended."""
    try:
        return row()
    except (ValueError, OSError) as error:
        return replace(instead, reason=str(error), **_job(job if job and job.live else None))


def _unreadable(record: Unreadable, jobs: Mapping[tuple[str, str, int], queue.Job]) -> list[Row]:
    """Return a row for a submission without a readable record, and one for each live job of it."""
    alive = [job for (id, _, _), job in jobs.items() if id == record.id and job.live]
    first = Row("?", record.id, record.id, "unreadable", reason=record.error)
    return [first, *(replace(first, what=f"{job.part} {job.index}", reason="", **_job(job)) for job in alive)]


def _job(live: queue.Job | None) -> dict[str, Any]:
    """Return the fields of a row that describe its job in the queue."""
    return {"job": live.id, "slurm": live.state, "node": live.node} if live else {}


def _waits_for(live: queue.Job) -> str:
    """Return what a job waits for in Slurm's words, with the command that helps a job which Slurm holds."""
    reason = "" if live.reason == "None" else live.reason
    if "held" in reason.lower() or live.state in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
        return f"{reason or live.state}: it starts again after `scontrol release {live.id}`"
    return reason


def _run(submission: Submission, path: Path, job: queue.Job | None, answered: bool, point: str = "") -> Row:
    live = job if job and job.live else None
    run = Run.at(path, known=True)
    status = run.recorded
    finished = status.state == "finished"
    if live and live.state == "RUNNING":
        # Read from the run's record, without its lock: on some file systems other nodes do not see a lock.
        state: str = status.state if status.state in ("running", "finished") else "starting"
    else:
        if status.state == "running" and not run.locked:
            status = status.moved("die", f"its job ended as {job.state}" if job and not live else ended(path))
        state = after(status.state, "queue") if live and not live.ending and not finished else status.state
        if state == "new" and not live and answered:
            state = "lost"
    reason = status.reason if state != "finished" else ""
    if live and (waits := _waits_for(live)):
        reason = waits + (f"; before: {reason}" if reason else "")
    elif state == "lost":
        reason = (
            f"its job ended as {job.state} before it began" if job else "its job left the queue before it began"
        ) + _AGAIN
    elif state == "stopped" and not live and (answered or status.reason == CANCELLED):
        reason += _AGAIN
    speed = status.tokens_per_s if state == "running" else None
    spec = run.spec
    return Row(
        submission.experiment,
        f"{spec.title} · seed {spec.train.seed}" + f" · {point}" * bool(point),
        path.name,
        state,
        # Without Slurm's answer, a run that stopped or failed may wait in the queue.
        **(_job(live) if answered or finished else {"slurm": "?"}),
        step=status.step,
        steps=status.steps,
        tokens_per_s=speed,
        loss=status.loss,
        left_s=(status.steps - status.step) * spec.train.batch_size * spec.data.context / speed if speed else None,
        reason=reason,
    )


def _notebook(submission: Submission, part: Part, job: queue.Job | None, answered: bool) -> Row:
    live = job if job and job.live else None
    ended = outcome(submission.folder, part.name)
    done = progress(submission.folder, part.name)
    reason = ""
    if ended and not live:
        if ended.error:
            state, reason = ("stopped", CANCELLED + _AGAIN) if ended.error == CANCELLED else ("failed", ended.error)
        else:
            state = "incomplete" if ended.missing else "finished"
            reason = f"without {', '.join(ended.missing)}" if ended.missing else paths.short(Path(ended.result))
    elif live:
        state = "running" if live.state == "RUNNING" else "waiting"
        reason = _waits_for(live)
    elif job and job.state == "CANCELLED":
        state, reason = "stopped", CANCELLED + _AGAIN
    else:
        state = "lost" if answered else "unknown"
        reason = f"its job ended{f' as {job.state}' if job else ''} without an outcome" + _AGAIN if answered else ""
    return Row(
        submission.experiment,
        "notebook" + _settings(part.values or {}),
        f"{submission.id}/{part.name}",
        state,
        **_job(live),
        step=done.cell,
        steps=done.cells,
        reason=reason,
    )


_AGAIN = "; submit again to go on"
_ANSWER_S = 20.0
"""In which Slurm has to answer; the files of the runs are shown in any case."""


def log_of(name: str) -> Path:
    """Return the path of the log of a run (by the beginning or the end of its id) or of a notebook.

    Args:
        name: as in the column "log" of `Overview.table`; of a notebook ``<submission>/<part>``.

    Raises:
        ValueError: one line; no log has that name, or several have.
    """
    store = RunStore()
    submission, _, part = name.partition("/")
    if part:
        matches = list((root() / submission).glob(f"{part}.out"))
    else:
        logs = store.ids(file="log.txt")
        matches = [store.root / run / "log.txt" for run in logs if run.startswith(name) or run.endswith(f"-{name}")]
    if len(matches) != 1:
        ids = ", ".join(p.parent.name for p in matches[:5]) if matches else "see `moelab status --all`"
        raise ValueError(f"{'several logs' if matches else 'no log'} of {name!r}: {ids}")
    return matches[0]
