from dataclasses import replace

import numpy as np
import pytest

from moelab import simulate
from moelab.config import ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.simulate.decoding import decode_sweep
from moelab.simulate.search import best, layouts, pareto, plan, sizes
from moelab.simulate.step import training_slots

WIDE = ParallelConfig(tensor=16, data=2, gpus_per_node=16, exchange="coordinated")


def dense(**kw):
    options = {"parallel": ParallelConfig(tensor=8, data=16, recompute=True), "batch": 1024, "micro_batch": 4} | kw
    return simulate.training("6.7B", options.pop("parallel"), "a100", **options)


def test_a_training_step_holds_together():
    got = dense()
    assert got.step_s == pytest.approx(sum(got.parts_s.values()))
    assert got.samples_per_s == pytest.approx(1024 / got.step_s) and got.tokens_per_s == got.samples_per_s * 2048
    flops = 6 * ModelConfig.parse("6.7B").active_parameters() * 1024 * 2048
    assert got.tflops_per_gpu * 128 * 1e12 * got.step_s == pytest.approx(flops)
    assert got.tflops_per_gpu < 312 and got.parts_s["products"] > flops / 128 / 312e12
    assert got.days(300e9) == pytest.approx(300e9 / got.tokens_per_s / 86400)


def test_states_of_mixed_precision_adam():
    """16 bytes a parameter of the rank: 6.66 B over 8 slices."""
    got = dense()
    state = sum(got.memory_gib[k] for k in ("weights", "gradients", "optimizer")) * 2**30
    assert state == pytest.approx(16 * ModelConfig.parse("6.7B").parameters() / 8)
    one, two = dense(zero=1), dense(zero=2)
    assert one.memory_gib["optimizer"] == two.memory_gib["optimizer"] == pytest.approx(got.memory_gib["optimizer"] / 16)
    assert one.memory_gib["gradients"] == got.memory_gib["gradients"] == pytest.approx(16 * two.memory_gib["gradients"])
    assert two.memory_gib["weights"] == got.memory_gib["weights"]
    whole = simulate.training("6.7B", ParallelConfig(data=128, shard=True), "a100", batch=128)
    state = sum(whole.memory_gib[k] for k in ("weights", "gradients", "optimizer")) * 2**30
    assert state == pytest.approx(16 * ModelConfig.parse("6.7B").parameters() / 128)


def test_zero_splits_experts_over_their_replicas_in_the_optimizers_time_as_in_its_memory():
    """8 experts on 8 of 32 ranks: 4 replicas, whose state and its update are a fourth with ZeRO."""
    layout = ParallelConfig(data=32, expert=8)
    plain, one = (simulate.training("350M+MoE-8", layout, batch=32, zero=zero) for zero in (0, 1))
    held, time = (
        getattr(plain, parts)["optimizer"] / getattr(one, parts)["optimizer"] for parts in ("memory_gib", "parts_s")
    )
    assert time == pytest.approx(held) and held > 4


def test_gradients_hide_behind_what_the_host_takes_in_the_backward_pass():
    """Where the host is the bound, products of 16 times the rate do not shorten what gradients can hide behind."""
    model = ModelConfig(layers=12, hidden=1024, heads=16, experts=(0, 8) * 6, context=512)
    where, layout = simulate.cluster("h100"), ParallelConfig(data=16)
    steps = []
    for tflops in (1, 2, 16):
        faster = replace(where, gpu=replace(where.gpu, tflops=tflops * where.gpu.tflops))
        steps.append(simulate.training(model, layout, faster, batch=16, program="megatron"))
    assert steps[0].parts_s["launch"] > 0 and steps[1].step_s <= steps[0].step_s and steps[2].step_s <= steps[1].step_s


def test_a_group_that_shares_nodes_with_another_sends_over_the_network():
    """12 ranks in nodes of 8 have 4 in a node at worst, and 2 of their 3 nodes' rows leave it."""
    model = ModelConfig(layers=1, hidden=512, heads=8, experts=(24,), top_k=2)

    def exchange(cluster):
        layout = ParallelConfig(data=24, expert=12, gpus_per_node=cluster.gpus_per_node)
        settings = {"batch": 24, "program": "megatron", "overlap": False}
        return simulate.training(model, layout, cluster, **settings).parts_s["all_to_all"]

    nodes_of_8 = simulate.cluster("h100")
    assert exchange(nodes_of_8) == pytest.approx(exchange(replace(nodes_of_8, gpus_per_node=4)))


def test_slices_of_experts_exchange_rows_in_programs_of_today():
    model = ModelConfig(layers=1, hidden=512, heads=8, experts=(2,))
    layouts = [ParallelConfig(data=8, expert=2, expert_slicing=slices) for slices in (1, 4)]
    settings = {"batch": 8, "program": "megatron", "overlap": False}
    whole, sliced = (simulate.training(model, one, "h100", **settings).parts_s["all_to_all"] for one in layouts)
    assert sliced > 2 * whole


