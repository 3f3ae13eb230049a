"""Layouts are arithmetic: every one the paper uses, at any size, without a process."""

from dataclasses import replace

import pytest

from moelab.config import DecoderConfig, ExpertConfig, ModelConfig, TrainConfig
from moelab.config.parallel import EXCHANGES, ParallelConfig

P = ParallelConfig
FINE = ModelConfig(2, 32, 4, (0, 4), decoder=DecoderConfig(ffn=66), expert=ExpertConfig(ffn=21))


def test_pr_moe_gets_its_own_expert_parallelism_per_layer():
    """Section 4.1.3: 128 GPUs, layers of 32, 64 and 128 experts: EP {32, 64, 128} x expert-data {4, 2, 1}."""
    config = ParallelConfig(data=128)
    layouts = [config.experts(e) for e in (32, 64, 128)]
    assert [(x.parallel, x.replicas, x.experts_per_rank) for x in layouts] == [(32, 4, 1), (64, 2, 1), (128, 1, 1)]
    model = ModelConfig.parse("350M+PR-MoE-32/64")
    ParallelConfig(data=64).check(model.experts, heads=model.heads, ffn=model.ffn)
    assert ParallelConfig(data=64).experts(32).replicas == 2


def test_figure_7():
    """16 GPUs, 8 experts, tensor slicing 4: EP 8, expert slicing 2, slices of expert i on GPUs i and i + 8."""
    config = ParallelConfig(tensor=4, data=4, expert_slicing=2, gpus_per_node=4)
    layout = config.experts(8)
    assert (layout.parallel, layout.slices, layout.replicas) == (8, 2, 1)
    for expert in range(8):
        holders = [rank for rank in range(16) if expert in layout.local_experts(rank)]
        assert holders == [expert, expert + 8]
        assert [layout.position(rank).slice for rank in holders] == [0, 1]


def test_a_size_has_to_suit_only_what_cuts_it():
    FINE.check_layout(P(tensor=2, data=4))
    FINE.check_layout(P(data=9, expert=1, expert_slicing=3, gpus_per_node=9))
    even = replace(FINE, expert=ExpertConfig(ffn=20))
    even.check_layout(P(data=4, expert_slicing=4))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    "tensor, data, slicing, node, experts", [(1, 8, 1, 4, 16), (2, 4, 1, 4, 8), (4, 4, 2, 4, 8), (8, 32, 1, 8, 128)]
)
def test_grid_and_position_agree(exchange, tensor, data, slicing, node, experts):
    config = ParallelConfig(tensor, data, expert_slicing=slicing, gpus_per_node=node, exchange=exchange)
    layout = config.experts(experts)
    grid = layout.grid()
    for rank in range(config.ranks):
        p = layout.position(rank)
        assert grid[p.replica, p.slice, p.node, p.local, p.tensor] == rank
        assert grid.reshape(layout.replicas, layout.slices, layout.parallel)[p.replica, p.slice, p.expert] == rank
        assert rank % tensor % layout.tensor == p.tensor
    held = [e for rank in grid[0, 0].ravel() for e in layout.local_experts(int(rank))]
    assert held == list(range(experts))
    # A (node, local, share) row never leaves its node when the layer spans several.
    if layout.nodes > 1:
        assert (grid // node == grid[..., :1, :1] // node).all()
    nodes = config.dense_grid() // config.ranks_per_node
    assert (nodes == nodes[:, :1]).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: P(tensor=3, data=8), "tensor 3 does not divide the 8 ranks of a node"),
        (lambda: P(data=12), "12 ranks .* do not fill nodes of 8"),
        (lambda: P(tensor=0), "tensor must be 1 to 1,048,576, got 0"),
        (lambda: P(data=10**30), "data must be 1 to 1,048,576"),
        (lambda: P(tensor=8, data=1 << 20), "8,388,608 ranks"),
        (lambda: P(exchange="ring"), "exchange must be one of .flat"),
        (lambda: P(tensor=2, data=4, shard=True), "shard needs tensor = 1"),
        (lambda: P(data=8, expert_slicing=3), r"expert_slicing 3 does not divide 8 ranks; allowed: \[1, 2, 4, 8\]"),
        (lambda: P(data=32).experts(48), r"48 experts .* evenly over 32 ranks; allowed .*\[1, 2, 4, 8, 16\]"),
        (lambda: P(data=8, expert_slicing=4, expert=4).experts(4), r"need a multiple of 16 ranks, got 8; .*\[1, 2\]"),
        (lambda: P(data=8).experts(6), r"6 experts over 6 ranks need a multiple of 6 ranks, got 8; allowed .*\[1, 2\]"),
        (lambda: P(tensor=4, data=3, gpus_per_node=4).experts(6), "must divide one another"),
        (lambda: P(data=24, exchange="hierarchical").experts(12), "needs whole nodes of 8"),
        (lambda: P(tensor=8).check((0, 0), heads=12, ffn=64), r"tensor 8 .* 12 attention heads; allowed: \[1, 2, 3"),
        (
            lambda: ModelConfig(1, hidden=32, heads=4, decoder=DecoderConfig(kv_heads=2)).check_layout(P(tensor=4)),
            r"tensor 4 does not divide the model's 2 key-value heads; allowed: \[1, 2\]",
        ),
        (lambda: P(data=8).check((0, 6), heads=8, ffn=64), r"\(layer 2\)"),
        (
            lambda: TrainConfig().check_layout(ModelConfig(1, 32, 4, dropout=0.1), P(tensor=2)),
            "dropout with tensor slicing is not supported",
        ),
        (
            lambda: FINE.check_layout(P(data=8, expert_slicing=2)),
            "expert_slicing 2 does not divide the experts' .* 21$",
        ),
        (lambda: FINE.check_layout(P(tensor=4, data=2)), "tensor 4 does not divide the feed-forward size 66"),
        (
            lambda: TrainConfig(batch_size=12, micro_batch=4).check_layout(ModelConfig(1, 32, 4), P(data=4)),
            "3 micro-batches a step .* do not spread over 4 data ranks; choose a micro_batch that divides 3",
        ),
    ],
)
def test_impossible_layouts_name_the_constraint(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
