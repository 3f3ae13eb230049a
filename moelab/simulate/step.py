"""One training step on a cluster: time with its breakdown, memory, samples per second, days for N tokens.

Nothing here is fitted: times follow from data-sheet rates and the fixed shares of `Constants`. A step is, for each
micro-batch, a forward pass, a backward pass (twice the forward) and, with recomputation, one more forward pass; then
gradients are summed and the optimizer runs. A pass has these parts in each layer:

    products      FLOPs / (rate x matmul_share); experts multiply all their slots (capacity), full or empty
    einsums       the one-hot dispatch and combine of the PyTorch system: 2 S E C M FLOPs each (section 5.4), which grow
                  with S^2
    elementwise   the s b h (34 + 5 a s / h) bytes of activations that a layer keeps (Korthikanti et al. 2022, eq. 1),
                  written once and read once
    all_reduce    two of S M numbers over the tensor group; as many backward (Shoeybi et al. 2019, the conjugate
                  operators f and g)
    all_to_all    two in an MoE layer, of its slots (`moelab.simulate.exchange`); as many backward

The host runs ahead of the device at these sizes: a micro-batch takes the larger of the device time and the time to
issue its kernels.

Programs of today (`System.modern`) differ in four ways. Fused attention keeps no scores. A token goes once to each node
that has some of its experts (`moelab.simulate.traffic.grouped`). With `overlap`, exchanges hide behind the products of
another micro-batch, and gradients behind the time of the backward pass in which the links are free, as far as these
last. Layers may be divided over `pipeline` stages: p stages of v chunks idle for (p - 1) / v micro-batches a step
(Narayanan et al. 2021, arXiv 2104.04473, 2.2).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from moelab.config import ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.simulate import constants as _constants
from moelab.simulate.attention import pair_flops
from moelab.simulate.constants import Constants
from moelab.simulate.exchange import all_reduce_us, all_to_all, rows_to_send, share_gather, slice_exchange, transfer_us
from moelab.simulate.hardware import Cluster, cluster
from moelab.simulate.layouts import Columns, Layouts
from moelab.simulate.memory import rank_parameters
from moelab.simulate.published import named
from moelab.simulate.systems import System, check_nodes, system
from moelab.simulate.traffic import grouped

PARTS = ("products", "einsums", "elementwise", "all_reduce", "all_to_all", "launch", "gradients", "optimizer")
COLLECTIVES = ("all_reduce", "all_to_all")
STATE_BYTES = {"weights": 2, "gradients": 2, "optimizer": 12}
"""Bytes per parameter in mixed precision with Adam (Rajbhandari et al. 2020).

