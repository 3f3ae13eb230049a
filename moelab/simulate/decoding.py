"""One decoding step on a cluster: latency with its breakdown, memory, throughput, cost.

A step makes one token for each sequence. It is a chain of kernels. On the device each takes the longest of

    `Constants.kernel_us`            no kernel is shorter
    bytes of weights / bandwidth     memory: each step reads all parameters on the tokens' path (section 5.1)
    operations / rate                compute
    alpha-beta time                  if it is a collective (`moelab.simulate.exchange`)

and on the host `Constants.eager_us` to issue, unless a CUDA graph is replayed. Host and device run side by side and
wait for each other where the program makes them (`moelab.simulate.clocks`); the step ends when the device has ended.
`System` gives kernel counts and waits. Where slots are padded (both systems of the paper), a rank reads all its
experts. Elsewhere it reads the expected number of distinct experts that T tokens choose, E (1 - (1 - K/E)^T), plus the
spread of the busiest of X ranks.

The formulas work on arrays of layouts; `decode` computes a single one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moelab.config import DTYPE_BYTES, FeedForward, ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.simulate import constants as _constants
from moelab.simulate.attention import cache_slices, cached_numbers, output_weights, pair_flops
from moelab.simulate.clocks import WAIT, Span, kernels
from moelab.simulate.constants import Constants
from moelab.simulate.exchange import (
    Stage,
    all_reduce_us,
    all_to_all,
    rows_to_send,
    share_gather,
    slice_exchange,
    transfer_us,
)
from moelab.simulate.hardware import Cluster, cluster
from moelab.simulate.layouts import Array, Layouts
from moelab.simulate.memory import inference_memory
from moelab.simulate.published import named
from moelab.simulate.systems import System, check_layout, check_nodes, slots, system

WEIGHT_BYTES = {**DTYPE_BYTES, "fp8": 1, "int8": 1}
"""Bytes of a weight. With fp8, weights and products have 8 bits and products twice the rate; with int8, weights alone.
All else has 16."""

PARTS = ("attention", "dense", "gate", "dispatch", "all_to_all", "experts", "all_reduce", "head", "launch")
"""The parts of a step, whose times add up to the latency.

