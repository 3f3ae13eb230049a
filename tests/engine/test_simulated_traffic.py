"""The simulator's counts are what the engine sends: same layouts, even routing, on gloo ranks."""

import numpy as np
import pytest
import torch

from moelab import kernels
from moelab.config.parallel import ParallelConfig
from moelab.engine.collectives import Sent, Traffic, observe
from moelab.engine.exchange import Exchange
from moelab.engine.mesh import Mesh
from moelab.engine.testing import identity_experts
from moelab.simulate.exchange import all_to_all, rows_to_send, share_gather, slice_exchange
from moelab.simulate.layouts import ExpertLayouts, Layouts

pytestmark = pytest.mark.multiprocess
M, SLOTS = 4, 3


@torch.no_grad()
def send(parallel, experts):
    """One layer on this rank, SLOTS tokens of each tensor group to every expert: what it sent."""
    mesh = Mesh(parallel, [experts])
    groups = mesh.experts(experts)
    logits = 50 * torch.eye(experts).repeat(SLOTS, 1)
    traffic = Traffic(parallel.ranks_per_node)
    with observe(traffic):
        Exchange(groups, parallel)(torch.randn(len(logits), M), kernels.gate(logits, 1, None), identity_experts)
    mesh.close()
    return traffic


def simulated(parallel, experts):
    """(dispatch, slices, share) as `Sent` of the worst placed rank."""
    layouts = Layouts.of([parallel])
    spread = ExpertLayouts.of(layouts, experts)
    rows = rows_to_send(spread, np.array([SLOTS * experts]), 1, 0)
    node = parallel.ranks_per_node
    stages = (
        all_to_all(layouts, spread, rows, node),
        [slice_exchange(layouts, spread, rows, node)],
        [share_gather(spread, rows)],
    )

    def total(parts, name, factor=1):
        return sum(int(np.ravel(getattr(s, name))[0] * factor) for s in parts)

    size = M * 4
    return [
        Sent(
            total(parts, "near_messages"),
            total(parts, "near_rows", size),
            total(parts, "far_messages"),
            total(parts, "far_rows", size),
        )
        for parts in stages
    ]


CASES = [
    pytest.param(*rest, id=name)
    for name, *rest in (
        ("flat-4", 4, ParallelConfig(data=4, gpus_per_node=2), 8),
        ("flat-tensor-4", 4, ParallelConfig(tensor=2, data=2, gpus_per_node=2), 4),
        ("hierarchical-4", 4, ParallelConfig(data=4, gpus_per_node=2, exchange="hierarchical"), 4),
        ("coordinated-4", 4, ParallelConfig(tensor=2, data=2, gpus_per_node=2, exchange="coordinated"), 8),
        ("hierarchical-2x4", 8, ParallelConfig(data=8, gpus_per_node=4, exchange="hierarchical"), 8),
        ("hierarchical-4x2", 8, ParallelConfig(data=8, gpus_per_node=2, exchange="hierarchical"), 16),
        ("flat-replicas-8", 8, ParallelConfig(data=8, gpus_per_node=4, expert=4), 8),
        (
            "coordinated-hierarchical-8", 8,
            ParallelConfig(tensor=2, data=4, gpus_per_node=4, exchange="coordinated-hierarchical"), 16,
        ),
        (
            "slices-8", 8,
            ParallelConfig(tensor=2, data=4, gpus_per_node=4, expert=4, expert_slicing=2, exchange="coordinated"), 8,
        ),
    )
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "parallel", "experts"), CASES)
def test_counts_equal_what_was_sent(on_ranks, ranks, parallel, experts):
    measured = on_ranks(ranks, send, parallel, experts)
    dispatch, slices, share = simulated(parallel, experts)

    def worst(*kinds):
        return max((t.total(*kinds) for t in measured), key=lambda s: (s.inter_node_messages, s.intra_node_messages))

    assert worst("dispatch") == worst("combine") == dispatch
    assert worst("tensor") == share

    def twice(s):
        return Sent(*(2 * getattr(s, f) for f in s.__dataclass_fields__))

    assert worst("slices") == twice(slices), "gathered before the experts, summed back after them"
