"""`moelab bench exchange`: the ways tokens travel, side by side, over message sizes and ranks of this machine.

One exchange is what one MoE layer adds to a forward pass: counts, dispatch and combine, around experts that do nothing. Each rank's tokens go
to all ranks alike, one expert a rank, `bytes` of them in all. Hierarchical ways call every few ranks a node; on one machine that saves
messages but no slow links. For the coordinated ways each tensor group holds the same tokens, of which `flat` sends every copy.

The candidates take turns; a time is the slowest rank's. Beside them, the two bare all-to-alls that dispatch and combine come down to.
Floor (alpha-beta model): messages * alpha + bytes * beta of what the busiest rank sends. alpha is what one more message costs in a stream of
small ones from rank 0 to rank 1 while the others wait, beta what one more byte costs in a stream of 1 MiB; medians, in the same run. Gloo's
messages take a core's time, so there the floor is multiplied by the ranks that share a core. It knows nothing of waking up waiting ranks.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moelab import kernels
from moelab.bench import harness as common
from moelab.config.parallel import ParallelConfig
from moelab.engine.collectives import Traffic, all_gather_json, observe
from moelab.engine.exchange import Exchange
from moelab.engine.launch import process
from moelab.engine.mesh import Mesh
from moelab.engine.testing import Ranks, identity_experts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BARE = "two bare all-to-alls"
WIDEST = 4096
"""Bytes of a row at most; small messages have narrower rows, at least one for each rank."""


def layouts(ranks: int, node: int = 0) -> dict[str, ParallelConfig]:
    """Candidate -> layout on so many ranks (a power of two from 4), tensor groups of half a node.

    node: ranks of a node; 0, and one node alone, calls about as many ranks a node as there are then nodes.
    """
    G = node if 1 < node < ranks else 1 << ranks.bit_length() // 2
    L = G // 2
    found = {
        "flat": ParallelConfig(data=ranks, gpus_per_node=G),
        f"hierarchical {ranks // G}x{G}": ParallelConfig(data=ranks, gpus_per_node=G, exchange="hierarchical"),
        f"coordinated, tensor {G}": ParallelConfig(tensor=G, data=ranks // G, gpus_per_node=G, exchange="coordinated"),
    }
    if L > 1:
        found[f"both, {ranks // G}x{G}, tensor {L}"] = ParallelConfig(
            tensor=L, data=ranks // L, gpus_per_node=G, exchange="coordinated-hierarchical"
        )
    return found


def _stream(device: str, rounds: int) -> tuple[float, float]:
    """(alpha in seconds a message, beta in seconds a byte), on every rank."""
    rank = dist.get_rank()
    ack = torch.zeros(1, device=device)

    def seconds(size: int, count: int) -> float:
        buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(count)]

        def send_all() -> None:
            start = dist.isend if rank == 0 else dist.irecv
            for work in [start(buffer, 1 - rank) for buffer in buffers]:
                work.wait()
            (dist.recv if rank == 0 else dist.send)(ack, 1 - rank)

        send_all()
        return statistics.median(common.seconds(send_all, device) for _ in range(2 * rounds))

    result = torch.zeros(2, dtype=torch.float64, device=device)
    if rank < 2:
        alpha = max(seconds(8, 1025) - seconds(8, 1), 0.0) / 1024
        large = max(seconds(1 << 20, 9) - seconds(1 << 20, 1), 0.0) / 8
        result[:] = torch.tensor([alpha, max(large - alpha, 0.0) / (1 << 20)])
    dist.broadcast(result, 0)
    return tuple(result.tolist())


def _measure_rank(ranks: int, size: int, rounds: int, device: str, node: int = 0) -> dict[str, Any]:
    """On each rank: seconds of each candidate, round by round; what it sends; alpha and beta."""
    S = max(ranks, size // WIDEST // ranks * ranks)
    x = torch.ones(S, max(size // S // 4, 1), device=device)
    logits = torch.zeros(S, ranks, device=device)
    logits[torch.arange(S), torch.arange(S) % ranks] = 9.0
    routing = kernels.gate(logits, 1)
    out = torch.empty_like(x)

    def bare() -> None:
        dist.all_to_all_single(out, x)
        dist.all_to_all_single(x, out)

    calls: dict[str, Callable[[], Any]] = {}
    sent = {}
    meshes = []
    for name, config in layouts(ranks, node).items():
        meshes.append(Mesh(config, [ranks], device))
        groups = meshes[-1].experts(ranks)
        traffic = Traffic(config.ranks_per_node)
        with observe(traffic):
            Exchange(groups, config)(x, routing, identity_experts)
        total = traffic.total()
        sent[name] = {
            "near_messages": total.intra_node_messages,
            "far_messages": total.inter_node_messages,
            "bytes": total.bytes,
        }
        calls[name] = functools.partial(Exchange(groups, config), x, routing, identity_experts)
    calls[BARE] = bare
    sent[BARE] = {
        "near_messages": 2 * (ranks - 1),
        "far_messages": 0,
        "bytes": 2 * (ranks - 1) * x.nbytes // ranks,
    }
    repeats = 8 if size <= 1 << 16 else 2
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for i in range(rounds + 1):
            for name, call in calls.items():
                dist.barrier()
                started = time.perf_counter()
                for _ in range(repeats):
                    call()
                if device == "cuda":
                    torch.cuda.synchronize()
                if i:  # the first round warms up
                    times[name].append((time.perf_counter() - started) / repeats)
    stream = _stream(device, rounds)
    for mesh in meshes:
        mesh.close()
    return {"times": times, "sent": sent, "stream": stream, "bytes": x.nbytes}


def measure(pool: Ranks, size: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Tidy rows of one case: `size` bytes of tokens on each rank; see `kernels.bench.common.rows`.

    `ratio` is time over `flat`'s; messages and bytes are the busiest rank's, counts included.
    """
    found = pool.run(_measure_rank, pool.size, size, rounds, device, timeout_s=600)
    return _rows(found, pool.size, rounds, device)


