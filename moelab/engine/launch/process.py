"""What a rank itself calls: find its place, join the process group, use the store, give signs of life.

A rank is a process started by `moelab.engine.launch`, by torchrun or by srun; `find` reads from the environment which.
A process started in any other way is no rank, also inside a job: a plain `python` in a batch script or an interactive
shell of Slurm sees variables that look like a rank's.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.environment import COLLECTIVE_S, HEARTBEAT, LAUNCHER, RENDEZVOUS

if TYPE_CHECKING:
    from torch.distributed import Store

_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", RENDEZVOUS.name, HEARTBEAT.name, LAUNCHER.name)
_BEAT_EVERY_S = 0.5

# Exit codes of ranks and of the launcher, which Slurm and the shell see.
FINISHED, FAILED, STOPPED = 0, 1, 75

_store: Store | None = None
_last_beat = 0.0
_unwatched = 0  # how many `unwatched` are open


@dataclass(frozen=True)
class Place:
    """A rank's place among the ranks.

    Attributes:
        rank, world_size: this rank (from 0), and how many there are.
        local_rank: its number among the ranks of its node; it chooses the GPU.
        host: the node's name.
    """

    rank: int
    world_size: int
    local_rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {self.host}"


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory mapped for the next step, in huge pages; return False where it is not glibc.

    A training step allocates the same sizes again and again, and each page that was given back is mapped and zeroed
    anew: 6,000 page faults per step of the twins, 10 to 19 % of its time. With huge pages layers of 128 experts take up
    to a tenth less time. Call it first in a process: it does not move memory that is already allocated, and PyTorch
    asks for huge pages (of tensors of 2 MiB and more) only if told before the first.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    never_mmap, trim_threshold, top_pad = -4, -1, -2  # of malloc.h
    try:
        c = ctypes.CDLL(None)
        set_option, _ = c.mallopt, c.madvise
    except (OSError, AttributeError):
        return False
    kept = all([set_option(*option) for option in ((never_mmap, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 << 20))])
    # Extend the heap by addresses, which take no memory before they are used, and ask for huge pages there.
    size, page, huge_pages = 1 << 30, 2 << 20, 14  # MADV_HUGEPAGE
    c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if start := c.malloc(size):
        c.madvise(-(-start // page) * page, size - page, huge_pages)
        c.free(start)
    return kept


def find(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return this process's place among ranks, or None when it is no rank.

    torchrun and `launch` set RANK, WORLD_SIZE and LOCAL_RANK. srun sets SLURM_PROCID in a step of several tasks; a
    batch script has no SLURM_STEP_ID, and an interactive shell is a step of one task.

    Raises:
        ValueError: the variables contradict each other; the message is one line.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, local_rank, world_size = "RANK", "LOCAL_RANK", _number(environment, "WORLD_SIZE")
    elif "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and _step_tasks(environment) > 1:
        rank, local_rank, world_size = "SLURM_PROCID", "SLURM_LOCALID", _step_tasks(environment)
    else:
        return None
    place = Place(_number(environment, rank), world_size, _number(environment, local_rank, 0), socket.gethostname())
    if not 0 <= place.rank < place.world_size:
        raise ValueError(
            f"ranks: the environment says rank {place.rank} of {place.world_size}; allowed: 0 to world size - 1"
        )
    return place


def without_rank(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for a child process that is no rank, even where this process is one."""
    return {name: value for name, value in environment.items() if name not in _OF_RANKS}


