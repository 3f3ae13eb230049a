import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from moelab import paper, simulate
from moelab.config import DecoderConfig, ExpertConfig, ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.simulate import paper_figures
from moelab.simulate.decoding import busiest_distinct, decode_sweep, distinct_experts
from moelab.simulate.exchange import all_reduce_us, collective_us
from moelab.simulate.layouts import Layouts
from moelab.simulate.search import layouts
from moelab.simulate.systems import System, slots
from tests.simulate.toy import ROUND, TOY

BARE = System("bare", 2, 1, 1, 1, 1, 1, 1, 0, 1, 1, "flat", min_capacity=2)


def test_a_dense_step_by_hand():
    """One layer, M 64, F 256, 4 sequences: every product is small, so each kernel waits for its issue, but the output head.

    10 GB/s of 20: 10,000 bytes a microsecond. Head: 8192 x 64 x 2 = 1,048,576 bytes -> 104.8576 us; operations 2 x 4 x 524,288 / (0.5 TFLOP/s
    = 500,000 a us) = 8.4 us. qkv: 24,576 bytes -> 2.4576; out 0.8192; up and down 3.2768 each. Cache: 4 x 16 x 2 x 64 x 2 bytes -> 1.6384.
    """
    model = ModelConfig(layers=1, hidden=64, heads=1, vocab=8192)
    got = simulate.decode(model, ParallelConfig(), TOY, program=BARE, batch=4, context=16, constants=ROUND)
    kernels = 2 + 1 + 1 + (2 + 1) + 1  # qkv, out, cache, one more of attention, ffn, head: issued one after the other
    # That of the step is issued behind the head.
    assert got.latency_ms == pytest.approx((kernels * 10 + 104.8576) / 1e3)
    assert got.parts_ms["attention"] == pytest.approx((2.4576 + 0.8192 + 1.6384) / 1e3)
    assert got.parts_ms["dense"] == pytest.approx(2 * 3.2768 / 1e3)
    assert got.tokens_per_s_per_gpu == pytest.approx(4 / got.latency_ms * 1e3)
    assert got.bound == "head"


def test_the_exchange_and_the_experts_by_hand():
    """4 ranks on 2 nodes of 2, 8 experts, 2 slots: each rank sends 16 rows of 128 bytes, 4 to each rank.

    Flat: 10 + 1 x 1 + 512 bytes / 10 GB/s + 2 x 4 + 1024 bytes / 1 GB/s = 10 + 1 + 0.0512 + 8 + 1.024.
    A rank reads its 2 experts: 2 x 2 products of 32,768 bytes, 3.2768 us each.
    """
    model = ModelConfig(layers=1, hidden=64, heads=1, vocab=64, experts=(8,))
    settings = {"program": BARE, "batch": 2, "context": 1, "constants": ROUND}
    flat, staged = (
        simulate.decode(model, ParallelConfig(data=4, gpus_per_node=2, exchange=exchange), TOY, **settings)
        for exchange in ("flat", "hierarchical")
    )
    assert flat.parts_ms["all_to_all"] == pytest.approx(2 * 20.0752 / 1e3)
    assert flat.parts_ms["experts"] == pytest.approx(4 * 3.2768 / 1e3)
    near, far = 10 + 1 + 8 * 128 / 1e4, 10 + 4 + 8 * 128 / 1e3
    assert staged.parts_ms["all_to_all"] == pytest.approx(2 * (near + far) / 1e3)
    one, four = all_reduce_us(np.array([1, 4]), 1000, TOY, ROUND)  # a ring in the node with halves, a tree over 2 nodes
    assert one == 0 and four == pytest.approx(10 + 2 * (1 + 500 / 1e4) + 2 * 4 + 2 * 500 / 1e3)
    half_used = replace(TOY, gpus_per_node=4)
    assert collective_us("all-reduce", 4, 2, 1000, half_used, ROUND) == four, "two nodes, of whose GPUs two take part"


def test_parts_add_up_and_latency_is_never_below_the_floor():
    """The floor: weights that must be read, over the full bandwidth."""
    for bar in paper_figures.fig10() + paper_figures.fig11() + paper_figures.fig14() + paper_figures.fig15():
        got = bar.simulate()
        assert got.latency_ms == pytest.approx(sum(got.parts_ms.values()))
        weights = (got.memory_gib["weights"] + got.memory_gib["experts"]) * 2**30
        embeddings = (bar.model.vocab + bar.model.context) * bar.model.hidden * 2
        assert got.latency_ms >= (weights - embeddings) / 1555e6


def test_distinct_experts_against_a_draw():
    rng = np.random.default_rng(0)
    for experts, tokens in ((8, 3), (128, 64), (128, 1024)):
        seen = np.mean([len(np.unique(rng.integers(0, experts, tokens))) for _ in range(400)])
        assert float(distinct_experts(experts, tokens)) == pytest.approx(seen, rel=0.03)
    busiest = []
    for _ in range(400):
        hit = np.unique(rng.integers(0, 128, 64)) // 16  # 8 ranks of 16
        busiest.append(np.bincount(hit, minlength=8).max())
    assert float(busiest_distinct(128, np.array([8]), np.array([64]))[0]) == pytest.approx(np.mean(busiest), rel=0.12)
    assert float(busiest_distinct(128, np.array([128]), np.array([4096]))[0]) == pytest.approx(1.0)
    for experts, tokens, top_k in ((64, 1, 8), (128, 16, 8), (8, 3, 2), (4, 2, 4)):
        draws = [rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :top_k] for _ in range(400)]
        seen = np.mean([len(np.unique(draw)) for draw in draws])
        assert float(distinct_experts(experts, tokens, top_k)) == pytest.approx(seen, rel=0.02)
    assert float(distinct_experts(64, 1, 8)) == pytest.approx(8), "a token never chooses an expert twice"


