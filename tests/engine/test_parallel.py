"""A model spread over 8 gloo ranks is the model on one: losses, gradients, norm, clipped step, initial weights."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from moelab.config import DecoderConfig, ExpertConfig, ModelConfig, RoutingConfig
from moelab.config.parallel import ParallelConfig
from moelab.engine import gradients, parallel
from moelab.engine.collectives import all_reduce
from moelab.engine.mesh import Mesh
from moelab.models import build
from moelab.models.gpt import Output
from moelab.models.routing import Router

pytestmark = pytest.mark.multiprocess

MODEL = ModelConfig(
    layers=4, hidden=32, heads=4, experts=(0, 4, 0, 8), residual=True, vocab=96, context=16, init_std=0.05,
    routing=RoutingConfig(drop_tokens=True, z_loss=0.01),
)  # fmt: skip
TOP2 = replace(MODEL, top_k=2, residual=False, routing=RoutingConfig(drop_tokens=False))
UNEVEN = replace(MODEL, experts=(2, 0, 8, 4), residual_mix="sum", routing=RoutingConfig(capacity_factor=0.5))
TODAY = ModelConfig(
    layers=4, hidden=32, heads=4, experts=(0, 4, 8, 4), top_k=2, vocab=96, context=16, init_std=0.05,
    decoder=DecoderConfig.modern(kv_heads=2, head_size=6, qk_norm="head", ffn=48, smeared_keys=True),
    expert=ExpertConfig(ffn=24, shared=2, shared_ffn=12, shared_gate=True),
    routing=RoutingConfig(drop_tokens=False, scores="sigmoid", balance_rate=0.01, aux_choices="all"),
)  # fmt: skip
ALL_HEADS = replace(
    TODAY, decoder=replace(TODAY.decoder, qk_norm="all"), expert=ExpertConfig(ffn=24), routing=TOP2.routing
)
GATED = replace(
    TODAY, decoder=DecoderConfig(feed_forward="swiglu", biases="qkv", tied=False, positions="rotary", norm="rms"),
    expert=ExpertConfig(ffn=16, shared=1), routing=RoutingConfig(capacity_factor=0.5, aux_scope="sequence"),
)  # fmt: skip
BIASES = replace(GATED, decoder=DecoderConfig(feed_forward="swiglu"), expert=ExpertConfig(), residual=True)
SEQUENCES, SEED = 8, 3


def batch(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(config.vocab, (SEQUENCES, config.context + 1), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def cross_entropy(output: Output, targets_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def forward_backward(config: ModelConfig, module, first: int, count: int, last=lambda: None, bf16=False) -> float:
    """Sequences first ... first + count - 1, each a micro-batch, mean loss over them."""
    tokens, targets = batch(config)
    module.train()
    total = 0.0
    for i in range(first, first + count):
        torch.manual_seed(i)
        if i == first + count - 1:
            last()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = module(tokens[i : i + 1])
        loss = cross_entropy(output, targets[i : i + 1]) + output.routing_loss()
        (loss / count).backward()
        total += float(loss.detach()) / count
    return total


@functools.cache
def on_one_rank(config: ModelConfig, bf16: bool = False) -> tuple[float, dict[str, tuple]]:
    """Loss, and name -> weight and gradient, of the model on one rank; each rank computes them once for all layouts."""
    reference = build(config, SEED)
    loss = forward_backward(config, reference, 0, SEQUENCES, bf16=bf16)
    return loss, {name: (p.detach(), p.grad) for name, p in reference.named_parameters() if p.requires_grad}


def parts(model: parallel.ParallelModel, name: str, ours: torch.Tensor, whole: torch.Tensor) -> list[tuple]:
    """The pieces of a weight or gradient that this rank holds, each with the same piece of the whole.

    No rank gathers the others' pieces: on 8 ranks of two cores that took more than half of a test's time.
    """
    if isinstance(ours, DTensor):
        (place,), mesh = ours.placements, ours.device_mesh
        pieces = whole.chunk(mesh.size(), place.dim)
        mine = pieces[mesh.get_local_rank()] if mesh.get_local_rank() < len(pieces) else whole.narrow(place.dim, 0, 0)
        return [(ours.to_local(), mine)]
    return [(shard.of(ours), whole[shard.region]) for shard in model.placements[name].shards]


def largest(values: torch.Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0


def trained(config: ModelConfig, layout: ParallelConfig, bf16: bool = False) -> tuple[parallel.ParallelModel, float]:
    """On a rank: its part of the model with the step's gradients, and the mean loss of all ranks."""
    mesh = Mesh(layout, config.experts)
    model = parallel.build(config, SEED, mesh)
    sync = gradients.GradientSync(model)
    count = SEQUENCES // mesh.data.size
    loss = torch.tensor(forward_backward(config, model.module, mesh.data.index * count, count, sync.arm, bf16))
    sync.finish()
    all_reduce(loss, mesh.data, "metrics")
    return model, float(loss) / mesh.data.size


