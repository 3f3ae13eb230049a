"""Ranks as the launcher handles them: processes of this machine, or tasks of one srun."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from moelab.engine.launch import child
from moelab.engine.launch.child import Child
from moelab.engine.launch.postmortem import End, Log, oom_kills
from moelab.engine.launch.process import rank_name
from moelab.environment import HEARTBEAT, LAUNCHER, RENDEZVOUS


class Ranks:
    """What both kinds of ranks share: processes that this one has started, one for each rank or srun alone.

    Attributes:
        logs: the log of each rank.
        children: the processes.
        stop_signal: the signal that asks ranks to write a checkpoint and end.
    """

    stop_signal = signal.SIGTERM

    def __init__(self, ranks: int, logs: Path) -> None:
        self.logs = [Log(logs / f"{rank_name(rank)}.txt") for rank in range(ranks)]
        self.children: list[Child] = []
        self._oom_kills = oom_kills()

    def codes(self) -> list[int | None]:
        """Return the exit code of each rank, negative for a signal; None while it lives."""
        return [child.poll() for child in self.children]

    def told_end(self, rank: int, code: int) -> End:
        """Return how a rank ended."""
        return End.of(code, self.logs[rank].error, oom_kills() > self._oom_kills)

    def host(self, rank: int) -> str:
        """Return the name of a rank's host."""
        return socket.gethostname()

    def signal(self, number: int) -> None:
        """Send a signal to all ranks that live."""
        for one in self.children:
            one.send_signal(number)

    def end(self, grace_s: float) -> None:
        """End all ranks and their child processes: SIGTERM, and SIGKILL after at most `grace_s`."""
        child.end(self.children, grace_s)

    def halted(self, rank: int) -> bool:
        """Return whether a rank is known to live but to be halted (SIGSTOP, a debugger)."""
        return False


class LocalRanks(Ranks):
    """P processes of this machine, with the variables that torchrun would set."""

    def __init__(
        self, command: Sequence[str], ranks: int, logs: Path, session: Path, environment: Mapping[str, str]
    ) -> None:
        super().__init__(ranks, logs)
        where = {RENDEZVOUS.name: session / "rendezvous.json", HEARTBEAT.name: session, LAUNCHER.name: os.getpid()}
        try:
            for rank, log in enumerate(self.logs):
                place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
                own = {name: str(value) for name, value in (where | place).items()}
                self.children.append(Child(command, log.path, {**environment, **own}, dies_with_us=signal.SIGKILL))
        except BaseException:
            self.end(0)
            raise

    def halted(self, rank: int) -> bool:
        """Return whether a rank lives but is halted."""
        import psutil

        try:
            status = psutil.Process(self.children[rank].pid).status()
            return status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        except psutil.Error:
            return False


class SlurmRanks(Ranks):
    """The tasks of one srun inside an allocation; Slurm kills all processes of an ended step, on all its nodes."""

    stop_signal = signal.SIGUSR1  # at SIGTERM srun would end the step itself
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
        super().__init__(ranks, logs)
        self._srun_log, self._per_node = session / "srun.txt", per_node
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
        options = [
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
        ]
        where = {RENDEZVOUS.name: str(session / "rendezvous.json"), HEARTBEAT.name: str(session)}
        # When this process dies, SIGTERM makes srun end the step.
        self._srun = Child(
            ["srun", *options, *command],
            self._srun_log,
            {**environment, **alone, **where},
            dies_with_us=signal.SIGTERM,
        )
        self.children = [self._srun]

    def codes(self) -> list[int | None]:
        """Return exit codes of ranks.

        srun reports failed tasks at once, and tasks that ended well when all have ended.
        """
        over = self._srun.poll()
        codes: list[int | None] = [None if over is None else 0] * len(self.logs)
        reported = False
        for match in self._ENDED.finditer(self._text()):
            for rank in _tasks(match["tasks"]):
                codes[rank], reported = _code(match["how"]), True
        if over and not reported:  # srun itself failed
            codes = [over] * len(self.logs)
        return codes

    def told_end(self, rank: int, code: int) -> End:
        """Return how a rank ended, or why srun started none."""
        if complaint := self._complaint():
            return End(code, f"was not started: {complaint}", complaint)
        return super().told_end(rank, code)

    def _complaint(self) -> str:
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
