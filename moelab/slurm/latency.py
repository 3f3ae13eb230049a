"""Measure what submitting costs.

Measured are the time to the first step, a notebook batch beside the same work in one process, and submitting many runs
at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from moelab import environment, paths
from moelab.data.preparation import prepare
from moelab.design.parameters import resolve
from moelab.experiments import experiment
from moelab.files import write_text
from moelab.notebook import execute as notebooks
from moelab.runs import executors
from moelab.runs.execute import execute
from moelab.runs.spec import RunSpec
from moelab.runs.store import RunStore
from moelab.slurm import queue
from moelab.slurm.profiles import Profile
from moelab.slurm.status import overview
from moelab.slurm.submission import outcome
from moelab.slurm.submit import submit
from moelab.terminal import announced


def main(profile: Profile, *, rounds: int, runs: int, out: Path | None) -> None:
    """Measure, print, and write `submit.jsonl` into `out`.

    Args:
        profile: the cluster.
        rounds: how often the ways of running take turns.
        runs: number of runs that are submitted at once, held, and cancelled again.
        out: folder of the results; None writes none.

    Raises:
        ValueError: one line; the profile is not of a Slurm cluster.
    """
    profile.require_slurm("moelab bench submit")
    parts = {
        "time to the first step": lambda: _first_step(profile, rounds),
        "a notebook batch beside the same work in one process": lambda: _notebook(profile, rounds),
        f"{runs} runs submitted at once": lambda: _many(profile, runs),
    }
    rows = [row for part in announced(list(parts), str) for row in parts[part]()]
    for row in rows:
        print(f"{row['what']:<66} {row['seconds']:8.2f} s" + (f"   ({row['note']})" if row["note"] else ""))
    if out is not None:
        write_text(out / "submit.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _first_step(profile: Profile, rounds: int) -> Iterator[dict[str, Any]]:
    """Time the smallest run from its start to its first optimizer step, as a process here and as a job."""
    ways: dict[str, Callable[[RunSpec], Any]] = {
        "asked -> first step, as a process on this machine": lambda spec: executors.start(RunStore().run(spec)),
        "submit -> first step, as a job": lambda spec: submit("bench", [({}, [spec])], profile, with_notebooks=False),
    }
    times: dict[str, list[float]] = {what: [] for what in ways}
    base = _specs()[0]
    with _home(base):
        for turn in range(rounds):
            for number, (what, start) in enumerate(ways.items()):
                # Runs are told apart by seed; a metric row each step.
                spec = replace(base, train=replace(base.train, log_every=1, seed=100 + len(ways) * turn + number))
                times[what].append(_to_first_row(start, spec))
    yield from _compared(times)


def _to_first_row(start: Callable[[RunSpec], Any], spec: RunSpec) -> float:
    """Start a run, wait until it has finished, and return the seconds until its first metric row."""
    run = RunStore().run(spec)
    rows = run.path / "train.jsonl"
    started = time.perf_counter()
    start(spec)
    _until(lambda: rows.exists() and rows.stat().st_size)
    seconds = time.perf_counter() - started
    _until(lambda: run.finished)
    return seconds


def _notebook(profile: Profile, rounds: int) -> Iterator[dict[str, Any]]:
    """Time two arms of the PR-MoE notebook at scale smoke: runs in one process, with the notebook, and as jobs."""
    chosen = experiment("pr-moe")
    request = resolve(chosen, {"scale": "smoke", "arms": "Dense,MoE-128"})
    values, specs = request.values, request.specs

    def here() -> None:
        for spec in specs:
            execute(RunStore().run(spec))

    def papermill() -> None:
        with environment.overridden({environment.EXECUTOR.name: "inline"}):
            notebooks.execute(chosen, values, paths.home() / "plan.json")

    def jobs() -> None:
        plan = submit("pr-moe", [(values, specs)], replace(profile, array_parallelism=1))
        _until(lambda: outcome(plan.submission.folder, "notebook-0"))

    ways = {
        "two smoke runs, one after the other, in this process": here,
        "the same under papermill, with the notebook's figures": papermill,
        "the same as an array and a notebook job": jobs,
    }
    times: dict[str, list[float]] = {what: [] for what in ways}
    for _ in range(rounds):
        for what, way in ways.items():
            with _home(specs[0]):
                times[what].append(_seconds(way))
    yield from _compared(times)


def _many(profile: Profile, runs: int) -> Iterator[dict[str, Any]]:
    """Time submitting many runs (held, so that none starts), showing, submitting again and cancelling them."""
    base = _specs()[0]
    specs = [replace(base, train=replace(base.train, seed=i)) for i in range(runs)]
    held = replace(profile, sbatch=(*profile.sbatch, "--hold"))
    with _home(base):
        ask = lambda: submit("bench", [({}, specs)], held, with_notebooks=False)  # noqa: E731
        yield _row(f"submitting {runs} runs", [_seconds(ask)])
        yield _row(f"moelab status of {runs} runs", [_seconds(overview)], "one call to Slurm")
        yield _row(f"submitting the same {runs} runs again", [_seconds(ask)], "nothing is queued twice")
        jobs = sorted({row.job.partition("_")[0] for row in overview().rows if row.job})
        yield _row(f"cancelling {runs} runs", [_seconds(lambda: queue.cancel(jobs))])


def _specs() -> list[RunSpec]:
    return list(experiment("pr-moe").specs("smoke", 1, arms=["Dense"]))


@contextlib.contextmanager
def _home(spec: RunSpec) -> Iterator[Path]:
    """Make an empty MOELAB_HOME on a disk that nodes see, and prepare a spec's tokens in it."""
    home = paths.home() / "bench" / f"{os.getpid()}-{time.time_ns()}"
    home.mkdir(parents=True)
    names = {environment.HOME.name: str(home), environment.RESULTS.name: str(home / "results")}
    try:
        with environment.overridden(names):
            prepare(spec.data, home / "data")
            yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _until(condition: Callable[[], Any], limit_s: float = 600) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"moelab bench submit: no progress in {limit_s:.0f} s; see moelab status")
        time.sleep(0.02)


def _compared(times: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each way; those after the first give the additional time over the first."""
    first, *_ = times.values()
    for what, seconds in times.items():
        more = median(seconds) - median(first)
        note = "" if seconds is first else f"{more:+.2f} s, {median(seconds) / median(first):.1f} times"
        yield _row(what, seconds, note)


def _row(what: str, seconds: list[float], note: str = "") -> dict[str, Any]:
    samples = [round(s, 3) for s in seconds]
    return {
        "what": what,
        "seconds": median(seconds),
        "samples": samples,
        "note": note,
        "load": round(os.getloadavg()[0], 2),
    }
