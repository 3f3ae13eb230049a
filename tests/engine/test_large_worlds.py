"""The exchanges on 32 to 256 ranks: the real code, a thread a rank, collectives that copy between threads."""

import pytest
import torch
from torch import nn

from moelab import kernels
from moelab.config.parallel import ParallelConfig
from moelab.engine.exchange import Exchange
from moelab.engine.threads import World, traffic
from moelab.models.dispatch import LocalDispatch

M = 2


class Scale(nn.Module):
    """Multiplies the rows of global expert e by e + 1."""

    def __init__(self, first, count):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(first + 1.0, first + count + 1))

    def forward(self, rows_RM, offsets_E1):
        assert offsets_E1[-1] == len(rows_RM)
        return rows_RM * self.weight.repeat_interleave(offsets_E1.diff().long())[:, None]


def data(config, experts, rank, even):
    generator = torch.Generator().manual_seed(rank // config.tensor)
    S = experts if even else int(torch.randint(0, experts, (), generator=generator))
    x, dy = (torch.randn(S, M, generator=generator) for _ in range(2))
    logits = torch.randn(S, experts, generator=generator)
    if even:
        logits[torch.arange(S), torch.arange(S)] += 50
    return x.requires_grad_(), logits.requires_grad_(), dy


def run(config, experts, even, capacity=None):
    """Every rank's traffic, its results having been compared with `LocalDispatch`."""
    world = World(config, experts)
    whole = Scale(0, experts)

    def rank_(rank, groups):
        x, logits, dy = data(config, experts, rank, even)
        mine = Scale(groups.local_experts.start, len(groups.local_experts))
        y = Exchange(groups, config)(x, kernels.gate(logits, 1, capacity), mine)
        y.backward(dy)
        return y.detach(), x.grad, logits.grad, mine.weight.grad

    results, traffic = world.count(rank_)
    for d in range(config.data):
        x, logits, dy = data(config, experts, d * config.tensor, even)
        y = LocalDispatch()(x, kernels.gate(logits, 1, capacity), whole)
        y.backward(dy)
        for found in results[d * config.tensor : (d + 1) * config.tensor]:
            for a, b in zip(found, (y, x.grad, logits.grad), strict=False):
                assert torch.equal(a, b)
    total = torch.zeros(experts)
    for (*_, grad), g in zip(results, world.groups, strict=True):
        total[g.local_experts.start : g.local_experts.stop] += grad / g.layout.token_replicas
    torch.testing.assert_close(total, whole.weight.grad, rtol=1e-4, atol=1e-3)
    return traffic


P = ParallelConfig
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
    for found in run(config, experts, even=True):
        sent = found.sent["dispatch", "forward"]
        assert sent.messages == dispatch and found.sent["combine", "forward"] == sent
        back = found.total("tensor")
        assert back.intra_node_messages == 3 * gather, "gathered forward, added up by a ring backward"
        assert (back.inter_node_messages, back.inter_node_bytes) == (0, 0)
        # every row to another node crosses once, however it travels; tensor ranks that coordinate share them
        rows = (p - G) * (experts // p) // (L if config.coordinated else 1)
        assert sent.inter_node_bytes == rows * M * 4


@pytest.mark.parametrize(("exchange", "capacity"), [("hierarchical", None), ("coordinated-hierarchical", 2)])
def test_uneven_rows_on_256_ranks_with_replicas_and_slices_of_nodes(exchange, capacity):
    run(P(tensor=2, data=128, expert=64, exchange=exchange), 128, even=False, capacity=capacity)


def test_counting_is_what_a_run_counts():
    config = P(tensor=4, data=4, exchange="coordinated")
    counted = [t.sent["dispatch", "forward"] for t in traffic(config, 16, width=M)]
    assert counted == [t.sent["dispatch", "forward"] for t in run(config, 16, even=True)]


def test_a_failing_rank_ends_its_world():
    def fail(rank, groups):
        if rank == 3:
            raise ValueError("rank 3 had enough")
        groups.expert.handle.swap(groups.expert.index, None)

    with pytest.raises(ValueError, match="rank 3 had enough"):
        World(P(data=8), 8).run(fail)
