"""`moelab bench decode`: what a token costs, optimised against the paper's baseline and against others, side by side in one process.

Protocol: random weights; a batch of prompts of `prompt` random tokens; one generation of 4 tokens as warm-up, then `rounds` in which the
candidates take turns, each generating `output` tokens for every prompt, greedily. The first token's time is that of the prompts (prefill); all
later steps are the sample: latency is a step's time, which gives each sequence of the batch one token. The breakdown comes from a further
generation under a clock, so its sum is a little more than the latency.

The floor is what the machine must do at least: read the weights that a step needs (of the experts, those that got tokens, counted) and
the cache, once, at the bandwidth measured in the same run; on ranks, plus the step's collectives times the time of an empty one. A model that fits
the processor's cache can be faster than that.

Ranks are processes of this machine, or, under torchrun and srun, those that were started: then each model is measured on all of them, by rank 0's word.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moelab.bench import peers
from moelab.bench.clock import PARTS, Clock
from moelab.bench.harness import device_name, seconds
from moelab.config import ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.engine import parallel as engine
from moelab.engine.collectives import all_gather_json
from moelab.engine.launch import process
from moelab.engine.mesh import Mesh
from moelab.engine.testing import Ranks
from moelab.files import write_text
from moelab.inference.generate import Generator
from moelab.inference.modes import MODES, set_mode
from moelab.inference.sampling import Sampling
from moelab.models import GPT

Steps = Callable[[int], list[float]]
"""tokens to generate -> seconds of each turn: the prompts and first tokens, then each step."""


@dataclass(frozen=True)
class Protocol:
    """Numbers of the module's text; prompt and output in tokens."""

    prompt: int = 32
    output: int = 32
    rounds: int = 5
    warm_up: int = 4


