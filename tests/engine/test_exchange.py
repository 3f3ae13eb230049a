"""The exchanges on real processes against `local` on the same arrays."""

import functools
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moelab import kernels
from moelab.engine.collectives import Traffic
from moelab.engine.exchange import Exchange
from moelab.engine.mesh import Mesh
from moelab.layout import ParallelConfig
from moelab.models.moe import Experts, local

pytestmark = pytest.mark.multiprocess
M, F = 6, 8


@dataclass(frozen=True)
class Case:
    """One layer on ranks. `tokens`: S of data rank d is tokens[d % len]. `skew`: where tokens go."""

    parallel: ParallelConfig
    experts: int
    top_k: int = 1
    capacity: int | None = None
    tokens: tuple[int, ...] = (13, 7, 0, 29)
    skew: str = "random"
    dtype: torch.dtype = torch.float32
    body: str = "experts"
    seed: int = 0
    input_grad: bool = True
    names: tuple[str, ...] = field(default=(), compare=False)


class Scale(nn.Module):
    """An elementwise stand-in for experts: the same bits however rows are grouped."""

    def __init__(self, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, M))

    def forward(self, rows_RM, offsets_E1):
        weight = self.weight.to(rows_RM.dtype).repeat_interleave(offsets_E1.diff().long(), 0)
        return rows_RM * weight


@functools.cache
def mesh_of(parallel, experts):
    return Mesh(parallel, [experts])


def whole_experts(case):
    module = Experts(case.experts, M, F) if case.body == "experts" else Scale(case.experts)
    generator = torch.Generator().manual_seed(7)
    for p in module.parameters():
        nn.init.normal_(p, generator=generator)
    return module


def cut(tensor, name, groups):
    """This rank's part of a whole parameter (or gradient)."""
    part = tensor[groups.local_experts.start : groups.local_experts.stop]
    W, w = groups.slices.size, groups.slices.index
    dim = {"up": 2, "up_bias": 1, "down": 1}.get(name)
    return part if dim is None else part.chunk(W, dim)[w]


