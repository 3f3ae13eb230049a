"""Run the jobs of a submission: the callables that submitit pickles and a job loads.

A callable holds names and numbers only. It runs as the job's driver, one process on the first node: it starts the ranks of a run as one
step of Slurm (`srun`), watches them (`moelab.engine.launch`), and requeues the job or not (`moelab.slurm.attempt`). All state is in the
run's directory, so `checkpoint` has nothing to save but the work of the ranks: it asks them for a checkpoint and waits. What a callable
returns is for people who look at submitit's files; moelab never loads it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from moelab.engine.launch import RankFailed
from moelab.engine.launch.process import FINISHED, STOPPED
from moelab.runs.store import Run, RunStore
from moelab.runs.supervisor import supervise
from moelab.slurm import attempt, queue


class Failed(RuntimeError):
    """A job failed for good; Slurm shows it as FAILED, and jobs that need its result are cancelled."""


class Checkpointable(ABC):
    """Do the work in a thread: submitit's signal handlers run in the main one, and may wait there until the work has stopped."""

    stop: threading.Event
    requeued: threading.Event  # submitit does it
    thread: threading.Thread

    def __call__(self, *arguments: str) -> dict[str, Any]:
        """Work to the end. Failed: for good. SystemExit: asked to stop; the job will go on or has been cancelled."""
        self.stop, self.requeued = threading.Event(), threading.Event()
        outcome: list[Any] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: self.stop.set())
        with contextlib.suppress(RuntimeError, KeyError):  # not a job of submitit: called as a function
            for left in submitit.JobEnvironment().paths.folder.glob(f"{submitit.JobEnvironment().job_id}_*.save_tmp"):
                left.unlink()  # of an attempt that was killed; submitit would not write its own
        self.thread = threading.Thread(target=self._keep, args=(outcome, *arguments))
        self.thread.start()
        self._wait()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def checkpoint(self, *arguments: str) -> DelayedSubmission:
        """Stop the work with a checkpoint and return the call that goes on with it: the same one."""
        self.requeued.set()
        self.stop.set()
        self._wait()
        return DelayedSubmission(type(self)(**self.__getstate__()), *arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in Checkpointable.__annotations__}

    def _keep(self, outcome: list[Any], *arguments: str) -> None:
        try:
            outcome.append(self.work(*arguments))
        except BaseException as error:
            outcome.append(error)

    def _wait(self) -> None:
        while self.thread.is_alive():  # no lock: a signal handler may interrupt this loop and run it itself
            time.sleep(0.1)

    def wait_for(self, process: subprocess.Popen, number: int) -> int:
        """Wait for a process, send it a signal when asked to stop, and return its exit code."""
        while process.poll() is None:
            if self.stop.wait(0.1):
                process.send_signal(number)
                process.wait()
        return process.returncode

    @abstractmethod
    def work(self, *arguments: str) -> dict[str, Any]: ...


@dataclass
class TrainRun(Checkpointable):
    """Train the run in a directory, as a job of Slurm.

    Attributes:
        python: interpreter of the ranks (in their container).
        srun: further options of srun.
        per_node: ranks of a node.
        limits: how often to try.
        spare_nodes: a node whose rank was killed or hung is left out when the job is requeued, if the partition has others.
    """

    python: str
    srun: tuple[str, ...]
    per_node: int
    limits: attempt.Limits
    spare_nodes: bool = True

    def work(self, path: str) -> dict[str, Any]:
        run = open_run(path)
        job, restart = submitit.JobEnvironment().job_id, int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if restart > self.limits.restarts:
            attempt.record(run, job, restart, "restarts", "", "", self.limits)
            raise Failed(f"run {run.spec.id}: {run.status.reason}")
        command = (self.python, "-m", "moelab.runs.worker")
        ended = train(run, self.stop, command=command, how="srun", per_node=self.per_node, srun=self.srun)
        if ended is None:
            return _finished(run)
        # Not running any more: Slurm itself is ending or requeueing this job (cancelled, preempted, requeued).
        if self.requeued.is_set() or queue.retried(queue.state, job) != "RUNNING":
            raise SystemExit(STOPPED)
        kind, reason, node = ended
        if not attempt.record(run, job, restart, kind, reason, node, self.limits):
            raise Failed(f"run {run.spec.id}: {run.status.reason}")
        queue.requeue(job, exclude=node if kind == "killed" and self.spare_nodes else "")
        raise SystemExit(STOPPED)


