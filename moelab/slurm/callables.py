"""Run the jobs of a submission: the callables that submitit pickles and a job loads.

A callable holds only names and numbers. It runs as the job's driver, one process on the first node: it starts the ranks
of a run as one Slurm step (`srun`), watches them (`moelab.engine.launch`), and decides whether to requeue the job
(`moelab.slurm.attempt`). All state is in the run's directory, so `checkpoint` only asks the ranks to write a checkpoint
and waits for it. submitit stores what a callable returns; moelab never loads it.
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

from moelab.config.parallel import ParallelConfig
from moelab.engine.launch import RankFailed
from moelab.engine.launch.process import FINISHED, STOPPED
from moelab.runs.store import Run, RunStore
from moelab.runs.supervisor import supervise
from moelab.slurm import attempt, queue


class Failed(RuntimeError):
    """Report that a job is given up: Slurm shows it as FAILED and cancels the jobs that need its result."""


class Checkpointable(ABC):
    """Do the work in a thread.

    submitit's signal handlers run in the main thread and may wait there until the work has stopped.
    """

    stop: threading.Event
    requeued: threading.Event  # set when submitit requeues the job
    thread: threading.Thread

    def __call__(self, *arguments: str) -> dict[str, Any]:
        """Do the work and return its outcome.

        Raises:
            Failed: the job is given up.
            SystemExit: the work was stopped; the job continues later or has been cancelled.
        """
        self.stop, self.requeued = threading.Event(), threading.Event()
        outcome: list[Any] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: self.stop.set())
        with contextlib.suppress(RuntimeError, KeyError):  # not a job of submitit: called as a function
            for left in submitit.JobEnvironment().paths.folder.glob(f"{submitit.JobEnvironment().job_id}_*.save_tmp"):
                left.unlink()  # left by an attempt that was killed; submitit does not overwrite it
        self.thread = threading.Thread(target=self._keep, args=(outcome, *arguments))
        self.thread.start()
        self._wait()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def checkpoint(self, *arguments: str) -> DelayedSubmission:
        """Stop the work with a checkpoint and return the call that continues it, which is the same one."""
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
    def work(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Do the work, which ends early once `stop` is set, and return a summary of its outcome.

        Its arguments are a subclass's own.
        """


@dataclass
class TrainRun(Checkpointable):
    """Train the run in a directory, as a job of Slurm.

    Attributes:
        python: interpreter of the ranks (in their container).
        srun: further options of srun.
        per_node: ranks per node.
        limits: how often to try.
        spare_nodes: whether a requeued job leaves out the node whose rank was killed or hung, if the partition has
            enough others.
        parallel: the layout that the job was sized for; another may be asked for while it is queued.
    """

    python: str
    srun: tuple[str, ...]
    per_node: int
    limits: attempt.Limits
    spare_nodes: bool
    parallel: ParallelConfig

    def work(self, path: str) -> dict[str, Any]:
        """Train the run in the directory `path`; after a failure, requeue the job or give it up."""
        run = open_run(path).laid_out(self.parallel)
        job, restart = submitit.JobEnvironment().job_id, int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if restart > self.limits.restarts:
            attempt.record(run, job, restart, "restarts", "", "", self.limits)
            raise Failed(f"run {run.spec.id}: {run.status.reason}")
        command = (self.python, "-m", "moelab.runs.worker")
        ended = train(run, self.stop, command=command, how="srun", per_node=self.per_node, srun=self.srun)
        if ended is None:
            return {"run": run.spec.id, "state": "finished"}
        # In another state than RUNNING, Slurm is already ending or requeueing this job (cancelled, preempted).
        if self.requeued.is_set() or queue.retried(queue.state, job) != "RUNNING":
            raise SystemExit(STOPPED)
        kind, reason, node = ended
        if not attempt.record(run, job, restart, kind, reason, node, self.limits):
            raise Failed(f"run {run.spec.id}: {run.status.reason}")
        queue.requeue(job, exclude=node if kind == "killed" and self.spare_nodes else "")
        raise SystemExit(STOPPED)


@dataclass
class ExecuteNotebook(Checkpointable):
    """Execute a notebook of a submission as a Slurm step; the notebook reads runs and trains none.

    Attributes:
        command: srun with its options, and the interpreter.
        kills: how often the notebook may be killed and start over.
    """

    command: tuple[str, ...]
    kills: int

    def work(self, folder: str, part: str) -> dict[str, Any]:
        """Execute the notebook `part` of the submission in `folder`; requeue the job if the notebook was killed."""
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
        stages: directories of runs; the runs of a stage need results of earlier stages.
        notebooks: names of their parts of the submission.
        workers: number of runs that train at a time.
        limits: how often to try a run.
        folder: folder of the submission.
        gpus: CUDA_VISIBLE_DEVICES of the process that submitted; None: not set, empty: no GPU. submitit sets its own.
    """

    stages: list[list[str]]
    notebooks: list[str]
    workers: int
    limits: attempt.Limits
    folder: str
    gpus: str | None = ""

    def work(self) -> dict[str, Any]:
        """Train the runs stage by stage, then execute the notebooks, whatever became of the runs."""
        os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus or ""
        if self.gpus is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        failed: list[str] = []
        job = f"{queue.LOCAL}{submitit.JobEnvironment().job_id}"
        for stage in self.stages:
            with ThreadPoolExecutor(self.workers) as pool:
                failed += [id for id in pool.map(lambda path: self._train(path, job), stage) if id]
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

    def _train(self, path: str, job: str) -> str:
        """Train the run in a directory, as often as the limits allow.

        Returns:
            the run's id if it is given up, else an empty text.
        """
        try:
            run = open_run(path)
        except (ValueError, OSError) as error:  # the other runs go on
            print(error, file=sys.stderr)
            return Path(path).name
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
    """Start the ranks of a run and wait for them.

    Returns:
        None when the run has finished; otherwise kind, reason and node of what ended it.
    """
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
