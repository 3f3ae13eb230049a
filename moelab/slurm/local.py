"""Run a submission without Slurm: as processes of this machine, through submitit's local executor.

That executor starts each job at once. A submission is therefore one job, which trains `array_parallelism` runs at a
time and then executes the notebooks. `moelab cancel` ends it as a whole.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil
import submitit

from moelab import environment
from moelab.config import from_json
from moelab.engine.launch.child import Child
from moelab.files import read_json, write_json
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run, RunStore
from moelab.slurm import queue
from moelab.slurm.attempt import Limits, history
from moelab.slurm.callables import LocalBatch
from moelab.slurm.profiles import Profile
from moelab.slurm.submission import Submission

_YEAR_MIN = 365 * 24 * 60  # a local job has no time limit


def start(
    submission: Submission,
    profile: Profile,
    specs: Mapping[str, Sequence[RunSpec]],
    directories: Mapping[str, Sequence[Path]],
) -> None:
    """Start the job of a submission and write its id into the record."""
    runs = [run for name, group in specs.items() for run in zip(group, directories[name], strict=True)]
    cuda = any(spec.train.device == "cuda" for spec, _ in runs)
    batch = LocalBatch(
        [str(path) for _, path in sorted(runs, key=lambda run: run[0].depth)],
        [part.name for part in submission.parts if part.values is not None],
        1 if cuda else profile.array_parallelism,  # each run takes the first GPUs
        Limits(profile.failures, profile.restarts),
        str(submission.folder),
        os.environ.get("CUDA_VISIBLE_DEVICES"),  # also where no run trains on one: notebooks measure on GPUs
    )
    write_json(submission.folder / "local.json", asdict(batch))
    places = os.pathsep.join(filter(None, (submission.snapshot, os.environ.get("PYTHONPATH"))))
    code = {"PYTHONPATH": places, "PYTHONSAFEPATH": "1"} if submission.snapshot else {}
    # In a session of its own, the job does not get the signals of Ctrl-C, a notebook's interrupt or a closed terminal.
    log = submission.folder / "local.out"
    variables = {**os.environ, **code, environment.EXECUTOR.name: "read"}
    if Child([sys.executable, "-m", "moelab.slurm.local", str(submission.folder)], log, variables).wait():
        raise ValueError(f"the local job could not be started; see {log}")
    id = read_json(submission.folder / "local.id.json")
    for part in submission.parts:
        part.job = f"{queue.LOCAL}{id}"
    submission.write()


def jobs(known: Iterable[Submission], store: RunStore) -> dict[tuple[str, str, int], queue.Job]:
    """Return the runs and notebooks of local submissions whose process is alive: (submission, part, index) -> job."""
    states = {}
    for submission in known:
        if submission.cluster != "local" or not submission.parts or not _lives(submission):
            continue
        for part in submission.parts:
            for index, run in enumerate(part.runs) if part.values is None else [(0, "")]:
                if run:
                    own, given_up = Run.files(store.root / run), False
                    with contextlib.suppress(OSError):
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
        if id.startswith(queue.LOCAL) and (process := _process(id, "submitit.local._local")):
            process.terminate()
    return [id for id in ids if not id.startswith(queue.LOCAL)]


def _lives(submission: Submission) -> bool:
    return _process(submission.parts[0].job or "", str(submission.folder)) is not None


def _process(id: str, word: str) -> psutil.Process | None:
    """Return the process of a local job, if it is alive.

    Args:
        id: the job's id, which contains the process id.
        word: an argument of its command line; another process that has got the same process id lacks it.
    """
    with contextlib.suppress(psutil.Error, ValueError):
        process = psutil.Process(int(id.removeprefix(queue.LOCAL)))
        if process.status() != psutil.STATUS_ZOMBIE and word in process.cmdline():
            return process
    return None


def main(folder: Path) -> None:
    """Start the job of the submission in a folder and write down its id."""
    executor = submitit.AutoExecutor(folder, cluster="local")
    executor.update_parameters(timeout_min=_YEAR_MIN, stderr_to_stdout=True)
    batch = from_json(LocalBatch, read_json(folder / "local.json"), "local job")
    write_json(folder / "local.id.json", int(executor.submit(batch).job_id))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