def decoders(hidden: int = 512, layers: int = 4, vocab: int = 4096) -> dict[str, ModelConfig]:
    """The models measured by default: the dense twin, which fits the caches; a dense base; the base with 8, 64 and 128 experts in every
    second layer; a dense model that fits no cache."""
    base = ModelConfig(layers, hidden, hidden // 64, vocab=vocab, context=256, init_std=0.05, name=f"dense {hidden}")
    moe = {
        f"MoE-{e} {hidden}": replace(base, experts=(0, e) * (layers // 2), name=f"MoE-{e} {hidden}")
        for e in (8, 64, 128)
    }
    return {
        "350M twin": ModelConfig.parse("350M twin", init_std=0.05),
        f"dense {hidden}": base,
        **moe,
        "350M+L6": ModelConfig.parse("350M+L6", context=256),
    }


def filled(config: ModelConfig, device: str) -> GPT:
    """A model of random weights, quickly: values do not matter here, but routing must spread."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, config.init_std)
    return model


def turns(generator: Generator, prompts: list[list[int]], tokens: int) -> Iterator[None]:
    """Generate, greedily, and come back after each turn: one token for each prompt, on ranks of this rank's share."""
    share = len(prompts)
    if generator.mesh is not None:
        share = len(range(generator.mesh.data.index, len(prompts), generator.mesh.data.size))
    pieces = generator.stream(prompts, Sampling(max_new_tokens=tokens, temperature=0))
    for count, _ in enumerate(pieces, start=1):
        if count % share == 0:
            yield


def our_steps(generator: Generator, prompts: list[list[int]]) -> Steps:
    """Times of one of our generators."""

    def run(tokens: int) -> list[float]:
        times = []
        last = time.perf_counter()
        for _ in turns(generator, prompts, tokens):
            now = time.perf_counter()
            times.append(now - last)
            last = now
        return times

    return run


def read_rate(device: str, size: int = 1 << 28) -> float:
    """Bytes/s of reading memory larger than the caches, best of seven sums."""
    x = torch.ones(size // 4, device=device)
    return size / min(seconds(x.sum, device) for _ in range(7))


def weight_bytes(config: ModelConfig, distinct: float, itemsize: int = 4) -> float:
    """Bytes of the weights one step reads when each MoE layer's tokens meet `distinct` experts, embeddings' rows left out."""
    used = config.active_parameters() - config.context * config.hidden
    expert = 2 * config.hidden * config.ffn + config.ffn + config.hidden
    return itemsize * (used + config.moe_layers * (distinct - config.top_k) * expert)


def cache_bytes(config: ModelConfig, batch: int, protocol: Protocol, itemsize: int = 4) -> float:
    """Bytes of keys and values that a step reads, at the middle of the output."""
    return itemsize * batch * 2 * config.layers * config.hidden * (protocol.prompt + protocol.output / 2)


def make_prompts(config: ModelConfig, batch: int, protocol: Protocol) -> list[list[int]]:
    """Random prompts, the same for every candidate."""
    return torch.randint(
        config.vocab, (batch, protocol.prompt), generator=torch.Generator().manual_seed(batch)
    ).tolist()


def breakdown(generator: Generator, prompts: list[list[int]], protocol: Protocol) -> dict[str, Any]:
    """Milliseconds a step by part, collectives a step, and distinct experts a MoE layer, from one more generation."""
    clock = Clock(generator.cache.device.type)
    clock.attach(generator.model)
    with clock.communication():
        for turn, _ in enumerate(turns(generator, prompts, protocol.output)):
            if turn == 0:
                clock.reset()  # the prompts are not a step, and what comes after the last one is none
            clock.stop()
            spent, collectives = clock.seconds.copy(), clock.collectives
    clock.detach()
    n = protocol.output - 1
    return {
        "parts_ms": {part: spent[part] / n * 1e3 for part in PARTS if spent[part]},
        "collectives": collectives / n,
        "distinct_experts": statistics.mean(clock.distinct) if clock.distinct else None,
    }


def measure(config: ModelConfig, batches: list[int], protocol: Protocol, device: str) -> list[dict[str, Any]]:
    """Rows of one model, one process: our two modes and, where installed, transformers; every candidate at every batch."""
    rate = read_rate(device)
    reference = filled(config, device)
    others = peers.candidates(reference, protocol.prompt + protocol.output)
    models: dict[str, GPT] = {"baseline": set_mode(filled(config, device), "baseline"), "optimised": reference}
    set_mode(reference, "optimised")
    found: list[dict[str, Any]] = []
    for batch in batches:
        prompts = make_prompts(config, batch, protocol)
        generators = {name: Generator(m, batch=batch) for name, m in models.items()}
        candidates: dict[str, Steps] = {name: our_steps(g, prompts) for name, g in generators.items()}
        candidates |= {name: peer.steps(prompts) for name, peer in others.items()}
        times = in_turns(candidates, protocol)
        case = {"model": str(config), "experts": max(config.experts), "batch": batch, "ranks": 1}
        case |= {"parameters": config.parameters(), "device": device_name(device), "read_GB_per_s": rate / 1e9}
        for name, measured in times.items():
            found.append({**case, "candidate": name, **figures(measured, times, batch, protocol)})
    for row in found:  # last, as the clock slows the models down
        prompts, name = make_prompts(config, row["batch"], protocol), row["candidate"]
        if name in models:
            row |= breakdown(Generator(models[name], batch=row["batch"]), prompts, protocol)
        else:
            row["distinct_experts"] = others[name].distinct_experts(prompts, protocol.output)
    distinct = {row["batch"]: row["distinct_experts"] for row in found if row["candidate"] == "optimised"}
    for row in found:
        needed = weight_bytes(config, distinct[row["batch"]] or 0) + cache_bytes(config, row["batch"], protocol)
        row |= floor(row, needed / rate)
    return found


def in_turns(candidates: dict[str, Steps], protocol: Protocol) -> dict[str, list[list[float]]]:
    """Turns of each candidate, round by round."""
    for run in candidates.values():
        run(protocol.warm_up)
    times: dict[str, list[list[float]]] = {name: [] for name in candidates}
    for _ in range(protocol.rounds):
        for name, run in candidates.items():
            times[name].append(run(protocol.output))
    return times


def figures(
    measured: list[list[float]], times: dict[str, list[list[float]]], batch: int, protocol: Protocol
) -> dict[str, Any]:
    """Latency, throughput and, round by round, the time over each other candidate's."""
    steps = sorted(t for turns in measured for t in turns[1:])
    row: dict[str, Any] = {
        "median_ms": statistics.median(steps) * 1e3,
        "p95_ms": steps[min(math.ceil(0.95 * len(steps)), len(steps)) - 1] * 1e3,
        "first_ms": statistics.median(turns[0] for turns in measured) * 1e3,
        "tokens_per_s": batch * len(steps) / sum(steps),
        "prompt": protocol.prompt,
        "output": protocol.output,
        "rounds": protocol.rounds,
        "warm_up": protocol.warm_up,
    }
    for other, theirs in times.items():
        pairs = zip(measured, theirs, strict=True)
        ratios = [statistics.median(a[1:]) / statistics.median(b[1:]) for a, b in pairs]
        row[f"time_over_{other}"] = statistics.median(ratios)
        row[f"time_over_{other}_range"] = [min(ratios), max(ratios)]
    return row


def floor(row: dict[str, Any], at_least_s: float) -> dict[str, float]:
    return {"floor_ms": at_least_s * 1e3, "floor_ratio": row["median_ms"] / (at_least_s * 1e3)}


# -- ranks -------------------------------------------------------------------------------------------------------------------------


def measure_rank(
    config: ModelConfig, parallel: ParallelConfig, batch: int, protocol: Protocol, device: str = "cpu"
) -> list[dict[str, Any]]:
    """On each rank: a row for each mode, as this rank saw it; `batch` sequences over all ranks."""
    mesh = Mesh(parallel, config.experts, device)
    generators = {
        mode: Generator(
            set_mode(engine.build(config, 0, mesh).module, mode), batch=-(-batch // mesh.data.size), mesh=mesh
        )
        for mode in MODES
    }
    prompts = make_prompts(config, batch, protocol)
    times = in_turns({mode: our_steps(g, prompts) for mode, g in generators.items()}, protocol)
    machine = {
        "empty_collective_ms": empty_collective(mesh) * 1e3,
        "read_GB_per_s": read_rate(device, 1 << 26) / 1e9,
    }
    return [
        {
            "candidate": mode,
            **figures(times[mode], times, batch, protocol),
            **breakdown(generator, prompts, protocol),
            **machine,
        }
        for mode, generator in generators.items()
    ]


def empty_collective(mesh: Mesh) -> float:
    """Seconds of an all-to-all of one number a rank, median of 50; 0 for one rank."""
    if mesh.world.size == 1:
        return 0.0
    x = torch.zeros(mesh.world.size, dtype=torch.int32, device=mesh.device)
    out = torch.empty_like(x)
    return statistics.median(
        seconds(lambda: dist.all_to_all_single(out, x, group=mesh.world.handle), mesh.device) for _ in range(50)
    )


def measure_ranks(
    config: ModelConfig, ranks: list[int], batch: int, protocol: Protocol, exchange: str = "flat"
) -> list[dict[str, Any]]:
    """Rows of one model over numbers of ranks of this machine: experts spread over all of them, data parallel outside."""
    found = []
    for size in ranks:
        parallel = ParallelConfig(data=size, exchange=exchange)
        with Ranks(size, threads=1) as pool:
            answers = pool.run(measure_rank, config, parallel, batch, protocol, timeout_s=900)
        machine = f"{device_name('cpu').partition(',')[0]}, {size} ranks of 1 thread"
        found += slowest(answers, config, parallel, batch, protocol, machine)
    return found


def measure_joined(
    config: ModelConfig, parallel: ParallelConfig, batch: int, protocol: Protocol, device: str
) -> list[dict[str, Any]]:
    """On ranks that have met (`process.join`): the rows, on every rank."""
    answers = all_gather_json(measure_rank(config, parallel, batch, protocol, device))
    name = device_name(device).partition(",")[0]
    return slowest(answers, config, parallel, batch, protocol, f"{name}, {parallel.ranks} ranks")


def slowest(
    answers: list[list[dict[str, Any]]],
    config: ModelConfig,
    parallel: ParallelConfig,
    batch: int,
    protocol: Protocol,
    machine: str,
) -> list[dict[str, Any]]:
    """Of what the ranks saw the slowest one's, mode by mode, with the floor."""
    found = []
    for rows in zip(*answers, strict=True):
        row = max(rows, key=lambda r: r["median_ms"])
        # Each rank reads the shared weights and, on average, its share of the experts that tokens chose.
        share = sum(r["distinct_experts"] or 0 for r in rows) / len(rows)
        needed = weight_bytes(config, share) / parallel.tensor + cache_bytes(
            config, -(-batch // parallel.data), protocol
        )
        waiting_s = row["collectives"] * row["empty_collective_ms"] / 1e3
        case = {"model": str(config), "experts": max(config.experts), "batch": batch, "ranks": parallel.ranks}
        case |= {"parameters": config.parameters(), "exchange": parallel.exchange, "tensor": parallel.tensor}
        case["device"] = machine
        found.append({**case, **row, **floor(row, needed / (row["read_GB_per_s"] * 1e9) + waiting_s)})
    return found


# -- the command -------------------------------------------------------------------------------------------------------------------


def main(
    *,
    models: list[str] | None,
    batches: list[int],
    ranks: list[int],
    rank_batch: int,
    protocol: Protocol,
    threads: int,
    device: str,
    out: Path | None,
    tensor: int = 1,
    exchange: str = "flat",
) -> None:
    """Measure, print and, with `out` (a folder), write `decode.jsonl` and its figure.

    Args:
        models: names of `decoders` or of the paper's grammar; None is all of `decoders`.
        ranks: numbers of ranks for the models with experts; empty leaves that part out.
        rank_batch: sequences over all ranks there.
        tensor, exchange: the layout where torchrun or srun started the ranks; otherwise it is flat and data parallel.
    """
    known = decoders()
    configs = [known[name] if name in known else ModelConfig.parse(name) for name in models or known]
    for config in configs:
        if protocol.prompt + protocol.output > config.context:
            raise ValueError(
                f"bench decode: prompt {protocol.prompt} and output {protocol.output} exceed the context of {config} ({config.context})"
            )
    if protocol.output < 2 or min(*batches, protocol.prompt, protocol.rounds) < 1:
        raise ValueError("bench decode: output must be at least 2 tokens; batch, prompt and rounds at least 1")
    place = process.find()
    if place is not None and place.world_size > 1:
        torch.set_num_threads(threads)
        _on_ranks(configs, place, tensor, exchange, rank_batch, protocol, device, out)
        return
    for size in ranks:
        if rank_batch < size:
            raise ValueError(f"bench decode: {rank_batch} sequences do not give each of {size} ranks one")
    torch.set_num_threads(threads)
    if tensor != 1 or exchange != "flat":
        raise ValueError("bench decode: --tensor and --exchange need several ranks; start with torchrun or srun")
    found = []
    for config in configs:
        case = measure(config, batches, protocol, device)
        show(f"{config}, {case[0]['device']}", case)
        found += case
        if config.is_moe and ranks:
            case = measure_ranks(config, ranks, rank_batch, protocol)
            show(f"{config}, batch {rank_batch} over ranks of 1 thread, experts over all ranks", case)
            found += case
        write(found, out)
    if out is not None:
        draw(found, out / "decode")


def write(found: list[dict[str, Any]], out: Path | None) -> None:
    """All rows so far, after each model: an interrupted benchmark keeps what it measured."""
    if out is not None:
        write_text(out / "decode.jsonl", "".join(json.dumps(row) + "\n" for row in found))
        print(f"{len(found)} rows in {out / 'decode.jsonl'}")


def _on_ranks(
    configs: list[ModelConfig],
    place: process.Place,
    tensor: int,
    exchange: str,
    batch: int,
    protocol: Protocol,
    device: str,
    out: Path | None,
) -> None:
    if tensor < 1 or place.world_size % tensor:
        raise ValueError(f"bench decode: --tensor {tensor} does not divide {place.world_size} ranks")
    parallel = ParallelConfig(tensor=tensor, data=place.world_size // tensor, exchange=exchange)
    if batch < parallel.data:
        raise ValueError(f"bench decode: {batch} sequences do not give each of {parallel.data} data ranks one")
    for config in configs:
        parallel.check(config.experts, heads=config.heads, ffn=config.ffn)
    process.join(device=device)
    found = []
    for config in configs:
        found += measure_joined(config, parallel, batch, protocol, device)
        if place.rank == 0:
            show(f"{config}, batch {batch}, {found[-1]['device']}", found[-len(MODES) :])
            write(found, out)
    process.leave()


def show(title: str, found: list[dict[str, Any]]) -> None:
    """Print rows: latency, throughput, and where the time goes."""
    from rich.console import Console
    from rich.table import Table

    view = Table(
        "ranks",
        "batch",
        "candidate",
        "median ms",
        "p95 ms",
        "tokens/s",
        "time / optimised",
        "time / floor",
        "where (ms)",
        title=title,
    )
    for row in found:
        parts = sorted(row.get("parts_ms", {}).items(), key=lambda item: -item[1])
        view.add_row(
            str(row["ranks"]),
            str(row["batch"]),
            row["candidate"],
            f"{row['median_ms']:.2f}",
            f"{row['p95_ms']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['time_over_optimised']:.2f}",
            f"{row['floor_ratio']:.1f}",
            ", ".join(f"{name} {ms:.2f}" for name, ms in parts if ms >= 0.005),
        )
    Console(width=170).print(view)


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """PNG and SVG: latency by model and batch in one process, floors as lines, and by ranks if measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    one = [row for row in found if row["ranks"] == 1 and "empty_collective_ms" not in row]
    many = [row for row in found if "empty_collective_ms" in row]
    batches = sorted({row["batch"] for row in one})
    names = list(dict.fromkeys(row["candidate"] for row in one))
    colors = dict(zip(names, ("#D55E00", "#0072B2", "#6E6E6E", "#E69F00"), strict=False))
    panels = len(batches) + bool(many)
    figure, axes = plt.subplots(1, panels, figsize=(1.5 + 3.6 * panels, 4.8), sharey=True, squeeze=False)

    def panel(ax, rows, across, title):
        groups = list(dict.fromkeys(row[across] for row in rows))
        for i, name in enumerate(names):
            mine = [row for row in rows if row["candidate"] == name]
            if not mine:
                continue
            at = [groups.index(row[across]) + (i - (len(names) - 1) / 2) * 0.2 for row in mine]
            median = [row["median_ms"] for row in mine]
            above = [max(row["p95_ms"] - row["median_ms"], 0) for row in mine]
            ax.errorbar(at, median, yerr=[[0] * len(mine), above], fmt="o", capsize=3, color=colors[name], label=name)
        floors = {row[across]: row["floor_ms"] for row in rows if row["candidate"] == "optimised"}
        for group, value in floors.items():
            at = groups.index(group)
            label = "floor" if at == 0 else None
            ax.plot([at - 0.4, at + 0.4], [value, value], color="#009E73", linewidth=1.5, label=label)
        ax.set_xticks(range(len(groups)), [str(g) for g in groups], rotation=30, ha="right")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        ax.set_title(title, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.35)

    for ax, batch in zip(axes[0], batches, strict=False):
        panel(ax, [row for row in one if row["batch"] == batch], "model", f"batch {batch}")
    if many:
        largest = max(many, key=lambda row: row["experts"])["model"]
        rows = [row for row in many if row["model"] == largest]
        panel(axes[0][-1], rows, "ranks", f"{largest}, batch {rows[0]['batch']} over ranks")
        axes[0][-1].set_xlabel("ranks")
    axes[0][0].set_ylabel("ms a token (median; bar to p95)")
    handles = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[0][-1].legend(
        handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9
    )
    figure.suptitle(f"{_title(one)}\n{one[0]['device']}", x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    for suffix in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{suffix}"), dpi=160, bbox_inches="tight")
    plt.close(figure)
    print(f"drawn to {path.with_suffix('.png')}")


def _title(one: list[dict[str, Any]]) -> str:
    moe = [row for row in one if row["candidate"] == "baseline" and row["experts"]]
    if not moe:
        return "Latency of a decoding step"
    most = max(row["experts"] for row in moe)
    ratios = [f"{row['time_over_optimised']:.1f} (batch {row['batch']})" for row in moe if row["experts"] == most]
    return f"With {most} experts a step of the paper's baseline takes {', '.join(ratios)} times as long as the optimised one"