def compare(config: ModelConfig, layout: ParallelConfig) -> dict[str, float]:
    """On a rank: largest differences from the model on one rank, relative to the largest value of each parameter's
    gradient.
    """
    whole_loss, whole = on_one_rank(config)
    model, loss = trained(config, layout)
    difference = {"loss": abs(loss - whole_loss), "weights": 0.0, "gradients": 0.0}
    parameters = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
    for name, p in parameters.items():
        weight, grad = whole[name]
        pairs = parts(model, name, p, weight)
        difference["weights"] = max(difference["weights"], *(largest(ours - theirs) for ours, theirs in pairs))
        pairs = parts(model, name, p.grad, grad)
        off = max(largest(ours - theirs) for ours, theirs in pairs)
        difference["gradients"] = max(difference["gradients"], off / (largest(grad) + 1e-3))
    norm = float(torch.nn.utils.get_total_norm([g for _, g in whole.values()]))
    difference["norm"] = abs(gradients.clip(model, norm / 2) - norm) / norm
    model.mesh.close()
    clipped = max(largest(g.to_local() if isinstance(g := p.grad, DTensor) else g) for p in parameters.values())
    assert clipped <= max(largest(g) for _, g in whole.values()) / 2 * (1 + 1e-4)
    return difference


LAYOUTS = {
    "expert 1": ParallelConfig(data=8, expert=1),
    "tensor 2, no exchange": ParallelConfig(tensor=2, data=4, expert=1),
    "shard, expert 1": ParallelConfig(data=8, shard=True, expert=1),
    "expert 2": ParallelConfig(data=8, expert=2),
    "as many as experts": ParallelConfig(data=8),
    "no overlap": ParallelConfig(data=8, overlap=False),
    "hierarchical 2x4": ParallelConfig(data=8, gpus_per_node=4, exchange="hierarchical"),
    "hierarchical 4x2": ParallelConfig(data=8, gpus_per_node=2, exchange="hierarchical"),
    "slicing 2": ParallelConfig(data=8, expert_slicing=2),
    "slicing 2, expert 2": ParallelConfig(data=8, expert=2, expert_slicing=2),
    "slicing 8": ParallelConfig(data=8, expert=1, expert_slicing=8),
    "tensor 2, flat": ParallelConfig(tensor=2, data=4),
    "tensor 2, coordinated": ParallelConfig(tensor=2, data=4, exchange="coordinated"),
    "tensor 2, expert 2, coordinated": ParallelConfig(tensor=2, data=4, expert=2, exchange="coordinated"),
    "tensor 4, expert 2, coordinated": ParallelConfig(tensor=4, data=2, expert=2, exchange="coordinated"),
    "tensor 2, coordinated, 2 nodes": ParallelConfig(
        tensor=2, data=4, gpus_per_node=4, exchange="coordinated-hierarchical"
    ),
    "figure 7 in small": ParallelConfig(
        tensor=2, data=4, expert=4, expert_slicing=2, gpus_per_node=2, exchange="coordinated"
    ),
    "tensor 4, slicing 4, flat": ParallelConfig(tensor=4, data=2, expert=2, expert_slicing=4),
    "shard": ParallelConfig(data=8, shard=True),
    "shard, slicing 2": ParallelConfig(data=8, shard=True, expert_slicing=2),
    "recompute": ParallelConfig(data=8, recompute=True),
    "recompute, shard, hierarchical": ParallelConfig(
        data=8, recompute=True, shard=True, gpus_per_node=4, exchange="hierarchical"
    ),
    "recompute, tensor 2, coordinated": ParallelConfig(tensor=2, data=4, recompute=True, exchange="coordinated"),
}


SOME = ["as many as experts", "hierarchical 2x4", "slicing 2", "tensor 2, coordinated"]
MORE = [*SOME, "tensor 2, no exchange", "figure 7 in small", "recompute, shard, hierarchical"]
HEADS = ["as many as experts", "tensor 2, no exchange", "tensor 2, coordinated", "recompute, tensor 2, coordinated"]
MODELS = {
    "PR-MoE": (MODEL, LAYOUTS),
    "top-2, drop-free": (TOP2, SOME),
    "2, 8 and 4 experts, dropping": (UNEVEN, SOME),
    "sigmoid, head norm": (TODAY, MORE),
    "shared": (GATED, MORE),
    "residual, biases": (BIASES, MORE),
    "norm of all heads": (ALL_HEADS, HEADS),
}


@pytest.mark.parametrize(("model", "layout"), [(name, layout) for name in MODELS for layout in MODELS[name][1]])
def test_a_model_on_8_ranks_is_that_on_one(on_ranks, model, layout):
    check(on_ranks, MODELS[model][0], LAYOUTS[layout])


def test_a_norm_over_all_heads_on_two_ranks(on_ranks):
    check(on_ranks, ALL_HEADS, ParallelConfig(tensor=2))
    for loss, gradient in on_ranks(2, step_in_bf16, replace(ALL_HEADS, top_k=1), ParallelConfig(tensor=2)):
        assert loss < 1e-3 and gradient < 0.02


