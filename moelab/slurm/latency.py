"""What Slurm costs: from submit to the first step, a notebook batch against the same work in one process, many runs at once."""

from __future__ import annotations

import contextlib
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
from moelab.experiments import experiment
from moelab.files import write_text
from moelab.notebook import execute as notebooks
from moelab.runs import executors
from moelab.runs.execute import execute
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run, RunStore
from moelab.slurm import queue, submit
from moelab.slurm.profiles import Profile
from moelab.slurm.status import overview


def main(profile: Profile, *, rounds: int, runs: int, out: Path | None) -> None:
    """Measure, print, and write `submit.jsonl` into `out`.

    Args:
        rounds: times that the ways of running take turns.
        runs: how many are submitted at once, held, and cancelled again.
    """
    rows = [*_first_step(profile, rounds), *_notebook(profile, rounds), *_many(profile, runs)]
    for row in rows:
        print(f"{row['what']:<66} {row['seconds']:8.2f} s" + (f"   ({row['note']})" if row["note"] else ""))
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if out is not None:
        import json

        write_text(out / "submit.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _first_step(profile: Profile, rounds: int) -> Iterator[dict[str, Any]]:
    """Asked for -> first optimizer step done, of the smallest run: as a process here, as a job."""
    base = _specs()[0]
    # One run after the other, told apart by seed; a metric row each step.
    specs = [replace(base, train=replace(base.train, log_every=1, seed=100 + i)) for i in range(2 * rounds)]
    here, there = [], []
    with _workshop():
        _prepare(base)
        for i in range(rounds):
            first, second = RunStore().run(specs[2 * i]), RunStore().run(specs[2 * i + 1])
            here.append(_until_step(first, lambda run=first: executors.start(run)))
            _until(lambda run=first: run.finished)
            there.append(_until_step(second, lambda run=second: _submit(run, profile)))
            _until(lambda run=second: run.finished)
    yield _row("asked -> first step, as a process on this machine", here)
    yield _row("submit -> first step, as a job", there, f"{median(there) - median(here):+.2f} s")


def _notebook(profile: Profile, rounds: int) -> Iterator[dict[str, Any]]:
    """The PR-MoE notebook's two smallest arms at smoke: runs only, in one process; notebook and runs here; all of it through Slurm."""
    chosen = experiment("pr-moe")
    values = notebooks.resolve(chosen, {"scale": "smoke", "arms": ["Dense", "MoE-128"]})
    specs = chosen.specs_of(values)
    times: dict[str, list[float]] = {"inline": [], "papermill": [], "slurm": []}
    for _ in range(rounds):
        with _workshop():
            _prepare(specs[0])
            started = time.perf_counter()
            for spec in specs:
                execute(RunStore().run(spec))
            times["inline"].append(time.perf_counter() - started)
        with _workshop() as home:
            _prepare(specs[0])
            started = time.perf_counter()
            with environment.overridden({environment.EXECUTOR.name: "inline"}):
                notebooks.execute(chosen, values, home / "plan.json")
            times["papermill"].append(time.perf_counter() - started)
        with _workshop():
            _prepare(specs[0])
            started = time.perf_counter()
            plan = submit.submit("pr-moe", [(values, specs)], replace(profile, array_parallelism=1))
            folder = plan.submission.folder
            _until(lambda folder=folder: submit.outcome(folder, "notebook-0"))
            times["slurm"].append(time.perf_counter() - started)
    base = median(times["inline"])
    yield _row("two smoke runs, one after the other, in this process", times["inline"])
    yield _row(
        "the same under papermill, with the notebook's figures", times["papermill"], _over(times["papermill"], base)
    )
    yield _row("the same as an array and a notebook job on Slurm", times["slurm"], _over(times["slurm"], base))


def _many(profile: Profile, runs: int) -> Iterator[dict[str, Any]]:
    """Submitting many runs (held, so that none starts), looking at them, submitting them again, cancelling them."""
    base = _specs()[0]
    specs = [replace(base, train=replace(base.train, seed=i)) for i in range(runs)]
    held = replace(profile, sbatch=(*profile.sbatch, "--hold"))

    def timed(what: str, action: Callable[[], Any], note: str = "") -> dict[str, Any]:
        started = time.perf_counter()
        action()
        return _row(what, [time.perf_counter() - started], note)

    with _workshop():
        ask = lambda: submit.submit("bench", [({}, specs)], held, with_notebooks=False)  # noqa: E731
        yield timed(f"submitting {runs} runs", ask)
        yield timed(f"moelab status of {runs} runs", overview, "one call to Slurm")
        yield timed(f"submitting the same {runs} runs again", ask, "nothing is queued twice")
        jobs = [row.job.partition("_")[0] for row in overview().rows if row.job]
        yield timed(f"cancelling {runs} runs", lambda: queue.cancel(sorted(set(jobs))))


def _specs() -> list[RunSpec]:
    return list(experiment("pr-moe").specs("smoke", 1, arms=["Dense"]))


@contextlib.contextmanager
def _workshop() -> Iterator[Path]:
    """An empty workshop beside the real one, so on a disk that nodes see; removed afterwards."""
    home = paths.home() / "bench" / f"{os.getpid()}-{time.time_ns()}"
    home.mkdir(parents=True)
    try:
        with environment.overridden(
            {environment.HOME.name: str(home), environment.RESULTS.name: str(home / "results")}
        ):
            yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _prepare(spec: RunSpec) -> None:
    """The tokens, which are made once whoever trains."""
    from moelab.data import prepare

    prepare(spec.data, paths.home() / "data")


def _submit(run: Run, profile: Profile) -> None:
    submit.submit("bench", [({}, [run.spec])], profile, with_notebooks=False)


def _until_step(run: Run, start: Callable[[], Any]) -> float:
    started = time.perf_counter()
    start()
    _until(lambda: (run.path / "train.jsonl").exists() and (run.path / "train.jsonl").stat().st_size)
    return time.perf_counter() - started


def _until(condition: Callable[[], Any], limit_s: float = 600) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"moelab bench submit: nothing for {limit_s:.0f} s; see moelab status")
        time.sleep(0.02)


def _row(what: str, seconds: list[float], note: str = "") -> dict[str, Any]:
    return {
        "what": what,
        "seconds": median(seconds),
        "samples": [round(s, 3) for s in seconds],
        "note": note,
        "load": round(os.getloadavg()[0], 2),
    }


def _over(seconds: list[float], base: float) -> str:
    return f"{median(seconds) - base:+.1f} s, {median(seconds) / base:.1f} times"
