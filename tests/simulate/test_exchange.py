"""Counts of messages and rows against what the engine sends."""

import numpy as np
import pytest

from moelab.config.parallel import ParallelConfig
from moelab.engine.threads import traffic
from moelab.simulate.exchange import all_to_all, rows_to_send, share_gather, slice_exchange
from moelab.simulate.layouts import Layouts

CASES = [
    (ParallelConfig(data=8), 16),
    (ParallelConfig(data=16), 32),
    (ParallelConfig(data=16, expert=4), 8),
    (ParallelConfig(data=32, exchange="hierarchical"), 32),  # the paper's 31 messages that become 10
    (ParallelConfig(data=32, gpus_per_node=4, exchange="hierarchical"), 64),
    (ParallelConfig(tensor=4, data=8), 32),
    (ParallelConfig(tensor=8, data=16, exchange="coordinated"), 128),  # its 127 that become 15
    (ParallelConfig(tensor=4, data=8, exchange="coordinated-hierarchical"), 64),
    (ParallelConfig(tensor=2, data=8, gpus_per_node=4, exchange="coordinated-hierarchical"), 16),
    (ParallelConfig(tensor=8, data=4, expert=2, exchange="coordinated"), 4),
    (ParallelConfig(data=16, expert_slicing=2), 8),
    (ParallelConfig(tensor=2, data=16, expert=8, expert_slicing=4, gpus_per_node=8, exchange="coordinated"), 8),
    (ParallelConfig(tensor=2, data=4, gpus_per_node=4, expert=2, expert_slicing=2), 4),
    (ParallelConfig(data=24, expert=12), 24),  # groups of 12 straddle nodes of 8
    (ParallelConfig(data=8, gpus_per_node=4, expert=4), 8),
    (ParallelConfig(tensor=2, data=2, gpus_per_node=2, exchange="coordinated"), 8),
    (ParallelConfig(tensor=2, data=4, gpus_per_node=4, expert=4, expert_slicing=2, exchange="coordinated"), 8),
]
COUNTS = ("near_messages", "near_rows", "far_messages", "far_rows")


@pytest.mark.parametrize(("config", "experts"), CASES, ids=str)
def test_counts_equal_what_the_engine_sends(config, experts):
    """One row for each expert, every rank a thread: what the rank with most messages to other nodes sends."""
    layouts, node = Layouts([config]), config.ranks_per_node
    spread = layouts.experts(experts)
    rows = rows_to_send(spread, np.array([1]), 1, 1)
    assert rows == rows_to_send(spread, np.array([experts]), 1, 0)
    sent = traffic(config, experts)
    for kind, stages, times in (
        *((kind, all_to_all(layouts, spread, rows, node), 1) for kind in ("dispatch", "combine")),
        ("slices", [slice_exchange(layouts, spread, rows, node)], 2),  # gathered, and summed back after the experts
        ("tensor", [share_gather(spread, rows)], 1),
    ):
        ours = [times * sum(float(np.ravel(getattr(s, name))[0]) for s in stages) for name in COUNTS]
        totals = [t.total(kind) for t in sent]
        most = max(totals, key=lambda t: (t.inter_node_messages, t.intra_node_messages))
        near, far = most.intra_node_bytes / 4, most.inter_node_bytes / 4
        assert ours == [most.intra_node_messages, near, most.inter_node_messages, far], kind
