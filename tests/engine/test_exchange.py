"""The exchanges on real processes against `LocalDispatch` on the same arrays."""

import functools
import random
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelab import kernels
from moelab.config import FeedForward
from moelab.config.parallel import ParallelConfig
from moelab.engine.collectives import Sent, Traffic, observe
from moelab.engine.exchange import Exchange, regroup
from moelab.engine.mesh import Mesh
from moelab.models.dispatch import LocalDispatch
from moelab.models.moe import Experts

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


class Scale(nn.Module):
    """An elementwise stand-in for experts: the same bits however rows are grouped."""

    def __init__(self, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, M))

    def forward(self, rows_RM, offsets_E1):
        weight = self.weight.to(rows_RM.dtype).repeat_interleave(offsets_E1.diff().long(), 0)
        return rows_RM * weight


@functools.lru_cache(1)
def mesh_of(parallel, experts):
    """Kept while tests ask for the same; groups that nobody lets go of keep a core busy."""
    for mesh in OPEN:
        mesh.close()
    OPEN[:] = [Mesh(parallel, [experts])]
    return OPEN[0]


OPEN = []


def whole_experts(case):
    module = Experts(case.experts, FeedForward(M, F)) if case.body == "experts" else Scale(case.experts)
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
        mine = Experts(len(groups.local_experts), FeedForward(M, F).slice(groups.slices.size))
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
    elif case.skew == "even":
        logits[torch.arange(S), torch.arange(S) % case.experts] += 50
    elif case.skew == "last":
        logits[:, : case.experts - case.top_k] -= 50
    return x.requires_grad_(case.input_grad), logits.requires_grad_(), dy


def route(case, logits):
    return kernels.gate(logits, case.top_k, case.capacity, seed=case.seed if case.capacity else None)


def run_case(case):
    """Differences to `LocalDispatch`: y, gradients of x and logits (this rank's), gradient of the experts; with the
    traffic.
    """
    mesh = mesh_of(case.parallel, case.experts)
    groups = mesh.experts(case.experts)
    reference = whole_experts(case)
    for d in range(case.parallel.data):
        x, logits, dy = tokens_of(case, d)
        y = LocalDispatch()(x, route(case, logits), reference)
        y.backward(dy)
        if d == mesh.data.index:
            expected = y.detach(), x.grad, logits.grad
    mine = rank_experts(case, groups)
    traffic = Traffic(case.parallel.ranks_per_node)
    exchange = Exchange(groups, case.parallel)
    x, logits, dy = tokens_of(case, mesh.data.index)
    with observe(traffic):
        y = exchange(x, route(case, logits), mine)
        y.backward(dy)
    assert y.dtype == case.dtype
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
            total / groups.layout.token_replicas, cut(reference.get_parameter(name).grad, name, groups)
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
    yield "coordinated-one-tensor-group-4", 4, P(tensor=4, expert=2, exchange="coordinated"), 4
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


UNSLICED = [p for p in LAYOUTS if p.values[1].expert_slicing == 1]


@pytest.mark.parametrize(("ranks", "parallel", "experts"), UNSLICED)
def test_same_bits_as_local_where_the_arithmetic_is_the_same(on_ranks, ranks, parallel, experts):
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


def one_rank_routes_otherwise(case, change):
    """What the exchange raises where one of the ranks with the same tokens has another routing."""
    mesh = mesh_of(case.parallel, case.experts)
    groups = mesh.experts(case.experts)
    x, logits, _ = tokens_of(case, mesh.data.index)
    routing = route(case, logits)
    if mesh.tensor.index == 1:
        expert_SK, kept_E = routing.expert_SK.clone(), routing.kept_E.clone()
        if change == "expert":  # a near-tie that fell the other way
            old = int(expert_SK[0, 0])
            expert_SK[0, 0] = new = (old + 1) % case.experts
            kept_E[old] -= 1
            kept_E[new] += 1
            routing = routing._replace(expert_SK=expert_SK, kept_E=kept_E)
        elif change == "order":  # as many rows to each expert, of other tokens
            routing = routing._replace(expert_SK=expert_SK.flip(0), slot_SK=routing.slot_SK.flip(0))
    try:
        Exchange(groups, case.parallel)(x, routing, rank_experts(case, groups))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("change", ["", "expert", "order"])
def test_ranks_with_the_same_tokens_that_route_them_differently_are_told(on_ranks, change):
    case = Case(ParallelConfig(tensor=2, data=2, exchange="coordinated"), 4, tokens=(13, 8))
    for message in on_ranks(4, one_rank_routes_otherwise, case, change):
        assert message.startswith("exchange: the 2 ranks with the same tokens") == bool(change)


