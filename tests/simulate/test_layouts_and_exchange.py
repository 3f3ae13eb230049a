"""Arrays of layouts against `moelab.config.parallel`, and counts against what the engine sends."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest

from moelab.config import DecoderConfig, ExpertConfig, ModelConfig
from moelab.config.parallel import EXCHANGES, ExpertLayout, ParallelConfig
from moelab.engine.threads import traffic
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
    ],
    ids=["4", "6", "16", "today's", "norm of all heads"],
)
def test_validity_and_shape_are_those_of_moelab_layout(model):
    experts = model.experts[1]
    columns = np.array([(*row[:5], EXCHANGES.index(row[5])) for row in GRID]).T
    ours = Layouts(*columns)  # possible and impossible ones
    valid, spread = ours.valid(model), ExpertLayouts.of(ours, experts)
    accepted = 0
    for i, (tensor, data, expert, slicing, node, exchange) in enumerate(GRID):
        try:
            config = ParallelConfig(tensor, data, expert, slicing, gpus_per_node=node, exchange=exchange)
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
    assert accepted > 200


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
    layouts, node = Layouts.of([config]), config.ranks_per_node
    spread = ExpertLayouts.of(layouts, experts)
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
