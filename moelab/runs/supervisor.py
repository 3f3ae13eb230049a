"""A run on several ranks, seen from outside: starts them, waits, and says in the run's own files why they failed."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from moelab.engine.launch.launcher import RankFailed, launch
from moelab.engine.launch.postmortem import lost_connection
from moelab.engine.launch.process import FINISHED, rank_name
from moelab.runs.store import Run, Status


def supervise(
    run: Run,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    tick: Callable[[], None] = lambda: None,
    command: Sequence[str] | None = None,
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
    parallel, before = run.spec.parallel, run.status
    try:
        return launch(
            [*(command or (sys.executable, "-m", "moelab.runs.worker")), str(run.path)],
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
        _record(run, before, str(failure), *lines, unexplained=failure.unexplained)
        raise
    except (ValueError, OSError) as error:  # before any rank was started
        _record(run, before, str(error))
        raise


def _record(run: Run, before: Status, reason: str, *details: str, unexplained: bool = False) -> None:
    """Put the cause in the status in place of rank 0's reason, a lost connection, unless another process trains now.

    Rank 0's reason stays where it is the only rank, or says more than the cause, which is then `unexplained`.
    """
    with contextlib.suppress(OSError), open(run.path / "log.txt", "a", encoding="utf-8") as log:  # the disk may be full
        log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {reason}\n")
        log.write("".join(f"    {line}\n" for text in details for line in text.splitlines()))
    lock = run.lock()
    try:
        lock.acquire(timeout=2)  # whoever looks at the status holds it for a moment
    except TimeoutError:
        return
    try:
        status = run.status
        told = unexplained and not lost_connection(status.reason)
        if (run.spec.parallel.ranks == 1 or told) and status.state == "failed" and status != before:
            return
        with contextlib.suppress(OSError):
            run.set_status(replace(status, state="failed", reason=reason))
    finally:
        lock.release()
