"""Arrays of layouts against `moelab.config.parallel`, and counts against enumeration over all ranks."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest

from moelab.config import DecoderConfig, ExpertConfig, ModelConfig
from moelab.config.parallel import EXCHANGES, ExpertLayout, ParallelConfig
from moelab.simulate.exchange import all_to_all, rows_to_send, share_gather, slice_exchange
from moelab.simulate.layouts import ExpertLayouts, Layouts

GRID = list(itertools.product((1, 2, 3, 4, 8), (1, 2, 4, 8, 16), (0, 1, 2, 3, 8), (1, 2, 4), (4, 8), EXCHANGES))


TODAY = ModelConfig(
    layers=2, hidden=96, heads=8, experts=(0, 16), top_k=4, expert=ExpertConfig(ffn=24, shared=3, shared_ffn=20),
    decoder=DecoderConfig.modern(kv_heads=2, head_size=16, qk_norm="head", ffn=200),
)  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [
        *(ModelConfig(layers=2, hidden=96, heads=8, experts=(0, experts)) for experts in (4, 6, 16)),
        TODAY,
        replace(TODAY, decoder=replace(TODAY.decoder, kv_heads=0, qk_norm="all")),
        replace(TODAY, dispatch="einsum"),
    ],
    ids=["4", "6", "16", "today's", "norm of all heads", "experts on one rank"],
)
def test_validity_and_shape_are_those_of_moelab_layout(model):
    experts = model.experts[1]
    columns = np.array([(*row[:5], EXCHANGES.index(row[5])) for row in GRID]).T
    ours = Layouts(*columns)  # possible and impossible ones
    valid, spread = ours.valid(model), ExpertLayouts.of(ours, experts)
    accepted = 0
    for i, (tensor, data, expert, slicing, node, exchange) in enumerate(GRID):
        try:
            config = ParallelConfig(
                tensor=tensor, data=data, expert=expert, expert_slicing=slicing, gpus_per_node=node, exchange=exchange
            )
            model.check_layout(config)
            theirs = config.experts(experts)
        except ValueError:
            assert not valid[i], GRID[i]
            continue
        accepted += 1
        assert valid[i], GRID[i]
        assert ours.config(i) == config
        for f in fields(ExpertLayout):
            value = np.broadcast_to(getattr(spread, f.name), len(GRID))[i]
            assert value == getattr(theirs, f.name), (config, experts, f.name)
    assert accepted > (200 if model.dispatch == "local" else 50)


def enumerate_rank(config, layout, rank, slots, per_node):
    """What a rank sends, hop by hop, found by asking where every row of every expert goes; `slots` rows an expert.

    Returns (dispatch, slices, share), each {destination: rows} counted per hop.
    """
    P = config.ranks
    here = layout.position(rank)
    hops = []

    def owner(expert):
        """The rank of this rank's replica and slice that holds an expert."""
        return next(
            r
            for r in range(P)
            if expert in layout.local_experts(r)
            and (layout.position(r).replica, layout.position(r).slice) == (here.replica, here.slice)
        )

    own = [
        e for e in range(layout.experts) if not config.coordinated or layout.position(owner(e)).tensor == here.tensor
    ]
    if config.hierarchical and layout.nodes > 1:
        near, far = {}, {}
        for e in own:
            goal = layout.position(owner(e))
            step = next(
                r
                for r in range(P)
                if (p := layout.position(r)).node == here.node
                and (p.replica, p.slice, p.local, p.tensor) == (here.replica, here.slice, goal.local, goal.tensor)
            )
            near[step] = near.get(step, 0) + slots
        # By symmetry it then holds, for each node, as many rows as it kept for each node, from every rank of its node.
        for node in range(layout.nodes):
            goal = next(
                r
                for r in range(P)
                if (p := layout.position(r)).node == node
                and (p.replica, p.slice, p.local, p.tensor) == (here.replica, here.slice, here.local, here.tensor)
            )
            peers = layout.local * (1 if config.coordinated else layout.tensor)
            far[goal] = slots * layout.experts_per_rank * peers
        hops = [near, far]
    else:
        flat = {}
        for e in own:
            flat[owner(e)] = flat.get(owner(e), 0) + slots
        hops = [flat]
    rows = slots * len(own)
    slices = {
        r: rows
        for r in range(P)
        if (p := layout.position(r)).replica == here.replica and p.expert == here.expert and p.slice != here.slice
    }
    share = {
        r: rows
        for r in range(P)
        if config.coordinated
        and (p := layout.position(r)).tensor != here.tensor
        and (p.replica, p.slice, p.node, p.local) == (here.replica, here.slice, here.node, here.local)
    }
    return hops, slices, share


