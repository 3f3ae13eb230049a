"""Check the ranks of an allocation for `moelab check-cluster`: software, file locks, interfaces, links, and a verdict.

All ranks call every function here; what raises on one rank ends in the time limit of a collective.
"""

from __future__ import annotations

import fcntl
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

import moelab
from moelab.engine.collectives import all_gather_json
from moelab.engine.groups import Group, ProcessGroups
from moelab.engine.launch import process, rendezvous

LIMIT_S = 120.0  # of each collective: a broken cluster should be reported soon
SLOW_SHARE = 0.7  # a collective that reaches less of the expected bandwidth is slow

Expected = Callable[[str, int, int, int], float]
"""Microseconds of a collective by its name, the group's ranks, those in one node, and the bytes of a rank's tensor."""


@dataclass(frozen=True)
class Finding:
    """One row of the table; the verdict "note" is a number without anything to compare it with."""

    check: str
    measured: str
    expected: str = ""
    verdict: Literal["ok", "slow", "wrong", "note"] = "note"
    remedy: str = ""


def check(device: str, expected: Expected | None, folder: Path, size: int) -> Iterator[Finding]:
    """Yield the rows, the same on every rank, after `process.join`, with messages of `size` bytes.

    Runs lock files in `folder`, which all nodes share. Where nothing is `expected`, the rows of links are notes.
    """
    place = process.find()
    assert place is not None, "join first"
    hosts = all_gather_json(place.host)
    yield from _ranks(hosts, device)
    yield _locks(place.rank, hosts, folder)
    yield _interface(hosts)
    yield from _links(hosts, device, expected, size)


def _ranks(hosts: Sequence[str], device: str) -> Iterator[Finding]:
    """Yield whether software and ranks of a node are equal, and whether each rank has a GPU of its own."""
    mine = {"moelab": moelab.__version__, "python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        mine |= {"card": torch.cuda.get_device_name(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    everyone = all_gather_json(mine)
    seen = {name: sorted({one[name] for one in everyone}) for name in mine}
    text = "; ".join(f"{name} {' and '.join(values)}" for name, values in seen.items())
    bad = any(one != mine for one in everyone)
    yield Finding("software", text, "equal on all", "wrong" if bad else "ok", "use one environment on all nodes")
    numbers = sorted({hosts.count(host) for host in hosts})
    text, bad = f"{' or '.join(map(str, numbers))}, {len(set(hosts))} nodes", len(numbers) > 1
    yield Finding("ranks of a node", text, "equal", "wrong" if bad else "ok", "give srun --ntasks-per-node")
    if device == "cuda":
        cards = all_gather_json(str(torch.cuda.get_device_properties("cuda").uuid))
        shared = len(cards) - len(set(cards))
        remedy = "let the ranks see all GPUs of their node (--gpus-per-node, --gpu-bind=none)"
        yield Finding("a GPU each", f"{shared} ranks share one", "none shared", "wrong" if shared else "ok", remedy)


def _locks(rank: int, hosts: Sequence[str], folder: Path) -> Finding:
    """Return whether a lock that the first rank holds is refused to the last one; two trainers of a run rely on it."""
    path, last = folder / ".check-cluster.lock", len(hosts) - 1
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        answer = ""
        for holder in dict.fromkeys((0, last)):
            try:
                if rank == holder:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    answer = "held"
            except OSError as error:
                answer = "refused" if isinstance(error, BlockingIOError) else error.strerror or str(error)
            dist.barrier()
        answers = all_gather_json(answer)
    if rank == 0:
        path.unlink(missing_ok=True)
    good = answers[0] == "held" and (last == 0 or answers[last] == "refused")
    text = f"{answers[0]} on {hosts[0]}, {answers[last]} on {hosts[last]}"
    remedy = "mount with locking (lustre: flock, NFS: no nolock), or put MOELAB_HOME elsewhere"
    return Finding(f"file locks in {folder}", text, "held by one at a time", "ok" if good else "wrong", remedy)


def _interface(hosts: Sequence[str]) -> Finding:
    """Return whether all nodes use an interface of one name that other nodes reach."""
    import psutil

    own = rendezvous.own_address(os.environ)
    addresses = psutil.net_if_addrs().items()
    name = next((name for name, known in addresses if any(a.address == own for a in known)), "?")
    names = sorted(set(all_gather_json(f"{name} (loopback)" if own.startswith("127.") or own == "::1" else name)))
    bad = len(set(hosts)) > 1 and (len(names) > 1 or "(loopback)" in names[0])
    remedy = "set NCCL_SOCKET_IFNAME (gloo follows it) in the profile's environment"
    return Finding("network interface", ", ".join(names), "one, no loopback", "wrong" if bad else "ok", remedy)


def _links(hosts: Sequence[str], device: str, expected: Expected | None, size: int) -> Iterator[Finding]:
    """Yield the bandwidth of each collective among all ranks, inside nodes and between nodes."""
    nodes = [[rank for rank, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)]
    groups, P, G = ProcessGroups(), len(hosts), min(map(len, nodes))
    parts: dict[str, tuple[Group, int]] = {f"all {P} ranks": (groups.world, G)}
    if len(nodes) > 1 and G == max(map(len, nodes)):
        parts[f"{G} ranks of a node"] = (groups.make(np.array(nodes)), G)
        parts[f"{len(nodes)} nodes, one rank each"] = (groups.make(np.array(nodes).T), 1)
    for name, (group, in_node) in parts.items():
        for operation in ("all-reduce", "all-to-all") if group.size > 1 else ():
            yield _link(operation, name, group, in_node, device, expected, size)
    groups.close()


def _link(
    operation: str, name: str, group: Group, in_node: int, device: str, expected: Expected | None, size: int
) -> Finding:
    """Return the row of one collective: the median of five rounds, on the slowest rank."""
    n = group.size
    x = torch.ones(max(size // 4 // n, 1) * n, device=device)
    out = torch.empty_like(x)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(6):
        wait()
        dist.barrier()
        started = time.perf_counter()
        for _ in range(3):
            group.all_reduce(x) if operation == "all-reduce" else group.all_to_all_single(out, x, None, None)
        wait()
        times.append((time.perf_counter() - started) / 3)
    seconds = max(all_gather_json(statistics.median(times[1:])))  # the first round warms up
    moved = x.nbytes * (n - 1) / n * (2 if operation == "all-reduce" else 1)
    check, measured = f"{operation} among {name}, {x.nbytes >> 20} MiB", f"{moved / seconds / 1e9:.3g} GB/s"
    if expected is None:
        return Finding(check, measured)
    due = expected(operation, n, in_node, x.nbytes) / 1e6
    slow, remedy = seconds > due / SLOW_SHARE, "see with NCCL_DEBUG=INFO which network it took"
    return Finding(check, measured, f"{moved / due / 1e9:.3g} GB/s", "slow" if slow else "ok", remedy)
