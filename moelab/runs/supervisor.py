"""A run on several ranks, seen from outside: starts them, waits, and says in the run's own files why they failed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from moelab.engine.launch import Limits, RankFailed, launch
from moelab.engine.launch.process import FINISHED, rank_name
from moelab.runs.store import Run


def supervise(
    run: Run,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    tick: Callable[[], None] = lambda: None,
    limits: Limits | None = None,
    command: Sequence[str] | None = None,
) -> int:
    """Run a spec on its P ranks, as processes here or, in a job of Slurm of several nodes or tasks, as srun's tasks.

    Holds no lock: rank 0 does, and writes status and result. The ranks' outputs are in `logs/`; rank 0's is the run's
        log.

    Args:
        command: of a rank, which gets the run's directory as argument; by default the worker.

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
    parallel = run.spec.parallel
    try:
        return launch(
            [*(command or (sys.executable, "-m", "moelab.runs.worker")), str(run.path)],
            parallel.ranks,
            logs,
            limits=limits,
            should_stop=should_stop,
            tick=tick,
            environment={**os.environ, "OMP_NUM_THREADS": str(run.spec.train.threads)},
            per_node=parallel.ranks_per_node,
        )
    except RankFailed as failure:
        if run.finished:  # it died on its way out
            return FINISHED
        _record(run, str(failure), f"the last lines of {failure.log.name}:", failure.tail)
        raise
    except (ValueError, OSError) as error:  # before any rank was started
        _record(run, str(error))
        raise


def _record(run: Run, reason: str, *details: str) -> None:
    """Put the cause in the status in place of rank 0's reason, a lost connection, unless another process trains now."""
    with open(run.path / "log.txt", "a") as log:
        log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {reason}\n")
        log.write("".join(f"    {line}\n" for text in details for line in text.splitlines()))
    lock = run.lock()
    try:
        lock.acquire(timeout=2)  # whoever looks at the status holds it for a moment
    except TimeoutError:
        return
    try:
        run.set_status(replace(run.status, state="failed", reason=reason))
    finally:
        lock.release()
