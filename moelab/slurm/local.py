"""Run a submission without Slurm: one process of this machine trains its runs and then executes its notebooks.

It goes on after the shell or notebook that started it has ended. submitit's local executor is no help: it starts each
job at once, and sets it a time limit. `moelab cancel` ends the process as a whole.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import takewhile
from pathlib import Path

import psutil

from moelab import environment
from moelab.engine.launch.child import Child
from moelab.engine.launch.process import FAILED, FINISHED, STOPPED, told_by
from moelab.runs.store import Run, RunStore
from moelab.slurm import queue
from moelab.slurm.attempt import Limits, history, record
from moelab.slurm.callables import notebook, train
from moelab.slurm.profiles import Profile
from moelab.slurm.submission import Submission

_MODULE = "moelab.slurm.local"


def start(submission: Submission, profile: Profile, store: RunStore) -> None:
    """Start the process of a submission and write its id into the record.

    Of the profile it gets `array_parallelism`, the number of runs at a time, `failures` and `restarts`.
    """
    numbers = map(str, (profile.array_parallelism, profile.failures, profile.restarts))
    command = [sys.executable, "-m", _MODULE, str(submission.folder), str(store.root), *numbers]
    places = os.pathsep.join(filter(None, (submission.snapshot, os.environ.get("PYTHONPATH"))))
    code = {"PYTHONPATH": places, "PYTHONSAFEPATH": "1"} if submission.snapshot else {}
    # In a session of its own, it does not get the signals of Ctrl-C, a notebook's interrupt or a closed terminal.
    process = Child(command, submission.folder / "local.out", {**os.environ, **code, environment.EXECUTOR.name: "read"})
    for part in submission.parts:
        part.job = f"{queue.LOCAL}{process.pid}"
    submission.write()


def jobs(known: Iterable[Submission], store: RunStore) -> dict[tuple[str, str, int], queue.Job]:
    """Return the runs and notebooks of local submissions whose process is alive: (submission, part, index) -> job."""
    states = {}
    for submission in known:
        first = submission.parts[0].job if submission.cluster == "local" and submission.parts else None
        for part in submission.parts if first and _process(first, str(submission.folder)) else ():
            for index, run in enumerate(part.runs if part.values is None else [None]):
                if run:
                    own, given_up = Run.files(store.root / run), False
                    with contextlib.suppress(OSError, ValueError):
                        given_up = any(last.job == part.job and not last.again for last in history(own)[-1:])
                    over, works = own.finished or given_up, own.locked
                else:
                    ended = submission.folder / f"{part.name}.json"
                    # The last one's process also makes the comparison of a sweep.
                    over = ended.exists() and part is not submission.parts[-1]
                    works = ended.with_suffix(".progress.json").exists()
                state = "COMPLETED" if over else "RUNNING" if works else "PENDING"
                key = (submission.id, part.name, index)
                states[key] = queue.Job(str(part.job), *key, state=state, reason="None", node="")
    return states


def cancel(ids: Collection[str]) -> list[str]:
    """Ask the local jobs among these to stop, with checkpoints, and return the ids of the others."""
    for id in ids:
        if id.startswith(queue.LOCAL) and (process := _process(id)):
            process.terminate()
    return [id for id in ids if not id.startswith(queue.LOCAL)]


def _process(id: str, folder: str = "") -> psutil.Process | None:
    """Return the process of a local job, if it is alive; another one may have got the same process id.

    Args:
        folder: of its submission, if that is known.
    """
    with contextlib.suppress(psutil.Error, ValueError):
        process = psutil.Process(int(id.removeprefix(queue.LOCAL)))
        if (
            process.status() != psutil.STATUS_ZOMBIE
            and _MODULE in (words := process.cmdline())
            and folder in ("", *words)
        ):
            return process
    return None


def main(folder: Path, store: RunStore, workers: int, limits: Limits) -> int:
    """Train the runs of a submission, each after those it requires, then execute its notebooks; return the exit code.

    Args:
        workers: number of runs that train at a time; on GPUs one, since each takes the first of them.
        limits: how often to try a run.
    """
    stop = told_by(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    submission = Submission.read(folder / "submission.json")
    runs, failed = [], list[str]()
    for id in (id for part in submission.parts if part.values is None for id in part.runs):
        try:
            runs.append(store.at(id))
        except (ValueError, OSError) as error:  # the other runs go on
            print(error, file=sys.stderr)
            failed.append(id)
    if any(run.spec.train.device == "cuda" for run in runs):
        workers = 1
    trained: dict[str, Future[bool]] = {}
    with ThreadPoolExecutor(workers) as pool:
        for run in sorted(runs, key=lambda run: run.spec.depth):
            trained[run.spec.id] = pool.submit(_train, run, stop, limits, trained)
    failed += [id for id, given_up in trained.items() if given_up.result()]
    for part in takewhile(lambda _: not stop(), (part.name for part in submission.parts if part.values is not None)):
        if notebook([sys.executable], folder, part).wait_or_stop(stop, signal.SIGINT):
            failed.append(part)
    if failed:
        print(f"failed: {', '.join(failed)}; see moelab status", file=sys.stderr)
    return STOPPED if stop() else FAILED if failed else FINISHED


def _train(run: Run, stop: Callable[[], bool], limits: Limits, trained: Mapping[str, Future[bool]]) -> bool:
    """Train a run, as often as the limits allow; return whether it is given up.

    Args:
        trained: run id -> what this returns of it, of all that began before.
    """
    wait([trained[spec.id] for spec in run.spec.requires() if spec.id in trained])
    restart = 0
    while not stop() and (ended := train(run, stop, how="local")) and not stop():
        if not record(run, f"{queue.LOCAL}{os.getpid()}", restart, *ended, limits):
            return True
        restart += 1
    return False


if __name__ == "__main__":
    own, runs, *counts = sys.argv[1:]
    at_a_time, failures, restarts = map(int, counts)
    sys.exit(main(Path(own), RunStore(Path(runs)), at_a_time, Limits(failures, restarts)))
