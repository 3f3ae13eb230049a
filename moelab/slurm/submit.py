"""Submit experiments: queue their unfinished runs, queue their notebooks after those, and record both on disk.

The comment of a job names its submission, so that a queued job is known even if the submitting process died before it
recorded the job's id. `moelab.slurm.submission` describes the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from moelab import paths
from moelab.report.sweep import Sweep
from moelab.runs.spec import RunSpec, closure
from moelab.runs.store import RunStore
from moelab.slurm import executor, local, queue, snapshot
from moelab.slurm.attempt import Limits
from moelab.slurm.callables import ExecuteNotebook, TrainRun
from moelab.slurm.executor import Executor
from moelab.slurm.profiles import Profile
from moelab.slurm.submission import Part, Submission, outcomes, root, submissions

_ARRAY = 500  # the default of Slurm's MaxArraySize is 1001
Jobs = Mapping[tuple[str, str, int], queue.Job]
_Place = tuple[str, int, int]
"""Where a run is in the queue: its job or the placeholder of one (``@runs-0@``), its index in the array, and the number
of the array's runs; 0 where the job is the run's own task."""


@dataclass(frozen=True)
class Plan:
    """Describe what is or, in a dry run, would be queued.

    Attributes:
        submission: the record of the submission.
        finished: number of runs that have a result.
        queued: number of runs that were in the queue already.
        scripts: part -> batch script, in which ``@runs-0@`` stands for the id of a job that is not queued yet; empty
            texts for a local submission.
        specs: part -> its runs.
        executors: part -> executor that queues it; empty for a local submission.
        calls: part -> what its job calls; empty for a local submission.
        waiting: the runs that were in the queue already, with all checkpoints that this submission needs of them.
        replaced: jobs of notebooks that wait in the queue, but not for all of their runs; this submission queues the
            notebooks anew and cancels these jobs.
    """

    submission: Submission
    finished: int
    queued: int
    scripts: dict[str, str] = field(default_factory=dict)
    specs: dict[str, list[RunSpec]] = field(default_factory=dict)
    executors: dict[str, Executor] = field(default_factory=dict)
    calls: dict[str, TrainRun | ExecuteNotebook] = field(default_factory=dict)
    waiting: list[RunSpec] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)

    def add(self, part: Part, executor: Executor | None = None, call: TrainRun | ExecuteNotebook | None = None) -> None:
        """Add a part; a local submission needs no executor of its own for it."""
        self.submission.parts.append(part)
        self.scripts[part.name] = ""
        if executor and call:
            self.scripts[part.name] = executor.script(len(part.runs) if part.values is None else 1)
            self.executors[part.name], self.calls[part.name] = executor, call


def submit(
    name: str,
    notebooks: Sequence[tuple[Mapping[str, Any], Sequence[RunSpec]]],
    profile: Profile,
    *,
    with_notebooks: bool = True,
    again: bool = False,
    publish: bool = False,
    dry_run: bool = False,
    sweep: Sweep | None = None,
    store: RunStore | None = None,
) -> Plan:
    """Queue the unfinished runs and, after them, their notebooks. What is finished or in the queue is not queued again.

    Args:
        name: the experiment's name.
        notebooks: for each notebook, its parameters and the specs of its runs.
        profile: the cluster.
        with_notebooks: False queues runs only.
        again: also execute notebooks whose complete result exists.
        publish: into the published results instead of the user's own.
        dry_run: only return the plan; nothing is written or queued.
        sweep: the sweep whose points the notebooks are; the last of them to end publishes the comparison of all.
        store: where the runs are; by default the store of MOELAB_HOME.

    Raises:
        ValueError: a run does not fit the profile, or Slurm refuses a script; nothing has been queued.
        queue.SlurmError: Slurm is not available, does not answer, or refuses a job whose script it had accepted. The
            message names what was queued before, which is recorded; submit again for the rest.
    """
    store = store or RunStore()
    if dry_run:
        return _plan(name, notebooks, profile, with_notebooks, again, publish, store, jobs={})
    root().mkdir(parents=True, exist_ok=True)
    with FileLock(root() / ".lock"):
        jobs = local.jobs(submissions(), store)
        if profile.cluster == "slurm":
            jobs |= queue.jobs()
        plan = _plan(name, notebooks, profile, with_notebooks, again, publish, store, jobs)
        plan.submission.sweep = sweep
        for text in {_header(text): None for text in plan.scripts.values() if text}:
            queue.check(text)
        for spec in plan.waiting:  # before a branch of it is queued
            store.keep(spec)
        if plan.scripts:
            _queue(plan, profile, store)
            queue.cancel(plan.replaced)
            _prune(jobs, plan.submission)
    return plan


def live_runs(earlier: Sequence[Submission], jobs: Jobs) -> dict[str, queue.Job]:
    """Return run id -> the job that trains it or will train it."""
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
    publish: bool,
    store: RunStore,
    jobs: Jobs,
) -> Plan:
    wanted = store.needed([spec for _, specs in notebooks for spec in specs])
    earlier = submissions()
    shown_by = [record for record in earlier if record.publish or not publish]
    # A cancelled job keeps its node while its run writes a checkpoint; the new job waits for the run's lock.
    queued = live_runs(earlier, {place: job for place, job in jobs.items() if not job.ending})
    done = {id for id in wanted if (store.root / id / "result.json").exists()}
    lacking = wanted.keys() - done - queued.keys()
    shown: list[tuple[Mapping[str, Any], list[str]]] = []
    replaced: list[str] = []
    for values, specs in notebooks if with_notebooks else ():
        runs = list(closure(specs))
        if waits := _notebook_queued(shown_by, jobs, name, values):
            if lacking.isdisjoint(runs):
                continue
            # It would be executed without the runs that this submission queues, one of a cancelled task perhaps.
            # A local job has more in it than this notebook, and goes on.
            replaced += [waits.id] * (waits.state == "PENDING" and not waits.local)
        elif not again and _notebook_done(shown_by, name, values, runs):
            continue
        shown.append((values, runs))
    # A local notebook cannot wait for runs of other jobs. Its own job includes them and waits for their locks.
    needed = {run for _, runs in shown for run in runs if profile.cluster == "local"}
    todo = [spec for id, spec in wanted.items() if id not in done and (id not in queued or id in needed)]

    id = datetime.now(UTC).strftime(f"%Y%m%d-%H%M%S-{name}-%f")
    code = snapshot.place(paths.home() / "snapshots")
    submission = Submission(
        id, name, profile.name, str(code) if code else None, cluster=profile.cluster, publish=publish
    )
    plan = Plan(submission, len(done), len(wanted) - len(done) - len(todo), replaced=replaced)
    planned = {spec.id for spec in todo}
    plan.waiting.extend(spec for id, spec in wanted.items() if id not in done and id not in planned)
    awaited = {run: (job.id, 0, 0) for run, job in queued.items() if not job.local and run not in done}
    for group in _groups(todo, profile, done):
        part = Part(f"runs-{len(plan.specs)}", None, [spec.id for spec in group])
        plan.specs[part.name] = group
        if profile.cluster == "local":
            plan.add(part)
            continue
        size = executor.size(group[0], profile)
        call = TrainRun(
            executor.interpreter(profile),
            (*profile.srun, *profile.container),
            size["ntasks_per_node"],
            Limits(profile.failures, profile.restarts),
            spare_nodes=not _chooses_nodes(profile),
            parallel=group[0].parallel,
        )
        given = {"job_name": name, "comment": queue.comment(id, part.name)}
        given["dependency"] = _dependency("afterok", [run.id for run in group[0].requires()], awaited)
        plan.add(part, executor.for_runs(profile, size, code, submission.folder, **given), call)
        awaited |= {spec.id: (f"@{part.name}@", index, len(group)) for index, spec in enumerate(group)}
    for values, runs in shown:
        part = Part(f"notebook-{len(plan.scripts) - len(plan.specs)}", None, runs, dict(values))
        if profile.cluster == "local":
            plan.add(part)
            continue
        given = {"job_name": f"{name}-notebook", "comment": queue.comment(id, part.name)}
        # afterany: the notebook starts even if runs failed, and shows the others.
        given["dependency"] = _dependency("afterany", runs, awaited)
        step = executor.step(profile, profile.notebook_cpus)
        job = executor.for_notebook(profile, code, submission.folder, **given)
        plan.add(part, job, ExecuteNotebook(step, profile.failures))
    return plan


def _chooses_nodes(profile: Profile) -> bool:
    """Return whether a profile's jobs run on some nodes of a partition only, whose number is not known."""
    options = ("--constraint", "--nodelist", "--reservation", "--nodefile")
    return bool(profile.constraint) or any(argument.startswith(options) for argument in profile.sbatch)


