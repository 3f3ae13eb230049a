"""The simulated programs: the kernels of each part of a decoding step, what it sends, which experts it reads.

The counts come from the code or the paper's text; none is fitted. The count of a part excludes its two matrix products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from moelab.config import ModelConfig, unknown
from moelab.config.parallel import Exchange, ParallelConfig
from moelab.simulate.hardware import Cluster


@dataclass(frozen=True)
class System:
    """One program.

    Attributes:
        attention, dense, residual: small kernels of attention, of a dense feed-forward, and those that Residual-MoE
            adds to a layer (its MLP's, and the mix).
        gate, dispatch, combine: kernels of the gate, and of the layout transforms to the experts and back.
        expert: small kernels of one expert.
        once: kernels around all experts of a layer.
        transform: layout transforms that a stage of a staged exchange needs (section 5.3).
        step: kernels of a step outside the layers: embeddings, last norm, output head, choice of the token.
        exchange: its default all-to-all.
        min_capacity: the least number of slots that every expert gets from every rank; 0 means no slots: exactly the
            routed tokens travel, and only experts that got any are read. With slots, all experts of a rank are read,
            chosen or not: their weights are multiplied with empty slots.
        grouped: whether two grouped products compute all experts of a rank, instead of a loop over experts.
        graph: whether kernels are replayed from a CUDA graph.
        layer_waits: whether the host waits for the device in every layer, before its feed-forward.
        gate_wait: kernels of the gate issued before the host waits for their result; 0: it never waits.
        modern: whether it is a program of today: `moelab.simulate.constants.modern` instead of those fitted on the
            paper, fused attention, which keeps no scores, and links that work at the same time.
        sliced: whether tensor parallelism slices every expert like a dense feed-forward, so that nothing is exchanged.
        scheduler: whether the host schedules between two steps while the GPU waits (`Constants.step_us`).
        only: the work that it alone does, training or inference; empty: both.
        source: where the counts come from.
    """

    name: str
    attention: int
    dense: int
    residual: int
    gate: int
    dispatch: int
    combine: int
    expert: int
    once: int
    transform: int
    step: int
    exchange: Exchange
    min_capacity: int
    grouped: bool = False
    graph: bool = False
    layer_waits: bool = False
    gate_wait: int = 0
    modern: bool = False
    sliced: bool = False
    scheduler: bool = False
    only: Literal["", "training", "inference"] = ""
    source: str = ""


_DEEPSPEED = System(
    name="deepspeed",
    attention=4,
    dense=2,
    residual=3,
    gate=2,
    dispatch=1,
    combine=1,
    expert=1,
    once=1,
    transform=1,
    step=8,
    exchange="coordinated-hierarchical",
    min_capacity=1,
    source="The full system: fused inference kernels (DeepSpeed-Inference: norm+product, attention, product, "
    "bias+residual), one gating kernel and table-driven transforms (section 5.4), hierarchical and coordinated "
    "all-to-all (5.3), experts in a loop and min_capacity 1 (defaults of moe_inference.py). A gate of one "
    "kernel has no counts to copy, so the host does not wait.",
)

SYSTEMS = {
    s.name: s
    for s in (
        System(
            name="pytorch",
            attention=18,
            dense=5,
            residual=8,
            gate=40,
            dispatch=5,
            combine=5,
            expert=1,
            once=2,
            transform=0,
            step=15,
            exchange="flat",
            min_capacity=4,
            layer_waits=True,
            gate_wait=9,
            source="The paper's baseline (section 5.5): the training stack, eager. Kernels counted in the public "
            "Megatron-DeepSpeed attention and DeepSpeed's one-hot gate and einsum dispatch (sharded_moe.py); experts "
            "in a Python loop; min_capacity 4 as in the scripts. The gate of DeepSpeed 0.6.0 copies the experts' "
            "counts to the CPU (sharded_moe.py, top1gating: exp_counts), and each layer of the authors' "
            "Megatron-DeepSpeed of 2022-01-19 (a599d072, transformer.py) makes two scalars on the GPU from Python "
            "numbers, which in PyTorch copies and waits for the stream.",
        ),
        _DEEPSPEED,
        replace(
            _DEEPSPEED,
            name="moelab",
            min_capacity=0,
            grouped=True,
            graph=True,
            source="What this project's engine aims at: the kernels of deepspeed with drop-free routing, grouped "
            "products over the experts that got tokens, a CUDA graph.",
        ),
        System(
            name="engine",
            attention=4,
            dense=2,
            residual=2,
            gate=2,
            dispatch=1,
            combine=1,
            expert=1,
            once=0,
            transform=0,
            step=8,
            exchange="coordinated",
            min_capacity=0,
            grouped=True,
            graph=True,
            modern=True,
            only="inference",
            source="An inference engine of today (vLLM, SGLang, TensorRT-LLM): a CUDA graph; norm, rotation, write "
            "into the cache and attention; top-k and alignment, two grouped products, an activation between them, sum.",
        ),
        System(
            name="megatron",
            attention=8,
            dense=3,
            residual=4,
            gate=10,
            dispatch=4,
            combine=4,
            expert=1,
            once=2,
            transform=0,
            step=20,
            exchange="coordinated",
            min_capacity=0,
            modern=True,
            only="training",
            source="Training with Megatron-Core: eager kernels of Transformer Engine, one product for each expert of a "
            "GPU in several streams (README of megatron/core/transformer/moe); small kernels estimated.",
        ),
    )
}
SYSTEMS["engine-tp"] = replace(
    SYSTEMS["engine"],
    name="engine-tp",
    exchange="flat",
    sliced=True,
    source="As engine, with every expert sliced over all GPUs.",
)


def system(name: str | System) -> System:
    """Return a program by name.

    They are pytorch (the paper's baseline), deepspeed (its full system), moelab, engine and engine-tp (today's
    inference engines), and megatron (today's training).

    Raises:
        ValueError: another name; the message is one line.
    """
    if isinstance(name, System):
        return name
    if name not in SYSTEMS:
        raise ValueError(unknown(f"no system {name!r}", name, SYSTEMS))
    return SYSTEMS[name]


def check_layout(system: System, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that a program can distribute a model in a layout; ValueError, one line, if not.

    Programs of today copy a head of keys and values to several ranks where a tensor group has more ranks than heads.
    """
    if system.sliced:  # no rank has experts of its own
        parallel = replace(parallel, expert=1, expert_slicing=parallel.tensor, exchange="flat")
    model.check_layout(parallel, copies=system.modern)


def check_nodes(where: Cluster, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that the nodes of an MoE model's layout are the cluster's; ValueError, one line, if not.

    Its exchanges are counted on the cluster's nodes. A dense model has none, and its tensor groups may leave a node.
    """
    if model.is_moe and parallel.ranks_per_node != min(where.gpus_per_node, parallel.ranks):
        raise ValueError(
            f"simulate: gpus_per_node must be the {where.gpus_per_node} of cluster {where.name}, "
            f"got {parallel.gpus_per_node}"
        )


def slots(system: System, model: ModelConfig, tokens: int, experts: int) -> int:
    """Return C, the rows that an expert gets from each rank (section 5.4's expert capacity c_e).

    It is 0 where exactly the routed tokens travel.
    """
    if not system.min_capacity:
        return 0
    return max(math.ceil(tokens * model.top_k / experts * model.routing.capacity_factor_eval), system.min_capacity)