def rank_experts(case, groups):
    whole = whole_experts(case)
    if case.body == "experts":
        mine = Experts(len(groups.local_experts), M, F // groups.slices.size)
    else:
        mine = Scale(len(groups.local_experts))
    with torch.no_grad():
        for name, p in mine.named_parameters():
            p.copy_(cut(whole.get_parameter(name), name, groups))
            if name == "down_bias" and groups.slices.index > 0:
                p.zero_()
    return mine


def tokens_of(case, data_rank):
    """(x, logits, dy) of a data rank; x and logits are leaves."""
    S = case.tokens[data_rank % len(case.tokens)]
    generator = torch.Generator().manual_seed(1000 * case.seed + data_rank)
    x, dy = (torch.randn(S, M, generator=generator).to(case.dtype) for _ in range(2))
    logits = torch.randn(S, case.experts, generator=generator)
    if case.skew == "one":
        logits[:, case.experts // 2] += 50
    elif case.skew == "last":
        logits[:, : case.experts - case.top_k] -= 50
    return x.requires_grad_(case.input_grad), logits.requires_grad_(), dy


def route(case, logits):
    return kernels.gate(logits, case.top_k, case.capacity, seed=case.seed if case.capacity else None)


def run_case(case):
    """Differences to `local`: y, gradients of x and logits (this rank's), gradient of the experts; with the traffic."""
    mesh = mesh_of(case.parallel, case.experts)
    groups = mesh.experts(case.experts)
    reference = whole_experts(case)
    for d in range(case.parallel.data):
        x, logits, dy = tokens_of(case, d)
        y = local(x, route(case, logits), reference)
        y.backward(dy)
        if d == mesh.data.index:
            expected = y.detach(), x.grad, logits.grad
    mine = rank_experts(case, groups)
    traffic = Traffic(case.parallel.ranks_per_node)
    exchange = Exchange(groups, case.parallel, traffic)
    x, logits, dy = tokens_of(case, mesh.data.index)
    y = exchange(x, route(case, logits), mine)
    assert y.dtype == case.dtype
    y.backward(dy)
    found = y.detach(), x.grad, logits.grad
    differences = {
        what: difference(a, b)
        for what, a, b in zip(("y", "x", "logits"), found, expected, strict=True)
        if b is not None
    }
    for name, p in mine.named_parameters():
        total = p.grad.clone()
        if groups.replicas.size > 1:
            dist.all_reduce(total, group=groups.replicas.handle)
        differences["experts." + name] = difference(
            total / groups.layout.copies, cut(reference.get_parameter(name).grad, name, groups)
        )
    return differences, traffic


def difference(a, b):
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs() / b.abs().clamp(min=1)).max().item() if a.numel() else 0.0


def layouts():
    """(name, ranks, config, experts) that reach every branch."""

    def P(**kw):
        return ParallelConfig(**kw)

    yield "flat-2", 2, P(data=2), 2
    yield "flat-2-experts-6", 2, P(data=2), 6
    yield "slices-2", 2, P(data=2, expert=1, expert_slicing=2), 3
    yield "coordinated-2", 2, P(tensor=2, exchange="coordinated"), 4
    yield "flat-replicas-4", 4, P(data=4, expert=2), 4
    yield "flat-tensor-4", 4, P(tensor=2, data=2), 4
    yield "hierarchical-2x2", 4, P(data=4, gpus_per_node=2, exchange="hierarchical"), 8
    yield "coordinated-2x2", 4, P(tensor=2, data=2, exchange="coordinated"), 4
    yield "coordinated-one-share-4", 4, P(tensor=4, expert=2, exchange="coordinated"), 4
    yield "slices-flat-4", 4, P(data=4, expert=2, expert_slicing=2), 4
    yield "slices-coordinated-4", 4, P(tensor=2, data=2, expert=2, expert_slicing=2, exchange="coordinated"), 6
    yield "hierarchical-2x4", 8, P(data=8, gpus_per_node=4, exchange="hierarchical"), 16
    yield "hierarchical-4x2", 8, P(data=8, gpus_per_node=2, exchange="hierarchical"), 8
    yield "hierarchical-inside-8", 8, P(data=8, gpus_per_node=4, expert=4, exchange="hierarchical"), 8
    yield "coordinated-8", 8, P(tensor=4, data=2, exchange="coordinated"), 8
    yield (
        "coordinated-hierarchical-8", 8,
        P(tensor=2, data=4, gpus_per_node=4, exchange="coordinated-hierarchical"), 16,
    )  # fmt: skip
    yield (
        "coordinated-hierarchical-slices-8", 8,
        P(tensor=2, data=4, gpus_per_node=2, expert=4, expert_slicing=2, exchange="coordinated-hierarchical"), 8,
    )  # fmt: skip


LAYOUTS = [pytest.param(*rest, id=name) for name, *rest in layouts()]


@pytest.mark.parametrize(("ranks", "parallel", "experts"), LAYOUTS)
def test_same_bits_as_local_where_the_arithmetic_is_the_same(on_ranks, ranks, parallel, experts):
    if parallel.expert_slicing > 1:
        pytest.skip("slices add partial sums")
    for capacity in (None, 2):
        case = Case(parallel, experts, capacity=capacity, body="scale", seed=ranks)
        for differences, _ in on_ranks(ranks, run_case, case):
            assert {k: differences[k] for k in ("y", "x", "logits")} == {"y": 0, "x": 0, "logits": 0}
            assert differences["experts.weight"] < 1e-5


@pytest.mark.parametrize(("ranks", "parallel", "experts"), LAYOUTS)
def test_equals_local(on_ranks, ranks, parallel, experts):
    for kw in (
        {"top_k": 1, "capacity": 2},
        {"top_k": 2, "capacity": 3, "seed": 1},
        {"top_k": 2, "skew": "one", "seed": 2},
        {"skew": "last", "tokens": (0, 5), "seed": 3},
        {"tokens": (0,)},
    ):
        for differences, _ in on_ranks(ranks, run_case, Case(parallel, experts, **kw)):
            assert max(differences.values()) < 1e-5, (kw, differences)


@pytest.mark.parametrize(("ranks", "parallel", "experts"), LAYOUTS)
def test_bf16_rows(on_ranks, ranks, parallel, experts):
    case = Case(parallel, experts, top_k=2, dtype=torch.bfloat16)
    for differences, _ in on_ranks(ranks, run_case, case):
        assert max(differences.values()) < 0.05, differences


@pytest.mark.parametrize(("ranks", "parallel", "experts"), LAYOUTS)
def test_input_without_gradient(on_ranks, ranks, parallel, experts):
    for differences, traffic in on_ranks(ranks, run_case, Case(parallel, experts, input_grad=False)):
        assert set(differences) > {"y", "logits"} and "x" not in differences
        assert max(differences.values()) < 1e-5
        assert ("dispatch", "backward") not in traffic.sent
