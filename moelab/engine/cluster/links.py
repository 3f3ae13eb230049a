"""Measure all-reduce and all-to-all among all ranks, inside nodes and between nodes, beside what they should take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moelab.engine.cluster.findings import SLOW_SHARE, Finding, Nodes, Verdict, size_text
from moelab.engine.collectives import all_gather_json
from moelab.engine.groups import Group, ProcessGroups
from moelab.engine.launch.process import Place

ROUNDS = 5


@dataclass(frozen=True)
class Links:
    """What collectives should take.

    Attributes:
        name: of the cluster that says so.
        microseconds: called with "all-reduce" or "all-to-all", the group's ranks, those of them in one node, and the
            bytes of a rank's tensor.
    """

    name: str
    microseconds: Callable[[str, int, int, int], float]


def measure(place: Place, nodes: Nodes, device: str, links: Links | None, largest: int) -> Iterator[Finding]:
    """Yield the time of the smallest and the bandwidth of the largest message of each collective in each group.

    Args:
        links: None: the rows are notes.
        largest: bytes.
    """
    groups = ProcessGroups()
    P = place.world_size
    parts: dict[str, tuple[Group, int]] = {f"all {P} ranks": (groups.world, _in_node(range(P), nodes))}
    if nodes.ranks.size and nodes.count > 1:
        G = nodes.ranks.shape[1]
        if G > 1:
            parts[f"{G} ranks of a node"] = (groups.make(nodes.ranks), G)
        parts[f"{nodes.count} nodes, one rank each"] = (groups.make(nodes.ranks.T), 1)
    for name, (group, in_node) in parts.items():
        if group.size == 1:
            continue
        for operation in ("all-reduce", "all-to-all"):
            for size in (0, largest):
                yield _link(operation, name, group, in_node, size, nodes, device, links)
    groups.close()


def _in_node(ranks: Sequence[int], nodes: Nodes) -> int:
    return min(sum(nodes.hosts[other] == nodes.hosts[rank] for other in ranks) for rank in ranks)


def _link(
    operation: str,
    name: str,
    group: Group,
    in_node: int,
    size: int,
    nodes: Nodes,
    device: str,
    links: Links | None,
) -> Finding:
    """Return the row of one collective: its time with next to no data where `size` is 0, else its bandwidth."""
    n = group.size
    count = max(size // 4 // n, 1) * n
    x = torch.ones(count, device=device)
    out = torch.empty_like(x)

    def call() -> None:
        if operation == "all-reduce":
            group.all_reduce(x)
        else:
            group.all_to_all_single(out, x, None, None)

    repeated = 20 if size == 0 else 3
    for _ in range(2):
        call()
    times = []
    for _ in range(ROUNDS):
        dist.barrier()
        times.append(_seconds(call, repeated, device))
    mine = statistics.median(times)
    everyone = all_gather_json(mine)
    slowest = max(range(len(everyone)), key=everyone.__getitem__)
    seconds, median = everyone[slowest], statistics.median(everyone)
    moved = x.nbytes * (n - 1) / n * (2 if operation == "all-reduce" else 1)
    expected_us = None if links is None else links.microseconds(operation, n, in_node, x.nbytes)

    def text(s: float) -> str:
        return f"{s * 1e6:.3g} us" if size == 0 else f"{moved / s / 1e9:.3g} GB/s"

    uneven = seconds > median / SLOW_SHARE and n < len(nodes.hosts)  # ranks of one group end together
    least = f" (slowest: rank {slowest} on {nodes.hosts[slowest]}, {text(seconds)})" if uneven else ""
    verdict: Verdict = "note" if expected_us is None else "ok"
    if uneven and size:
        verdict = "slow"
    if expected_us is not None and seconds * 1e6 > expected_us / (SLOW_SHARE if size else 0.2):
        verdict = "slow"
    return Finding(
        f"{operation} among {name}, {size_text(x.nbytes) if size else 'latency'}",
        text(median) + least,
        "" if links is None or expected_us is None else f"{text(expected_us / 1e6)} by {links.name}",
        verdict,
        "check NCCL_DEBUG=INFO for the network it took, and the interfaces below" if verdict == "slow" else "",
    )


def _seconds(call: Callable[[], None], calls: int, device: str) -> float:
    """Return the time of a call, the mean of some in a row."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - started) / calls
