"""What must hold for any model: more GPUs and faster machines are never worse."""

import contextlib
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab import simulate
from moelab.config import ExpertConfig, ModelConfig
from moelab.config.parallel import EXCHANGES, ParallelConfig
from moelab.simulate.constants import fitted, modern
from moelab.simulate.decoding import decode_sweep
from moelab.simulate.hardware import cluster
from moelab.simulate.layouts import Layouts
from moelab.simulate.search import OBJECTIVES
from moelab.simulate.systems import check_layout, system


@st.composite
def models(draw):
    """An MoE, plain, pyramid or residual, or a dense model."""
    layers = draw(st.integers(1, 3))
    heads = draw(st.sampled_from([4, 6, 16]))
    counts = st.sampled_from([0, 4, 6, 12, 60, 128])
    experts = tuple(draw(st.lists(counts, min_size=layers, max_size=layers)))
    return ModelConfig(
        layers=layers,
        hidden=heads * draw(st.sampled_from([64, 128])),
        heads=heads,
        experts=experts,
        top_k=draw(st.sampled_from([1, 2, 4])),
        context=draw(st.sampled_from([2048, 64])),
        residual=any(experts) and draw(st.booleans()),
        expert=ExpertConfig(ffn=draw(st.sampled_from([0, 768]))),
    )


def every_layout(model, gpus, program):
    """All layouts of nodes of 8, replicas included."""
    for P in (n for n in range(1, gpus + 1) if n <= 8 or n % 8 == 0):
        divisors = [d for d in range(1, P + 1) if P % d == 0]
        experts = product([0, *divisors], divisors, EXCHANGES) if model.is_moe else [(0, 1, "flat")]
        for tensor, (expert, slices, exchange) in product(divisors, list(experts)):
            with contextlib.suppress(ValueError):
                layout = ParallelConfig(tensor, P // tensor, expert, slices, 8, exchange)
                check_layout(system(program), model, layout)
                yield layout


def test_more_gpus_are_never_worse_where_the_experts_are_60():
    """Six GPUs divide the experts, eight do not."""
    model = ModelConfig(layers=24, hidden=2048, heads=16, experts=(60,) * 24, top_k=4)
    best = [simulate.plan(model, gpus).best.latency_ms for gpus in (6, 8, 16, 24, 32, 64)]
    assert best == sorted(best, reverse=True)


@settings(max_examples=40, deadline=None)
@given(
    model=models(),
    gpus=st.integers(1, 16),
    more=st.integers(0, 40),
    batch=st.sampled_from([1, 16]),
    program=st.sampled_from(["pytorch", "deepspeed", "engine"]),
    objective=st.sampled_from(OBJECTIVES),
)
def test_a_plan_is_the_best_of_all_layouts_and_no_worse_on_more_gpus(model, gpus, more, batch, program, objective):
    """Replicas, which the search leaves out, are not better."""
    options = Layouts([*every_layout(model, gpus, program)])
    sweep = decode_sweep(model, options, "a100", program=program, batch=batch, context=2048)
    setting = {"program": program, "objective": objective, "batches": (batch,)}
    found, larger = (simulate.plan(model, n, "a100", **setting).best for n in (gpus, gpus + more))
    if objective == "latency":
        assert found.latency_ms == pytest.approx(sweep.latency_ms[sweep.fits].min(), rel=1e-12)
        assert larger.latency_ms <= found.latency_ms
    else:
        best = sweep.tokens_per_s_per_gpu[sweep.fits].max()
        assert found.tokens_per_s_per_gpu == pytest.approx(best, rel=1e-12)
        assert larger.tokens_per_s_per_gpu >= found.tokens_per_s_per_gpu
    fewest = int(options.ranks[sweep.fits].min())
    assert simulate.least_gpus(model, "a100", program=program, batch=batch, most=gpus)[0] == fewest


FASTER_CLUSTER = ("tflops", "memory_gb_s", "near_gb_s", "far_gb_s")
SHARES = ("memory_share", "matmul_share", "near_share", "far_share")
TIMES = ("eager_us", "far_us", "near_us", "collective_us", "hop_us", "kernel_us", "exchange_us", "product_us")


def improved(where, known, what, times):
    """Return the cluster and the constants with one figure better by a factor."""
    if what in FASTER_CLUSTER[:2]:
        return replace(where, gpu=replace(where.gpu, **{what: getattr(where.gpu, what) * times})), known
    if what in FASTER_CLUSTER:
        return replace(where, **{what: getattr(where, what) * times}), known
    better = getattr(known, what) * times if what in SHARES else getattr(known, what) / times
    return where, replace(known, **{what: better})


def machines(known):
    """Yield a cluster with constants, and each of them with one figure better."""
    yield cluster("h100"), known
    for what, times in product(FASTER_CLUSTER + SHARES + TIMES, (1.01, 2.0, 16.0)):
        yield improved(cluster("h100"), known, what, times)


eager_us = st.sampled_from([1.0, 10.0, 50.0])


@settings(max_examples=40, deadline=None)
@given(
    model=models(),
    program=st.sampled_from(["megatron", "pytorch", "deepspeed"]),
    zero=st.sampled_from([0, 2]),
    overlap=st.booleans(),
    recompute=st.booleans(),
    eager_us=eager_us,
    data=st.data(),
)
def test_a_faster_machine_never_makes_a_training_step_longer(model, program, zero, overlap, recompute, eager_us, data):
    parallel = data.draw(st.sampled_from([*every_layout(model, 16, program)][::-1]))
    options = {
        "batch": parallel.data * data.draw(st.sampled_from([1, 3])),
        "pipeline": data.draw(st.sampled_from([1, 4])) if program == "megatron" else 1,
    }
    parallel = replace(parallel, recompute=recompute)
    known = replace(modern() if program == "megatron" else fitted(), eager_us=eager_us)
    steps = []
    for where, constants in machines(known):
        got = simulate.training(
            model, parallel, where, program=program, zero=zero, overlap=overlap, constants=constants, **options
        )
        assert got.step_s == pytest.approx(sum(got.parts_s.values())) and min(got.parts_s.values()) >= 0
        steps.append(got.step_s)
    assert max(steps) <= steps[0] * (1 + 1e-12)


@settings(max_examples=15, deadline=None)
@given(
    model=models(),
    program=st.sampled_from(["pytorch", "deepspeed", "engine"]),
    batch=st.sampled_from([1, 16, 256]),
    eager_us=eager_us,
)
def test_a_faster_machine_never_makes_a_decoding_step_longer(model, program, batch, eager_us):
    options = Layouts([*every_layout(model, 16, program)])
    known = replace(modern() if program == "engine" else fitted(), eager_us=eager_us)
    steps = [
        decode_sweep(model, options, where, program=program, batch=batch, constants=constants).latency_ms
        for where, constants in machines(known)
    ]
    assert (np.max(steps, axis=0) <= steps[0] * (1 + 1e-12)).all()
