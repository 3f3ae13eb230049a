"""A rank's part of a model: `build(config, seed, mesh)` replaces `moelab.models.build`.

The model's code stays as it is. `build` replaces its linear layers by sliced ones, its experts by this rank's experts,
and the dispatch of each MoE layer by an exchange. Each parameter gets a `Placement`, which is all that gradients, norms
and checkpoints need to know. Initial weights are those of the model on one rank.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moelab.config import ModelConfig
from moelab.engine.collectives import all_reduce
from moelab.engine.mesh import ExpertGroups, Mesh
from moelab.engine.placement import Placement
from moelab.models.gpt import GPT, Block, allocate, initial_weight
from moelab.models.moe import MLP, Experts, MoE


@dataclass(frozen=True)
class ParallelModel:
    """A rank's model, and the shards of the whole model that it holds.

    Attributes:
        module: the model; call it like the whole one, on this data rank's tokens.
        placements: parameter name -> placement. With `shard`, non-expert parameters are DTensors besides.
        mesh: the groups it communicates in.
    """

    module: GPT
    placements: dict[str, Placement]
    mesh: Mesh


class SlicedExperts(Experts):
    """Computes this rank's E / ep experts, or a slice of the feed-forward size of each.

    With slices, the outputs are partial sums over the slices.
    """

    def __init__(self, config: ModelConfig, groups: ExpertGroups) -> None:
        super().__init__(groups.layout.experts_per_rank, config.expert_feed_forward.slice(groups.slices.size))
        self.adds_bias = groups.slices.index == 0

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return the weights as `Experts.weights`; the output bias is zero on all slices but one."""
        w1, b1, w2, b2 = super().weights()
        return w1, b1, w2, b2 if b2 is None or self.adds_bias else b2 * 0


def build(config: ModelConfig, seed: int | None, mesh: Mesh, dtype: torch.dtype = torch.float32) -> ParallelModel:
    """Return this rank's part of a model on `mesh.device`, with initial weights, or if `seed` is None with none.

    Raises:
        ValueError: the layout is impossible for the model.
    """
    parallel = mesh.config
    config.check_layout(parallel)
    with torch.device("meta"):
        whole = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
        model = GPT(config)
        for block in model.blocks:
            _slice_block(block, config, mesh)
    placements = {name: _placement(name, shape, config, mesh) for name, shape in whole.items()}
    allocate(model.to(dtype), mesh.device)
    if seed is not None:
        _init(model, config, seed, placements, mesh)
    if parallel.recompute:
        for block in model.blocks:
            block.__dict__["forward"] = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if mesh.fsdp is not None:
        _shard(model, mesh)
    return ParallelModel(model, placements, mesh)


