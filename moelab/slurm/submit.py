"""Submitting: an experiment's unfinished runs as jobs, its notebook as the job after them, and a record of both on disk.

    .moelab/submissions/<date>-<name>-<hash>/submission.json    what was submitted: runs and notebooks with their job ids
                                            runs-0.sbatch, runs-0.txt      an array and its run directories
                                            notebook-0.sbatch, notebook-0.json, notebook-0.out     outcome and log of a notebook
    .moelab/snapshots/<hash>/               the code they run

A job carries its submission in its comment, so that one that was queued is known even if the submitting process died before it
could write its id down.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from filelock import FileLock

from moelab import paths
from moelab.files import read_json, write_json, write_text
from moelab.runs.spec import RunSpec
from moelab.runs.store import RunStore
from moelab.slurm import queue, script, snapshot
from moelab.slurm.profiles import Profile

_ARRAY = 500  # the default of Slurm's MaxArraySize is 1001


@dataclass
class Part:
    """One job of a submission: an array of runs, or a notebook.

    Attributes:
        name: ``runs-0``, ``notebook-0``; the file names begin with it.
        job: Slurm's id; None until it is queued.
        runs: the run ids, in the array's order; for a notebook those it waits for and shows.
        values: the notebook's parameters; None for runs.
    """

    name: str
    job: str | None
    runs: list[str]
    values: dict[str, Any] | None = None


@dataclass
class Submission:
    """What one `moelab submit` queued."""

    id: str
    experiment: str
    profile: str
    snapshot: str | None
    created: str
    parts: list[Part] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return root() / self.id

    def write(self) -> None:
        record = {**self.__dict__, "parts": [part.__dict__ for part in self.parts]}
        write_json(self.folder / "submission.json", record)

    @classmethod
    def read(cls, path: Path) -> Self:
        record = read_json(path)
        return cls(**{**record, "parts": [Part(**part) for part in record["parts"]]})


@dataclass(frozen=True)
class Plan:
    """What is, or would be, queued.

    Attributes:
        scripts: part -> batch script; ``@runs-0@`` stands for the id of a job that is not queued yet.
        specs: part -> its runs.
        finished, queued: runs that have a result, and that were in the queue already.
    """

    submission: Submission
    scripts: dict[str, str]
    specs: dict[str, list[RunSpec]]
    finished: int
    queued: int


def root() -> Path:
    """The folder of all submissions."""
    return paths.home() / "submissions"


def submissions() -> list[Submission]:
    """All submissions, newest first."""
    return [Submission.read(path) for path in sorted(root().glob("*/submission.json"), reverse=True)]


def outcome(folder: Path, part: str) -> dict[str, Any] | None:
    """How a notebook ended, by its own word: ``{"result": folder, "missing": [run ids]}`` or ``{"error": line}``; None before."""
    return read_json(folder / f"{part}.json")


def submit(
    name: str,
    notebooks: Sequence[tuple[Mapping[str, Any], Sequence[RunSpec]]],
    profile: Profile,
    *,
    with_notebooks: bool = True,
    again: bool = False,
    dry_run: bool = False,
    store: RunStore | None = None,
) -> Plan:
    """Queue the unfinished runs and, after them, their notebooks. Nothing that is finished or in the queue is queued again.

    Args:
        name: the experiment's name.
        notebooks: for each, its parameters and the specs of its runs.
        with_notebooks: False queues runs only.
        again: execute notebooks whose complete result exists, too.
        dry_run: only return the plan; nothing is written or queued.

    Raises:
        ValueError: a run does not fit the profile, or Slurm refuses a script; nothing has been queued.
        queue.SlurmError: Slurm is not there or does not answer. What had been queued by then is on record; the rest follows next time.
    """
    store = store or RunStore()
    if dry_run:
        return _plan(name, notebooks, profile, with_notebooks, again, store, jobs={})
    root().mkdir(parents=True, exist_ok=True)
    with FileLock(root() / ".lock"):
        plan = _plan(name, notebooks, profile, with_notebooks, again, store, jobs := queue.jobs())
        if plan.scripts:
            for text in {_header(text): None for text in plan.scripts.values()}:
                queue.check(text)
            _queue(plan, store)
            _prune(jobs, plan.submission)
    return plan


def live_runs(earlier: Sequence[Submission], jobs: Mapping[tuple[str, str, int], queue.Job]) -> dict[str, queue.Job]:
    """Run id -> the job that will train it, or does."""
    return {
        run: job
        for submission in earlier
        for part in submission.parts
        if part.values is None
        for index, run in enumerate(part.runs)
        if (job := jobs.get((submission.id, part.name, index))) and job.live
    }


def _plan(
    name: str,
    notebooks: Sequence[tuple[Mapping[str, Any], Sequence[RunSpec]]],
    profile: Profile,
    with_notebooks: bool,
    again: bool,
    store: RunStore,
    jobs: Mapping[tuple[str, str, int], queue.Job],
) -> Plan:
    wanted = _closure([spec for _, specs in notebooks for spec in specs])
    earlier = submissions()
    queued = live_runs(earlier, jobs)
    done = {id for id in wanted if (store.root / id / "result.json").exists()}
    todo = [spec for id, spec in wanted.items() if id not in done and id not in queued]

    now = time.gmtime()
    id = f"{time.strftime('%Y%m%d-%H%M%S', now)}-{name}-{secrets.token_hex(3)}"
    code = snapshot.place(paths.home() / "snapshots")
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", now)
    submission = Submission(id, name, profile.name, str(code) if code else None, created)
    scripts: dict[str, str] = {}
    specs_by_part: dict[str, list[RunSpec]] = {}
    awaited = {run: _Place(job.id, 0, 0) for run, job in queued.items()}

    for (size, needs), group in _groups(todo, profile, done):
        part = Part(f"runs-{len(specs_by_part)}", None, [spec.id for spec in group])
        submission.parts.append(part)
        specs_by_part[part.name] = group
        scripts[part.name] = script.runs_script(
            profile,
            size,
            name=name,
            comment=queue.comment(id, part.name),
            listing=submission.folder / f"{part.name}.txt",
            count=len(group),
            snapshot=code,
            dependency=_dependency("afterok", needs, awaited),
        )
        awaited |= {spec.id: _Place(f"@{part.name}@", index, len(group)) for index, spec in enumerate(group)}
    for values, specs in notebooks if with_notebooks else ():
        shown = list(_closure(specs))
        if _notebook_queued(earlier, jobs, name, values) or (
            not again and _notebook_done(earlier, name, values, shown)
        ):
            continue
        part = Part(f"notebook-{len(scripts) - len(specs_by_part)}", None, shown, dict(values))
        submission.parts.append(part)
        scripts[part.name] = script.notebook_script(
            profile,
            name=f"{name}-notebook",
            comment=queue.comment(id, part.name),
            folder=submission.folder,
            key=part.name,
            snapshot=code,
            # Whatever becomes of them: one failed run costs only its own points.
            dependency=_dependency("afterany", [run for run in shown if run not in done], awaited),
        )
    return Plan(submission, scripts, specs_by_part, len(done), len(wanted) - len(done) - len(todo))


def _queue(plan: Plan, store: RunStore) -> None:
    submission = plan.submission
    if submission.snapshot:
        snapshot.take(Path(submission.snapshot))
    submission.write()  # before anything is queued: a job must never be one that nobody knows
    for name, specs in plan.specs.items():
        write_text(submission.folder / f"{name}.txt", "".join(f"{store.run(spec).path}\n" for spec in specs))
    ids: dict[str, str] = {}
    try:
        for part in submission.parts:
            text = re.sub(r"@([a-z]+-\d+)@", lambda found: ids[found[1]], plan.scripts[part.name])
            write_text(path := submission.folder / f"{part.name}.sbatch", text)
            ids[part.name] = part.job = queue.submit(path)
    finally:
        submission.write()


def _prune(jobs: Mapping[tuple[str, str, int], queue.Job], newest: Submission) -> None:
    """Let go of code that no job will run any more."""
    records = {id: root() / id / "submission.json" for (id, _, _), job in jobs.items() if job.live}
    if all(path.exists() for path in records.values()):  # else some job's code is not known
        used = [newest, *map(Submission.read, records.values())]
        snapshot.prune(paths.home() / "snapshots", {Path(s.snapshot) for s in used if s.snapshot})


@dataclass(frozen=True)
class _Place:
    """A run's place: the job (or what stands for it until it is queued), its index in the array of `count`; 0 for a known id."""

    job: str
    index: int
    count: int


