"""`moelab bench exchange`: the ways tokens travel, side by side, over message sizes and ranks of this machine.

One exchange is what one MoE layer adds to a forward pass: counts, dispatch and combine, around experts that do
nothing. Each rank's tokens go to all ranks alike, one expert a rank, `bytes` of them in all: equal messages are what
the floor and the formulas speak of. Hierarchical ways call every few ranks a node; on one machine that saves messages
but no slow links. For the coordinated ways each tensor group holds the same tokens, of which `flat` sends every copy.

The candidates take turns; a time is the slowest rank's. Beside them, the two bare all-to-alls that dispatch and
combine come down to. Floor (alpha-beta model): messages * alpha + bytes * beta of what the busiest rank sends. alpha
is what one more message costs in a stream of small ones from rank 0 to rank 1 while the others wait, beta what one
more byte costs in a stream of 1 MiB; medians, in the same run. Gloo's messages take a core's time, so there the floor
is multiplied by the ranks that share a core. It knows nothing of waking up waiting ranks.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moelab import kernels, machine, terminal
from moelab.bench import harness
from moelab.bench.harness import Row, Timing
from moelab.config.parallel import ParallelConfig
from moelab.engine.collectives import Traffic, all_gather_json, observe
from moelab.engine.exchange import Exchange
from moelab.engine.launch import process
from moelab.engine.mesh import Mesh
from moelab.engine.testing import Ranks, identity_experts
from moelab.models.routing import Routing
from moelab.plotting import benchmarks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BARE = "two bare all-to-alls"
MAX_WIDTH = 4096
"""Bytes of a row at most; small messages have narrower rows, at least one for each rank."""


def layouts(ranks: int, node: int = 0) -> dict[str, ParallelConfig]:
    """Return candidate -> layout on so many ranks (a power of two from 4), tensor groups of half a node.

    Args:
        node: ranks of a node; 0, and one node alone, calls about as many ranks a node as there are then nodes.
    """
    G = node if 1 < node < ranks else 1 << ranks.bit_length() // 2
    L = G // 2
    measured = {
        "flat": ParallelConfig(data=ranks, gpus_per_node=G),
        f"hierarchical {ranks // G}x{G}": ParallelConfig(data=ranks, gpus_per_node=G, exchange="hierarchical"),
        f"coordinated, tensor {G}": ParallelConfig(tensor=G, data=ranks // G, gpus_per_node=G, exchange="coordinated"),
    }
    if L > 1:
        measured[f"both, {ranks // G}x{G}, tensor {L}"] = ParallelConfig(
            tensor=L, data=ranks // L, gpus_per_node=G, exchange="coordinated-hierarchical"
        )
    return measured


def _stream(timing: Timing) -> tuple[float, float]:
    """Return (alpha in seconds a message, beta in seconds a byte), on every rank."""
    rank = dist.get_rank()
    ack = torch.zeros(1, device=timing.device)

    def seconds(size: int, count: int) -> float:
        buffers = [torch.zeros(size, dtype=torch.uint8, device=timing.device) for _ in range(count)]

        def send_all(_: None) -> None:
            start = dist.isend if rank == 0 else dist.irecv
            for work in [start(buffer, 1 - rank) for buffer in buffers]:
                if work is not None:
                    work.wait()
            (dist.recv if rank == 0 else dist.send)(ack, 1 - rank)

        send_all(None)
        return statistics.median(timing.seconds(send_all, None) for _ in range(2 * timing.rounds))

    result = torch.zeros(2, dtype=torch.float64, device=timing.device)
    if rank < 2:
        alpha = max(seconds(8, 1025) - seconds(8, 1), 0.0) / 1024
        large = max(seconds(1 << 20, 9) - seconds(1 << 20, 1), 0.0) / 8
        result[:] = torch.tensor([alpha, max(large - alpha, 0.0) / (1 << 20)])
    dist.broadcast(result, 0)
    alpha, beta = result.tolist()
    return alpha, beta


def _exchange(exchange: Exchange, x: torch.Tensor, routing: Routing, _: None) -> None:
    exchange(x, routing, identity_experts)


def _measure_rank(ranks: int, size: int, rounds: int, device: str, node: int = 0) -> dict[str, Any]:
    """On each rank: seconds of each candidate, round by round; what it sends; alpha and beta."""
    timing = Timing(rounds, device, warm_up=1, budget_s=math.inf)  # no rank may stop before another
    S = max(ranks, size // MAX_WIDTH // ranks * ranks)
    x = torch.ones(S, max(size // S // 4, 1), device=device)
    logits = torch.zeros(S, ranks, device=device)
    logits[torch.arange(S), torch.arange(S) % ranks] = 9.0
    routing = Routing(*kernels.gate(logits, 1))
    out = torch.empty_like(x)

    def bare(_: None) -> None:
        dist.all_to_all_single(out, x)
        dist.all_to_all_single(x, out)

    calls: dict[str, Callable[[None], Any]] = {}
    sent, meshes = {}, []
    for name, config in layouts(ranks, node).items():
        meshes.append(Mesh(config, [ranks], device))
        exchange = Exchange(meshes[-1].experts(ranks), config)
        traffic = Traffic(config.ranks_per_node)
        with observe(traffic):
            exchange(x, routing, identity_experts)
        total = traffic.total()
        sent[name] = {
            "near_messages": total.intra_node_messages,
            "far_messages": total.inter_node_messages,
            "sent_bytes": total.bytes,
        }
        calls[name] = functools.partial(_exchange, exchange, x, routing)
    calls[BARE] = bare
    G = config.ranks_per_node  # of every layout
    sent[BARE] = {"near_messages": 2 * (G - 1), "far_messages": 2 * (ranks - G)}
    sent[BARE]["sent_bytes"] = 2 * (ranks - 1) * x.nbytes // ranks

    def sample(call: Callable[[None], Any], given: None) -> float:
        dist.barrier()
        return timing.seconds(call, given, calls=8 if size <= 1 << 16 else 2)

    with torch.no_grad():
        times = harness.in_turns(calls, lambda i: None, timing, sample)
    stream = _stream(timing)
    for mesh in meshes:
        mesh.close()
    return {"times": times, "sent": sent, "stream": stream, "bytes": x.nbytes, "threads": torch.get_num_threads()}


def measure(pool: Ranks, size: int, rounds: int, device: str) -> list[Row]:
    """Return the rows of one case: `size` bytes of tokens on each rank.

    Messages and bytes are the busiest rank's, counts included.
    """
    measured = pool.run(_measure_rank, pool.size, size, rounds, device, timeout_s=600)
    return _rows(measured, pool.size, Timing(rounds, device))


def _rows(measured: Sequence[dict[str, Any]], near: int, timing: Timing) -> list[Row]:
    """Return the rows of what the ranks found; `near` of them share a machine."""
    names = list(measured[0]["times"])
    times = {n: [max(t) for t in zip(*(f["times"][n] for f in measured), strict=True)] for n in names}
    alpha, beta = measured[0]["stream"]
    cores = machine.cores()
    crowding = 1.0 if timing.device == "cuda" else max(near / cores, 1.0)
    sent = {
        n: max((f["sent"][n] for f in measured), key=lambda s: s["near_messages"] + s["far_messages"]) for n in names
    }
    floors = {
        n: crowding * ((s["near_messages"] + s["far_messages"]) * alpha + s["sent_bytes"] * beta)
        for n, s in sent.items()
    }
    case = {
        "ranks": len(measured),
        "bytes_per_rank": measured[0]["bytes"],
        "backend": "nccl" if timing.device == "cuda" else "gloo",
        "cores": cores,
        "ranks_per_core": crowding,
        "alpha_ms": alpha * 1e3,
        "beta_ms_per_mib": beta * 1e3 * (1 << 20),
    }
    equal, threads = "equal messages to all ranks", measured[0]["threads"]
    on_cpu = f"{machine.cpu()}, {threads} thread{'s' if threads > 1 else ''} a rank"
    device = harness.device_name("cuda") if timing.device == "cuda" else on_cpu
    return harness.rows(
        case, times, against="flat", floor_s=floors, timing=timing, inputs=equal, device=device, numbers=sent
    )


def show(measured: Sequence[Row]) -> None:
    """Print the rows of one case."""
    c = measured[0].case
    title = (
        f"exchange, forward: {c['ranks']} ranks on {c['cores']} cores, {c['backend']}, "
        f"{c['bytes_per_rank'] / 1024:g} KiB a rank; "
        f"alpha {c['alpha_ms']:.3g} ms, beta {c['beta_ms_per_mib']:.3g} ms/MiB"
    )
    columns = {
        "messages (in node + out)": lambda row: f"{row.numbers['near_messages']} + {row.numbers['far_messages']}",
        "KiB sent": lambda row: f"{row.numbers['sent_bytes'] / 1024:.3g}",
    }
    harness.show(title, measured, columns)


def main(*, ranks: list[int] | None, sizes: list[int], rounds: int, device: str, out: Path | None) -> None:
    """Measure, print and, with `out` (a folder), write `exchange.jsonl` and its figure.

    On the ranks that torchrun or srun started `ranks` does not count: there are as many as there are. None is 4, 8 and
    16, of these on GPUs only as many as the machine has.

    Raises:
        ValueError: ranks that are no power of two from 4, or more than there are GPUs; sizes below 1 KiB; no rounds.
    """
    place = process.find()
    joined = place if place is not None and place.world_size > 1 else None
    most = 1 << 20 if joined else torch.cuda.device_count() if device == "cuda" else 64
    if most < 4:
        raise ValueError(f"bench exchange: it takes 4 ranks, so 4 GPUs, and here are {most}")
    if ranks is None:
        ranks = [P for P in (4, 8, 16) if P <= most]
    for P in [joined.world_size] if joined else ranks:
        if P < 4 or P & (P - 1) or P > most:
            raise ValueError(f"--ranks must be powers of two from 4 to {most} here, got {P}")
    for size in sizes:
        if size < 1024:
            raise ValueError(f"--bytes must be 1024 or more, got {size}")
    if rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, got {rounds}")
    measured: list[Row] = []

    def keep(case: list[Row]) -> None:
        """After each case: what was measured is kept."""
        show(case)
        measured.extend(case)
        if out is not None:
            harness.write(measured, out / "exchange.jsonl")

    if joined:
        _on_ranks(joined, sizes, rounds, device, keep)
    else:
        for P in terminal.announced(ranks, lambda P: f"exchanges of {P} ranks"):
            with Ranks(P, backend="nccl" if device == "cuda" else "gloo") as pool:
                for size in sizes:
                    keep(measure(pool, size, rounds, device))
    if measured and out is not None and benchmarks.possible():
        benchmarks.save(figure([row.json() for row in measured]), out / "exchange")


def _on_ranks(
    place: process.Place, sizes: list[int], rounds: int, device: str, keep: Callable[[list[Row]], None]
) -> None:
    """Measure on the ranks that were started; rank 0 keeps the rows."""
    process.join(device=device)
    near = all_gather_json(place.host).count(place.host)
    for size in sizes:
        answers = all_gather_json(_measure_rank(place.world_size, size, rounds, device, near))
        if place.rank == 0:
            keep(_rows(answers, near, Timing(rounds, device)))
    process.leave()


def _kind(candidate: str) -> str:
    word = candidate.replace(",", " ").split()[0]
    return {"both": "coordinated + hierarchical", "two": BARE}.get(word, word)


def headline(measured: Sequence[Mapping[str, Any]]) -> str:
    """Return what the smallest messages show, one line."""
    smallest = min(row["bytes_per_rank"] for row in measured)
    ratios = [
        r["ratio"] for r in measured if _kind(r["candidate"]) == "hierarchical" and r["bytes_per_rank"] == smallest
    ]
    span = " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios))))
    return f"At {smallest / 1024:g} KiB hierarchical takes {span} times flat's time"


def figure(measured: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw time relative to flat over bytes a rank, one panel for each number of ranks."""
    return benchmarks.ratios(
        [{**row, "candidate": _kind(row["candidate"])} for row in sorted(measured, key=lambda row: row["ranks"])],
        title=f"{headline(measured)}; one layer, forward, {measured[0]['backend']} on {measured[0]['cores']} cores",
        x="bytes_per_rank",
        xlabel="KiB of tokens a rank",
        panel="ranks",
        tick=lambda size: f"{size / 1024:g}",
        panel_title=lambda ranks: f"{ranks} ranks",
        line=True,
    )
