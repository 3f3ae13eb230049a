"""`moelab bench decode`: what a token costs: our modes, the paper's baseline among them, and others, side by side.

Random weights; in each round a batch of new prompts, `prompt` tokens of text each, the same for all candidates, which
take turns and generate `output` tokens for every prompt, greedily; one round warms up. The first token's time is that
of the prompts (prefill); all later steps are the sample: latency is a step's time, which gives each sequence of the
batch one token. The breakdown comes from a further generation under a clock, so its sum is a little more than the
latency; on CUDA it is of the same step without its graph. There the simulator's step stands beside the measured one.

The floor is what the machine must do at least: read the weights that a step needs (of the experts, those that got
tokens, counted) and the cache, once, at the bandwidth measured in the same rounds (the median), or compute their
products at the rate of large ones, whichever takes longer for the shared weights and for the experts. On ranks it is
the reading, plus the step's collectives times the time of an empty one. A model that fits the processor's cache can be
faster than that.

Ranks are processes of this machine, or, under torchrun and srun, those that were started: then each model is measured
on all of them.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moelab import machine, simulate, terminal
from moelab.bench import harness, inputs, llama, peers
from moelab.bench.decode_steps import (
    DecodeSettings,
    Rates,
    breakdown,
    cache_bytes,
    decode_rows,
    filled,
    least_seconds,
    our_turns,
    round_prompts,
    weight_bytes,
)
from moelab.bench.decoders import Turns, decoders
from moelab.bench.harness import Row, Timing, reader
from moelab.config import ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.engine import parallel as engine
from moelab.engine.checkpoint import hf
from moelab.engine.collectives import all_gather_json
from moelab.engine.launch import process
from moelab.engine.mesh import Mesh
from moelab.engine.testing import Ranks
from moelab.inference.generate import Generator
from moelab.inference.modes import MODES, set_mode
from moelab.models import GPT
from moelab.plotting import benchmarks


def named(name: str) -> ModelConfig:
    """Return the model of a paper name, or that in a directory, whose weights are not used."""
    if not (Path(name) / "config.json").is_file():
        return ModelConfig.parse(name)
    return replace(hf.read_config(Path(name)), name=Path(name).name)


def measure(config: ModelConfig, batches: list[int], settings: DecodeSettings) -> list[Row]:
    """Return the rows of one model in one process: our modes and, where installed, others, at every batch."""
    reference = filled(config, settings.device, settings.torch_dtype)
    others = peers.generators(reference, settings.prompt + settings.output)
    with llama.beside(reference, round_prompts(config, 2, settings)(0), settings.output) as further:
        return _measure(reference, {**others, **further}, batches, settings)


def _measure(
    reference: GPT, others: Mapping[str, peers.Peer | llama.Peer], batches: list[int], settings: DecodeSettings
) -> list[Row]:
    """Return the rows of `measure`; `reference` is switched to the optimised mode."""
    config, timing = reference.config, settings.timing
    read, products = reader(timing), harness.product_rate(settings.torch_dtype, timing)
    models = {
        "baseline": set_mode(filled(config, settings.device, settings.torch_dtype), "baseline"),
        "optimised": set_mode(reference, "optimised"),
    }
    turns: dict[int, dict[str, list[Turns]]] = {}
    rates: dict[int, Rates] = {}
    for batch in batches:
        length = settings.prompt + settings.output  # a static cache is read as long as it is
        ours = {name: Generator(model, batch=batch, length=length) for name, model in models.items()}
        candidates: dict[str, Callable[[Any], Any]] = {
            name: functools.partial(our_turns, generator, tokens=settings.output) for name, generator in ours.items()
        }
        candidates |= {name: functools.partial(p.turns, tokens=settings.output) for name, p in others.items()}
        candidates["reading"] = lambda _: [read()]
        new_prompts = round_prompts(config, batch, settings)
        turns[batch] = harness.in_turns(candidates, new_prompts, timing, lambda call, given: call(given), others.keys())
        rates[batch] = Rates(statistics.median(rate for [rate] in turns[batch].pop("reading")), products)
    measured = []
    for batch in batches:  # last, as the clock slows the models down
        prompts = round_prompts(config, batch, settings)(timing.warm_up + timing.rounds)
        numbers = {
            name: breakdown(Generator(model, batch=batch, length=length, capture=False), prompts, settings)
            for name, model in models.items()
        }
        if settings.device == "cuda":
            for name in models:
                numbers[name] |= simulated(config, name, batch, settings, harness.device_name("cuda"))
        numbers |= {name: others[name].about for name in others.keys() & turns[batch].keys()}
        distinct = numbers["optimised"]["distinct_experts"] or 0
        floor_s = least_seconds(config, distinct, batch, settings, rates[batch])
        case = {"model": str(config), "experts": max(config.experts), "batch": batch, "ranks": 1}
        case |= {"dtype": settings.dtype, "parameters": config.parameters(), "read_GB_per_s": rates[batch].read / 1e9}
        case["product_GFLOP_per_s"] = products / 1e9
        measured += decode_rows(case, turns[batch], numbers, floor_s, settings)
    return measured


def simulated(config: ModelConfig, mode: str, batch: int, settings: DecodeSettings, card: str) -> dict[str, float]:
    """Return, as "simulated_ms", what the simulator says of a mode's step on one GPU, whose data sheet it has.

    Args:
        card: the GPU's name; for others than those of `simulate.clusters`, and in fp32, the result is empty.
    """
    where = simulate.cluster_of_card(card)
    if where is None or settings.dtype != "bf16":
        return {}
    # The baseline is replayed from a graph as well, so that its gate does not wait for the host.
    replayed = replace(simulate.system("pytorch"), graph=True, layer_waits=False, gate_wait=0)
    program = replayed if mode == "baseline" else simulate.system("moelab")
    options = {"program": program, "batch": batch, "context": settings.prompt + settings.output // 2, "dtype": "bf16"}
    return {"simulated_ms": simulate.decode(config, ParallelConfig(), where, **options).latency_ms}


# -- ranks -----------------------------------------------------------------------------------------------------------


def measure_rank(config: ModelConfig, parallel: ParallelConfig, batch: int, settings: DecodeSettings) -> dict[str, Any]:
    """Return, on each rank, the turns of each mode and what was measured beside them; `batch` is over all ranks."""
    mesh, timing, cuda = Mesh(parallel, config.experts, settings.device), settings.timing, settings.device == "cuda"
    models: dict[str, GPT] = {}
    for mode in MODES:
        # On CUDA no mode packs the weights, and both share one copy: two of a large model may not fit.
        there = models.get(MODES[0]) if cuda else None
        models[mode] = there or set_mode(engine.build(config, 0, mesh, settings.torch_dtype).module, mode)
    generators = {mode: Generator(m, batch=-(-batch // mesh.data.size), mesh=mesh) for mode, m in models.items()}

    def switched(mode: str) -> Generator:
        if cuda:
            set_mode(models[mode], mode)
        return generators[mode]

    def turn(mode: str, given: list[list[int]]) -> Turns:
        return our_turns(switched(mode), given, settings.output)

    new_prompts = round_prompts(config, batch, settings)
    candidates = {mode: functools.partial(turn, mode) for mode in MODES}
    turns = harness.in_turns(candidates, new_prompts, timing, lambda call, given: call(given))
    shared = {
        "empty_collective_ms": empty_collective(mesh, timing) * 1e3,
        "read_GB_per_s": reader(timing)() / 1e9,
    }
    prompts = new_prompts(timing.warm_up + timing.rounds)
    numbers = {mode: {**breakdown(switched(mode), prompts, settings), **shared} for mode in MODES}
    return {"turns": turns, "numbers": numbers}


def empty_collective(mesh: Mesh, timing: Timing) -> float:
    """Return the seconds of an all-to-all of one number a rank, median of 50; 0 for one rank."""
    if mesh.world.size == 1:
        return 0.0
    x = torch.zeros(mesh.world.size, dtype=torch.int32, device=mesh.device)
    out = torch.empty_like(x)
    return statistics.median(
        timing.seconds(lambda _: dist.all_to_all_single(out, x, group=mesh.world.handle), None) for _ in range(50)
    )


def measure_ranks(config: ModelConfig, ranks: list[int], batch: int, settings: DecodeSettings) -> list[Row]:
    """Return the rows of one model over ranks of this machine's CPU; its experts are spread over all of them."""
    inputs.text()  # once, before the ranks ask for it
    settings, measured = replace(settings, device="cpu"), []
    for size in ranks:
        parallel = ParallelConfig(data=size)
        with Ranks(size, threads=1) as pool:
            answers = pool.run(measure_rank, config, parallel, batch, settings, timeout_s=900)
        measured += slowest(answers, config, parallel, batch, settings, f"{machine.cpu()}, {size} ranks of 1 thread")
    return measured


