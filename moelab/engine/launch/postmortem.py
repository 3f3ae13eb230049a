"""How a rank died or where it hangs, read from its exit code, log and stacks and from the kernel's counters."""

from __future__ import annotations

import contextlib
import linecache
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

# torch puts "[rank1]: " before the lines of an exception that nobody caught.
_ERROR = re.compile(
    r"^(?:\[rank\d+\]: )?(?P<error>(?:[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Diverged|Failed))\b(?::.*)?)$"
)
# What NCCL's own thread saw when it aborts the process, and what `process.within` says: no Python exception.
_ABORTED = re.compile(r"terminated with exception: (?:\[Rank \d+\] )?(?P<error>.+)|^(?P<late>Timeout \(\d.*\)!)$")
_LOST = re.compile(
    r"Connection (?:closed|reset|refused)|connection lost|Broken pipe|Timed? ?out waiting|remote process exit"
    r"|DistNetworkError|DistStoreError|Socket Timeout|wait timeout|Rank \d+ failed to pass"
    r"|did not come within|gloo/transport|connectFullMesh|ncclRemoteError|Watchdog caught collective operation timeout"
    r"|communicator was aborted|^Timeout \(",
    re.IGNORECASE,
)
_MEMORY = re.compile(
    r"MemoryError|OutOfMemoryError|out of memory|can't allocate memory|not enough memory", re.IGNORECASE
)
_FETCHES = re.compile(r"\.(wait(_tensor)?|cpu|tolist|item|synchronize|nonzero)\(|\b(float|int|bool)\(")
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>\S+)')

Stack = list[tuple[str, int, str]]  # file, line, function; innermost first


class Log:
    """A log to which processes append; what it has when this object is made does not count.

    Attributes:
        path: the file, which may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = self._size()

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def grown(self) -> int:
        """Bytes that were appended."""
        return self._size() - self._start

    @property
    def text(self) -> str:
        """What was appended, at most the last 64,000 bytes."""
        try:
            with open(self.path, "rb") as file:
                file.seek(max(self._start, self._size() - 64_000))
                return re.sub(r"\r", "\n", file.read().decode(errors="replace"))
        except FileNotFoundError:
            return ""

    @property
    def error(self) -> str:
        """The last error in it, see `last_error`."""
        return last_error(self.text)


def last_error(log: str) -> str:
    """Return the last exception that a log names as Python's tracebacks do, else why its process aborted, if it did."""
    lines = [line.rstrip() for line in reversed(log.splitlines())]
    if error := next((match["error"] for line in lines if (match := _ERROR.match(line))), ""):
        return error
    return next((match["error"] or match["late"] for line in lines if (match := _ABORTED.search(line))), "")


def lost_connection(error: str) -> bool:
    """Return whether an exception only reports that another rank is gone."""
    return bool(_LOST.search(error))


@dataclass(frozen=True)
class End:
    """How a process that did not end well ended.

    Attributes:
        code: exit code, negative for the signal that ended it; None: it hung.
        how: one line that goes on after the name of the process: "was killed by SIGKILL".
        error: the error that its log names; empty without one.
    """

    code: int | None
    how: str
    error: str = ""

    @classmethod
    def of(cls, code: int, error: str, oom_kill: bool = False) -> Self:
        """Describe the end of a process.

        Threads of a process group may still abort a rank that has raised an exception; the exception is what counts.

        Args:
            error: the last one in its log.
            oom_kill: whether the kernel has counted a kill for lack of memory since the process was started.
        """
        if code < 0 and (code == -signal.SIGKILL or not error):
            memory = ", out of memory: the kernel counted a kill" if oom_kill and code == -signal.SIGKILL else ""
            return cls(code, f"was killed by {_signal(-code)}{memory}")
        ending = f"exit code {code}" if code >= 0 else f"then {_signal(-code)}"
        known = "ran out of memory: " if _MEMORY.search(error) else "failed with "
        return cls(code, f"{known}{error} ({ending})" if error else f"ended with {ending}", error)

    @property
    def killed(self) -> bool:
        """Whether a signal ended it, or it hung: nothing that the process itself has done."""
        return self.code is None or (self.code < 0 and not self.error)

    @property
    def unexplained(self) -> bool:
        """Whether it ended by itself and its log names no error; an exception may have any name."""
        return not self.killed and not self.error


def oom_kills() -> int:
    """Return how many processes of this control group the kernel has killed so far for lack of memory.

    It is the machine's count where the group has none, and 0 where the kernel does not count.
    """
    for file in (*_control_files(), Path("/proc/vmstat")):
        with contextlib.suppress(OSError, ValueError):
            for line in file.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def stacks(dump: str) -> list[Stack]:
    """Parse the threads in a dump of `faulthandler`."""
    result: list[Stack] = []
    for line in dump.splitlines():
        if line.endswith("(most recent call first):"):
            result.append([])
        elif result and (match := _FRAME.match(line)):
            result[-1].append((match["file"], int(match["line"]), match["function"]))
    return [stack for stack in result if stack]


def in_collective(threads: Sequence[Stack]) -> bool:
    """Return whether one of the threads waits for other ranks.

    Such a thread is inside torch.distributed, at the `wait` of a handle from it, or fetches a number from a GPU: NCCL's
    collectives return at once, and what waits is the first line that needs a result.
    """
    return any(_waits(stack) for stack in threads)


def innermost(threads: Sequence[Stack]) -> str:
    """Return where the main thread is, as ``file.py:12 in function``; empty for no stack."""
    if not threads:
        return ""
    file, line, function = threads[-1][0]  # faulthandler prints the main thread last
    return f"{Path(file).name}:{line} in {function}"


def _waits(stack: Stack) -> bool:
    file, line, _ = stack[0]
    inside = any("torch/distributed" in f for f, _, _ in stack[:4])
    return inside or _FETCHES.search(linecache.getline(file, line)) is not None


def _control_files() -> list[Path]:
    """Return the files that count kills in this process's control group: version 2, then version 1.

    In a container it is the root group.
    """
    root, files = Path("/sys/fs/cgroup"), list[Path]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds:
                files += [root / path.lstrip("/") / "memory.events", root / "memory.events"]
            elif "memory" in kinds.split(","):
                below = root / "memory"
                files += [below / path.lstrip("/") / "memory.oom_control", below / "memory.oom_control"]
    return files


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
