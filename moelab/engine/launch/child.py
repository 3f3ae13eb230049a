"""A process that this one starts and watches: its environment and log, how it is stopped, and how its end is told.

The process of a run (`moelab.runs.supervisor`), ranks and srun (`ranks`), and the notebooks and servers of a job's
driver (`moelab.slurm.callables`) are all started here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moelab.engine.launch import postmortem, process

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Child(subprocess.Popen[bytes]):
    """A process in a session of its own, so that a terminal's Ctrl-C reaches this process alone, which then stops it.

    Args:
        log: gets its output, after what the file has; None: the output of this process.
        environment: by default this process's, without a place among ranks.
        dies_with_us: the signal that the kernel sends it when this process dies (Linux); None for a process that looks
            whether its parent is alive (`process.launcher_gone`).
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
        *,
        dies_with_us: int | None = None,
    ) -> None:
        self.log = postmortem.Log(log) if log else None
        self._oom_kills = postmortem.oom_kills()
        with contextlib.nullcontext() if log is None else open(log, "ab") as output:
            super().__init__(
                command,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid(), dies_with_us) if dies_with_us else None,
                env=process.without_rank() if environment is None else environment,
            )

    def told_end(self) -> postmortem.End:
        """Return how it ended; it must have."""
        error = self.log.error if self.log else ""
        return postmortem.End.of(self.returncode, error, postmortem.oom_kills() > self._oom_kills)

    def wait_or_stop(self, should_stop: Callable[[], bool], number: int) -> int:
        """Wait for its end, send it a signal when it should stop, and return its exit code."""
        while self.poll() is None:
            if should_stop():
                self.send_signal(number)
                self.wait()
            time.sleep(0.1)
        return self.returncode


def end(children: Sequence[Child], grace_s: float) -> None:
    """End processes: SIGTERM, and after at most `grace_s` SIGKILL to them and to all that they have started."""
    for child in children:
        child.send_signal(signal.SIGTERM)
    _wait(children, grace_s)
    for child in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)  # also reaches the children of a dead process
    _wait(children, 10)


def _wait(children: Sequence[Child], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)


def _die_with(parent: int, number: int) -> Callable[[], None]:
    """Return a function that a child calls before its program starts, so that it gets a signal when the parent dies."""

    def ask() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, int(number))
            if os.getppid() != parent:  # the parent died before this call
                os._exit(process.STOPPED)

    return ask
