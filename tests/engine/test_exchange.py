"""The exchanges on real processes, the baseline's too, against `LocalDispatch` on the same arrays; what they send."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from moelab import kernels
from moelab.config import FeedForward
from moelab.config.parallel import ParallelConfig
from moelab.engine.collectives import Sent, Traffic, observe
from moelab.engine.exchange import Exchange
from moelab.engine.mesh import Mesh
from moelab.engine.padded import PaddedExchange
from moelab.models.dispatch import LocalDispatch
from moelab.models.moe import Experts
from moelab.simulate.exchange import all_to_all, rows_to_send, slice_exchange
from moelab.simulate.layouts import Layouts

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
    seed: int = 0
    input_grad: bool = True
    padded: bool = False


def whole_experts(case):
    module = Experts(case.experts, FeedForward(M, F))
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
    mine = Experts(len(groups.local_experts), FeedForward(M, F).slice(groups.slices.size))
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
    """Differences to `LocalDispatch` of y and of the gradients of x, logits and experts; with the traffic."""
    mesh = Mesh(case.parallel, [case.experts])
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
    exchange = PaddedExchange(groups) if case.padded else Exchange(groups, case.parallel)
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
    mesh.close()
    return differences, traffic


def difference(a, b):
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs() / b.abs().clamp(min=1)).max().item() if a.numel() else 0.0


P = ParallelConfig
LAYOUTS = [
    # layout, experts: they reach every branch
    pytest.param(P(data=2), 2, id="flat-2"),
    pytest.param(P(data=2), 6, id="flat-2-experts-6"),
    pytest.param(P(data=2, expert=1, expert_slicing=2), 3, id="slices-2"),
    pytest.param(P(tensor=2, exchange="coordinated"), 4, id="coordinated-2"),
    pytest.param(P(data=4, expert=2), 4, id="flat-replicas-4"),
    pytest.param(P(tensor=2, data=2), 4, id="flat-tensor-4"),
    pytest.param(P(data=4, gpus_per_node=2, exchange="hierarchical"), 8, id="hierarchical-2x2"),
    pytest.param(P(tensor=2, data=2, exchange="coordinated"), 4, id="coordinated-2x2"),
    pytest.param(P(tensor=4, expert=2, exchange="coordinated"), 4, id="coordinated-one-tensor-group-4"),
    pytest.param(P(data=4, expert=2, expert_slicing=2), 4, id="slices-flat-4"),
    pytest.param(
        P(tensor=2, data=2, expert=2, expert_slicing=2, exchange="coordinated"), 6, id="slices-coordinated-4"
    ),
    pytest.param(P(data=8, gpus_per_node=4, exchange="hierarchical"), 16, id="hierarchical-2x4"),
    pytest.param(P(data=8, gpus_per_node=2, exchange="hierarchical"), 8, id="hierarchical-4x2"),
    pytest.param(P(data=8, gpus_per_node=4, expert=4, exchange="hierarchical"), 8, id="hierarchical-inside-8"),
    pytest.param(P(tensor=4, data=2, exchange="coordinated"), 8, id="coordinated-8"),
    pytest.param(
        P(tensor=2, data=4, gpus_per_node=4, exchange="coordinated-hierarchical"), 16, id="coordinated-hierarchical-8"
    ),
    pytest.param(
        P(tensor=2, data=4, gpus_per_node=2, expert=4, expert_slicing=2, exchange="coordinated-hierarchical"), 8,
        id="coordinated-hierarchical-slices-8",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("parallel", "experts"), LAYOUTS)
def test_equals_local(on_ranks, parallel, experts):
    for kw in (
        {"top_k": 1, "capacity": 2},
        {"top_k": 2, "capacity": 3, "seed": 1},
        {"top_k": 2, "skew": "one", "seed": 2},
        {"skew": "last", "tokens": (0, 5), "seed": 3},
        {"tokens": (0,)},
        {"top_k": 2, "dtype": torch.bfloat16},
        {"input_grad": False},
    ):
        case = Case(parallel, experts, **kw)
        for differences, traffic in on_ranks(parallel.ranks, run_case, case):
            assert max(differences.values()) < (1e-5 if case.dtype == torch.float32 else 0.05), (kw, differences)
            assert ("x" in differences) == case.input_grad
            assert case.input_grad or ("dispatch", "backward") not in traffic.sent


def one_rank_routes_otherwise(case, change):
    """What the exchange raises where one of the ranks with the same tokens has another routing."""
    mesh = Mesh(case.parallel, [case.experts])
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
    finally:
        mesh.close()
    return ""


@pytest.mark.parametrize("change", ["", "expert", "order"])
def test_ranks_with_the_same_tokens_that_route_them_differently_are_told(on_ranks, change):
    case = Case(ParallelConfig(tensor=2, data=2, exchange="coordinated"), 4, tokens=(13, 8))
    for message in on_ranks(4, one_rank_routes_otherwise, case, change):
        assert message.startswith("exchange: the 2 ranks with the same tokens") == bool(change)


def test_random_cases(on_ranks):
    draw = random.Random(0)
    for seed in range(12):
        parallel, experts = draw.choice(LAYOUTS).values
        tokens = tuple(draw.choice([0, 1, 2, 3, 31, 32, 67]) for _ in range(8))
        top_k, capacity = draw.randint(1, min(3, experts)), draw.choice([None, 1, 4])
        case = Case(
            parallel, experts, top_k, capacity, tokens, draw.choice(["random", "one", "last", "even"]), seed=seed
        )
        for differences, _ in on_ranks(parallel.ranks, run_case, case):
            assert max(differences.values()) < 1e-5, (case, differences)


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


PADDED = {
    "expert 4": P(data=4, gpus_per_node=2),
    "expert 2 of 4": P(data=4, expert=2),
    "expert 2, slicing 2": P(data=4, expert=2, expert_slicing=2, gpus_per_node=2),
    "tensor 2": P(tensor=2, data=2),
}


@pytest.mark.parametrize("tokens", [(5,), (9, 1, 0, 6), (0,)], ids=["even", "uneven", "nobody"])
@pytest.mark.parametrize("name", PADDED)
def test_padded_slots_travel_and_the_result_is_that_of_one_process(on_ranks, name, tokens):
    """What leaves a rank is what the simulator counts for a system with slots: C for every expert, whatever the tokens."""
    parallel = PADDED[name]
    case = Case(parallel, 8, top_k=2, tokens=tokens, padded=True)
    busiest = [int(route(case, tokens_of(case, d)[1]).kept_E.max()) for d in range(parallel.data)]
    layouts, grid = Layouts([parallel]), parallel.experts(case.experts)
    spread = layouts.experts(case.experts)
    for rank, (differences, traffic) in enumerate(on_ranks(4, run_case, case)):
        assert max(differences.values()) < 1e-5, differences
        block = [r for r in range(parallel.ranks) if grid.position(r).replica == grid.position(rank).replica]
        C = max(1, *(busiest[r // parallel.tensor] for r in block))
        rows = rows_to_send(spread, np.array([0]), 2, C)
        stage, _ = all_to_all(layouts, spread, rows, parallel.ranks_per_node)
        over = slice_exchange(layouts, spread, rows, parallel.ranks_per_node)
        for kind, messages, sent, times in (
            ("dispatch", grid.parallel - 1, stage, 1),
            ("combine", grid.parallel - 1, stage, 1),
            ("slices", grid.slices - 1, over, 2),  # gathered before the experts, summed back after them
        ):
            got = traffic.sent.get((kind, "forward"), Sent())
            assert (got.messages, got.bytes) == (times * messages, times * (sent.near_rows + sent.far_rows)[0] * ROW)