def _slice_block(block: Block, config: ModelConfig, mesh: Mesh) -> None:
    tensor = mesh.tensor
    if tensor.size > 1:
        from moelab.engine.differentiable import mean_over_group
        from moelab.engine.tensor_slicing import ColumnLinear, RowLinear

        attention = block.attention
        attention.heads //= tensor.size
        attention.kv_heads //= tensor.size
        if config.decoder.qk_norm == "all":
            for name in ("q_norm", "k_norm"):
                norm = getattr(attention, name)
                setattr(attention, name, torch.nn.RMSNorm(norm.normalized_shape[0] // tensor.size, eps=norm.eps))
            attention.pool = functools.partial(mean_over_group, group=tensor)
        if attention.smear is not None:
            attention.smear = torch.nn.Parameter(torch.empty(attention.kv_heads))
        mlp = block.ffn if isinstance(block.ffn, MLP) else block.ffn.mlp
        pairs = [(attention, "qkv", "out")] + ([] if mlp is None else [(mlp, "up", "down")])
        for owner, column, row in pairs:
            for name, kind in ((column, ColumnLinear), (row, RowLinear)):
                linear = getattr(owner, name)
                bias = linear.bias is not None
                setattr(owner, name, kind(linear.in_features, linear.out_features, tensor, bias))
    if isinstance(block.ffn, MoE):
        groups = mesh.experts(block.ffn.router.experts)
        if groups.expert.size > 1 or groups.slices.size > 1:  # tokens have to travel to the experts
            from moelab.engine.exchange import Exchange

            block.ffn.experts = SlicedExperts(config, groups)
            block.ffn.own = block.ffn.dispatcher = Exchange(groups, mesh.config)
        if mesh.data.size > 1 and config.routing.aux_scope == "step":
            block.ffn.router.pool = functools.partial(_mean, mesh=mesh)


def _mean(x: Tensor, mesh: Mesh) -> Tensor:
    all_reduce(x, mesh.data, "router")
    return x / mesh.data.size


_SLICED_DIM = {
    ("qkv", "weight"): 0,
    ("qkv", "bias"): 0,
    ("attention", "smear"): 0,
    ("out", "weight"): 1,
    ("up", "weight"): 0,
    ("up", "bias"): 0,
    ("down", "weight"): 1,
}
"""(module, parameter) -> the dim that tensor slicing cuts; query, key and value, or gate and up, are cut each."""


def _placement(name: str, shape: tuple[int, ...], config: ModelConfig, mesh: Mesh) -> Placement:
    owner, _, leaf = name.rpartition(".")
    module = owner.rpartition(".")[2]
    if module == "experts":
        groups = mesh.experts(shape[0])
        layout, position = groups.layout, groups.position
        parts = {0: (position.expert, layout.parallel)}
        sliced = config.expert_feed_forward.tensors()[leaf].sliced
        if sliced is not None:
            parts[1 + sliced] = (position.slice, layout.slices)
        replicas = groups.same_experts if sliced is None else groups.replicas
        return Placement.part(shape, parts, replicas.ranks, layout.token_replicas)
    if mesh.tensor.size > 1 and (dim := _SLICED_DIM.get((module, leaf))) is not None:
        part = (mesh.tensor.index, mesh.tensor.size)
        stretches: tuple[int, ...] = ()
        if module == "qkv":
            stretches = tuple(n * config.head_size for n in (config.heads, config.kv_heads, config.kv_heads))
        elif module == "up" and config.dense_feed_forward.gated:  # the fixed branch's kind is the same
            stretches = (shape[0] // 2,) * 2
        return Placement.part(shape, {dim: part}, mesh.data.ranks, 1, stretches)
    if module in ("q_norm", "k_norm"):  # each tensor rank has the gradient of its own heads only
        if mesh.tensor.size > 1 and config.decoder.qk_norm == "all":  # and the weights of these
            return Placement.part(shape, {0: (mesh.tensor.index, mesh.tensor.size)}, mesh.data.ranks, 1)
        return Placement.whole(shape, mesh.world.ranks, 1)
    return Placement.whole(shape, mesh.world.ranks, mesh.tensor.size)


@torch.no_grad()
def _init(model: GPT, config: ModelConfig, seed: int, placements: dict[str, Placement], mesh: Mesh) -> None:
    for name, parameter in model.named_parameters():
        placement = placements[name]
        if placement.local_shape != tuple(parameter.shape):
            raise AssertionError(f"{name}: placed as {placement.local_shape}, built as {tuple(parameter.shape)}")
        for shard in placement.shards:
            target = shard.of(parameter)
            if name.rpartition(".")[0].endswith("experts"):  # one expert at a time: no rank ever holds them all
                for i in range(shard.size[0]):
                    values = initial_weight(config, seed, name, placement.shape[1:], shard.offset[0] + i)
                    target[i].copy_(values[shard.region[1:]])
            else:
                values = initial_weight(config, seed, name, placement.shape)
                target.copy_(values[shard.region])


def _shard(model: GPT, mesh: Mesh) -> None:
    from torch.distributed.fsdp import fully_shard  # slow to import (see moelab.engine.sharded)

    # A block's output may be a view of what its MoE layer returns; nothing here works on it in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    experts = {p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    whole = experts | {p for p in model.parameters() if not p.requires_grad}
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh.fsdp, ignored_params=whole)