def _rows(found: list[dict[str, Any]], near: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Rows of what the ranks found; `near` of them share a machine."""
    names = list(found[0]["times"])
    times = {n: [max(t) for t in zip(*(f["times"][n] for f in found), strict=True)] for n in names}
    alpha, beta = found[0]["stream"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    crowding = 1.0 if device == "cuda" else max(near / cores, 1.0)
    case = {
        "ranks": len(found),
        "bytes_per_rank": found[0]["bytes"],
        "backend": "nccl" if device == "cuda" else "gloo",
        "cores": cores,
        "device": common.device_name(device),
        "ranks_per_core": crowding,
        "alpha_ms": alpha * 1e3,
        "beta_ms_per_mib": beta * 1e3 * (1 << 20),
    }
    rows = common.rows(case, times, "flat", 1.0)
    for row in rows:
        busiest = max(
            (f["sent"][row["candidate"]] for f in found), key=lambda s: s["near_messages"] + s["far_messages"]
        )
        messages = busiest["near_messages"] + busiest["far_messages"]
        floor = crowding * (messages * alpha + busiest["bytes"] * beta)
        row.update(
            near_messages=busiest["near_messages"],
            far_messages=busiest["far_messages"],
            sent_bytes=busiest["bytes"],
            floor_ms=floor * 1e3,
            floor_ratio=row["median_ms"] / (floor * 1e3),
        )
    return rows


def show(found: list[dict[str, Any]]) -> None:
    """Print the rows of one case."""
    from moelab import terminal

    first = found[0]
    title = (
        f"exchange, forward: {first['ranks']} ranks on {first['cores']} cores, {first['backend']}, {first['bytes_per_rank'] / 1024:g} KiB a rank; "
        f"alpha {first['alpha_ms']:.3g} ms, beta {first['beta_ms_per_mib']:.3g} ms/MiB"
    )
    view = terminal.table(
        "candidate", "messages (in node + out)", "KiB sent", "median ms", "min to max", "time / flat", "min to max",
        "floor ms", "time / floor", title=title,
    )  # fmt: skip
    for row in found:
        view.add_row(
            row["candidate"],
            f"{row['near_messages']} + {row['far_messages']}",
            f"{row['sent_bytes'] / 1024:.3g}",
            f"{row['median_ms']:.3g}",
            f"{row['min_ms']:.3g} to {row['max_ms']:.3g}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}",
            f"{row['floor_ms']:.3g}",
            f"{row['floor_ratio']:.3g}",
        )
    terminal.console().print(view)


def main(*, ranks: list[int], sizes: list[int], rounds: int, device: str, out: Path | None) -> None:
    """Measure, print and, with `out` (a folder), write `exchange.jsonl` and its figure.

    Raises:
        ValueError: ranks that are no power of two from 4, or more than there are GPUs; sizes below 1 KiB; no rounds.

    On the ranks that torchrun or srun started `ranks` does not count: there are as many as there are.
    """
    place = process.find()
    joined = place is not None and place.world_size > 1
    most = 1 << 20 if joined else torch.cuda.device_count() if device == "cuda" else 64
    for P in [place.world_size] if joined else ranks:
        if P < 4 or P & (P - 1) or P > most:
            raise ValueError(f"--ranks must be powers of two from 4 to {most} here, got {P}")
    for size in sizes:
        if size < 1024:
            raise ValueError(f"--bytes must be 1024 or more, got {size}")
    if rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, got {rounds}")
    if joined:
        _on_ranks(place, sizes, rounds, device, out)
        return
    found = []
    for P in ranks:
        with Ranks(P, backend="nccl" if device == "cuda" else "gloo") as pool:
            for size in sizes:
                case = measure(pool, size, rounds, device)
                show(case)
                found += case
    if out is not None:
        common.write(found, out / "exchange.jsonl")
        draw(found, out / "exchange")


def _on_ranks(place: process.Place, sizes: list[int], rounds: int, device: str, out: Path | None) -> None:
    process.join(device=device)
    near = all_gather_json(place.host).count(place.host)
    found = []
    for size in sizes:
        answers = all_gather_json(_measure_rank(place.world_size, size, rounds, device, near))
        case = _rows(answers, near, rounds, device)
        found += case
        if place.rank == 0:
            show(case)
            if out is not None:  # after each size: what was measured is kept
                common.write(found, out / "exchange.jsonl")
    if place.rank == 0 and out is not None:
        draw(found, out / "exchange")
    process.leave()


def _kind(candidate: str) -> str:
    return candidate.replace(",", " ").split()[0]


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """PNG and SVG of `figure`; `path` without suffix."""
    import matplotlib

    matplotlib.use("Agg")
    common.save(figure(found), path)


def finding(found: list[dict[str, Any]]) -> str:
    """What the smallest messages say, one line."""
    smallest = min(row["bytes_per_rank"] for row in found)
    ratios = [r["ratio"] for r in found if _kind(r["candidate"]) == "hierarchical" and r["bytes_per_rank"] == smallest]
    span = " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios))))
    return f"At {smallest / 1024:g} KiB hierarchical takes {span} times as long as flat"


def figure(found: list[dict[str, Any]]) -> Figure:
    """Time relative to flat over bytes a rank, one panel for each number of ranks."""
    import matplotlib.pyplot as plt

    colors = {"hierarchical": "#0072B2", "coordinated": "#D55E00", "both": "#009E73", "two": "#6E6E6E"}
    labels = {"both": "coordinated + hierarchical", "two": BARE}
    panels = sorted({row["ranks"] for row in found})
    fig, axes = plt.subplots(1, len(panels), figsize=(3 + 3.2 * len(panels), 4.2), sharey=True, squeeze=False)
    for ax, ranks in zip(axes[0], panels, strict=True):
        shown = [row for row in found if row["ranks"] == ranks and row["candidate"] != "flat"]
        for name in dict.fromkeys(row["candidate"] for row in shown):
            rows = [row for row in shown if row["candidate"] == name]
            at, ratio = [row["bytes_per_rank"] / 1024 for row in rows], [row["ratio"] for row in rows]
            spread = [[r["ratio"] - r["ratio_min"] for r in rows], [r["ratio_max"] - r["ratio"] for r in rows]]
            kind = _kind(name)
            ax.errorbar(
                at, ratio, yerr=spread, fmt="o-", ms=4, capsize=3, color=colors[kind], label=labels.get(kind, kind)
            )
        ax.axhline(1, color="#888888", linewidth=1)
        ax.set_xscale("log", base=4)
        ax.set_yscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        ax.minorticks_off()
        ax.set_xlabel("KiB of tokens a rank")
        ax.set_title(f"{ranks} ranks", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.35)
    axes[0][0].set_ylabel("time / flat (median, least to greatest)")
    handles = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[0][-1].legend(
        handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9
    )
    fig.suptitle(
        f"{finding(found)}\none layer, forward; {found[0]['backend']} on {found[0]['cores']} cores, {found[0]['device'].split(',')[0]}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    fig.tight_layout()
    return fig