def add_up(hops, rank, per_node):
    """(near messages, near rows, far messages, far rows) of what goes to others."""
    out = [0, 0, 0, 0]
    for hop in hops:
        for goal, rows in hop.items():
            if goal != rank and rows:
                far = 2 * (goal // per_node != rank // per_node)
                out[far] += 1
                out[far + 1] += rows
    return out


CASES = [
    (ParallelConfig(data=8), 16),
    (ParallelConfig(data=16), 32),
    (ParallelConfig(data=16, expert=4), 8),
    (ParallelConfig(data=16, exchange="hierarchical"), 16),
    (ParallelConfig(data=32, gpus_per_node=4, exchange="hierarchical"), 64),
    (ParallelConfig(tensor=4, data=8), 32),
    (ParallelConfig(tensor=4, data=8, exchange="coordinated"), 32),
    (ParallelConfig(tensor=4, data=8, exchange="coordinated-hierarchical"), 64),
    (ParallelConfig(tensor=2, data=8, gpus_per_node=4, exchange="coordinated-hierarchical"), 16),
    (ParallelConfig(tensor=8, data=4, expert=2, exchange="coordinated"), 4),
    (ParallelConfig(data=16, expert_slicing=2), 8),
    (ParallelConfig(tensor=2, data=16, expert=8, expert_slicing=4, gpus_per_node=8, exchange="coordinated"), 8),
    (ParallelConfig(tensor=2, data=4, gpus_per_node=4, expert=2, expert_slicing=2), 4),
    (ParallelConfig(data=24, expert=12), 24),  # groups of 12 straddle nodes of 8
]


@pytest.mark.parametrize(("config", "experts"), CASES, ids=str)
def test_counts_equal_an_enumeration_over_ranks(config, experts):
    per_node, slots = config.ranks_per_node, 3
    layout, layouts = config.experts(experts), Layouts.of([config])
    spread = ExpertLayouts.of(layouts, experts)
    rows = rows_to_send(spread, np.array([1]), 1, slots)
    found = [enumerate_rank(config, layout, r, slots, per_node) for r in range(config.ranks)]
    for stages, part in (
        (all_to_all(layouts, spread, rows, per_node), 0),
        ([slice_exchange(layouts, spread, rows, per_node)], 1),
        ([share_gather(spread, rows)], 2),
    ):
        ours = [
            sum(float(np.ravel(getattr(s, name))[0]) for s in stages)
            for name in ("near_messages", "near_rows", "far_messages", "far_rows")
        ]
        counted = [add_up(f[0] if part == 0 else [f[part]], r, per_node) for r, f in enumerate(found)]
        assert ours == max(counted, key=lambda c: c[2]), part


def test_the_papers_hops():
    """Section 5.3: 31 messages become 10 on 4 nodes of 8; 128 GPUs in 8 slices talk to 15 others instead of 127."""

    def messages(config, experts):
        layouts = Layouts.of([config])
        spread = ExpertLayouts.of(layouts, experts)
        stages = all_to_all(layouts, spread, np.array([128.0]), 8)
        return sum(int((s.near_messages + s.far_messages)[0]) for s in stages)

    assert messages(ParallelConfig(data=32), 32) == 31
    assert messages(ParallelConfig(data=32, exchange="hierarchical"), 32) == 7 + 3
    assert messages(ParallelConfig(tensor=8, data=16), 128) == 127
    assert messages(ParallelConfig(tensor=8, data=16, exchange="coordinated"), 128) == 15


def test_hierarchical_keeps_far_rows_and_nearly_doubles_all():
    flat, staged = (
        all_to_all(layouts, ExpertLayouts.of(layouts, 32), np.array([64.0]), 8)
        for layouts in (Layouts.of([ParallelConfig(data=32, exchange=x)]) for x in ("flat", "hierarchical"))
    )
    assert sum(s.far_rows[0] for s in flat) == sum(s.far_rows[0] for s in staged) == 64 * 24 / 32
    assert sum(s.near_rows[0] for s in staged) == 64 * 7 / 8