def _dependency(kind: str, runs: Sequence[str], awaited: Mapping[str, _Place]) -> str:
    """For sbatch: ``afterany:12:13_4``; a whole array by its id alone. Empty when there is nothing to wait for."""
    by_job: dict[str, list[_Place]] = {}
    for run in runs:
        if run in awaited:
            by_job.setdefault(awaited[run].job, []).append(awaited[run])
    names: list[str] = []
    for job, places in by_job.items():
        whole = places[0].count in (0, len(places))
        names += [job] if whole else [f"{job}_{place.index}" for place in places]
    return ":".join([kind, *names]) if names else ""


def _closure(specs: Sequence[RunSpec]) -> dict[str, RunSpec]:
    """Run id -> spec, those that others need in front of them."""
    found: dict[str, RunSpec] = {}
    for spec in specs:
        found |= {id: s for id, s in _closure(spec.requires()).items() if id not in found}
        found.setdefault(spec.id, spec)
    return found


def _groups(
    specs: Sequence[RunSpec], profile: Profile, done: set[str]
) -> list[tuple[tuple[script.Size, tuple[str, ...]], list[RunSpec]]]:
    """Runs of equal size that wait for the same runs, in arrays of at most `_ARRAY`."""
    alike: dict[tuple[script.Size, tuple[str, ...]], list[RunSpec]] = {}
    for spec in specs:
        needs = tuple(run.id for run in spec.requires() if run.id not in done)
        alike.setdefault((script.Size.of(spec, profile), needs), []).append(spec)
    return [(key, group[i : i + _ARRAY]) for key, group in alike.items() for i in range(0, len(group), _ARRAY)]


def _notebook_queued(
    earlier: Sequence[Submission],
    jobs: Mapping[tuple[str, str, int], queue.Job],
    name: str,
    values: Mapping[str, Any],
) -> bool:
    return any(
        submission.experiment == name
        and part.values == values
        and (job := jobs.get((submission.id, part.name, 0)))
        and job.live
        for submission in earlier
        for part in submission.parts
    )


def _notebook_done(earlier: Sequence[Submission], name: str, values: Mapping[str, Any], runs: Sequence[str]) -> bool:
    """Whether a submission's notebook published a result of these parameters and runs in which nothing is missing."""
    for submission in earlier:
        for part in submission.parts:
            if submission.experiment == name and part.values == values and part.runs == runs:
                ended = outcome(submission.folder, part.name) or {}
                if ended.get("result") and not ended["missing"] and Path(ended["result"]).exists():
                    return True
    return False


def _header(text: str) -> str:
    """What Slurm can judge before anything is queued: the script without what tells equal ones apart."""
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    apart = ("--comment", "--dependency", "--output")
    return "\n".join(["#!/bin/bash", *(line for line in lines if not line.split()[1].startswith(apart)), "true", ""])
