"""Find layouts: judge all ways to spread a model over a cluster; return the best one, why, and the Pareto front."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import numpy as np

from moelab.config import ModelConfig
from moelab.config.parallel import EXCHANGES, ParallelConfig
from moelab.lazy import pd
from moelab.simulate.decoding import DecodeEstimate, DecodeSweep, decode, decode_sweep
from moelab.simulate.hardware import Cluster, cluster
from moelab.simulate.layouts import Layouts
from moelab.simulate.published import named
from moelab.simulate.systems import System, check_layout, system

Objective = Literal["latency", "throughput", "cost"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@functools.lru_cache(maxsize=32)  # plans of one model and several batches or clusters share them
def layouts(
    model: ModelConfig, gpus: tuple[int, ...], gpus_per_node: int, program: str | System = "deepspeed"
) -> Layouts:
    """Return the layouts of a program on these numbers of GPUs, each on the fewest of them that it fills.

    They have tensor slicing inside a node and, unless the program slices experts over the tensor group, expert
    parallelism and expert slicing over any divisors, and for MoE models all four exchanges. The same degrees and
    exchange on more GPUs are replicas, with the same step and memory, if no fewer ranks of a group share a node.
    """
    code = system(program)
    counts = {e for e in model.experts if e and not code.sliced}
    exchanges = EXCHANGES if counts else EXCHANGES[:1]
    most, ffn = max(counts, default=0), model.expert_feed_forward.ffn if counts else 1
    all_slicing = [w for w in range(1, ffn + 1) if ffn % w == 0]
    all_parallel = [x for x in range(1, most + 1) if not any(e % min(x, e) for e in counts)]
    found: dict[tuple[int | str, ...], ParallelConfig | None] = {}
    for P in sorted(gpus):
        G = min(gpus_per_node, P)
        if P % G:
            continue
        tensor = [d for d in range(1, G + 1) if G % d == 0]
        slicing = [w for w in all_slicing if P % w == 0]
        parallel = [x for x in all_parallel if P % x == 0] if counts else [0]
        for L, W, X in product(tensor, slicing, parallel):
            if any(P % (min(X, e) * W) for e in counts):
                continue
            in_node = [math.gcd(min(X, e) * w, G) for e in counts for w in (1, W)]
            for exchange in exchanges:
                if (key := (exchange, L, W, X, *in_node)) in found:
                    continue
                found[key] = None
                with contextlib.suppress(ValueError):  # the model cannot be distributed so
                    config = ParallelConfig(L, P // L, X, W, gpus_per_node, exchange)
                    check_layout(code, model, config)
                    found[key] = config
    return Layouts([config for config in found.values() if config])


def sizes(most: int, gpus_per_node: int) -> tuple[int, ...]:
    """Return the numbers of GPUs up to `most` that fill nodes: all in a node, and those of whole nodes."""
    G = gpus_per_node
    return (*range(1, min(most, G) + 1), *range(2 * G, most + 1, G))


def least_gpus(
    model: ModelConfig | str,
    on: str | Cluster,
    *,
    program: str | System = "deepspeed",
    batch: int = 8,
    context: int = 2048,
    most: int = 4096,
    dtype: str = "fp16",
) -> tuple[int, ParallelConfig]:
    """Return the fewest GPUs that hold the model and its cache, and a layout that does.

    Args:
        batch, context: the cache is that of `batch` sequences of `context` tokens.

    Raises:
        ValueError: it does not fit `most` GPUs.
    """
    model = named(model)
    where = cluster(on)
    options = layouts(model, sizes(most, where.gpus_per_node), where.gpus_per_node, program)
    sweep = decode_sweep(model, options, where, program=program, batch=batch, context=context, dtype=dtype)
    if not sweep.fits.any():
        raise ValueError(
            f"simulate: {model} does not fit {most} GPUs of {where.name} with {batch} sequences of {context} tokens a "
            "tensor group"
        )
    need = int(options.ranks[sweep.fits].min())
    return need, options.rows[int(np.argmin(np.where(options.ranks == need, sweep.total, np.inf)))]


@dataclass(frozen=True)
class Plan:
    """The outcome of a search.

    Attributes:
        best: the best layout by `objective`; `why` says what bounds it and which layout comes next.
        runner_up: the best layout that is more than 0.05 % worse at every batch; None when there is none.
        ties: number of other layouts as good as the best.
        considered, fitting: how many (layout, batch) pairs were judged, and how many fit the memory.
        front: the Pareto front of latency and throughput per GPU, best latency first.
    """

    objective: str
    best: DecodeEstimate
    runner_up: DecodeEstimate | None
    ties: int
    considered: int
    fitting: int
    front: tuple[DecodeEstimate, ...]

    @property
    def headline(self) -> str:
        """What the Pareto front shows, in one line."""
        fastest, most = self.front[0], self.front[-1]
        return (
            f"{self.best.model} on {self.best.cluster}: {fastest.latency_ms:.1f} ms a token at best, "
            f"{most.tokens_per_s_per_gpu:,.0f} tokens/s/GPU at most, at {most.latency_ms:.0f} ms "
            f"({self.best.system}, simulated)"
        )

    @property
    def why(self) -> list[str]:
        """What bounds the best layout, its memory, and the runner-up, as lines of text."""
        best = self.best
        share = best.parts_ms[best.bound] / best.latency_ms
        lines = [
            f"bound by {BOUND[best.bound]} ({share:.0%} of {best.latency_ms:.2f} ms)",
            f"{best.total_gib:.1f} of {best.capacity_gib:.1f} GiB a GPU: "
            + ", ".join(f"{name} {size:.1f}" for name, size in best.memory_gib.items() if size >= 0.05),
        ]
        if self.runner_up:
            other = self.runner_up
            ratio = score(other, self.objective) / score(best, self.objective)
            if self.objective == "throughput":  # more is better: the score is its inverse
                how = f"{1 - 1 / ratio:.1%} lower throughput"
            else:
                how = f"{ratio - 1:.1%} higher {self.objective}"
            # A step's time, or a GPU's for a token: batches and slices may differ.
            by_step = self.objective == "latency"
            mine, its = (1.0 if by_step else e.parallel.tensor / e.batch for e in (best, other))
            worse = max(other.parts_ms, key=lambda p: its * other.parts_ms[p] - mine * best.parts_ms[p])
            lines.append(
                f"runner-up: {describe(other)}: {other.latency_ms:.2f} ms, "
                f"{other.tokens_per_s_per_gpu:,.1f} tokens/s/GPU; "
                f"{how}, most of it {BOUND[worse]}"
            )
        if self.ties:
            lines.append(f"{self.ties} other layout{'s' if self.ties > 1 else ''} as good")
        lines.append(f"{self.considered:,} layouts and batches judged, {self.fitting:,} fit")
        return lines


BOUND = {
    "attention": "reading attention weights and cache",
    "dense": "reading dense feed-forward weights",
    "gate": "the gate's product",
    "dispatch": "moving tokens into expert order and back",
    "all_to_all": "the all-to-alls",
    "experts": "reading and multiplying experts",
    "all_reduce": "the all-reduces of tensor slicing",
    "head": "the output head",
    "launch": "issuing kernels from the host",
}
"""Part of a step -> what it means when a step is bound by it."""


def score(estimate: DecodeEstimate, objective: str) -> float:
    """Return the number that the search minimises."""
    return {
        "latency": estimate.latency_ms,
        "throughput": 1 / estimate.tokens_per_s_per_gpu,
        "cost": estimate.cost_per_million or 1 / estimate.tokens_per_s_per_gpu,
    }[objective]


def describe(estimate: DecodeEstimate) -> str:
    """Return a layout and batch in one line."""
    p = estimate.parallel
    words = [f"{p.ranks} GPU{'s' if p.ranks > 1 else ''}", f"tensor {p.tensor} x data {p.data}"]
    if p.expert:
        words.append(f"experts over {p.expert}" + (f", {p.expert_slicing} slices each" if p.expert_slicing > 1 else ""))
        words.append(f"{p.exchange} exchange")
    words.append(f"{estimate.batch} sequence{'s' if estimate.batch > 1 else ''} a tensor group")
    return ", ".join(words)


def plan(
    model: ModelConfig | str,
    gpus: int,
    on: str | Cluster = "a100",
    *,
    objective: Objective = "latency",
    program: str | System = "deepspeed",
    batches: Sequence[int] = BATCHES,
    context: int = 2048,
    max_latency_ms: float = 0.0,
    dtype: str = "fp16",
) -> Plan:
    """Return the best way to serve a model on up to `gpus` GPUs.

    Args:
        objective: `latency` of a token, `throughput` per GPU, or `cost` of a token.
        batches: the numbers of sequences of a tensor group to choose from.
        context: tokens of a sequence, for the cache.
        max_latency_ms: the longest latency allowed; 0 is no limit.

    Raises:
        ValueError: nothing fits; the message is one line and says how many GPUs would.
    """
    model = named(model)
    where, code = cluster(on), system(program)
    if objective not in OBJECTIVES:
        raise ValueError(f"plan: objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if gpus < 1 or not batches:
        raise ValueError(f"plan: needs at least one GPU and one batch, got {gpus} and {list(batches)}")
    if not max_latency_ms >= 0:
        raise ValueError(f"plan: max_latency_ms must be 0 (no limit) or more, got {max_latency_ms:g}")
    options = layouts(model, sizes(gpus, where.gpus_per_node), where.gpus_per_node, code)
    settings: dict[str, Any] = {"program": code, "context": context, "dtype": dtype}
    sweeps = {b: decode_sweep(model, options, where, batch=b, **settings) for b in batches}
    latency = _table(sweeps, "latency_ms")
    throughput = _table(sweeps, "tokens_per_s_per_gpu")
    fits = _table(sweeps, "fits")
    good = fits & ((latency <= max_latency_ms) if max_latency_ms > 0 else True)
    if not good.any():
        if fits.any():
            raise ValueError(
                f"plan: no layout of {model} on {gpus} GPUs of {where.name} is faster than "
                f"{np.where(fits, latency, np.inf).min():.1f} ms, asked were {max_latency_ms:g}"
            )
        need, _ = least_gpus(model, where, program=code, batch=min(batches), context=context, dtype=dtype)
        raise ValueError(f"plan: {model} does not fit {gpus} GPUs of {where.name}; it needs {need}")

    main = latency if objective == "latency" else 1 / throughput
    order = _order(options, main, latency, throughput, good)
    n, worth = len(options), main.ravel()
    first = int(order[0])
    equal = worth[order] <= worth[first] * 1.0005
    others = order[~np.isin(order % n, order[equal] % n)]
    other = int(others[0]) if len(others) else None

    def estimate(flat: int) -> DecodeEstimate:
        b, i = divmod(flat, n)
        return decode(model, options.rows[i], where, batch=list(sweeps)[b], **settings)

    return Plan(
        objective=objective,
        best=estimate(first),
        runner_up=None if other is None else estimate(other),
        ties=len(set((order[equal] % n).tolist()) - {first % n}),
        considered=latency.size,
        fitting=int(fits.sum()),
        front=tuple(estimate(f) for f in pareto(latency.ravel(), throughput.ravel(), good.ravel())),
    )


def _order(
    options: Layouts, main: np.ndarray, latency: np.ndarray, throughput: np.ndarray, good: np.ndarray
) -> np.ndarray:
    """Return the flat indices of the good ones of [batches, layouts], best first.

    By `main`, the objective; among equals by latency, throughput, fewer GPUs, and the simpler exchange.
    """
    exchange = 2 * options.coordinated + options.hierarchical  # the index in `EXCHANGES`
    keys = np.broadcast_arrays(exchange, options.ranks, 1 / throughput, latency, np.where(good, main, np.inf))
    return np.lexsort([key.ravel() for key in keys])[: int(good.sum())]


def best(
    model: ModelConfig | str, gpus: int, on: str | Cluster, *, batch: int, program: str = "deepspeed", **settings: Any
) -> dict[Objective, DecodeEstimate]:
    """Return the best layout by latency and by cost, as `plan` does, in a quarter of its time; empty if nothing fits.

    Args:
        batch: sequences of a tensor group.
        settings: context and dtype, as of `plan`.
    """
    model, where, code = named(model), cluster(on), system(program)
    options = layouts(model, sizes(gpus, where.gpus_per_node), where.gpus_per_node, code)
    sweep = decode_sweep(model, options, where, program=code, batch=batch, **settings)
    if not sweep.fits.any():
        return {}
    latency, throughput, found = sweep.latency_ms, sweep.tokens_per_s_per_gpu, {}
    mains: dict[Objective, np.ndarray] = {"latency": latency, "cost": 1 / throughput}
    for objective, main in mains.items():
        layout = options.rows[int(_order(options, main, latency, throughput, sweep.fits)[0])]
        found[objective] = decode(model, layout, where, batch=batch, program=code, **settings)
    return found


def pareto(latency: np.ndarray, throughput: np.ndarray, allowed: np.ndarray) -> list[int]:
    """Return the allowed indices that no other one beats in both (latency and throughput), by rising latency."""
    front, best = [], -np.inf
    for i in np.lexsort((-throughput, latency)):
        if allowed[i] and throughput[i] > best * (1 + 1e-9):
            front.append(int(i))
            best = throughput[i]
    return front


def frame(estimates: Sequence[DecodeEstimate]) -> pd.DataFrame:
    """Return estimates as a table, a row per estimate."""
    return pd.DataFrame(
        [
            {
                "layout": describe(e),
                "gpus": e.parallel.ranks,
                "tensor": e.parallel.tensor,
                "batch": e.batch,
                "latency_ms": e.latency_ms,
                "tokens_per_s_per_gpu": e.tokens_per_s_per_gpu,
                "cost_per_million": e.cost_per_million,
                "gib_per_gpu": e.total_gib,
                "bound": e.bound,
            }
            for e in estimates
        ]
    )


def _table(sweeps: dict[int, DecodeSweep], field: str) -> np.ndarray:
    """Return a field of the sweeps as an array [batches, layouts]."""
    return np.stack([getattr(sweep, field) for sweep in sweeps.values()])
