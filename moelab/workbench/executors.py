"""How unfinished runs get done: in this process, or as processes of this machine, one run each."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from moelab.workbench.store import Run, execute

Tick = Callable[[], None]


def inline(runs: Sequence[Run], tick: Tick = lambda: None) -> None:
    """One after the other in this process. A run that fails leaves its reason in its status; the others go on."""
    for run in runs:
        with contextlib.suppress(Exception):
            execute(run, on_progress=lambda _: tick())
        tick()


def processes(runs: Sequence[Run], workers: int, tick: Tick = lambda: None, poll_s: float = 0.5) -> None:
    """Up to `workers` runs at a time, each a process with its own log; longest first.

    Ends when all have ended. An exception here (Ctrl-C in a notebook, say) asks the processes to write a checkpoint and go, waits for
    them, and is raised again.
    """
    waiting = sorted(runs, key=lambda run: -run.spec.cost)
    going: list[subprocess.Popen] = []
    try:
        while waiting or going:
            going = [p for p in going if p.poll() is None]
            while waiting and len(going) < workers:
                going.append(_start(waiting.pop(0)))
            tick()
            time.sleep(poll_s)
    except BaseException:
        for process in going:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        for process in going:
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        raise
    tick()


def _start(run: Run) -> subprocess.Popen:
    # Its own session, so that a terminal's Ctrl-C reaches us alone and we ask for the checkpoint.
    with open(run.path / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "moelab.workbench.worker", str(run.path), str(os.getpid())],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": str(run.spec.train.threads)},
        )