def show_stacks_when_asked() -> None:
    """Print the stacks of all threads into the log at SIGUSR2, which the launcher sends to a rank that hangs.

    The stack of a thread that the kernel ends (SIGSEGV, SIGBUS) stands there, too.
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)


def told_by(*signals: signal.Signals) -> Callable[[], bool]:
    """Handle these signals from now on, and return the function that says whether one has come."""
    came: list[int] = []
    for one in signals:
        signal.signal(one, lambda number, _: came.append(number))  # no lock: it may interrupt its holder
    return lambda: bool(came)


def join(*, device: str = "cpu", timeout: float | None = None, folder: Path | None = None) -> Place:
    """Join the other ranks: make the process group (gloo for "cpu", nccl for "cuda") and choose the GPU by local rank.

    Args:
        timeout: seconds after which the meeting, or later a collective of any group, raises; by default the launcher's
            limit, else 600.
        folder: for ranks of a Slurm step, a folder that all nodes see; by default the working directory.

    Raises:
        RuntimeError: this process is no rank, or the others did not come in time.
        ValueError: there is no GPU for it.
    """
    import torch
    import torch.distributed as dist

    from moelab.engine.launch import rendezvous

    place = find()
    if place is None:
        raise RuntimeError("ranks: this process is not a rank; start it through launch, torchrun or srun")
    show_stacks_when_asked()
    limit = timedelta(seconds=timeout or COLLECTIVE_S.seconds())
    if interface := rendezvous.gloo_interface(os.environ, rendezvous.interfaces()):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    store = rendezvous.meet(place.rank, place.world_size, limit, folder)
    options: dict[str, Any] = {}
    if device == "cuda":
        count = torch.cuda.device_count()
        # Under srun a rank may see only its own GPU; torchrun's ranks see all of the node's.
        alone = "SLURM_PROCID" in os.environ and os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
        number = 0 if count == 1 and alone else place.local_rank
        if number >= count:
            raise ValueError(f"ranks: {place} needs a GPU of its own, its number {number} here; there are {count}")
        torch.cuda.set_device(number)
        options["device_id"] = torch.device("cuda", number)
        # Sums of gradients overlap the exchanges of other groups; NCCL then starts both in one order on all ranks.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    with within(limit) if device == "cuda" else contextlib.nullcontext():
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=limit,
            **options,
        )
    rendezvous.met(place.rank, folder)  # all ranks are connected by now
    global _store
    _store = dist.PrefixStore("published", store)
    return place


@contextlib.contextmanager
def within(limit: timedelta) -> Iterator[None]:
    """End this process, with its stacks in the log, if the code inside takes longer.

    NCCL makes communicators in C without a time limit, and Python's signal handlers do not run meanwhile: ranks that
    cannot reach the others would wait until the job's own limit.
    """
    faulthandler.dump_traceback_later(limit.total_seconds(), exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def leave() -> None:
    """Wait until the other ranks have called this, too, and end the process group; do nothing if there is none.

    A rank that ends with its group open may abort, because gloo's threads are then destroyed with the interpreter.
    """
    import torch.distributed as dist

    global _store
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    _store = None


def publish(key: str, value: str) -> None:
    """Let all ranks know a value; use each key once."""
    assert _store is not None, "join first"
    _store.set(key, value)


def wait_for(key: str) -> str:
    """Return the value that a rank published under a key; wait for it without a limit.

    It is no collective and so has no time limit: preparing data or waiting for a lock may take hours, and the launcher
    watches for ranks that die meanwhile. A rank that is asked to stop goes on waiting, because the publishing rank does
    not see that and would meet nobody in its next collective; that rank publishes that all are to stop.
    """
    assert _store is not None, "join first"
    while not _store.check([key]):
        time.sleep(0.1)
    return _store.get(key).decode()


def launcher_gone() -> bool:
    """Return whether the process that started this one, and watches it, has died.

    On Linux the kernel kills a launcher's ranks before they can ask.
    """
    launcher = LAUNCHER.get()
    return launcher is not None and os.getppid() != int(launcher)


def beat(*, first: bool = True) -> None:
    """Give a sign of life: after each micro-batch, validation batch, checked file and second of waiting for a write.

    It costs next to nothing. After its first sign, a rank that gives none for `Limits.hang_s` counts as hanging.
    A write that never ends is therefore no hang; the other ranks' checkpoint group gives up after `collective_s`.

    Args:
        first: whether it may be the rank's first sign. Those of a checkpoint may not: after it, a script whose own loop
            gives none would count as hanging.
    """
    global _last_beat
    folder = HEARTBEAT.get()
    if not folder or _unwatched or time.monotonic() - _last_beat < _BEAT_EVERY_S or not (first or _last_beat):
        return
    if place := find():
        _last_beat = time.monotonic()
        with contextlib.suppress(OSError):  # the launcher is gone, or its disk is full, which must not fail a step
            (Path(folder) / rank_name(place.rank)).touch()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Give no signs of life, and withdraw those before: the rank starts, however long that takes.

    The launcher does not take it for hanging until its next `beat`. Building a model and its teacher and loading a
    checkpoint may take longer than a rank may be silent, also after steps: a branch starts when its trunk is trained.
    All ranks do this together, because one that waits for another is silent, too.
    """
    global _last_beat, _unwatched
    folder = HEARTBEAT.get()
    if folder and (place := find()):
        with contextlib.suppress(OSError):
            (Path(folder) / rank_name(place.rank)).unlink(missing_ok=True)
    _last_beat, _unwatched = 0.0, _unwatched + 1
    try:
        yield
    finally:
        _unwatched -= 1


def rank_name(rank: int) -> str:
    """Return ``rank-00003``, for the names of a rank's files."""
    return f"rank-{rank:05d}"


def _step_tasks(environment: Mapping[str, str]) -> int:
    return _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, default)
    try:
        return int(text if text is not None else "")
    except ValueError:
        raise ValueError(f"ranks: environment variable {name} must be a whole number, got {text!r}") from None
