"""Every layout writes the tokens of one process; ranks that have no sequences take part without a word of their own."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moelab.config import DecoderConfig, ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.engine import parallel as engine
from moelab.engine.mesh import Mesh
from moelab.engine.placement import Placement
from moelab.inference import Generator, Sampling, set_mode
from moelab.inference.text import load_run, open_text
from moelab.models import build
from moelab.runs.execute import execute
from moelab.runs.store import RunStore

pytestmark = pytest.mark.multiprocess

SIZES = dict(hidden=32, heads=4, vocab=320, context=48, init_std=0.3)
PR = ModelConfig(layers=4, experts=(0, 4, 0, 8), residual=True, **SIZES)
DENSE = ModelConfig(layers=2, **SIZES)
WIDE = replace(PR, hidden=64)  # the cached attention of its heads is C++
GATED = replace(WIDE, layers=2, experts=(0, 4), residual=False, decoder=DecoderConfig.modern(ffn=88, qk_norm="all"))
TOP2 = ModelConfig(layers=2, experts=(0, 4), top_k=2, **SIZES)
SAMPLING = Sampling(max_new_tokens=6, temperature=0.8, top_k=50, seed=2)
PROMPTS = [
    torch.randint(320, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (7, 1, 19, 12, 8, 30, 3)
]

LAYOUTS = {
    "expert 2, top-2": (TOP2, ParallelConfig(data=2)),
    "tensor 2": (PR, ParallelConfig(tensor=2, expert=1)),
    "tensor 2, gated": (GATED, ParallelConfig(tensor=2, expert=1)),
    "slicing 2, gated": (GATED, ParallelConfig(data=2, expert=1, expert_slicing=2)),
    "tensor 2, wide": (WIDE, ParallelConfig(tensor=2)),
    "tensor 2, dense": (DENSE, ParallelConfig(tensor=2)),
    "tensor 2, expert 2, coordinated": (PR, ParallelConfig(tensor=2, exchange="coordinated")),
    "slicing 2": (PR, ParallelConfig(data=2, expert=1, expert_slicing=2)),
    "expert 4": (PR, ParallelConfig(data=4)),
    "expert 4, hierarchical 2 x 2": (PR, ParallelConfig(data=4, gpus_per_node=2, exchange="hierarchical")),
    "expert 2, slicing 2": (PR, ParallelConfig(data=4, expert=2, expert_slicing=2)),
    "expert 2 of 4 ranks": (PR, ParallelConfig(data=4, expert=2)),
    "tensor 2, expert 4, coordinated": (PR, ParallelConfig(tensor=2, data=2, exchange="coordinated")),
    "tensor 2, expert 4, both": (PR, ParallelConfig(2, 2, gpus_per_node=2, exchange="coordinated-hierarchical")),
}
BASELINE = (
    "expert 2, top-2",
    "tensor 2, gated",
    "slicing 2",
    "expert 4, hierarchical 2 x 2",
    "tensor 2, expert 4, both",
)


def random_biases(model, placements):
    """The initial ones are zero and would hide one that is lost or added on every rank."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                place = placements.get(name) or Placement.whole(tuple(parameter.shape))
                whole = torch.randn(place.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3
                for shard in place.shards:
                    shard.of(parameter).copy_(whole[shard.region])
    return model


def write(config, parallel, mode, prompts, batch=2):
    """This rank's completions of all prompts, and the draws its own sequences took."""
    torch.set_num_threads(1)
    mesh = Mesh(parallel, config.experts)
    part = engine.build(config, 0, mesh)
    model = set_mode(random_biases(part.module, part.placements), mode)
    generator = Generator(model, batch=batch, mesh=mesh)
    mine = []
    found = generator.generate(prompts, SAMPLING, on_piece=lambda piece: mine.append(piece.prompt))
    dist.barrier()
    mesh.close()
    return [c.tokens for c in found], sorted(set(mine))


def alone(config, mode, prompts):
    model = set_mode(random_biases(build(config, 0), {}), mode)
    return [c.tokens for c in Generator(model, batch=2).generate(prompts, SAMPLING)]


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "optimised") for name in LAYOUTS), *((name, "baseline") for name in BASELINE)]
)
def test_a_layout_writes_the_tokens_of_one_process(on_ranks, name, mode):
    config, parallel = LAYOUTS[name]
    expected = alone(config, mode, PROMPTS)
    for rank, (tokens, mine) in enumerate(on_ranks(parallel.ranks, write, config, parallel, mode, PROMPTS)):
        assert tokens == expected
        data = rank // parallel.tensor
        assert mine == list(range(data, len(PROMPTS), parallel.data)), "each data rank wrote its share"


@pytest.mark.parametrize("prompts", [PROMPTS[:1], []], ids=["one", "none"])
@pytest.mark.parametrize("mode", ["optimised", "baseline"])
@pytest.mark.parametrize("name", ["expert 4, hierarchical 2 x 2", "expert 2, slicing 2"])
def test_ranks_without_sequences_neither_hang_nor_skew(on_ranks, name, mode, prompts):
    config, parallel = LAYOUTS[name]
    expected = alone(config, mode, prompts)
    assert [tokens for tokens, _ in on_ranks(4, write, config, parallel, mode, prompts)] == [expected] * 4


def test_a_rank_that_ends_early_waits_for_the_others(on_ranks):
    """Rank 0 has five prompts and room for one, rank 1 four shorter ones: both keep meeting until the last token."""
    prompts = [PROMPTS[i % 7] for i in range(9)]
    expected = alone(PR, "optimised", prompts)
    found = on_ranks(2, write, PR, ParallelConfig(data=2), "optimised", prompts, 1)
    assert [tokens for tokens, _ in found] == [expected] * 2


def open_and_write(directory, cache, parallel, expert_counts):
    torch.set_num_threads(1)
    mesh = Mesh(parallel, expert_counts)
    found = open_text(directory, cache=cache, mesh=mesh).generate(["the wave", "corn", "mill"], SAMPLING)
    mesh.close()
    return found


def test_a_checkpoint_of_one_process_is_written_with_by_many(on_ranks, trained, workspace):
    expected = open_text(trained.path, cache=workspace / "data").generate(["the wave", "corn", "mill"], SAMPLING)
    for parallel in (ParallelConfig(data=2), ParallelConfig(tensor=2, exchange="coordinated")):
        args = (trained.path, workspace / "data", parallel, trained.spec.model.experts)
        assert on_ranks(2, open_and_write, *args) == [expected, expected]


def loss_on_ranks(directory, parallel, expert_counts):
    torch.set_num_threads(1)
    mesh = Mesh(parallel, expert_counts)
    model = load_run(directory, mesh=mesh).eval()
    tokens_BT = torch.arange(model.config.context)[None]
    with torch.no_grad():
        loss = float(model(tokens_BT, targets_BT=tokens_BT).loss)
    mesh.close()
    return len(tokens_BT[0]), round(loss, 5)


def test_positions_that_were_not_trained_are_not_used_on_ranks_either(on_ranks, tiny_spec, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    run = RunStore().run(replace(tiny_spec, data=replace(tiny_spec.data, context=16)))
    execute(run)
    model = load_run(run.path).eval()
    tokens_BT = torch.arange(16)[None]
    with torch.no_grad():
        expected = 16, round(float(model(tokens_BT, targets_BT=tokens_BT).loss), 5)
    for parallel in (ParallelConfig(data=2), ParallelConfig(tensor=2), ParallelConfig(data=2, expert=1, shard=True)):
        assert on_ranks(2, loss_on_ranks, run.path, parallel, tiny_spec.model.experts) == [expected, expected]
