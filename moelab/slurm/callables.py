"""Run the jobs of a submission: the callables that submitit pickles and a job loads.

A callable holds only names and numbers. It runs as the job's driver, one process on the first node: it starts the ranks
of a run as one Slurm step (`srun`), watches them (`moelab.engine.launch`), and decides whether to requeue the job
(`moelab.slurm.attempt`). All state is in the run's directory.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from moelab.config.parallel import ParallelConfig
from moelab.engine.launch.child import Child
from moelab.engine.launch.launcher import RankFailed
from moelab.engine.launch.process import FINISHED, STOPPED, told_by
from moelab.runs.store import Run
from moelab.runs.supervisor import supervise
from moelab.slurm import attempt, queue


class Failed(RuntimeError):
    """Report that a job is given up: Slurm shows it as FAILED and cancels the jobs that need its result."""


def begin() -> Callable[[], bool]:
    """Take a job over from submitit, and return the function that says whether it has been asked to stop.

    submitit's signal handlers, which are there by now, would requeue it; moelab decides that itself.
    """
    job = submitit.JobEnvironment()
    for left in job.paths.folder.glob(f"{job.job_id}_*.save_tmp"):
        left.unlink()  # left by an attempt that was killed; submitit does not overwrite it
    return told_by(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class TrainRun:
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

    def __call__(self, path: str) -> None:
        """Train the run in the directory `path`; after a failure, requeue the job or give it up.

        Raises:
            Failed: the job is given up.
            SystemExit: the run was stopped; the job continues later or has been cancelled.
        """
        stop = begin()
        run = Run.at(Path(path)).laid_out(self.parallel)
        if run.finished:
            return
        job, restart = submitit.JobEnvironment().job_id, int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if restart > self.limits.restarts:
            attempt.record(run, job, restart, "restarts", "", "", self.limits)
            raise Failed(f"run {run.spec.id}: {run.status.reason}")
        command = (self.python, "-m", "moelab.runs.worker")
        ended = train(run, stop, command=command, how="srun", per_node=self.per_node, srun=self.srun)
        if ended is None:
            return
        # In another state than RUNNING, Slurm is already ending or requeueing this job (cancelled, preempted).
        if queue.retried(queue.state, job) != "RUNNING":
            raise SystemExit(STOPPED)
        kind, reason, node = ended
        if not attempt.record(run, job, restart, kind, reason, node, self.limits):
            raise Failed(f"run {run.spec.id}: {run.status.reason}")
        queue.requeue(job, exclude=node if kind == "killed" and self.spare_nodes else "")
        raise SystemExit(STOPPED)


@dataclass
class ExecuteNotebook:
    """Execute a notebook of a submission as a Slurm step; the notebook reads runs and trains none.

    Attributes:
        command: srun with its options, and the interpreter.
        kills: how often the notebook may be killed and start over.
    """

    command: tuple[str, ...]
    kills: int

    def __call__(self, folder: str, part: str) -> None:
        """Execute the notebook `part` of the submission in `folder`; requeue the job if the notebook was killed."""
        stop = begin()
        code = notebook(self.command, Path(folder), part).wait_or_stop(stop, signal.SIGTERM)  # srun then ends the step
        if code == FINISHED:
            return
        again = (code < 0 or code >= 128) and int(os.environ.get("SLURM_RESTART_COUNT", 0)) < self.kills
        if again and queue.requeue(submitit.JobEnvironment().job_id):
            raise SystemExit(STOPPED)
        raise Failed(f"notebook {Path(folder).name}/{part}: exit code {code}; see its log")


def train(run: Run, stop: Callable[[], bool], **launch: Any) -> tuple[attempt.Kind, str, str] | None:
    """Start the ranks of a run and wait for them.

    Returns:
        None when the run has finished; otherwise kind, reason and node of what ended it.
    """
    try:
        if supervise(run, should_stop=stop, **launch) == FINISHED:
            return None
        return "stopped", run.status.reason or "stopped with a checkpoint", os.environ.get("SLURMD_NODENAME", "")
    except (RankFailed, OSError, ValueError) as failure:
        return None if run.finished else attempt.judge(failure, run)


def notebook(command: Sequence[str], folder: Path, part: str) -> Child:
    """Start the process that executes a notebook of a submission; it writes into the log ``<part>.out``."""
    return Child([*command, "-m", "moelab.slurm.notebook_job", str(folder), part], folder / f"{part}.out")
