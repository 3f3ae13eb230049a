"""Start the processes of a run, watch them from outside, and record in the run's own files why they ended.

A run is trained in one of three ways: `RunProcess` is a process of its own, `supervise` starts its ranks (processes
here, or srun's tasks), and the job of a cluster (`moelab.slurm.callables`) calls `supervise` on a node.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal

from moelab.engine.launch import process
from moelab.engine.launch.child import Child
from moelab.engine.launch.launcher import RankFailed, launch
from moelab.engine.launch.postmortem import lost_connection
from moelab.engine.launch.process import FINISHED, STOPPED, rank_name
from moelab.environment import LAUNCHER
from moelab.runs.states import Event, Status
from moelab.runs.store import Run, disk_full

WORKER = (sys.executable, "-m", "moelab.runs.worker")
"""Command of a process or a rank that trains the run whose directory it gets."""


class RunProcess(Child):
    """The process of one run, which ends when this one does; by default it is the worker."""

    def __init__(self, run: Run, command: Sequence[str] = WORKER) -> None:
        run.path.mkdir(parents=True, exist_ok=True)
        self.run, self._before = run, run.last_write
        own = {LAUNCHER.name: str(os.getpid()), "OMP_NUM_THREADS": str(run.spec.train.threads)}
        super().__init__([*command, str(run.path)], run.path / "log.txt", {**process.without_rank(), **own})

    def record_end(self) -> None:
        """Record how it ended, unless it has said why itself or another process trains the run."""
        if self.returncode in (FINISHED, STOPPED):
            return
        end = self.told_end()
        event: Event = "die" if end.killed else "crash"
        with contextlib.suppress(OSError):  # the disk is full, which the run's status tells
            record_end(self.run, self._before, event, f"its process {end.how}{disk_full(self.run.path)}")


def supervise(
    run: Run,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    tick: Callable[[], None] = lambda: None,
    command: Sequence[str] = WORKER,
    how: Literal["auto", "local", "srun"] = "auto",
    per_node: int | None = None,
    srun: Sequence[str] = (),
) -> int:
    """Run a spec on its P ranks, as processes here or, in a job of Slurm of several nodes or tasks, as srun's tasks.

    Holds no lock: rank 0 does, and writes status and result. The ranks' outputs are in `logs/`, rank 0's in the run's
    log.

    Args:
        command: of a rank, which gets the run's directory as argument; by default the worker.
        how, srun: as for `launch`.
        per_node: ranks of a node; by default the layout's.

    Returns:
        0 finished, 75 stopped with a checkpoint.

    Raises:
        RankFailed: one line naming rank, host and death, which is also the run's status; the rank's last lines are in
            the run's log.
        ValueError, OSError: no rank could be started; the run's status says so too.
    """
    if run.finished:
        return FINISHED
    logs = run.path / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    first = logs / f"{rank_name(0)}.txt"
    if not first.is_symlink():
        first.unlink(missing_ok=True)
        first.symlink_to("../log.txt")
    parallel, before = run.spec.parallel, run.last_write
    try:
        return launch(
            [*command, str(run.path)],
            parallel.ranks,
            logs,
            should_stop=should_stop,
            tick=tick,
            environment={**os.environ, "OMP_NUM_THREADS": str(run.spec.train.threads)},
            per_node=per_node or parallel.ranks_per_node,
            how=how,
            srun=srun,
        )
    except RankFailed as failure:
        if run.finished:  # it died on its way out
            return FINISHED
        lines = (f"the last lines of {failure.log.name}:", failure.tail)
        _record_failure(run, before, str(failure), *lines, unexplained=failure.end.unexplained)
        raise
    except (ValueError, OSError) as error:  # before any rank was started
        _record_failure(run, before, str(error))
        raise


def record_end(
    run: Run,
    before: tuple[int, Status],
    event: Event,
    reason: str,
    explained: Callable[[Status], bool] = lambda status: status.state not in ("new", "running"),
) -> None:
    """Record, as who watched a run's process, how it ended.

    Writes nothing if the run is finished, if another process trains it now, or if the process has recorded itself why.

    Args:
        before: `run.last_write` when the process was started.
        explained: whether a status that the process has written since says why it ended.

    Raises:
        OSError: it cannot be written, such as on a full disk.
    """
    if not (run.finished or run.locked or (run.last_write != before and explained(run.recorded))):
        run.move(event, reason)


def _record_failure(
    run: Run, before: tuple[int, Status], reason: str, *details: str, unexplained: bool = False
) -> None:
    """Put the cause in the status in place of rank 0's reason, which may be a lost connection, and into the log.

    Rank 0's reason stays where it is the only rank, or says more than the cause, which is then `unexplained`.
    """
    with contextlib.suppress(OSError), open(run.path / "log.txt", "a", encoding="utf-8") as log:  # the disk may be full
        log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {reason}\n")
        log.write("".join(f"    {line}\n" for text in details for line in text.splitlines()))

    def explained(status: Status) -> bool:
        told = run.spec.parallel.ranks == 1 or (unexplained and not lost_connection(status.reason))
        return status.state == "failed" and told

    with contextlib.suppress(OSError):
        record_end(run, before, "crash", reason, explained)