def test_what_costs_and_what_saves():
    got = dense()
    kept = dense(parallel=ParallelConfig(tensor=8, data=16))
    assert kept.step_s < got.step_s, "recomputation is work"
    assert kept.memory_gib["activations"] > got.memory_gib["activations"]
    assert got.parts_s["all_reduce"] == pytest.approx(1.5 * kept.parts_s["all_reduce"]), "backward as often as forward"
    assert got.parts_s["products"] == pytest.approx(4 / 3 * kept.parts_s["products"])
    moe = ParallelConfig(data=128, recompute=True)
    einsum, table = (
        simulate.training("1.3B+MoE-128", moe, "a100", batch=512, micro_batch=4, program=p)
        for p in ("pytorch", "deepspeed")
    )
    assert einsum.parts_s["einsums"] > 0 == table.parts_s["einsums"] and table.step_s < einsum.step_s
    assert einsum.samples_per_s > 3 * got.samples_per_s


def test_pr_moe_needs_less_memory_in_training():
    """Section 4: up to 3x, the ratio of the models' parameters, less what is not experts, where a GPU holds many of them."""
    layout = ParallelConfig(data=8, recompute=True)
    pr, plain = (simulate.training(m, layout, "a100", batch=8) for m in ("350M+PR-MoE-32/64", "350M+MoE-128"))
    states = [sum(m.memory_gib[k] for k in ("weights", "gradients", "optimizer")) for m in (plain, pr)]
    assert 2 < states[0] / states[1] < 3.2


@pytest.mark.parametrize(("recompute", "layers"), [(True, 1), (False, 12)])
def test_a_rank_keeps_the_rows_that_it_sends_to_experts_and_has_none_in_dense_layers(recompute, layers):
    model = ModelConfig.parse("1.3B+MoE-128")

    def kept(exchange):
        layout = ParallelConfig(tensor=4, data=32, exchange=exchange, recompute=recompute)
        return simulate.training(model, layout, batch=512, program="deepspeed").memory_gib["activations"] * 2**30

    rows = 128 * training_slots(model, 2048, 128)  # without coordination each of the 4 ranks sends all
    assert kept("flat") - kept("coordinated") == pytest.approx(layers * 3 / 4 * 2 * rows * (2 + 4) * 2048)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: simulate.decode("1.3B+MoE-128", ParallelConfig(tensor=3, data=1), "a100"), "16 attention heads"),
        (lambda: simulate.decode("1.3B+MoE-128", ParallelConfig(data=24, expert=24), "a100"), "do not spread evenly"),
        (lambda: simulate.decode("350M", ParallelConfig(), "a100", batch=0), "batch and context must be at least 1"),
        (lambda: simulate.decode("350M", ParallelConfig(), "a100", dtype="fp4"), "dtype must be one of"),
        (lambda: simulate.decode("350M", ParallelConfig(), "a100", imbalance=0.5), "imbalance"),
        (lambda: simulate.decode("350M", ParallelConfig(), "a100", imbalance=float("inf")), "finite, got inf"),
        (lambda: simulate.decode("350M", ParallelConfig(), "a100", dtype="fp8"), "A100-SXM4-40GB has no fp8; int8"),
        (lambda: dense(program="megatron", dtype="fp8"), "A100-SXM4-40GB has no fp8"),
        (lambda: simulate.decode("350M+MoE-32", ParallelConfig(data=16, gpus_per_node=16), "a100"), "must be the 8"),
        (lambda: simulate.decode("350M+MoE-32", ParallelConfig(data=16, gpus_per_node=4), "a100"), "must be the 8"),
        (lambda: simulate.training("350M+MoE-16", WIDE, "a100", batch=2), "8 of cluster a100-40gb, got 16"),
        (lambda: dense(batch=1000), "not a multiple of 16 data ranks x micro_batch 4"),
        (lambda: dense(micro_batch=0), "not a multiple"),
        (lambda: dense(zero=3), "zero must be 0, 1 or 2"),
        (lambda: dense(program="engine-tp"), "system engine-tp is for inference alone"),
        (lambda: simulate.plan("1.3B", 8, program="megatron"), "system megatron is for training alone"),
        (lambda: dense(dtype="fp32"), "training's dtype must be one of bf16, fp16, fp8, got 'fp32'"),
        (lambda: simulate.plan("24B+MoE-128", 8), "does not fit 8 GPUs of a100-40gb; it needs 64"),
        (lambda: simulate.plan("1.3B", 8, objective="speed"), "objective must be one of latency"),
        (lambda: simulate.plan("1.3B", 8, max_latency_ms=0.1), "is faster than"),
        (lambda: simulate.plan("1.3B", 8, max_latency_ms=-1.0), "max_latency_ms must be 0 (no limit) or more, got -1"),
        (lambda: simulate.plan("1.3B", 8, max_latency_ms=float("nan")), "no limit) or more, got nan"),
        (lambda: simulate.plan("1.3B", 0), "at least one GPU"),
    ],
)
def test_bad_queries_are_one_line(call, part):
    with pytest.raises(ValueError) as error:
        call()
    assert part in str(error.value) and "\n" not in str(error.value)


