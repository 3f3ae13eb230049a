"""How unfinished runs get done: in this process, or as processes of this machine, one run each.

A run on several ranks never trains in this process: it starts its ranks and waits for them.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

from moelab.engine.launch import child
from moelab.environment import STOP_S
from moelab.runs.execute import execute
from moelab.runs.states import Status
from moelab.runs.store import Run
from moelab.runs.supervisor import RunProcess, record_end, supervise
from moelab.terminal import one_line

Tick = Callable[[], None]

_MARGIN_S = 30.0
"""By which a run's process may outlast its ranks: until it sees that they have ended, and writes why."""


def inline(runs: Sequence[Run], tick: Tick = lambda: None) -> None:
    """One after the other in this process; the others go on where a run fails.

    A run that fails leaves its reason in its status, and the traceback in its log, as in a process of its own.
    """
    for run in runs:
        before = run.last_write
        try:
            if run.spec.parallel.ranks > 1:
                supervise(run, tick=tick)
            else:
                execute(run, on_progress=lambda _: tick())
        except Exception as error:
            _failed(run, error, before)
        tick()


def _failed(run: Run, error: Exception, before: tuple[int, Status]) -> None:
    """Write into the files of a run how it failed, or on standard error where they cannot be written.

    Args:
        before: last write of the run's status when it was begun.
    """
    try:
        record_end(run, before, "crash", one_line(error))
        if run.spec.parallel.ranks == 1:  # ranks have logs of their own
            with open(run.path / "log.txt", "a", encoding="utf-8") as log:
                traceback.print_exception(error, file=log)
    except OSError:  # such as a store that is read-only
        print(f"run {run.spec.id}: {one_line(error)}", file=sys.stderr)


def processes(runs: Sequence[Run], workers: int, tick: Tick = lambda: None, poll_s: float = 0.5) -> None:
    """Train runs in processes, each with its own log, `workers` ranks at a time.

    They go seed by seed, so that a batch that is stopped early has whole seeds, and of a seed the longest first.
    A run waits until those of the others that it requires have ended, a branch for its trunk's checkpoint alone. A run
    on P ranks counts as P workers. One always goes, even if it wants more than there are; on GPUs one at a time,
    because each takes the first ones.

    Ends when all have ended. An exception here (Ctrl-C in a notebook, say) asks the processes to write a checkpoint and
    go, waits for them, and is raised again. Those that take much longer than MOELAB_STOP_S are killed.
    """
    stop_s = STOP_S.seconds()
    if any(run.spec.train.device == "cuda" for run in runs):
        workers = 1
    waiting = sorted(runs, key=lambda run: (run.spec.train.seed, -run.spec.cost))
    going: list[RunProcess] = []
    try:
        while waiting or going:
            for worker in [worker for worker in going if worker.poll() is not None]:
                going.remove(worker)
                worker.record_end()
            taken = sum(worker.run.spec.parallel.ranks for worker in going)
            unfinished = {run.spec.id: run for run in (*waiting, *(worker.run for worker in going))}
            for run in [run for run in waiting if not _waits(run, unfinished)]:
                ranks = run.spec.parallel.ranks
                if not going or ranks <= workers - taken:
                    waiting.remove(run)
                    before = run.last_write
                    try:
                        going.append(RunProcess(run))
                    except OSError as error:  # a folder of another user, say; the others go on
                        _failed(run, error, before)
                        continue
                    taken += ranks
            tick()
            time.sleep(poll_s)
    except BaseException:
        child.end(going, stop_s + _MARGIN_S)
        for worker in going:
            worker.record_end()
        raise
    tick()


def _waits(run: Run, unfinished: Mapping[str, Run]) -> bool:
    """Return whether a run must wait for one of the unfinished ones."""
    needed = {spec.id for spec in run.spec.requires()} & unfinished.keys()
    trunk = unfinished.get(run.spec.start.run.id) if run.spec.start else None
    if trunk is not None and trunk.has_checkpoint(run.spec.first_step):
        needed.discard(trunk.spec.id)
    return bool(needed)
