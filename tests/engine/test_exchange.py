"""The exchanges, the baseline's too, against `LocalDispatch` on the same arrays, on 2 to 256 ranks; what they send.

The ranks are threads, which run the real code on collectives that copy; test_parallel.py runs it on processes.
"""

import functools
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from moelab import kernels
from moelab.config import FeedForward
from moelab.config.parallel import ParallelConfig
from moelab.engine.collectives import Sent
from moelab.engine.exchange import Exchange
from moelab.engine.threads import World, traffic
from moelab.models.dispatch import LocalDispatch
from moelab.models.moe import Experts
from moelab.simulate.exchange import all_to_all, rows_to_send, slice_exchange
from moelab.simulate.layouts import Layouts

M, F = 6, 8


@dataclass(frozen=True)
class Case:
    """One layer on ranks. `tokens`: S of data rank d is tokens[d % len]. `skew`: where tokens go. `scale`: see `Scale`."""

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
    scale: bool = False


class Scale(nn.Module):
    """Multiplies the rows of each expert by its number, to the same bits on any rank; cheap among hundreds of them."""

    def __init__(self, experts):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts))

    def forward(self, rows_RM, offsets_E1):
        assert offsets_E1[-1] == len(rows_RM)
        return rows_RM * self.weight.repeat_interleave(offsets_E1.diff().long())[:, None]


@functools.cache
def whole_experts(experts, scale):
    module = Scale(experts) if scale else Experts(experts, FeedForward(M, F))
    generator = torch.Generator().manual_seed(7)
    for p in module.parameters():
        nn.init.normal_(p, generator=generator)
    return module


def cut(tensor, name, groups):
    """This rank's part of a whole parameter (or gradient)."""
    held = groups.layout.local_experts(groups.expert.rank)
    part = tensor[held.start : held.stop]
    W, w = groups.slices.size, groups.slices.index
    dim = {"up": 2, "up_bias": 1, "down": 1}.get(name)
    return part if dim is None else part.chunk(W, dim)[w]


def rank_experts(case, groups):
    count = groups.layout.experts_per_rank
    mine = Scale(count) if case.scale else Experts(count, FeedForward(M, F).slice(groups.slices.size))
    with torch.no_grad():
        for name, p in mine.named_parameters():
            p.copy_(cut(whole_experts(case.experts, case.scale).get_parameter(name), name, groups))
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


def outcome(case, data_rank, dispatch, experts):
    """y, and the gradients of x and logits; those of the experts' parameters are added to theirs."""
    x, logits, dy = tokens_of(case, data_rank)
    y = dispatch(x, route(case, logits), experts)
    assert y.dtype == case.dtype
    y.backward(dy)
    return y.detach(), x.grad, logits.grad


