"""How a rank died or where it hangs, read from its exit code, log and stacks and from the kernel's counters."""

from __future__ import annotations

import contextlib
import linecache
import re
import signal
from collections.abc import Sequence
from pathlib import Path

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


def size(path: Path) -> int:
    """Return the bytes of a log; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def read_log(path: Path, start: int) -> str:
    """Return a log from byte `start` on, at most its last 64,000 bytes."""
    try:
        with open(path, "rb") as file:
            file.seek(max(start, size(path) - 64_000))
            return re.sub(r"\r", "\n", file.read().decode(errors="replace"))
    except FileNotFoundError:
        return ""


def last_error(log: str) -> str:
    """Return the last exception that a log names as Python's tracebacks do, else why its process aborted, if it did."""
    lines = [line.rstrip() for line in reversed(log.splitlines())]
    if error := next((match["error"] for line in lines if (match := _ERROR.match(line))), ""):
        return error
    return next((match["error"] or match["late"] for line in lines if (match := _ABORTED.search(line))), "")


def lost_connection(error: str) -> bool:
    """Return whether an exception only reports that another rank is gone."""
    return bool(_LOST.search(error))


def death_by_exit(code: int, error: str) -> str:
    """Describe in one line how a rank ended by itself; `code` is negative if a signal ended it."""
    ending = f"exit code {code}" if code >= 0 else f"then {_signal(-code)}"
    memory = "ran out of memory: " if _MEMORY.search(error) else "failed with "
    return f"{memory}{error} ({ending})" if error else f"ended with {ending}"


def death_by_signal(number: int, rank: int, memory: Sequence[int], oom_kill: bool) -> str:
    """Describe in one line how a signal ended a rank.

    Args:
        number: the signal.
        memory: last seen resident bytes of each rank.
        oom_kill: whether the kernel has counted a kill for lack of memory since the ranks were started.
    """
    how = f"was killed by {_signal(number)}"
    limit = memory_limit()
    seen = f"last seen with {_GiB(memory[rank])} of {_GiB(limit)}" if memory[rank] else ""
    if number != signal.SIGKILL:
        return how
    if oom_kill:
        return f"{how}, out of memory: the kernel counted a kill" + (f" ({seen})" if seen else "")
    if limit and (memory[rank] > limit / 2 or sum(memory) > 0.8 * limit):
        return f"{how}, likely out of memory ({seen + ', ' if seen else ''}{_GiB(sum(memory))} all ranks together)"
    return how + (f" ({seen})" if seen else "")


def oom_kills() -> int:
    """Return how many processes of this control group the kernel has killed so far for lack of memory.

    It is 0 where the kernel does not count them.
    """
    for file, name in _control_files():
        with contextlib.suppress(OSError, ValueError):
            for line in (file / name).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def memory_limit() -> int:
    """Return the bytes that this process's control group may use, at most the machine's memory."""
    import psutil

    limit = psutil.virtual_memory().total
    for folder, _ in _control_files():
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limit = min(limit, int((folder / name).read_text()))
    return limit


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


def _control_files() -> list[tuple[Path, str]]:
    """Return (folder, file that counts kills) of this process's control group: version 2, then version 1.

    In a container it is the root group.
    """
    root, files = Path("/sys/fs/cgroup"), []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds:
                files += [(root / path.lstrip("/"), "memory.events"), (root, "memory.events")]
            elif "memory" in kinds.split(","):
                folder = root / "memory"
                files += [(folder / path.lstrip("/"), "memory.oom_control"), (folder, "memory.oom_control")]
    return files


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _GiB(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