fp16 weight and gradient; fp32 weight and two moments."""


@dataclass(frozen=True)
class TrainingEstimate:
    """The estimate of one layout of one model.

    Attributes:
        step_s, samples_per_s, tokens_per_s: of the whole cluster; a sample is a sequence of `context` tokens.
        tflops_per_gpu: model operations per second and GPU, 1e12: 6 x active parameters x tokens, as Table 3's derived
            column.
        parts_s: part of a step -> seconds; they add up to `step_s`. See `PARTS`.
        memory_gib: GPU memory by use.
    """

    model: str
    system: str
    cluster: str
    parallel: ParallelConfig
    batch: int
    micro_batch: int
    step_s: float
    samples_per_s: float
    tokens_per_s: float
    tflops_per_gpu: float
    parts_s: dict[str, float]
    memory_gib: dict[str, float]
    capacity_gib: float

    @property
    def total_gib(self) -> float:
        """Memory of a GPU, GiB."""
        return sum(self.memory_gib.values())

    @property
    def fits(self) -> bool:
        """Whether the memory fits the GPU."""
        return self.total_gib <= self.capacity_gib

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts_s, key=self.parts_s.__getitem__)

    def days(self, tokens: float) -> float:
        """Return the days of training for `tokens` tokens at a constant batch."""
        return tokens / self.tokens_per_s / 86400


def training(
    model: ModelConfig | str,
    parallel: ParallelConfig,
    on: str | Cluster = "a100-40gb",
    *,
    batch: int,
    micro_batch: int = 1,
    program: str | System = "pytorch",
    zero: int = 0,
    pipeline: int = 1,
    chunks: int = 1,
    dtype: str = "bf16",
    overlap: bool = True,
    constants: Constants | None = None,
) -> TrainingEstimate:
    """Return the estimate of a training step.

    Args:
        parallel: the ranks, with a pipeline those of one stage; `recompute` adds a forward pass and saves activations;
            `shard` splits all of a model's state over the data ranks.
        batch: sequences per step, over all ranks.
        micro_batch: sequences in a forward pass of one data rank.
        program: gives the dispatch ("pytorch": einsums; the others: table-driven); the exchange is that of `parallel`.
        zero: 1 splits the optimizer state over the ranks that hold the same parameters, 2 also the gradients; 0, as
            in the paper's scripts, neither.
        pipeline, chunks: stages of a pipeline, and chunks of layers of each; all stages take the same time.
        dtype: of products: bf16 (or fp16), or fp8, at twice the rate, but for attention's scores.
        overlap: of exchanges and gradients with computation, in programs of today.

    Raises:
        ValueError: the model cannot be spread so, or the batch not divided; the message is one line.
    """
    model = named(model)
    where, code = cluster(on), system(program)
    known = constants or (_constants.modern() if code.modern else _constants.fitted())
    if code.only == "inference":
        raise ValueError(f"simulate: system {code.name} is for inference alone")
    model.check_layout(parallel)
    check_nodes(where, model, parallel)
    share = batch / (parallel.data * micro_batch) if micro_batch >= 1 else 0
    if share < 1 or share != int(share):
        raise ValueError(
            f"simulate: batch {batch} is not a multiple of {parallel.data} data ranks x micro_batch {micro_batch}"
        )
    if dtype not in ("bf16", "fp16", "fp8"):
        raise ValueError(f"simulate: training's dtype must be one of bf16, fp16, fp8, got {dtype!r}")
    if dtype == "fp8" and not where.gpu.fp8:
        raise ValueError(f"simulate: {where.gpu.name} has no fp8")
    if zero not in (0, 1, 2):
        raise ValueError(f"simulate: zero must be 0, 1 or 2, got {zero}")
    if pipeline < 1 or chunks < 1 or (not code.modern and (pipeline > 1 or dtype == "fp8")):
        raise ValueError(f"simulate: {code.name} knows no pipeline of {pipeline} x {chunks} in {dtype}")
    layouts = Layouts([parallel])
    tokens = micro_batch * model.context
    forward = forward_us(model, layouts, where, code, known, tokens, dtype=dtype, train=True)
    passes = 3 + parallel.recompute
    issue = passes * known.eager_us * kernels_issued(model, code, parallel)
    parts = {name: (passes - (name in COLLECTIVES)) * us for name, us in forward.items()}
    communicates = sum(parts[name] for name in COLLECTIVES)
    if code.modern and overlap:
        parts["all_to_all"] = max(0.0, parts["all_to_all"] - parts["products"])
    parts["launch"] = max(0.0, issue - sum(parts.values()))
    rounds = (int(share) + (pipeline - 1) / chunks) / pipeline
    backward = rounds * (passes - 1) / passes * (sum(parts.values()) - communicates)  # its time with free links
    parts = {name: rounds * us for name, us in parts.items()}

    outside, experts = (float(p[0]) / pipeline for p in rank_parameters(model, layouts))
    parts["gradients"] = float(
        all_reduce_us(parallel.data, 2 * outside, where, known, stride=parallel.tensor)
        + _expert_gradients_us(model, layouts, where, known) / pipeline
    )
    if code.modern and overlap:
        parts["gradients"] = max(0.0, parts["gradients"] - backward)
    # Adam reads and writes the weight and both moments and reads the gradient: 7 numbers of 4 bytes.
    updated = _held(model, parallel, outside, experts, zero >= 1) * 28
    parts["optimizer"] = transfer_us(updated, where.gpu.memory_gb_s * known.memory_share)
    step = sum(parts.values()) / 1e6
    samples = batch / step
    memory = _memory(model, parallel, outside, experts, tokens, zero, code, known)
    return TrainingEstimate(
        model=str(model),
        system=code.name,
        cluster=where.name,
        parallel=parallel,
        batch=batch,
        micro_batch=micro_batch,
        step_s=step,
        samples_per_s=samples,
        tokens_per_s=samples * model.context,
        tflops_per_gpu=6 * model.active_parameters() * samples * model.context / (parallel.ranks * pipeline) / 1e12,
        parts_s={name: parts[name] / 1e6 for name in PARTS},
        memory_gib={name: size / 2**30 for name, size in memory.items()},
        capacity_gib=where.gpu.memory_gib,
    )


def training_slots(model: ModelConfig, tokens: int, experts: int) -> int:
    """Return C of a micro-batch of `tokens` tokens; with drop-free routing, what even routing needs."""
    capacity = model.routing.capacity(tokens, experts, model.top_k, training=True)
    return capacity if capacity is not None else math.ceil(tokens * model.top_k / experts)


def forward_us(
    model: ModelConfig,
    layouts: Layouts,
    where: Cluster,
    code: System,
    known: Constants,
    tokens: int,
    *,
    dtype: str = "bf16",
    heads_of: int = 0,
    train: bool = False,
) -> dict[str, float]:
    """Return the device microseconds of one micro-batch's forward pass, by part.

    Recomputation repeats all of it but the head, which is small.

    Args:
        tokens: of a tensor group.
        heads_of: tokens for which the output head is computed; 0: all, as in training.
        train: whether it is a pass of training, for `Constants.train_share`.
    """
    M, L, branch = model.hidden, int(layouts.tensor[0]), model.fixed_feed_forward
    plain = where.gpu.tflops * known.matmul_share * 1e6
    rate = plain * (2 if dtype == "fp8" else 1)
    bandwidth = where.gpu.memory_gb_s * known.memory_share
    fixed = model.layers * model.attention_weights
    fixed += (model.layers - model.moe_layers) * model.dense_feed_forward.weights
    fixed += 0 if branch is None else model.moe_layers * branch.weights
    flops = 2 * (tokens * fixed + (heads_of or tokens) * model.vocab * M) / L
    scores = tokens * model.layers * pair_flops(model, decoding=False) * (model.context + 1) / 2 / L
    kept = _kept(model, tokens, L, code)
    reduced = all_reduce_us(L, tokens * M * 2, where, known)
    normed = all_reduce_us(L, tokens * 2 * 4, where, known) if model.decoder.qk_norm == "all" else 0.0
    parts = {
        "products": flops / rate + scores / plain,
        "einsums": 0.0,
        "elementwise": model.layers * transfer_us(2 * kept, bandwidth),
        "all_reduce": (2 * model.layers - model.moe_layers * (branch is None and not code.sliced)) * float(reduced)
        + model.layers * float(normed),
        "all_to_all": 0.0,
    }
    for experts, count in Counter(e for e in model.experts if e).items():
        spread = layouts.experts(experts)
        C = training_slots(model, tokens, experts)
        sent = rows_to_send(spread, np.array([tokens]), model.top_k, C)
        # Every sender fills its slots, so a rank multiplies as many rows as it sends; with slices, it multiplies the
        # rows of all slices, each by a slice of the weights.
        flops = float(sent[0]) * model.expert_feed_forward.flops / (L if code.sliced else 1)
        parts["products"] += count * (flops + 2 * tokens * M * experts) / rate
        if code.gate > 10:  # one-hot masks instead of tables
            parts["einsums"] += count * 2 * 2 * tokens * experts * C * M / rate
        elif code.modern:
            row_bytes = expert_row_bytes(model, 1 if dtype == "fp8" else 2)
            parts["elementwise"] += (
                count * transfer_us(float(sent[0]) * row_bytes, bandwidth) / (L if code.sliced else 1)
            )
        else:
            parts["elementwise"] += count * 2 * transfer_us(2 * float(sent[0]) * M * 2, bandwidth)
        row = M * 2
        over = slice_exchange(layouts, spread, sent, where.gpus_per_node)
        parts["all_to_all"] += count * 2 * float(over.microseconds(row, where, known)[0])
        if code.modern:
            in_node = math.gcd(int(spread.parallel[0]), min(where.gpus_per_node, int(layouts.ranks[0])))
            parts["all_to_all"] += count * _grouped_us(model, spread, in_node, where, known, tokens / L, dtype)
            continue
        for stage in all_to_all(layouts, spread, sent, where.gpus_per_node):
            parts["all_to_all"] += count * 2 * float(stage.microseconds(row, where, known)[0])
        parts["all_to_all"] += count * float(share_gather(spread, sent).microseconds(row, where, known)[0])
    for name in ("products", "elementwise"):
        parts[name] /= known.train_share if train else known.counted_share
    return parts


def expert_row_bytes(model: ModelConfig, width: int) -> int:
    """Return the bytes that an expert's kernels move for one row, besides weights; operands of products have `width`.

    The row is brought into expert order (read and written), multiplied (read; the inner numbers written), activated
    (read; F written), multiplied (read; the row written), and brought back (read and written).
    """
    M, one = model.hidden, model.expert_feed_forward
    return M * (4 + width) + 2 * one.inner + (2 * one.inner + width * one.ffn) + (width * one.ffn + 2 * M) + 4 * M


def _grouped_us(
    model: ModelConfig, spread: Columns, in_node: int, where: Cluster, known: Constants, tokens: float, dtype: str
) -> float:
    """Return the microseconds of a layer's dispatch, with fp8 in 8 bits, and combine, of a rank's own `tokens`."""
    ranks = int(spread.parallel[0])
    stage, _, _ = grouped(ranks, in_node, tokens, model.top_k, ranks // in_node)
    widths = (1 if dtype == "fp8" else 2, 2)
    return sum(float(stage.microseconds(model.hidden * width, where, known)[0]) for width in widths)


def kernels_issued(model: ModelConfig, code: System, parallel: ParallelConfig) -> float:
    """Return the number of kernels of a forward pass; a backward pass has about twice as many."""
    count = code.step + 1 + model.layers * (code.attention + 2) + (model.layers - model.moe_layers) * (code.dense + 2)
    count += model.moe_layers * (model.fixed_feed_forward is not None) * (code.residual + 2)
    for experts in (e for e in model.experts if e):
        own = parallel.experts(experts).experts_per_rank
        loops = 1 if code.grouped else own
        count += code.gate + 1 + code.dispatch + code.combine + 2 + code.once + loops * (code.expert + 2)
    return count


def _expert_gradients_us(model: ModelConfig, layouts: Layouts, where: Cluster, known: Constants) -> float:
    """Return the microseconds to sum each layer's expert gradients over its replicas (section 4.1.3)."""
    one = model.expert_feed_forward.parameters
    total = 0.0
    for experts, count in Counter(e for e in model.experts if e).items():
        spread = layouts.experts(experts)
        size = 2 * count * experts / spread.parallel[0] * one / spread.slices[0]
        stride = spread.parallel * spread.slices
        total += float(all_reduce_us(spread.replicas, size, where, known, stride=stride)[0])
    return total