def slowest(
    answers: Sequence[dict[str, Any]],
    config: ModelConfig,
    parallel: ParallelConfig,
    batch: int,
    settings: DecodeSettings,
    name: str,
) -> list[Row]:
    """Return the rows of what the ranks measured: of each mode the slowest rank's times, with the floor."""
    turns, numbers, floors = {}, {}, {}
    # A layer's experts on the ranks of a tensor group, which hold the same tokens.
    held = parallel.tensor * statistics.mean([parallel.experts(e).experts_per_rank for e in config.experts if e] or [0])
    for mode in MODES:
        last = max(answers, key=lambda a: statistics.median(t for times in a["turns"][mode] for t in times[1:]))
        turns[mode], numbers[mode] = last["turns"][mode], last["numbers"][mode]
        # Each rank reads the shared weights and, on average, its share of the chosen experts, at most those it has.
        share = statistics.mean(a["numbers"][mode]["distinct_experts"] or 0 for a in answers)
        needed = weight_bytes(config, min(share, held), settings.torch_dtype.itemsize)
        needed += cache_bytes(config, -(-batch // parallel.data), settings)
        needed /= parallel.tensor
        waiting_s = numbers[mode]["collectives"] * numbers[mode]["empty_collective_ms"] / 1e3
        floors[mode] = needed / (numbers[mode]["read_GB_per_s"] * 1e9) + waiting_s
    case = {"model": str(config), "experts": max(config.experts), "batch": batch, "ranks": parallel.ranks}
    case |= {"dtype": settings.dtype, "parameters": config.parameters()}
    case |= {"exchange": parallel.exchange, "tensor": parallel.tensor}
    return decode_rows(case, turns, numbers, floors, settings, name)


# -- the command -----------------------------------------------------------------------------------------------------


def main(
    *,
    models: list[str] | None,
    batches: list[int],
    ranks: list[int],
    rank_batch: int,
    settings: DecodeSettings,
    threads: int,
    out: Path | None,
    tensor: int = 1,
    exchange: str = "flat",
) -> None:
    """Measure, print and, with `out` (a folder), write `decode.jsonl` and its figure (bf16: `decode-bf16`).

    Args:
        models: names of `decoders` or as `named` takes them; None is all of `decoders`.
        ranks: numbers of ranks for the models with experts; empty leaves that part out.
        rank_batch: sequences over all ranks there.
        tensor, exchange: the layout where torchrun or srun started the ranks; otherwise it is flat and data parallel.
    """
    known = decoders()
    configs = [known[name] if name in known else named(name) for name in models or known]
    for config in configs:
        if settings.prompt + settings.output > config.context:
            raise ValueError(
                f"bench decode: prompt {settings.prompt} and output {settings.output} exceed the context of {config} "
                f"({config.context})"
            )
    if threads < 1:
        raise ValueError(f"bench decode: threads must be at least 1, got {threads}")
    if min(batches) < 1:
        raise ValueError(f"bench decode: batch must be at least 1, got {min(batches)}")
    place = process.find()
    joined = place if place is not None and place.world_size > 1 else None
    stem = "decode" if settings.dtype == "fp32" else f"decode-{settings.dtype}"
    torch.set_num_threads(threads)
    if joined:
        _on_ranks(configs, joined, tensor, exchange, rank_batch, settings, out and out / f"{stem}.jsonl")
        return
    if ranks and rank_batch < max(ranks):
        raise ValueError(f"bench decode: {rank_batch} sequences do not give each of {max(ranks)} ranks one")
    if tensor != 1 or exchange != "flat":
        raise ValueError("bench decode: --tensor and --exchange need several ranks; start with torchrun or srun")
    for config in configs:  # before the first is measured
        for size in ranks if config.is_moe else ():
            config.check_layout(ParallelConfig(data=size))
    measured: list[Row] = []
    many = f"batches {', '.join(map(str, batches))}"
    for config in terminal.announced(configs, lambda config: f"decoding with {config}, {many}{_ranks(config, ranks)}"):
        case = measure(config, batches, settings)
        if config.is_moe and ranks:
            case += measure_ranks(config, ranks, rank_batch, settings)
        show(case)
        measured += case
        if out is not None:  # after each model: what was measured is kept
            objects = harness.write(measured, out / f"{stem}.jsonl")
    if out is not None and benchmarks.possible():
        draw(objects, out / stem)


def _ranks(config: ModelConfig, ranks: list[int]) -> str:
    return f", then on {', '.join(map(str, ranks))} ranks" if config.is_moe and ranks else ""


def _on_ranks(
    configs: list[ModelConfig],
    place: process.Place,
    tensor: int,
    exchange: str,
    batch: int,
    settings: DecodeSettings,
    file: Path | None,
) -> None:
    if tensor < 1 or place.world_size % tensor:
        raise ValueError(f"bench decode: --tensor {tensor} does not divide {place.world_size} ranks")
    parallel = ParallelConfig(tensor=tensor, data=place.world_size // tensor, exchange=exchange)  # type: ignore[arg-type]  # the class checks it
    if batch < parallel.data:
        raise ValueError(f"bench decode: {batch} sequences do not give each of {parallel.data} data ranks one")
    process.join(device=settings.device)
    parallel = replace(parallel, gpus_per_node=all_gather_json(place.host).count(place.host))
    for config in configs:
        config.check_layout(parallel)
    measured: list[Row] = []
    name = harness.device_name("cuda") if settings.device == "cuda" else machine.cpu()
    for config in configs:
        answers = all_gather_json(measure_rank(config, parallel, batch, settings))
        case = slowest(answers, config, parallel, batch, settings, f"{name}, {parallel.ranks} ranks")
        measured += case
        if place.rank == 0:
            show(case)
            if file is not None:
                harness.write(measured, file)
    process.leave()


COLUMNS: dict[str, Callable[[Row], str]] = {
    "p95 ms": lambda row: f"{row.numbers['p95_ms']:.2f}",
    "tokens/s": lambda row: f"{row.numbers['tokens_per_s']:,.0f}",
    "simulated ms": lambda row: f"{row.numbers['simulated_ms']:.2f}" if "simulated_ms" in row.numbers else "",
    "where (ms)": lambda row: ", ".join(
        f"{name} {ms:.2f}"
        for name, ms in sorted(row.numbers.get("parts_ms", {}).items(), key=lambda item: -item[1])
        if ms >= 0.005
    ),
}


def show(measured: Sequence[Row]) -> None:
    """Print rows, a table for each batch and number of ranks."""
    cases = {(row.case["batch"], row.device): row.case for row in measured}
    for (batch, device), case in cases.items():
        rows = [row for row in measured if (row.case["batch"], row.device) == (batch, device)]
        title = f"decoding, {case['model']}, {case['dtype']}, batch {batch}, ranks {case['ranks']}"
        harness.show(title, rows, COLUMNS)


def draw(measured: list[dict[str, Any]], path: Path) -> None:
    """Draw latency by model and batch in one process, and by ranks where they were measured; `path` without suffix."""
    many = [{**row, "across": "ranks"} for row in measured if "empty_collective_ms" in row]
    one = [row for row in measured if "empty_collective_ms" not in row]
    panels = [(f"batch {b}", [r for r in one if r["batch"] == b]) for b in sorted({r["batch"] for r in one})]
    if many:
        largest = max(many, key=lambda row: row["experts"])["model"]
        rows = [row for row in many if row["model"] == largest]
        panels.append((f"{largest}, batch {rows[0]['batch']} over ranks", rows))
    ylabel = "ms a token (median; bar to p95)"
    benchmarks.save(
        benchmarks.times(one, title=headline(one), x="model", panels=panels, ylabel=ylabel, high="p95_ms"), path
    )


def headline(one: Sequence[Mapping[str, Any]]) -> str:
    """Return what the rows of one process show, one line."""
    moe = [row for row in one if row["candidate"] == "baseline" and row["experts"]]
    if not moe:
        return "Latency of a decoding step"
    most = max(row["experts"] for row in moe)
    rows = [row for row in moe if row["experts"] == most]
    ratios = sorted(row["ratio"] for row in rows)
    span = " to ".join(dict.fromkeys(f"{ratio:.1f}" for ratio in (ratios[0], ratios[-1])))
    return f"With {most} experts the baseline takes {span} times the optimised step"
