"""Check ranks, slow GPUs or cores, network interfaces and clocks; print all checks and their verdict.

On NCCL the links are compared with a cluster of the simulator: its data-sheet bandwidth times the share that NCCL
reaches.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import moelab
from moelab import machine, terminal
from moelab.engine.cluster import shared_folder
from moelab.engine.cluster.findings import CLOCK_S, LIMIT_S, SLOW_SHARE, Finding, Nodes
from moelab.engine.cluster.links import Links, measure
from moelab.engine.collectives import all_gather_json, broadcast_json
from moelab.engine.groups import gloo_group
from moelab.engine.launch import process, rendezvous
from moelab.files import write_json

Rates = Callable[[], tuple[float, float]]
"""Measures this rank: matrix products in TFLOP/s, copying memory in GB/s."""


def check(
    place: process.Place,
    *,
    device: str,
    links: Links | None,
    rates: Rates,
    commit: str | None,
    gpus_per_node: int,
    environment: Sequence[str],
    folder: Path,
    largest: int,
) -> Iterator[Finding]:
    """Yield the rows, on every rank the same; every rank calls this, joined (`process.join`).

    Args:
        links: what collectives should take; None: their rows are notes.
        commit: of the code that runs, if it is known.
        gpus_per_node: ranks of a node that the profile says; 0 is unknown.
        environment: NAME=VALUE lines that the profile sets.
        folder: on the shared file system.
        largest: bytes of the largest message, and of a rank's part of the checkpoint.
    """
    nodes = Nodes.of(all_gather_json(place.host))
    yield from _ranks(place, nodes, device, gpus_per_node, commit)
    yield from _stragglers(nodes, device, rates)
    yield from measure(place, nodes, device, links, largest)
    yield from _interfaces(nodes, device, environment)
    yield from _clocks(place, nodes)
    yield from shared_folder.files(place, nodes, folder)
    yield from shared_folder.checkpoint(place, folder, largest)


# -- ranks -----------------------------------------------------------------------------------------------------------


def _ranks(
    place: process.Place, nodes: Nodes, device: str, gpus_per_node: int, commit: str | None
) -> Iterator[Finding]:
    mine: dict[str, Any] = {
        "moelab": moelab.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        mine |= {"card": torch.cuda.get_device_name(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    everyone = all_gather_json(mine)
    differing = {name: sorted({str(one[name]) for one in everyone}) for name in mine}
    differing = {name: values for name, values in differing.items() if len(values) > 1}
    software = ", ".join(f"{name} {value}" for name, value in mine.items() if name != "commit")
    yield Finding(
        "software of the ranks",
        "; ".join(f"{name}: {' and '.join(values)}" for name, values in differing.items()) or software,
        "equal on all",
        "wrong" if differing else "ok",
        "use one environment on all nodes" if differing else "",
    )
    numbers = sorted({nodes.hosts.count(host) for host in nodes.hosts})
    expected = [gpus_per_node] if gpus_per_node else numbers[:1]
    yield Finding(
        "ranks of a node",
        f"{' or '.join(map(str, numbers))}, {nodes.count} node{'s' if nodes.count > 1 else ''}",
        f"{expected[0]}, by the profile" if gpus_per_node else "equal",
        "ok" if numbers == expected else "wrong",
        "" if numbers == expected else "give srun --ntasks-per-node, or correct gpus_per_node of the profile",
    )
    if device == "cuda":
        cards = all_gather_json([place.host, str(torch.cuda.get_device_properties("cuda").uuid)])
        shared = len(cards) - len({tuple(card) for card in cards})
        free = all_gather_json(torch.cuda.mem_get_info()[0] / torch.cuda.mem_get_info()[1])
        yield Finding(
            "a GPU for each rank",
            f"{shared} ranks share one; least free memory {min(free):.0%} (rank {free.index(min(free))})",
            "none shared, 90 % free",
            "wrong" if shared or min(free) < 0.9 else "ok",
            "let the ranks see all GPUs of their node (--gpus-per-node, --gpu-bind=none); see who uses one: nvidia-smi",
        )


def _stragglers(nodes: Nodes, device: str, rates: Rates) -> Iterator[Finding]:
    dist.barrier()
    products, copies = zip(*all_gather_json(rates()), strict=True)
    crowded = device == "cpu" and max(map(nodes.hosts.count, nodes.hosts)) > machine.cores()
    for what, values, unit in (("matrix products", products, "TFLOP/s"), ("copying memory", copies, "GB/s")):
        median, least = statistics.median(values), min(values)
        slow = [f"rank {i} on {nodes.hosts[i]}" for i, value in enumerate(values) if value < SLOW_SHARE * median]
        measured = f"{median:.3g} {unit}, least {least:.3g}"
        yield Finding(
            f"{what}, each rank",
            measured + (f" ({', '.join(slow[:3])})" if slow else ""),
            "no equals: ranks share cores" if crowded else "all alike",
            "note" if crowded else "slow" if slow else "ok",
            "leave these nodes out (sbatch --exclude) and report them" if slow else "",
        )


# -- interfaces, clocks ----------------------------------------------------------------------------------------------


def _interfaces(nodes: Nodes, device: str, environment: Sequence[str]) -> Iterator[Finding]:
    import psutil

    addresses, states = psutil.net_if_addrs(), psutil.net_if_stats()
    own = rendezvous.own_address(os.environ)
    used = next((name for name, all_ in addresses.items() if any(a.address == own for a in all_)), "")
    infiniband = sorted(path.parent.parent.parent.name for path in _active_ports())
    mine = {
        "address": own,
        "interface": used,
        "mbit": getattr(states.get(used), "speed", 0),
        "loopback": own.startswith("127.") or own == "::1",
        "infiniband": infiniband,
        "missing": [line for line in environment if os.environ.get(line.partition("=")[0]) != line.partition("=")[2]],
    }
    everyone = all_gather_json(mine)
    several = nodes.count > 1
    names = sorted({one["interface"] or "?" for one in everyone})
    loopback = [nodes.hosts[i] for i, one in enumerate(everyone) if one["loopback"]]
    rate = min((one["mbit"] for one in everyone if one["mbit"]), default=0)
    wrong = several and (bool(loopback) or len(names) > 1)
    slow = several and device == "cuda" and 0 < rate <= 1000 and not all(one["infiniband"] for one in everyone)
    yield Finding(
        "interface of gloo and of the meeting",
        ", ".join(names) + (f", {rate} Mbit/s" if rate else "") + (f"; loopback on {loopback[0]}" if loopback else ""),
        "one name on all nodes, no loopback" if several else "any, one node",
        "wrong" if wrong else "slow" if slow else "ok",
        "set NCCL_SOCKET_IFNAME (gloo follows it) in the profile's environment" if wrong or slow else "",
    )
    counts = sorted({len(one["infiniband"]) for one in everyone})
    disabled = os.environ.get("NCCL_IB_DISABLE") == "1"
    if counts != [0] or disabled:
        bad = len(counts) > 1 or (disabled and counts != [0])
        yield Finding(
            "InfiniBand ports that are active, each node",
            " or ".join(map(str, counts)) + (", NCCL_IB_DISABLE=1" if disabled else ""),
            "equal, and used",
            "wrong" if bad else "ok",
            "unset NCCL_IB_DISABLE; leave out nodes with ports that are down" if bad else "",
        )
    if missing := sorted({line for one in everyone for line in one["missing"]}):
        yield Finding(
            "environment of the profile",
            f"not set: {', '.join(missing)}",
            "as the profile says",
            "wrong",
            "export these in the allocation; jobs of `moelab submit` set them",
        )


def _active_ports() -> list[Path]:
    ports = []
    for path in Path("/sys/class/infiniband").glob("*/ports/*/state"):
        with contextlib.suppress(OSError):
            if "ACTIVE" in path.read_text():
                ports.append(path)
    return ports


def _clocks(place: process.Place, nodes: Nodes) -> Iterator[Finding]:
    """Compare each node's clock with rank 0's: a message there and back brackets the other clock."""
    group = gloo_group()
    first = [nodes.hosts.index(host) for host in dict.fromkeys(nodes.hosts)][1:]
    stamp = torch.zeros(1, dtype=torch.float64)
    offsets: dict[int, tuple[float, float]] = {}
    for other in first:
        best = (float("inf"), 0.0)
        for _ in range(5):
            if place.rank == 0:
                sent = time.time()
                dist.send(stamp, other, group=group.handle)
                dist.recv(stamp, other, group=group.handle)
                got = time.time()
                best = min(best, (got - sent, float(stamp) - (sent + got) / 2))
            elif place.rank == other:
                dist.recv(stamp, 0, group=group.handle)
                stamp[0] = time.time()
                dist.send(stamp, 0, group=group.handle)
        offsets[other] = best
    offsets = {int(k): v for k, v in broadcast_json(offsets).items()}
    if not offsets:
        yield Finding("clocks", "one node", "", "ok")
        return
    worst = max(offsets, key=lambda rank: abs(offsets[rank][1]))
    trip, offset = offsets[worst]
    yield Finding(
        "clocks of the nodes against rank 0's",
        f"at most {offset * 1e3:+.3g} ms ({nodes.hosts[worst]}; known to {trip / 2 * 1e3:.2g} ms)",
        f"within {CLOCK_S * 1e3:g} ms",
        "ok" if abs(offset) < CLOCK_S + trip / 2 else "wrong",
        "" if abs(offset) < CLOCK_S + trip / 2 else "start chronyd or ntpd on that node",
    )


# -- the command -----------------------------------------------------------------------------------------------------


def verdict(findings: Sequence[Finding], place: process.Place, nodes: int) -> str:
    """Return the verdict in one line."""
    what = f"{place.world_size} ranks on {nodes} node{'s' if nodes > 1 else ''}"
    bad = [row for row in findings if row.verdict in ("wrong", "slow")]
    if not bad:
        return f"verdict: ok, {what}"
    named = "; ".join(f"{row.check} ({row.verdict})" for row in bad)
    return f"verdict: {len(bad)} of {len(findings)} checks are not ok, {what}: {named}"


def main(
    *,
    device: str,
    largest: int,
    out: Path | None,
    **options: Any,
) -> bool:
    """Join the other ranks, check, and print as rank 0; return whether all is well, on other ranks True.

    Args:
        out: JSON file for the rows.
        options: of `check`.

    Raises:
        ValueError: this process is no rank; a size below 1 MiB; a folder that not all ranks see.
    """
    if process.find() is None:
        raise ValueError(
            "check-cluster: this process is no rank; start it with srun (several tasks) or torchrun, as in "
            "`srun moelab check-cluster` or `torchrun --nproc-per-node 8 -m moelab.cli check-cluster`"
        )
    if largest < 1 << 20:
        raise ValueError("check-cluster: --mib must be at least 1")
    place = process.join(device=device, timeout=LIMIT_S)
    findings: list[Finding] = []
    hosts = all_gather_json(place.host)
    for row in check(place, device=device, largest=largest, **options):
        findings.append(row)
        if place.rank == 0:  # as they come: a check that never ends is the one after the last line
            print(f"{row.verdict:>5}  {row.check}", file=sys.stderr, flush=True)
    good = not any(row.verdict in ("wrong", "slow") for row in findings)
    if place.rank == 0:
        _show(findings)
        line = verdict(findings, place, len(set(hosts)))
        print(line)
        if out is not None:
            write_json(out, {"verdict": line, "checks": [asdict(row) for row in findings]})
    process.leave()  # not after an error, which others may not have: they would be waited for
    return good or place.rank != 0


def _show(findings: Sequence[Finding]) -> None:
    view = terminal.table("check", "measured", "expected", "verdict", "what to do")
    for row in findings:
        remedy = row.remedy if row.verdict in ("wrong", "slow") else ""
        view.add_row(row.check, row.measured, row.expected, row.verdict, remedy)
    terminal.console().print(view)