@pytest.mark.parametrize("axes", [(2, 1, 0, 3), (0, 2, 1, 3), (3, 1, 0, 2)])
def test_rows_are_regrouped_as_by_hand(axes):
    counts = torch.randint(0, 4, (2, 3, 2, 5), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    chunks = torch.arange(int(counts.sum())).split(counts.flatten().tolist())
    places = torch.arange(counts.numel()).view(counts.shape).permute(axes).flatten().tolist()
    found = regroup(counts, axes, int(counts.sum()))
    assert torch.equal(found, torch.cat([chunks[i] for i in places])) and found.dtype == torch.int64
    assert len(regroup(torch.zeros(2, 3, 2, 5, dtype=torch.int32), axes, 0)) == 0


def test_random_cases(on_ranks):
    draw = random.Random(0)
    for seed in range(12):
        _, ranks, parallel, experts = draw.choice([*layouts()])
        tokens = tuple(draw.choice([0, 1, 2, 3, 31, 32, 67]) for _ in range(8))
        top_k, capacity = draw.randint(1, min(3, experts)), draw.choice([None, 1, 4])
        case = Case(
            parallel, experts, top_k, capacity, tokens, draw.choice(["random", "one", "last", "even"]), seed=seed
        )
        for differences, _ in on_ranks(ranks, run_case, case):
            assert max(differences.values()) < 1e-5, (case, differences)


def two_layers(case, recompute):
    """Gradients of two MoE layers in a row, gates included, with or without recomputation."""
    mesh = mesh_of(case.parallel, case.experts)
    groups = mesh.experts(case.experts)
    mine = rank_experts(case, groups)
    exchange = Exchange(groups, case.parallel)
    x, _, dy = tokens_of(case, mesh.data.index)
    gates = [torch.linspace(-1, 1, case.experts * M).sin().mul(i).view(case.experts, M) for i in (10, 20)]
    gates = [g.requires_grad_() for g in gates]

    def layer(x, gate):
        return x + exchange(x, route(case, x @ gate.T), mine)

    y = x
    for gate in gates:
        y = checkpoint(layer, y, gate, use_reentrant=False) if recompute else layer(y, gate)
    y.backward(dy)
    return [y.detach(), x.grad, *(g.grad for g in gates), *(p.grad for p in mine.parameters())]


@pytest.mark.parametrize(("ranks", "parallel", "experts"), LAYOUTS)
def test_recomputation_in_backward(on_ranks, ranks, parallel, experts):
    case = Case(parallel, experts, top_k=2, capacity=3, tokens=(9, 0, 4, 17))
    plain, recomputed = (on_ranks(ranks, two_layers, case, recompute) for recompute in (False, True))
    for a, b in zip(plain, recomputed, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
    assert sum(g.abs().sum() for g in plain[0][1:]) > 0


ROW = M * 4  # bytes


def test_traffic_of_flat_and_hierarchical(on_ranks):
    """8 ranks as 2 nodes of 4, an expert each, 3 rows from each rank to each expert."""
    found = {}
    for name in ("flat", "hierarchical"):
        case = Case(ParallelConfig(data=8, gpus_per_node=4, exchange=name), 8, tokens=(24,), skew="even")
        (found[name],) = {repr(traffic): traffic for _, traffic in on_ranks(8, run_case, case)}.values()
    rows = Sent(3, 3 * 3 * ROW, 4, 4 * 3 * ROW)
    assert found["flat"].sent == {
        ("counts", "forward"): Sent(3, 3 * 4, 4, 4 * 4),
        **{(kind, way): rows for kind in ("dispatch", "combine") for way in ("forward", "backward")},
    }
    rows = Sent(3, 2 * 3 * 3 * ROW, 1, 4 * 3 * ROW)  # twice the bytes inside the node, the same between
    assert found["hierarchical"].sent == {
        ("counts", "forward"): Sent(3, 3 * 2 * 4, 1, 4 * 4),
        **{(kind, way): rows for kind in ("dispatch", "combine") for way in ("forward", "backward")},
    }


def test_traffic_of_coordinated_and_slices(on_ranks):
    """8 ranks, tensor 4: a token travels once instead of four times, and its result is gathered by its tensor group."""
    case = Case(ParallelConfig(tensor=4, data=2, exchange="coordinated"), 8, tokens=(24,), skew="even")
    rows, mine = Sent(1, 3 * ROW), 6 * ROW
    for _, traffic in on_ranks(8, run_case, case):
        assert traffic.sent == {
            ("counts", "forward"): Sent(1, 4),
            ("check", "forward"): Sent(3, 3 * 4),
            **{(kind, way): rows for kind in ("dispatch", "combine") for way in ("forward", "backward")},
            ("tensor", "forward"): Sent(3, 3 * mine),
            ("tensor", "backward"): Sent(6, 6 * 24 * ROW // 4),  # the ring that adds up the tokens' gradients
        }
        assert traffic.total("dispatch", "combine") == Sent(4, 4 * 3 * ROW)
        assert traffic.total().intra_node_messages == 1 + 3 + 4 + 3 + 6
    case = Case(ParallelConfig(data=4, expert=2, expert_slicing=2), 2, tokens=(8, 0, 4, 0), skew="even")
    sent = [traffic.sent for _, traffic in on_ranks(4, run_case, case)]
    # Slices are ranks 0 and 2, 1 and 3; after the exchange 4, 4, 2, 2 rows lie there, and each is sent the other's sums.
    for rank, (own, other) in enumerate([(4, 2), (4, 2), (2, 4), (2, 4)]):
        assert sent[rank]["slices", "forward"] == Sent(2, (own + other) * ROW)
        assert sent[rank]["slices", "backward"] == Sent(2, (own + other) * ROW)
    assert sent[1]["dispatch", "forward"] == Sent(), "nothing to send is no message"
