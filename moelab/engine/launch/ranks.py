"""Ranks as the launcher handles them: processes of this machine, or tasks of one srun."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from moelab.engine.launch import process
from moelab.engine.launch.process import rank_name
from moelab.environment import HEARTBEAT, LAUNCHER, RENDEZVOUS

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class LocalRanks:
    """P processes of this machine, each a session of its own, with the variables that torchrun would set."""

    def __init__(
        self, command: Sequence[str], ranks: int, logs: Path, session: Path, environment: Mapping[str, str]
    ) -> None:
        self._processes: list[subprocess.Popen] = []
        self._memory = [0] * ranks
        try:
            for rank in range(ranks):
                place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
                where: dict[str, object] = {RENDEZVOUS.name: session / "rendezvous.json", HEARTBEAT.name: session}
                where[LAUNCHER.name] = os.getpid()
                with open(logs / f"{rank_name(rank)}.txt", "ab") as log:
                    self._processes.append(
                        subprocess.Popen(
                            command,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            stdin=subprocess.DEVNULL,
                            start_new_session=True,
                            preexec_fn=_die_with(os.getpid(), signal.SIGKILL),
                            env={**environment, **{name: str(value) for name, value in {**place, **where}.items()}},
                        )
                    )
        except BaseException:
            self.end(0)
            raise

    def codes(self) -> list[int | None]:
        """Return the exit code of each rank, negative for a signal; None while it lives."""
        return [p.poll() for p in self._processes]

    def complaint(self) -> str:
        """Return why no rank was started at all; empty if they were started."""
        return ""

    def host(self, rank: int) -> str:
        """Return the name of a rank's host."""
        return socket.gethostname()

    def ask_to_stop(self) -> None:
        """Ask all ranks to write a checkpoint and end."""
        self.signal(signal.SIGTERM)

    def signal(self, number: int) -> None:
        """Send a signal to all ranks that live."""
        for p in self._processes:
            if p.poll() is None:
                p.send_signal(number)

    def watch_memory(self) -> None:
        """Record the resident memory of each rank, to report it when a rank is killed."""
        import psutil

        for rank, p in enumerate(self._processes):
            with contextlib.suppress(psutil.Error):
                self._memory[rank] = psutil.Process(p.pid).memory_info().rss or self._memory[rank]

    def memory(self) -> list[int]:
        """Return the last seen resident memory of each rank, in bytes."""
        return list(self._memory)

    def stopped_by_signal(self, rank: int) -> bool:
        """Return whether a rank lives but is halted (SIGSTOP, a debugger)."""
        import psutil

        try:
            status = psutil.Process(self._processes[rank].pid).status()
            return status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        except psutil.Error:
            return False

    def end(self, grace_s: float) -> None:
        """End all ranks and their child processes: SIGTERM to their process groups, SIGKILL after at most `grace_s`."""
        self._signal_groups(signal.SIGTERM)
        _wait(self._processes, grace_s)
        self._signal_groups(signal.SIGKILL)
        _wait(self._processes, 10)

    def _signal_groups(self, number: int) -> None:
        for p in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(p.pid, number)  # also reaches the children of a dead rank


