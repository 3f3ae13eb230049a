"""How unfinished runs get done: in this process, or as processes of this machine, one run each.

A run on several ranks never trains in this process: it starts its ranks and waits for them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moelab.engine.launch import postmortem, process
from moelab.environment import LAUNCHER, STOP_S
from moelab.runs.execute import execute
from moelab.runs.store import Run, Status, disk_full
from moelab.runs.supervisor import supervise
from moelab.terminal import one_line

Tick = Callable[[], None]

_MARGIN_S = 30.0
"""By which a run's process may outlast its ranks: until it sees that they have ended, and writes why."""


def inline(runs: Sequence[Run], tick: Tick = lambda: None) -> None:
    """One after the other in this process; the others go on where a run fails.

    A run that fails leaves its reason in its status, and the traceback in its log, as in a process of its own.
    """
    for run in runs:
        before = run.status_time
        try:
            if run.spec.parallel.ranks > 1:
                supervise(run, tick=tick)
            else:
                execute(run, on_progress=lambda _: tick())
        except Exception as error:
            _failed(run, error, before)
        tick()


def _failed(run: Run, error: Exception, before: int) -> None:
    """Write into the files of a run how it failed, or on standard error where they cannot be written.

    Args:
        before: time of the run's status when it was begun.
    """
    try:
        status = Status.read(run.path) or Status("new")
        if not _has_reason(run, status, before):  # it was raised before the training or after it
            run.set_status(replace(status, state="failed", reason=one_line(error)))
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
    going: dict[subprocess.Popen[bytes], _Session] = {}
    try:
        while waiting or going:
            for worker in [worker for worker in going if worker.poll() is not None]:
                going.pop(worker).ended(worker.returncode)
            taken = sum(session.run.spec.parallel.ranks for session in going.values())
            unfinished = {run.spec.id: run for run in (*waiting, *(session.run for session in going.values()))}
            for run in [run for run in waiting if not _waits(run, unfinished)]:
                ranks = run.spec.parallel.ranks
                if not going or ranks <= workers - taken:
                    waiting.remove(run)
                    session = _Session.of(run)
                    try:
                        going[start(run)] = session
                    except OSError as error:  # a folder of another user, say; the others go on
                        _failed(run, error, session.status)
                        continue
                    taken += ranks
            tick()
            time.sleep(poll_s)
    except BaseException:
        for worker in going:
            worker.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + stop_s + _MARGIN_S
        for worker, session in going.items():
            try:
                worker.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            session.ended(worker.returncode)
        raise
    tick()


def _waits(run: Run, unfinished: Mapping[str, Run]) -> bool:
    """Return whether a run must wait for one of the unfinished ones."""
    needed = {spec.id for spec in run.spec.requires()} & unfinished.keys()
    trunk = unfinished.get(run.spec.start.run.id) if run.spec.start else None
    if trunk is not None and trunk.has_checkpoint(run.spec.first_step):
        needed.discard(trunk.spec.id)
    return bool(needed)


@dataclass(frozen=True)
class _Session:
    """A run and what tells, once its process has ended, what the process wrote and what the kernel did to it.

    Attributes:
        status, log: time of the run's status and bytes of its log, before the process was started.
        oom_kills: how many processes the kernel had killed for lack of memory.
    """

    run: Run
    status: int
    log: int
    oom_kills: int

    @classmethod
    def of(cls, run: Run) -> _Session:
        return cls(run, run.status_time, postmortem.size(run.path / "log.txt"), postmortem.oom_kills())

    def ended(self, code: int) -> None:
        """Write into the run's status how its process ended, unless the process has said why or another one trains."""
        run, status = self.run, Status.read(self.run.path) or Status("new")
        if code in (process.FINISHED, process.STOPPED) or _has_reason(run, status, self.status):
            return
        if code < 0:
            how = postmortem.death_by_signal(-code, 0, [0], postmortem.oom_kills() > self.oom_kills)
        else:
            log = postmortem.read_log(run.path / "log.txt", self.log)
            how = postmortem.death_by_exit(code, postmortem.last_error(log))
        reason = f"its process {how}{disk_full(run.path)}"
        with contextlib.suppress(OSError):  # the disk is full, which the run's status tells
            run.set_status(replace(status, state="stopped" if code < 0 else "failed", reason=reason))


def _has_reason(run: Run, status: Status, before: int) -> bool:
    """Return whether a run needs no reason: it has one that is newer than `before`, is finished, or is trained."""
    said = run.status_time != before and status.state not in ("new", "running")
    return said or run.finished or run.locked


def start(run: Run) -> subprocess.Popen[bytes]:
    """Start the process of one run; it ends when this process does."""
    # Its own session, so that a terminal's Ctrl-C reaches us alone and we ask for the checkpoint.
    run.path.mkdir(parents=True, exist_ok=True)
    own = {LAUNCHER.name: str(os.getpid()), "OMP_NUM_THREADS": str(run.spec.train.threads)}
    with open(run.path / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "moelab.runs.worker", str(run.path)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**process.without_rank(), **own},
        )