def _queue(plan: Plan, profile: Profile, store: RunStore) -> None:
    submission = plan.submission
    if submission.snapshot:
        snapshot.take(Path(submission.snapshot))
    submission.write()  # before anything is queued, so that every job belongs to a known submission
    directories = {name: [(str(store.run(spec).path),) for spec in specs] for name, specs in plan.specs.items()}
    if submission.cluster == "local":
        local.start(submission, profile, store)
        return
    ids: dict[str, str] = {}
    try:
        for part in submission.parts:
            queued = plan.executors[part.name]
            if waits := queued.parameters.get("dependency"):
                queued.update_parameters(dependency=re.sub(r"@([a-z]+-\d+)@", lambda found: ids[found[1]], waits))
            arguments = directories.get(part.name, [(str(submission.folder), part.name)])
            ids[part.name] = part.job = queued.queue(plan.calls[part.name], arguments)
    except queue.SlurmError as error:
        before = f"; queued before: {', '.join(ids.values())}; submit again for the rest" if ids else ""
        raise queue.SlurmError(f"{error}{before}") from None
    finally:
        submission.write()


def _prune(jobs: Jobs, newest: Submission) -> None:
    """Remove snapshots of code that no job will run any more."""
    live = {id for (id, _, _), job in jobs.items() if job.live}
    known = {record.id: record for record in submissions()}
    if newest.cluster == "local":  # Slurm was not asked which of its jobs are live
        live |= {record.id for record in known.values() if record.cluster == "slurm"}
    if live <= known.keys():  # otherwise the snapshot of some live job is not known
        used = [newest, *(known[id] for id in live)]
        snapshot.prune(paths.home() / "snapshots", {Path(s.snapshot) for s in used if s.snapshot})


