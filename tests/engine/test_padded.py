"""The baseline's exchange among ranks: the results of one process, and every slot on the way, used or not."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from moelab.kernels import gate

from moelab.config import FeedForward
from moelab.config.parallel import ParallelConfig
from moelab.engine.collectives import Traffic, observe
from moelab.engine.mesh import Mesh
from moelab.engine.padded import PaddedExchange
from moelab.models.dispatch import EinsumDispatch
from moelab.models.moe import Experts
from moelab.simulate.exchange import all_to_all, rows_to_send, slice_exchange
from moelab.simulate.layouts import ExpertLayouts, Layouts

pytestmark = pytest.mark.multiprocess

E, M, F = 8, 16, 32
LOADS = {"even": [5, 5, 5, 5], "uneven": [9, 1, 0, 6], "nobody": [0, 0, 0, 0]}
LAYOUTS = {
    "expert 4": ParallelConfig(data=4, gpus_per_node=2),
    "expert 2 of 4": ParallelConfig(data=4, expert=2),
    "expert 2, slicing 2": ParallelConfig(data=4, expert=2, expert_slicing=2, gpus_per_node=2),
    "tensor 2": ParallelConfig(tensor=2, data=2),
}


def inputs(data, tokens):
    """Tokens of a data rank, how they are routed, and all experts."""
    generator = torch.Generator().manual_seed(data)
    x, logits = torch.randn(tokens, M, generator=generator), torch.randn(tokens, E, generator=generator)
    torch.manual_seed(9)
    experts = Experts(E, FeedForward(M, F))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return x, gate(logits, 2, None), experts


@torch.no_grad()
def layer(parallel, loads):
    torch.set_num_threads(1)
    mesh = Mesh(parallel, (E,))
    groups = mesh.experts(E)
    x, routing, whole = inputs(mesh.data.index, loads[mesh.data.index])
    W, w = groups.slices.size, groups.slices.index
    mine, cut = groups.local_experts, slice(w * F // W, (w + 1) * F // W)
    part = Experts(len(mine), FeedForward(M, F).slice(W))
    part.up.copy_(whole.up[mine.start : mine.stop, :, cut])
    part.up_bias.copy_(whole.up_bias[mine.start : mine.stop, cut])
    part.down.copy_(whole.down[mine.start : mine.stop, cut])
    part.down_bias.copy_(whole.down_bias[mine.start : mine.stop] * (w == 0))
    traffic = Traffic(parallel.ranks_per_node)
    with observe(traffic):
        y = PaddedExchange(groups)(x, routing, part)
    torch.testing.assert_close(y, EinsumDispatch()(x, routing, whole))
    dist.barrier()
    return int(routing.kept_E.max()), {kind: traffic.total(kind) for kind in ("dispatch", "combine", "slices")}


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_padded_slots_travel_and_the_result_is_that_of_one_process(on_ranks, name, loads):
    """What leaves a rank is what the simulator counts for a system with slots: C for every expert, whatever the tokens."""
    parallel = LAYOUTS[name]
    answers = on_ranks(4, layer, parallel, LOADS[loads])
    layouts = Layouts.of([parallel])
    spread = ExpertLayouts.of(layouts, E)
    X, W = int(spread.parallel[0]), int(spread.slices[0])
    grid = parallel.experts(E)
    for rank, (_, sent) in enumerate(answers):
        block = [a[0] for r, a in enumerate(answers) if grid.position(r).replica == grid.position(rank).replica]
        rows = rows_to_send(spread, np.array([0]), 2, max(*block, 1))
        stage, _ = all_to_all(layouts, spread, rows, parallel.ranks_per_node)
        for kind in ("dispatch", "combine"):
            got = sent[kind]
            assert got.messages == X - 1
            assert got.bytes == (stage.near_rows + stage.far_rows)[0] * M * 4
        over = slice_exchange(layouts, spread, rows, parallel.ranks_per_node)
        assert sent["slices"].messages == 2 * (W - 1)
        assert sent["slices"].bytes == 2 * (over.near_rows + over.far_rows)[0] * M * 4