def check(on_ranks, model: ModelConfig, layout: ParallelConfig) -> None:
    for rank, difference in enumerate(on_ranks(layout.ranks, compare, model, layout)):
        assert difference["weights"] == 0, f"rank {rank}: initial weights depend on the layout"
        assert difference["loss"] < 1e-5 and difference["gradients"] < 1e-5 and difference["norm"] < 1e-5, (
            rank,
            difference,
        )


def pooled(config: ModelConfig, layout: ParallelConfig) -> float:
    """On a rank: largest difference of a router's gradient from that of the whole batch as one micro-batch."""
    tokens, targets = batch(config)
    reference = build(config, SEED).train()
    torch.manual_seed(0)
    output = reference(tokens)
    (cross_entropy(output, targets) + output.routing_loss()).backward()
    model, _ = trained(config, layout)
    model.mesh.close()
    return max(
        float((a.ffn.router.weight.grad - b.ffn.router.weight.grad).abs().max() / b.ffn.router.weight.grad.abs().max())
        for a, b in zip(model.module.blocks, reference.blocks, strict=True)
        if hasattr(a.ffn, "router")
    )


def step_in_bf16(config: ModelConfig, layout: ParallelConfig) -> tuple[float, float]:
    """On a rank: how far loss and gradients under autocast are from the model's on one rank, relative, all gradients as
    one vector.
    """
    whole_loss, whole = on_one_rank(config, bf16=True)
    model, loss = trained(config, layout, bf16=True)
    off = size = 0.0
    for name, p in model.module.named_parameters():
        for found, expected in parts(model, name, p.grad, whole[name][1]):
            off, size = off + float((found - expected).square().sum()), size + float(expected.square().sum())
    model.module.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(cross_entropy(model.module(batch(config)[0]), batch(config)[1]))
    model.mesh.close()
    return abs(loss - whole_loss) / whole_loss, (off / size) ** 0.5


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *(
            (MODEL, layout)
            for layout in ("as many as experts", "slicing 2", "tensor 2, flat", "figure 7 in small", "shard")
        ),
        *((UNEVEN, layout) for layout in ("tensor 2, no exchange", "recompute, tensor 2, coordinated")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.residual_mix,
)
def test_a_step_in_bf16_is_that_of_one_rank(on_ranks, model, layout):
    for loss, gradient in on_ranks(8, step_in_bf16, model, LAYOUTS[layout]):
        assert loss < 1e-3 and gradient < 0.02


def gradients_of_two_steps(config: ModelConfig) -> list[torch.Tensor]:
    """On a rank: a weight's gradient after the same step twice; only the first is announced by `arm`."""
    mesh = Mesh(ParallelConfig(data=2), config.experts)
    model = parallel.build(config, SEED, mesh)
    sync, found = gradients.GradientSync(model), []
    for announce in (sync.arm, lambda: None):
        model.module.zero_grad()
        forward_backward(config, model.module, mesh.data.index, 1, announce)
        sync.finish()
        found.append(model.module.token_embedding.weight.grad.clone())
    mesh.close()
    return found


def test_a_step_that_is_not_announced_is_summed_at_its_end(on_ranks):
    (first, second), others = on_ranks(2, gradients_of_two_steps, MODEL)
    assert torch.equal(first, second) and torch.equal(second, others[1])


def gradients_of_two_dtypes(config: ModelConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """On a rank: gradients of a model in bf16 whose routers stay in fp32, as published ones do."""
    mesh = Mesh(ParallelConfig(data=2), config.experts)
    model = parallel.build(config, SEED, mesh, torch.bfloat16)
    for router in [module for module in model.module.modules() if isinstance(module, Router)]:
        router.float()
    sync = gradients.GradientSync(model)
    forward_backward(config, model.module, mesh.data.index, 1, sync.arm)
    sync.finish()
    mesh.close()
    return [(p.grad, p) for name, p in model.module.named_parameters() if "router" in name or "norm" in name]


def test_weights_of_two_dtypes_have_gradients_of_theirs(on_ranks):
    for first, other in zip(*on_ranks(2, gradients_of_two_dtypes, MODEL), strict=True):
        assert torch.equal(first[0], other[0]) and first[0].dtype == first[1].dtype


def test_load_balancing_over_all_ranks_is_that_of_the_whole_batch(on_ranks):
    routing = RoutingConfig(drop_tokens=False, aux_scope="step", aux_loss=1.0)
    model = replace(MODEL, routing=routing)
    assert max(on_ranks(8, pooled, model, ParallelConfig(data=8))) < 1e-5
    per_rank = replace(model, routing=replace(routing, aux_scope="micro_batch"))
    assert max(on_ranks(8, pooled, per_rank, ParallelConfig(data=8))) > 1e-3  # the choice matters


def test_the_wrong_number_of_ranks_is_refused():
    with pytest.raises(ValueError, match=r"the layout is for 8 ranks \(tensor 2 x data 4\), there are 1"):
        Mesh(ParallelConfig(tensor=2, data=4))


def test_a_mesh_for_other_layers_is_refused():
    with pytest.raises(ValueError, match="no groups for layers of 8 experts; give Mesh the model's experts"):
        parallel.build(MODEL, SEED, Mesh(ParallelConfig(), (4,)))