def _dependency(kind: str, runs: Sequence[str], awaited: Mapping[str, _Place]) -> str:
    """Return a dependency for sbatch, such as ``afterany:12:13_4``; an empty text when no run is awaited.

    A whole array is named by its id alone.
    """
    by_job: dict[str, list[_Place]] = {}
    for place in (awaited[run] for run in runs if run in awaited):
        by_job.setdefault(place[0], []).append(place)
    names: list[str] = []
    for job, places in by_job.items():
        whole = places[0][2] in (0, len(places))
        names += [job] if whole else [f"{job}_{index}" for _, index, _ in places]
    return ":".join([kind, *names]) if names else ""


def _groups(specs: Sequence[RunSpec], profile: Profile, done: set[str]) -> list[list[RunSpec]]:
    """Group runs of equal size and layout that wait for the same runs, at most `_ARRAY` each."""
    alike: dict[object, list[RunSpec]] = {}
    for spec in specs:
        job = (str(executor.size(spec, profile)), spec.parallel) if profile.cluster == "slurm" else None
        needs = tuple(run.id for run in spec.requires() if run.id not in done)
        alike.setdefault((job, needs), []).append(spec)
    return [group[i : i + _ARRAY] for group in alike.values() for i in range(0, len(group), _ARRAY)]


def _notebook_queued(
    earlier: Sequence[Submission],
    jobs: Jobs,
    name: str,
    values: Mapping[str, Any],
) -> queue.Job | None:
    """Return the job of Slurm or of this machine that waits to execute a notebook, or executes it."""
    queued = (
        jobs.get((submission.id, part.name, 0))
        for submission in earlier
        for part in submission.parts
        if submission.experiment == name and part.values == values
    )
    return next((job for job in queued if job and job.live and not job.ending), None)


def _notebook_done(earlier: Sequence[Submission], name: str, values: Mapping[str, Any], runs: Sequence[str]) -> bool:
    """Return whether a notebook with these parameters and runs has published a result without missing runs."""
    return any(
        part.runs == runs and ended.result and not ended.missing and Path(ended.result).exists()
        for part, ended in outcomes(earlier, name, values)
    )


def _header(text: str) -> str:
    """Return the part of a script that Slurm checks: its options, without those that differ between equal scripts."""
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    apart = ("--comment", "--dependency", "--output")
    return "\n".join(["#!/bin/bash", *(line for line in lines if not line.split()[1].startswith(apart)), "true", ""])