class SlurmRanks:
    """The tasks of one srun inside an allocation; Slurm kills all processes of an ended step, on all its nodes."""

    _ENDED = re.compile(r"srun: error: (?P<host>\S+): tasks? (?P<tasks>[\d,\s-]+): (?P<how>.+)")

    def __init__(
        self,
        command: Sequence[str],
        ranks: int,
        logs: Path,
        session: Path,
        environment: Mapping[str, str],
        per_node: int,
    ) -> None:
        self._ranks, self._srun_log, self._per_node = ranks, session / "srun.txt", per_node
        fewest = _fewest_tasks(environment.get("SLURM_TASKS_PER_NODE", ""), per_node)
        if ranks > per_node > fewest:
            # srun would silently fill the nodes unevenly, and groups that must stay in a node would not.
            raise ValueError(
                f"srun: the layout has {per_node} ranks on each node, the job a node with {fewest}; "
                f"submit it with --ntasks-per-node={per_node}"
            )
        # Without these, srun would spread fewer ranks than the allocation has tasks over all its nodes.
        if ranks > per_node and ranks % per_node == 0:
            layout = [f"--nodes={ranks // per_node}", f"--ntasks-per-node={per_node}"]
        else:
            layout = ["--nodes=1"] if ranks <= min(per_node, fewest) else []
        cpus = environment.get("SLURM_CPUS_PER_TASK")
        # `process.find` does not take a step of one task for a rank, which would then give no signs of life.
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} if ranks == 1 else {}
        with open(self._srun_log, "ab") as said:
            self._srun = subprocess.Popen(
                [
                    "srun",
                    f"--ntasks={ranks}",
                    *layout,
                    *([f"--cpus-per-task={cpus}"] if cpus else []),
                    *(["--overlap"] if "SLURM_STEP_ID" in environment else []),
                    "--distribution=block:block",  # a node's first ranks, and so its first GPUs, on its first socket
                    "--export=ALL",  # a job that was submitted with --export=NONE would pass on no variable
                    # The launcher decides when one rank's end ends all: a rank that stopped as asked has not failed.
                    "--kill-on-bad-exit=0",
                    "--wait=0",
                    "--open-mode=append",
                    f"--output={logs}/rank-%5t.txt",
                    *command,
                ],
                stdout=said,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid(), signal.SIGTERM),  # srun then ends the step
                env={
                    **environment,
                    **alone,
                    RENDEZVOUS.name: str(session / "rendezvous.json"),
                    HEARTBEAT.name: str(session),
                },
            )

    def codes(self) -> list[int | None]:
        """Return exit codes as `LocalRanks.codes` does.

        srun reports failed tasks at once, and tasks that ended well when all have ended.
        """
        over = self._srun.poll()
        codes: list[int | None] = [None if over is None else 0] * self._ranks
        reported = False
        for match in self._ENDED.finditer(self._text()):
            for rank in _tasks(match["tasks"]):
                codes[rank], reported = _code(match["how"]), True
        if over and not reported:  # srun itself failed
            codes = [over] * self._ranks
        return codes

    def complaint(self) -> str:
        """Return what `LocalRanks.complaint` does."""
        lines = [line.strip() for line in self._text().splitlines() if line.strip()]
        if not self._srun.poll() or any(self._ENDED.search(line) for line in lines):
            return ""
        return next((line for line in lines if line.startswith("srun: error: ")), (lines or ["srun failed"])[-1])

    def host(self, rank: int) -> str:
        """Return the name of a rank's host, or the allocation's list of nodes where Slurm does not give it."""
        for match in self._ENDED.finditer(self._text()):
            if rank in _tasks(match["tasks"]):
                return match["host"]
        return _host(rank, self._per_node) or os.environ.get("SLURM_JOB_NODELIST", "the allocation")

    def ask_to_stop(self) -> None:
        """Ask all ranks to write a checkpoint and end."""
        self.signal(signal.SIGUSR1)  # SIGTERM would make srun end the step itself

    def signal(self, number: int) -> None:
        """Send a signal to srun, which sends it to the tasks."""
        if self._srun.poll() is None:
            self._srun.send_signal(number)

    def watch_memory(self) -> None:
        """Do nothing: Slurm itself reports that a task ran out of memory."""

    def memory(self) -> list[int]:
        """Return zeros: the memory of the tasks is not known."""
        return [0] * self._ranks

    def stopped_by_signal(self, rank: int) -> bool:
        """Return False: the tasks' states are not known."""
        return False

    def end(self, grace_s: float) -> None:
        """Send SIGTERM to srun, which ends the step and kills tasks that stay; send SIGKILL to srun if it stays."""
        if self._srun.poll() is None:
            self._srun.send_signal(signal.SIGTERM)
            _wait([self._srun], grace_s)
        if self._srun.poll() is None:
            self._srun.kill()
            _wait([self._srun], 10)

    def _text(self) -> str:
        """Return what srun has said; nothing when its file is gone, which ends no rank that lives."""
        try:
            return self._srun_log.read_text(errors="replace")
        except FileNotFoundError:
            return ""


def in_allocation(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether ranks should be srun's tasks: whether this is a job of Slurm that has several nodes or tasks."""
    several = any(int(environment.get(name) or 1) > 1 for name in ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS"))
    return "SLURM_JOB_ID" in environment and several and shutil.which("srun") is not None


def _die_with(parent: int, number: int):
    """Return a function that a child calls before its program starts.

    It asks the kernel to send signal `number` when the parent dies (Linux).
    """

    def ask() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, int(number))
            if os.getppid() != parent:  # the parent died before this call
                os._exit(process.STOPPED)

    return ask


def _wait(processes: Sequence[subprocess.Popen], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


def _host(rank: int, per_node: int) -> str:
    """Return the node of a rank of a job whose ranks are laid out in blocks; empty when Slurm does not say."""
    with contextlib.suppress(OSError, IndexError, subprocess.TimeoutExpired):
        listed = subprocess.run(["scontrol", "show", "hostnames"], capture_output=True, text=True, timeout=60)
        return listed.stdout.split()[rank // per_node]
    return ""


def _tasks(text: str) -> list[int]:
    """Parse Slurm's list of task numbers, such as ``0,2-3``."""
    numbers: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _fewest_tasks(text: str, default: int) -> int:
    """Return the smallest count in Slurm's list of tasks per node, such as ``3,1`` or ``2(x4),1``."""
    return min((int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?", text)), default=default)


def _code(how: str) -> int:
    """Return the exit code for Slurm's description of a task's end."""
    if match := re.search(r"exit code (\d+)", how):
        return int(match[1])
    if "Out Of Memory" in how or "Killed" in how:
        return -signal.SIGKILL
    names = {signal.strsignal(s): s for s in signal.Signals}
    return next((-s for name, s in names.items() if name and how.startswith(name)), 1)