@dataclass
class ExecuteNotebook(Checkpointable):
    """Execute the notebook `part` of the submission in a folder, as a step of Slurm; it reads runs and trains none.

    Attributes:
        command: srun with its options, and the interpreter.
        kills: how often it may be killed and start over.
    """

    command: tuple[str, ...]
    kills: int

    def work(self, folder: str, part: str) -> dict[str, Any]:
        code = self.wait_for(notebook(self.command, folder, part), signal.SIGTERM)  # srun then ends the step
        if self.requeued.is_set():
            raise SystemExit(STOPPED)
        if code == FINISHED:
            return {"notebook": f"{Path(folder).name}/{part}", "state": "finished"}
        job, restart = submitit.JobEnvironment().job_id, int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if (code < 0 or code >= 128) and restart < self.kills and queue.retried(queue.state, job) == "RUNNING":
            queue.requeue(job)
            raise SystemExit(STOPPED)
        raise Failed(f"notebook {Path(folder).name}/{part}: exit code {code}; see its log")


@dataclass
class LocalBatch(Checkpointable):
    """Train runs and then execute notebooks in one job of submitit's local executor, which has no queue of its own.

    Attributes:
        stages: directories of runs; those of a stage need results of the ones before.
        notebooks: their parts.
        workers: runs at a time.
        limits: how often to try a run.
        folder: of the submission.
    """

    stages: list[list[str]]
    notebooks: list[str]
    workers: int
    limits: attempt.Limits
    folder: str

    def work(self) -> dict[str, Any]:
        failed: list[str] = []
        job = f"{queue.LOCAL}{submitit.JobEnvironment().job_id}"
        for stage in self.stages:
            with ThreadPoolExecutor(self.workers) as pool:
                failed += [id for id in pool.map(lambda path: self._train(open_run(path), job), stage) if id]
        for part in self.notebooks if not self.stop.is_set() else ():
            with open(Path(self.folder) / f"{part}.out", "ab") as log:
                process = notebook((sys.executable,), self.folder, part, stdout=log, stderr=subprocess.STDOUT)
                if self.wait_for(process, signal.SIGINT):
                    failed.append(part)
        if self.stop.is_set():
            raise SystemExit(STOPPED)
        if failed:
            raise Failed(f"failed: {', '.join(failed)}; see moelab status")
        return {"runs": sum(map(len, self.stages)), "state": "finished"}

    def _train(self, run: Run, job: str) -> str:
        """Train one run, as often as the limits allow; its id if it failed for good."""
        restart = 0
        while not self.stop.is_set():
            command = (sys.executable, "-m", "moelab.runs.worker")
            if (ended := train(run, self.stop, command=command, how="local")) is None:
                return ""
            if self.stop.is_set():
                break
            if not attempt.record(run, job, restart, *ended, self.limits):
                return run.spec.id
            restart += 1
        return ""


def train(run: Run, stop: threading.Event, **launch: Any) -> tuple[attempt.Kind, str, str] | None:
    """Start the ranks of a run and wait: None when it has finished, else kind, reason and node of what ended it."""
    try:
        if supervise(run, should_stop=stop.is_set, **launch) == FINISHED:
            return None
        return "stopped", run.status.reason or "stopped with a checkpoint", os.environ.get("SLURMD_NODENAME", "")
    except (RankFailed, OSError, ValueError) as failure:
        return None if run.finished else attempt.judge(failure, run)


def notebook(command: Sequence[str], folder: str, part: str, **options: Any) -> subprocess.Popen:
    """Start the process that executes a notebook of a submission."""
    return subprocess.Popen([*command, "-m", "moelab.slurm.notebook_job", folder, part], **options)


def open_run(path: str) -> Run:
    """Open the run in a directory."""
    return RunStore(Path(path).parent).at(Path(path).name)


def _finished(run: Run) -> dict[str, Any]:
    return {"run": run.spec.id, "state": "finished"}
