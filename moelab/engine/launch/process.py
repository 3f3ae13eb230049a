"""One rank: where it stands, how it joins the others, its signs of life.

A rank is a process started by `moelab.engine.launch`, by torchrun or by srun; `find` reads from the environment which. A process
started in any other way is no rank, whatever job it runs in: a plain `python` in a batch script or an interactive shell of Slurm sees
variables that look like a rank's.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.files import read_json, write_json

if TYPE_CHECKING:
    from torch.distributed import Store

RENDEZVOUS = "MOELAB_RENDEZVOUS"  # file in which rank 0 says where its store listens; set by `launch`
HEARTBEAT = "MOELAB_HEARTBEAT"  # folder in which each rank touches a file of its own
LAUNCHER = "MOELAB_LAUNCHER"  # process id of `launch`, when ranks are its children
COLLECTIVE = "MOELAB_COLLECTIVE_S"  # seconds until a collective gives up
_FORGET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", RENDEZVOUS, HEARTBEAT, LAUNCHER)
_BEAT_EVERY_S = 0.5

# How `train` and the launcher speak about an orderly end: Slurm and the shell see these exit codes.
FINISHED, FAILED, STOPPED = 0, 1, 75

_store: Store | None = None
_last_beat = 0.0


@dataclass(frozen=True)
class Place:
    """Where a rank stands.

    Attributes:
        rank, world: this rank (from 0), and how many there are.
        local_rank: its number among the ranks of its node; chooses the GPU.
        host: the node's name.
    """

    rank: int
    world: int
    local_rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world} on {self.host}"


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed mapped for the next step instead of giving it back; False where it is not glibc.

    A training step allocates the same sizes again and again, and each page that was given back is mapped and zeroed anew: 6,000 page faults a
    step of the twins, 10 to 19 % of its time. Call it first in a process: it does not move what is already allocated.
    """
    never_mmap, trim_threshold, top_pad = -4, -1, -2  # of malloc.h
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    options = ((never_mmap, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 << 20))
    return all([set_option(*option) for option in options])