def _memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    outside: float,
    experts: float,
    tokens: int,
    zero: int,
    code: System,
    known: Constants,
) -> dict[str, float]:
    """Return the bytes on a GPU: states by `STATE_BYTES`, activations of a micro-batch, workspace."""
    L, M = parallel.tensor, model.hidden

    def state(what: str, split: bool) -> float:
        return STATE_BYTES[what] * _held(model, parallel, outside, experts, split)

    def experts_rows(experts: int) -> float:
        """Return the bytes of a rank's rows in and out of experts, and between their two products."""
        rows = experts * training_slots(model, tokens, experts) / parallel.spread(experts).senders
        return 2 * rows * (2 * M + model.expert_feed_forward.inner)

    layer = _kept(model, tokens, L, code)
    moe = [experts_rows(e) for e in model.experts if e]
    if parallel.recompute:
        kept = model.layers * tokens * M * 2 + layer + max(moe, default=0.0)
    else:
        kept = model.layers * layer + sum(moe)
    return {
        "weights": state("weights", False),
        "gradients": state("gradients", zero == 2),
        "optimizer": state("optimizer", zero >= 1),
        "activations": kept + tokens * model.vocab * 6 / L,
        "reserved": known.reserved_gib * 2**30,
    }


def _kept(model: ModelConfig, tokens: int, tensor: int, code: System) -> float:
    """Return the bytes of a dense layer's activations; fused attention keeps no scores."""
    scores = 0 if code.modern else 5 * model.heads * model.context / model.hidden / tensor
    return tokens * model.hidden * (10 + 24 / tensor + scores)


def _held(model: ModelConfig, parallel: ParallelConfig, outside: float, experts: float, split: bool) -> float:
    """Return the parameters whose state a rank holds; with `split`, ZeRO splits it over the ranks that share them."""
    data = parallel.data if split or parallel.shard else 1
    return outside / data + experts / (_expert_copies(model, parallel) if split else 1)


def _expert_copies(model: ModelConfig, parallel: ParallelConfig) -> float:
    """Return over how many ranks ZeRO can split a rank's expert state: its replicas, weighted by the layers' sizes."""
    held = shared = 0.0
    for experts in (e for e in model.experts if e):
        spread = parallel.experts(experts)
        held += spread.experts_per_rank
        shared += spread.experts_per_rank / spread.replicas
    return held / shared if shared else 1.0