def run(case, within=1e-5):
    """What each rank sends; results and gradients are those of `LocalDispatch`, with `Scale` the same bits."""
    world, whole = World(case.parallel, case.experts), whole_experts(case.experts, case.scale)
    whole.zero_grad()
    expected = [outcome(case, d, LocalDispatch(), whole) for d in range(case.parallel.data)]
    ranks = [rank_experts(case, groups) for groups in world.groups]

    def rank_(rank, groups):
        exchange = Exchange(groups, case.parallel)
        dispatch = exchange.baseline() if case.padded else exchange
        return outcome(case, rank // case.parallel.tensor, dispatch, ranks[rank])

    results, sent = world.count(rank_)
    for rank, (found, groups, mine) in enumerate(zip(results, world.groups, ranks, strict=True)):
        for a, b in zip(found, expected[rank // case.parallel.tensor], strict=True):
            same = a is b if b is None else torch.equal(a, b) if case.scale else difference(a, b) < within
            assert same, (case, rank)
        for name in dict(mine.named_parameters()):
            total = sum(ranks[r].get_parameter(name).grad for r in groups.replicas.ranks)
            theirs = cut(whole.get_parameter(name).grad, name, groups)
            assert difference(total / groups.layout.token_replicas, theirs) < within, (case, rank, name)
    return sent


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
def test_equals_local(parallel, experts):
    for kw in (
        {"top_k": 1, "capacity": 2},
        {"top_k": 2, "capacity": 3, "seed": 1},
        {"top_k": 2, "skew": "one", "seed": 2},
        {"skew": "last", "tokens": (0, 5), "seed": 3},
        {"tokens": (0,)},
        {"top_k": 2, "dtype": torch.bfloat16},
        {"input_grad": False},
    ):
        sent = run(Case(parallel, experts, **kw), 0.05 if "dtype" in kw else 1e-5)
        assert "input_grad" not in kw or not any(("dispatch", "backward") in s.sent for s in sent)


@pytest.mark.parametrize("change", ["", "expert", "order"])
def test_ranks_with_the_same_tokens_that_route_them_differently_are_told(change):
    case = Case(ParallelConfig(tensor=2, data=2, exchange="coordinated"), 4, tokens=(13, 8))

    def message(rank, groups):
        x, logits, _ = tokens_of(case, rank // 2)
        routing = route(case, logits)
        if groups.tensor.index == 1 and change == "expert":  # a near-tie that fell the other way
            expert_SK, kept_E = routing.expert_SK.clone(), routing.kept_E.clone()
            old = int(expert_SK[0, 0])
            expert_SK[0, 0] = new = (old + 1) % case.experts
            kept_E[old] -= 1
            kept_E[new] += 1
            routing = routing._replace(expert_SK=expert_SK, kept_E=kept_E)
        elif groups.tensor.index == 1 and change == "order":  # as many rows to each expert, of other tokens
            routing = routing._replace(expert_SK=routing.expert_SK.flip(0), slot_SK=routing.slot_SK.flip(0))
        try:
            Exchange(groups, case.parallel)(x, routing, rank_experts(case, groups))
        except RuntimeError as error:
            return str(error)
        return ""

    for said in World(case.parallel, case.experts).run(message):
        assert said.startswith("exchange: the 2 ranks with the same tokens") == bool(change)


def test_random_cases():
    draw = random.Random(0)
    for seed in range(12):
        parallel, experts = draw.choice(LAYOUTS).values
        tokens = tuple(draw.choice([0, 1, 2, 3, 31, 32, 67]) for _ in range(8))
        top_k, capacity = draw.randint(1, min(3, experts)), draw.choice([None, 1, 4])
        run(Case(parallel, experts, top_k, capacity, tokens, draw.choice(["random", "one", "last", "even"]), seed=seed))


ROW = M * 4  # bytes
WORLDS = [
    # ranks in words, layout, experts, messages of one dispatch, messages of the gather after combine
    pytest.param(P(data=32), 32, 31, 0, id="flat, 4 nodes of 8"),
    pytest.param(P(data=32, exchange="hierarchical"), 32, 7 + 3, 0, id="hierarchical, 4 nodes of 8"),
    pytest.param(P(tensor=8, data=16), 128, 127, 0, id="flat, 128 GPUs, tensor 8"),
    pytest.param(P(tensor=8, data=16, exchange="coordinated"), 128, 15, 7, id="coordinated, 128 GPUs, tensor 8"),
    pytest.param(P(data=256, exchange="hierarchical"), 256, 7 + 31, 0, id="hierarchical, 32 nodes of 8"),
    pytest.param(
        P(tensor=4, data=64, exchange="coordinated-hierarchical"), 512, 1 + 31, 3, id="both, 32 nodes of 8, tensor 4"
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "experts", "dispatch", "gather"), WORLDS)
def test_every_row_arrives_and_messages_are_as_the_paper_counts(config, experts, dispatch, gather):
    p, G, L = config.ranks, config.ranks_per_node, config.tensor
    for found in run(Case(config, experts, tokens=(experts,), skew="even", scale=True)):
        sent = found.sent["dispatch", "forward"]
        assert sent.messages == dispatch and found.sent["combine", "forward"] == sent
        back = found.total("tensor")
        assert back.intra_node_messages == 3 * gather, "gathered forward, added up by a ring backward"
        assert (back.inter_node_messages, back.inter_node_bytes) == (0, 0)
        # every row to another node crosses once, however it travels; tensor ranks that coordinate share them
        rows = (p - G) * (experts // p) // (L if config.coordinated else 1)
        assert sent.inter_node_bytes == rows * ROW


@pytest.mark.parametrize(("exchange", "capacity"), [("hierarchical", None), ("coordinated-hierarchical", 2)])
def test_uneven_rows_on_128_ranks_with_replicas_and_slices_of_nodes(exchange, capacity):
    layout = P(tensor=2, data=64, expert=32, exchange=exchange)  # two replicas of eight nodes
    run(Case(layout, 64, capacity=capacity, tokens=tuple(range(0, 128, 5)), scale=True))


def test_traffic_of_flat_and_hierarchical():
    """8 ranks as 2 nodes of 4, an expert each, 3 rows from each rank to each expert."""
    found = {}
    for name in ("flat", "hierarchical"):
        case = Case(ParallelConfig(data=8, gpus_per_node=4, exchange=name), 8, tokens=(24,), skew="even")
        (found[name],) = {repr(sent): sent for sent in run(case)}.values()
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


def test_traffic_of_coordinated_and_slices():
    """8 ranks, tensor 4: a token travels once instead of four times, and its result is gathered by its tensor group."""
    case = Case(ParallelConfig(tensor=4, data=2, exchange="coordinated"), 8, tokens=(24,), skew="even")
    rows, mine = Sent(1, 3 * ROW), 6 * ROW
    for found in run(case):
        assert found.sent == {
            ("counts", "forward"): Sent(1, 4),
            ("check", "forward"): Sent(3, 3 * 4),
            **{(kind, way): rows for kind in ("dispatch", "combine") for way in ("forward", "backward")},
            ("tensor", "forward"): Sent(3, 3 * mine),
            ("tensor", "backward"): Sent(6, 6 * 24 * ROW // 4),  # the ring that adds up the tokens' gradients
        }
        assert found.total("dispatch", "combine") == Sent(4, 4 * 3 * ROW)
        assert found.total().intra_node_messages == 1 + 3 + 4 + 3 + 6
    case = Case(ParallelConfig(data=4, expert=2, expert_slicing=2), 2, tokens=(8, 0, 4, 0), skew="even")
    sent = [found.sent for found in run(case)]
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
def test_padded_slots_travel_and_the_result_is_that_of_one_process(name, tokens):
    """What leaves a rank is what the simulator counts for a system with slots: C for every expert, whatever the tokens."""
    parallel = PADDED[name]
    case = Case(parallel, 8, top_k=2, tokens=tokens, padded=True)
    busiest = [int(route(case, tokens_of(case, d)[1]).kept_E.max()) for d in range(parallel.data)]
    layouts, grid = Layouts([parallel]), parallel.experts(case.experts)
    spread = layouts.experts(case.experts)
    for rank, found in enumerate(run(case)):
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
            got = found.sent.get((kind, "forward"), Sent())
            assert (got.messages, got.bytes) == (times * messages, times * (sent.near_rows + sent.far_rows)[0] * ROW)


def test_counting_is_what_a_run_counts():
    config = P(tensor=4, data=4, exchange="coordinated")
    counted = [t.sent["dispatch", "forward"] for t in traffic(config, 16, width=M)]
    assert counted == [t.sent["dispatch", "forward"] for t in run(Case(config, 16, tokens=(16,), skew="even"))]


def test_a_failing_rank_ends_its_world():
    def fail(rank, groups):
        if rank == 3:
            raise ValueError("rank 3 had enough")
        groups.expert.handle.swap(groups.expert.index, None)

    with pytest.raises(ValueError, match="rank 3 had enough"):
        World(P(data=8), 8).run(fail)