They are device times (dense includes residual MLPs, dispatch both layout transforms), and, as launch, the time in which
the device is idle because the host has not issued the next kernel."""


@dataclass(frozen=True)
class DecodeSweep:
    """n decoding steps, one per layout; arrays of n.

    Attributes:
        latency_ms: time of a step, which is the time of a token of every sequence.
        parts_ms: part -> device time, see `PARTS`.
        tokens_per_s_per_gpu: sequences of all replicas / step time / GPUs.
        cost_per_million: price of a million tokens at the cluster's price of a GPU.
        memory: bytes per GPU, by use, see `inference_memory`.
        total: their sum.
        fits: whether it fits the GPU.
    """

    latency_ms: Array
    parts_ms: dict[str, Array]
    tokens_per_s_per_gpu: Array
    cost_per_million: Array
    memory: dict[str, Array]
    total: Array
    fits: Array


@dataclass(frozen=True)
class DecodeEstimate:
    """One decoding step; see `DecodeSweep`. `currency` is that of the cost, empty where it is not known."""

    model: str
    system: str
    cluster: str
    parallel: ParallelConfig
    batch: int
    latency_ms: float
    parts_ms: dict[str, float]
    tokens_per_s_per_gpu: float
    cost_per_million: float
    memory_gib: dict[str, float]
    total_gib: float
    capacity_gib: float
    fits: bool
    currency: str = ""

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts_ms, key=self.parts_ms.__getitem__)


class _Program:
    """Kernels in the order in which they are issued: device time by part, and their effect on the two clocks."""

    def __init__(self, issue_us: float, kernel_us: float) -> None:
        self.issue, self.least = issue_us, kernel_us
        self.parts: dict[str, Array | float] = {}
        self.span = Span()

    def kernels(self, part: str, count: Array | float, each_us: Array | float = 0.0) -> None:
        """Add `count` kernels of `each_us` device time each."""
        each = np.maximum(each_us, self.least)
        self.parts[part] = self.parts.get(part, 0.0) + count * each
        self.span = self.span.then(kernels(count, self.issue, each))

    def wait(self) -> None:
        """Let the host wait for the device."""
        self.span = self.span.then(WAIT)

    def run(self, other: _Program) -> None:
        """Add all kernels of another program."""
        for part, us in other.parts.items():
            self.parts[part] = self.parts.get(part, 0.0) + us
        self.span = self.span.then(other.span)


def distinct_experts(experts: Array | float, tokens: Array | float, top_k: int = 1) -> Array:
    """Return how many experts are hit on average by `tokens` tokens that each choose `top_k` different ones evenly.

    A token misses an expert with probability 1 - K / E, so T tokens hit E (1 - (1 - K/E)^T) of E experts.
    """
    with np.errstate(divide="ignore"):  # a token that chooses all experts misses none
        return experts * -np.expm1(tokens * np.log1p(-top_k / np.asarray(experts, dtype=float)))


def busiest_distinct(experts: int, ranks: Array, tokens: Array, top_k: int = 1) -> Array:
    """Return how many distinct experts the rank reads that reads most: mean + sqrt(2 ln X) standard deviations.

    The result is at most the number of experts that a rank has. The slots of a rank are taken as independent, so the
    count is binomial; sqrt(2 ln X) is the leading term of the expected maximum of X normal variables.
    """
    own = experts / ranks
    hit = distinct_experts(experts, tokens, top_k) / experts
    spread = np.sqrt(own * hit * (1 - hit) * 2 * np.log(ranks))
    return np.minimum(own * hit + spread, np.minimum(own, tokens * top_k))


def decode_sweep(
    model: ModelConfig,
    layouts: Layouts,
    on: str | Cluster,
    *,
    program: str | System = "deepspeed",
    batch: int = 8,
    context: int = 128,
    dtype: str = "fp16",
    imbalance: float = 1.0,
    constants: Constants | None = None,
) -> DecodeSweep:
    """Return a decoding step in every layout.

    Args:
        on: the cluster.
        program: see `System`; the exchange is that of the layout.
        batch: sequences of one tensor group. The paper's runs have 8.
        context: tokens already in the cache. The paper does not state its prompt and output lengths; at 128 tokens the
            cache hardly matters.
        imbalance: tokens of the busiest rank over an even share; matters to systems without slots.
        constants: by default the fitted ones.
    """
    where, code = cluster(on), system(program)
    _check(code.only != "training", f"system {code.name} is for training alone")
    _check(batch >= 1 and context >= 1, f"batch and context must be at least 1, got {batch} and {context}")
    _check(1 <= imbalance < np.inf, f"imbalance must be at least 1 (even) and finite, got {imbalance}")
    _check(dtype in WEIGHT_BYTES, f"dtype must be one of {', '.join(WEIGHT_BYTES)}, got {dtype!r}")
    _check(dtype != "fp8" or where.gpu.fp8, f"{where.gpu.name} has no fp8; int8 has weights of the same size")
    known = constants or (_constants.modern() if code.modern else _constants.fitted())
    weight = WEIGHT_BYTES[dtype]
    width = max(weight, 2)
    M, L = model.hidden, layouts.tensor
    bandwidth = where.gpu.memory_gb_s * known.memory_share
    plain = where.gpu.tflops * known.matmul_share * 1e6  # operations per microsecond
    rate = plain * {"fp32": 0.5, "fp8": 2.0}.get(dtype, 1.0)
    issue = 0.0 if code.graph else known.eager_us

    def product(rows: Array | float, weights: Array | float) -> Array:
        """Microseconds of rows x (a matrix of `weights` numbers)."""
        return known.product_us + np.maximum(transfer_us(weights * weight, bandwidth), 2 * rows * weights / rate)

    def sum_over_tensor(program: _Program) -> None:
        program.kernels("all_reduce", L > 1, all_reduce_us(L, batch * M * width, where, known))

    def attention(program: _Program) -> None:
        outer = output_weights(model)
        program.kernels("attention", 1, product(batch, (model.attention_weights - outer) / L))
        if model.decoder.qk_norm == "all":  # the slices' mean squares of queries and keys, in fp32
            program.kernels("all_reduce", L > 1, all_reduce_us(L, batch * 2 * 4, where, known))
        pairs = batch * context
        read = transfer_us(pairs * cached_numbers(model) * width / cache_slices(model, L), bandwidth)
        program.kernels("attention", 1, np.maximum(read, pairs * pair_flops(model, decoding=True) / L / plain))
        program.kernels("attention", code.attention - 1)
        program.kernels("attention", 1, product(batch, outer / L))
        sum_over_tensor(program)

    def feed_forward(program: _Program, shape: FeedForward, small: int) -> None:
        program.kernels("dense", 2, product(batch, shape.weights / 2 / L))  # the mean of both
        program.kernels("dense", small)
        sum_over_tensor(program)

    def grouped(program: _Program, read: Array | float, rows: Array | float, weights: Array | float) -> None:
        """Both products of `rows` rows with the experts that are read, each of `weights` numbers."""
        us = np.maximum(transfer_us(read * weights * weight, bandwidth), 2 * rows * weights / rate)
        program.kernels("experts", 2, known.product_us + us)
        program.kernels("experts", code.expert + code.once)

    def experts_layer(program: _Program, experts: int) -> None:
        spread = layouts.experts(experts)
        C = slots(code, model, batch, experts)
        sent = rows_to_send(spread, np.full(len(layouts), batch), model.top_k, C)
        if model.fixed_feed_forward is not None:
            feed_forward(program, model.fixed_feed_forward, code.residual)
        program.kernels("gate", 1, product(batch, M * experts))
        program.kernels("gate", code.gate_wait)
        if code.gate_wait:
            program.wait()
        program.kernels("gate", code.gate - code.gate_wait)
        if code.sliced:
            rows = batch * model.top_k
            program.kernels("dispatch", code.dispatch + code.combine, transfer_us(rows * M * width, bandwidth))
            grouped(
                program, distinct_experts(experts, batch, model.top_k), rows, model.expert_feed_forward.weights / 2 / L
            )
            sum_over_tensor(program)
            return

        moved = transfer_us(2 * sent * M * width, bandwidth)
        program.kernels("dispatch", 1, moved)
        program.kernels("dispatch", code.dispatch - 1)
        there = all_to_all(layouts, spread, sent, where.gpus_per_node)
        staged = there[0].happens & there[1].happens
        over_slices = slice_exchange(layouts, spread, sent, where.gpus_per_node)

        def exchange(stages: Sequence[Stage], bytes_of_a_number: float) -> None:
            for stage in stages:
                program.kernels("all_to_all", stage.happens, stage.microseconds(M * bytes_of_a_number, where, known))
                program.kernels("dispatch", code.transform * staged, moved)

        def slices() -> None:
            us = over_slices.microseconds(M * width, where, known)
            program.kernels("all_to_all", over_slices.happens, us)

        exchange(there, weight if dtype == "fp8" else width)
        slices()
        own = spread.experts / spread.parallel
        arriving = sent * spread.slices / own * (1.0 if C else imbalance)  # rows that an expert of this rank multiplies
        weights = model.expert_feed_forward.weights / 2 / spread.slices  # of each of the two products, in the mean
        if C:
            read = own
        else:
            groups = np.maximum(spread.parallel * spread.slices / L, 1.0)  # tensor groups whose tokens meet here
            read = busiest_distinct(experts, spread.parallel, batch * groups, model.top_k)
        if code.grouped:
            grouped(program, read, arriving * own, weights)
        else:  # one expert after the other: its products and its small kernels alternate, so all get the mean
            mean = (2 * product(arriving, weights) + code.expert * known.kernel_us) / (2 + code.expert)
            program.kernels("experts", read * (2 + code.expert), mean)
            program.kernels("experts", code.once)
        slices()
        exchange(there[::-1], width)
        gather = share_gather(spread, sent)
        program.kernels("all_to_all", gather.happens, gather.microseconds(M * width, where, known))
        program.kernels("dispatch", 1, moved)
        program.kernels("dispatch", code.combine - 1)

    layer: dict[int, _Program] = {}
    for experts in dict.fromkeys(model.experts or (0,) * model.layers):
        one = layer[experts] = _Program(issue, known.kernel_us)
        attention(one)
        if code.layer_waits:
            one.wait()
        if experts:
            experts_layer(one, experts)
        else:
            feed_forward(one, model.dense_feed_forward, code.dense)

    step = _Program(issue, known.kernel_us)
    for experts in model.experts or (0,) * model.layers:
        step.run(layer[experts])
    step.kernels("head", 1, product(batch, model.vocab * M / L))
    step.kernels("head", code.step)

    latency = np.broadcast_to(step.span.ends + known.step_us * code.scheduler, len(layouts)) / 1e3
    parts = {part: np.broadcast_to(step.parts.get(part, 0.0), len(layouts)) / 1e3 for part in PARTS}
    parts["launch"] = np.maximum(latency - sum(parts.values()), 0.0)
    throughput = batch / L / latency * 1e3
    memory = inference_memory(
        model, layouts, code, batch=batch, context=context, width=width, weight=weight, constants=known
    )
    total = np.sum(list(memory.values()), axis=0)
    return DecodeSweep(
        latency_ms=latency,
        parts_ms=parts,
        tokens_per_s_per_gpu=throughput,
        cost_per_million=where.price_per_gpu_hour / 3600 / throughput * 1e6,
        memory=memory,
        total=total,
        fits=total <= where.gpu.memory_gib * 2**30,
    )


def decode(model: ModelConfig | str, parallel: ParallelConfig, on: str | Cluster, **options: Any) -> DecodeEstimate:
    """Return `decode_sweep` of one layout, as plain numbers; `options` are the sweep's.

    Raises:
        ValueError: the model cannot be spread so, or an option is wrong; the message is one line.
    """
    model = named(model)
    where, code = cluster(on), system(options.get("program", "deepspeed"))
    check_layout(code, model, parallel)
    check_nodes(where, model, parallel)
    sweep = decode_sweep(model, Layouts([parallel]), where, **options)
    return DecodeEstimate(
        model=str(model),
        system=code.name,
        cluster=where.name,
        parallel=parallel,
        batch=options.get("batch", 8),
        latency_ms=float(sweep.latency_ms[0]),
        parts_ms={part: float(ms[0]) for part, ms in sweep.parts_ms.items()},
        tokens_per_s_per_gpu=float(sweep.tokens_per_s_per_gpu[0]),
        cost_per_million=float(sweep.cost_per_million[0]),
        memory_gib={name: float(size[0]) / 2**30 for name, size in sweep.memory.items()},
        total_gib=float(sweep.total[0]) / 2**30,
        capacity_gib=where.gpu.memory_gib,
        fits=bool(sweep.fits[0]),
        currency=where.currency,
    )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"simulate: {message}")