def find(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place among ranks, or None when it is not one.

    torchrun (and `launch`): RANK, WORLD_SIZE, LOCAL_RANK. srun: SLURM_PROCID in a step of several tasks; a batch script has no
    SLURM_STEP_ID, and an interactive shell is a step of one task.

    Raises:
        ValueError: one line, when the variables contradict each other.
    """
    host = socket.gethostname()
    if "RANK" in environment and "WORLD_SIZE" in environment:
        place = Place(
            _number(environment, "RANK"),
            _number(environment, "WORLD_SIZE"),
            _number(environment, "LOCAL_RANK", 0),
            host,
        )
    elif "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and _step_tasks(environment) > 1:
        place = Place(
            _number(environment, "SLURM_PROCID"),
            _step_tasks(environment),
            _number(environment, "SLURM_LOCALID", 0),
            host,
        )
    else:
        return None
    if not 0 <= place.rank < place.world:
        raise ValueError(f"ranks: the environment says rank {place.rank} of {place.world}; allowed: 0 to world - 1")
    return place


def forget(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for a child that is no rank, even where this process is one."""
    return {name: value for name, value in environment.items() if name not in _FORGET}


def join(*, device: str = "cpu", timeout: float | None = None) -> Place:
    """Meet the other ranks: process group (gloo for "cpu", nccl for "cuda"), GPU by local rank, first sign of life.

    Args:
        timeout: seconds until meeting, or later a collective, gives up with an exception; by default what the launcher says, else 600.

    Raises:
        RuntimeError: this process is no rank, or the others did not come in time.
        ValueError: there is no GPU for it.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    place = find()
    if place is None:
        raise RuntimeError("ranks: this process is not a rank; start it through launch, torchrun or srun")
    # The launcher asks a rank that hangs where it stands: SIGUSR2 prints the stacks of all threads into its log.
    faulthandler.enable()
    if hasattr(signal, "SIGUSR2"):
        faulthandler.register(signal.SIGUSR2, all_threads=True)
    limit = timedelta(seconds=timeout or float(os.environ.get(COLLECTIVE, 600)))
    store = _meet(place, limit)
    options: dict[str, Any] = {}
    if device == "cuda":
        count = torch.cuda.device_count()
        # Under srun a rank may see one GPU only: its own.
        number = 0 if count == 1 and "SLURM_PROCID" in os.environ else place.local_rank
        if number >= count:
            raise ValueError(f"ranks: {place} needs a GPU of its own, its number {number} here; there are {count}")
        torch.cuda.set_device(number)
        options["device_id"] = torch.device("cuda", number)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=place.rank,
        world_size=place.world,
        timeout=limit,
        **options,
    )
    global _store
    _store = dist.PrefixStore("word", store)
    return place


def leave() -> None:
    """Wait for the other ranks to come here too, and end the process group. Without one, nothing.

    A rank that ends with its group open may abort: gloo's threads are then torn down with the interpreter.
    """
    import torch.distributed as dist

    global _store
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    _store = None


def tell(what: str, word: str) -> None:
    """Let all ranks know; each `what` once."""
    assert _store is not None, "join first"
    _store.set(what, word)


def hear(what: str, should_stop: Callable[[], bool] = lambda: False, poll_s: float = 0.1) -> str:
    """Wait, as long as it takes, for what a rank told.

    No collective and so no time limit: preparing data or waiting for a lock may take hours, and a rank that dies meanwhile is the
    launcher's business.

    Raises:
        KeyboardInterrupt: `should_stop` said so.
    """
    assert _store is not None, "join first"
    while not _store.check([what]):
        if should_stop():
            raise KeyboardInterrupt(f"stopped while waiting for {what}")
        time.sleep(poll_s)
    return _store.get(what).decode()


def launcher_gone() -> bool:
    """Whether the launcher that started this rank has died. On Linux the kernel kills its ranks before they can ask."""
    return LAUNCHER in os.environ and os.getppid() != int(os.environ[LAUNCHER])


def beat() -> None:
    """A sign of life, asked of every rank after each step, or batch of validation. Costs next to nothing.

    From the first one on, a rank that gives none for `Limits.hang_s` counts as hanging.
    """
    global _last_beat
    folder = os.environ.get(HEARTBEAT)
    if folder and time.monotonic() - _last_beat >= _BEAT_EVERY_S and (place := find()):
        _last_beat = time.monotonic()
        with contextlib.suppress(OSError):  # the launcher is gone, or its disk is full: no reason to fail a step
            (Path(folder) / rank_name(place.rank)).touch()


def rank_name(rank: int) -> str:
    """``rank-00003``, in the names of a rank's files."""
    return f"rank-{rank:05d}"


def _meet(place: Place, limit) -> Store:
    """The store that all ranks share, served by rank 0."""
    import torch.distributed as dist

    if file := os.environ.get(RENDEZVOUS):
        # Rank 0 lets the system choose a port and says which: no port is picked before it is bound.
        if place.rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, place.world, is_master=True, timeout=limit, wait_for_workers=False)
            write_json(Path(file), {"port": store.port})
            return store
        deadline = time.monotonic() + limit.total_seconds()
        while (found := read_json(Path(file))) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{place}: rank 0 did not come within {limit.total_seconds():.0f} s")
            time.sleep(0.02)
        return dist.TCPStore("127.0.0.1", found["port"], place.world, is_master=False, timeout=limit)
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        os.environ.update(_slurm_master(os.environ))
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world))
    store, _, _ = next(dist.rendezvous("env://", place.rank, place.world, timeout=limit))
    return store


def _slurm_master(environment: Mapping[str, str]) -> dict[str, str]:
    """Address and port of rank 0 in a step of Slurm: the node that called srun, a port of the step's own below the ephemeral ones.

    Raises:
        RuntimeError: there is no such step.
    """
    address = environment.get("MASTER_ADDR") or environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if not address or "SLURM_JOB_ID" not in environment:
        raise RuntimeError("ranks: MASTER_ADDR and MASTER_PORT are not set, and this is no step of Slurm")
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID", 0)
    return {"MASTER_ADDR": address, "MASTER_PORT": str(20000 + (job * 97 + step) % 12000)}


def _step_tasks(environment: Mapping[str, str]) -> int:
    return _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError):
        raise ValueError(f"ranks: environment variable {name} must be a whole number, got {text!r}") from None