def test_sizes_fill_nodes_and_the_pareto_front():
    assert sizes(5, 8) == (1, 2, 3, 4, 5) and sizes(30, 8) == (1, 2, 3, 4, 5, 6, 7, 8, 16, 24)
    assert sizes(20, 6) == (1, 2, 3, 4, 5, 6, 12, 18), "whole nodes, whatever their size"
    latency, throughput = np.array([1.0, 2.0, 3.0, 2.5, 0.5]), np.array([1.0, 3.0, 3.0, 4.0, 9.0])
    allowed = np.array([True, True, True, True, False])
    assert pareto(latency, throughput, allowed) == [0, 1, 3]


@pytest.mark.parametrize("objective", ["latency", "throughput", "cost"])
def test_a_plan_is_the_best_of_all(objective):
    found = simulate.plan("350M+PR-MoE-32/64", 32, "a100", objective=objective, batches=(1, 8, 64), context=256)
    model = ModelConfig.parse("350M+PR-MoE-32/64")
    options = layouts(model, sizes(32, 8), 8)
    sweeps = [decode_sweep(model, options, "a100", batch=b, context=256) for b in (1, 8, 64)]
    assert found.considered == 3 * len(options) and found.best.fits
    if objective == "latency":
        assert found.best.latency_ms == pytest.approx(min(s.latency_ms[s.fits].min() for s in sweeps))
    else:
        best = max(s.tokens_per_s_per_gpu[s.fits].max() for s in sweeps)
        assert found.best.tokens_per_s_per_gpu == pytest.approx(best)
    assert found.runner_up is not None and len(found.why) >= 4
    column = "latency_ms" if objective == "latency" else "tokens_per_s_per_gpu"
    ours, other = (getattr(estimate, column) for estimate in (found.best, found.runner_up))
    said = {
        "latency": f"{other / ours - 1:.1%} higher latency",
        "throughput": f"{1 - other / ours:.1%} lower throughput",
        "cost": f"{ours / other - 1:.1%} higher cost",
    }
    assert said[objective] in "\n".join(found.why)
    front = [(e.latency_ms, e.tokens_per_s_per_gpu) for e in found.front]
    assert front == sorted(front) and [t for _, t in front] == sorted(t for _, t in front)
    assert front[0][0] == pytest.approx(min(s.latency_ms[s.fits].min() for s in sweeps))


def test_the_runner_up_loses_by_what_a_token_takes_where_batches_differ():
    found = simulate.plan("24B+MoE-128", 256, objective="throughput", batches=(32, 64), max_latency_ms=40.0)
    best, other = found.best, found.runner_up
    assert (best.batch, other.batch, other.bound) == (64, 32, "attention")
    more = {part: ms / other.batch - best.parts_ms[part] / best.batch for part, ms in other.parts_ms.items()}
    assert best.parallel.tensor == other.parallel.tensor and max(more, key=more.get) == "experts"
    assert found.why[2].endswith("lower throughput, most of it reading and multiplying experts")


def test_a_latency_bound_is_kept():
    free = simulate.plan("1.3B+MoE-128", 64, objective="throughput")
    bound = simulate.plan("1.3B+MoE-128", 64, objective="throughput", max_latency_ms=16.0)
    assert bound.best.latency_ms <= 16.0 < free.best.latency_ms
    assert bound.best.tokens_per_s_per_gpu < free.best.tokens_per_s_per_gpu


def test_a_batch_named_twice_counts_once():
    once, twice = (simulate.plan("350M+MoE-32", 8, batches=b, objective="throughput") for b in ((1, 64), (1, 1, 64)))
    assert once == twice and once.best.batch == 64


def test_a_dense_model_has_plans_too():
    found = simulate.plan("6.7B", 8, "h100", program="pytorch")
    assert found.best.parallel.tensor == 1, "the host's time would not shrink with the slices"
    assert simulate.plan("6.7B", 8, "h100", program="pytorch", batches=(1, 8)).best.bound == "launch"
    assert simulate.plan("175B", 8, "h100").best.parallel.tensor == 8


def test_the_best_layout_alone_is_that_of_the_plan():
    for model, gpus, batch in (("1.3B+MoE-128", 16, 4), ("24B+MoE-128", 128, 64), ("6.7B", 8, 1)):
        for objective, found in best(model, gpus, "a100", batch=batch, context=512, dtype="fp16").items():
            assert found == plan(model, gpus, "a100", objective=objective, batches=[batch], context=512).best
    assert best("175B", 1, "a100", batch=1, context=512, dtype="fp16") == {}