@pytest.mark.parametrize(("name", "gpus", "tensor"), [("1.3B+MoE-128", 8, 1), ("24B+MoE-128", 128, 8)])
def test_weights_of_all_gpus_are_the_model(name, gpus, tensor):
    """Summed over GPUs: experts once, everything else once a tensor group; against the paper's sizes."""
    model = ModelConfig.parse(name)
    got = simulate.decode(model, paper_figures.layout(model, gpus, tensor, "deepspeed"), "a100", batch=8)
    bytes_ = (got.memory_gib["experts"] * gpus + got.memory_gib["weights"] * tensor) * 2**30
    assert bytes_ / 2e9 == pytest.approx(paper.model(name).computed_B, rel=2e-3)
    pytorch, deepspeed, ours = (simulate.system(n) for n in ("pytorch", "deepspeed", "moelab"))
    assert [slots(system, model, 8, 128) for system in (pytorch, deepspeed, ours)] == [4, 1, 0]
    assert slots(deepspeed, model, 1024, 128) == 8


def test_todays_models_are_counted_too():
    """Weights of all GPUs are the model's, the cache has its heads of keys and values, a shared expert costs time."""
    plain = ModelConfig(
        layers=8, hidden=2048, heads=16, experts=(64,) * 8, top_k=8, vocab=50304, context=4096,
        decoder=DecoderConfig.modern(), expert=ExpertConfig(ffn=1024),
    )  # fmt: skip
    shared = replace(plain, decoder=replace(plain.decoder, kv_heads=4), expert=replace(plain.expert, shared=2))
    layout = ParallelConfig(data=8)
    one, two = (simulate.decode(model, layout, "a100", batch=8) for model in (plain, shared))
    for model, got in ((plain, one), (shared, two)):
        held = got.memory_gib["experts"] * 8 + got.memory_gib["weights"]
        assert held * 2**30 == pytest.approx(2 * model.parameters(), rel=1e-6)
    assert one.memory_gib["cache"] == pytest.approx(4 * two.memory_gib["cache"])
    assert two.parts_ms["dense"] > 0 == one.parts_ms["dense"]


def test_what_the_paper_says_about_variants_and_memory():
    """It served 52B on 8 GPUs, 2T on 256 (and the baseline on 128); 349B needs 32 GPUs, as PR-MoE with a student 16 (Fig 12)."""
    for bar in paper_figures.fig10() + paper_figures.fig11() + paper_figures.tutorial():
        assert bar.simulate().fits, bar
    assert simulate.least_gpus("8B+MoE-128", "a100")[0] == 32
    assert simulate.least_gpus(paper_figures.family("8B")["PR-MoE+MoS"], "a100")[0] == 16
    large = paper_figures.family("47B", layers=44)
    assert large["MoE"].parameters() / 1e12 == pytest.approx(1.5, rel=0.03)
    assert [(m.layers, m.moe_layers) for m in large.values()] == [(44, 22), (44, 22), (38, 19)], "the authors' script"
    assert not simulate.decode("175B", ParallelConfig(tensor=8), "a100").fits
    assert simulate.decode("175B", ParallelConfig(tensor=16, gpus_per_node=16), "a100").fits


SHAPES = [("1.3B+MoE-128", 64), ("24B+MoE-128", 128), ("350M+PR-MoE-32/64", 16)]


@pytest.mark.parametrize(("name", "gpus"), SHAPES)
@pytest.mark.parametrize("program", ["pytorch", "deepspeed", "moelab"])
def test_monotone(name, gpus, program):
    """More sequences take longer but give more tokens; a faster machine is not slower; a longer context neither faster nor smaller."""
    model = ModelConfig.parse(name)
    options = layouts(model, (gpus,), 8)

    def run(on="a100-40gb", **kw):
        return decode_sweep(model, options, on, program=program, **kw)

    def not_slower(fast, slow):
        return np.all(fast.latency_ms <= slow.latency_ms * (1 + 1e-12))

    base = run(batch=8)
    more, longer = run(batch=32), run(batch=8, context=2048)
    assert not_slower(base, more)
    assert np.all(more.tokens_per_s_per_gpu >= base.tokens_per_s_per_gpu)
    assert np.all(more.total > base.total)
    assert not_slower(base, longer) and np.all(longer.total > base.total)
    assert not_slower(run("a100-80gb", batch=8), base)
    assert not_slower(run("h100", batch=8), run("a100-80gb", batch=8))
    assert not_slower(base, run(batch=8, imbalance=4.0))


def test_latency_falls_as_gpus_are_added():
    """The paper's point of section 5.1: spread over more GPUs, each reads fewer experts, and the exchange must not eat that up."""
    model = ModelConfig.parse("1.3B+MoE-128")
    spread = [paper_figures.layout(model, n, 1, "deepspeed") for n in (8, 16, 32, 64, 128)]
    latency = [simulate.decode(model, p, "a100").latency_ms for p in spread]
    assert latency == sorted(latency, reverse=True)


def test_ten_thousand_layouts_take_less_than_a_second_of_a_processor():
    model = ModelConfig.parse("24B+MoE-128")
    some = layouts(model, (64, 128, 256), 8).rows
    many = list(itertools.islice(itertools.cycle(some), 10_000))
    times = []
    for _ in range(3):
        started = time.process_time()
        sweep = decode_sweep(model, Layouts(many), "a100")
        times.append(time.process_time() - started)
    assert len(sweep.latency_ms) == 10_000 and min(times) < 1.0
    one = simulate.decode(model, many[7], "a100")
    assert math.isclose(one.latency_ms, sweep.latency_ms[7], rel_tol=1e-12)
