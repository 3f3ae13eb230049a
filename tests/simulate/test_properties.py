"""What must hold for any model: more GPUs and faster machines are never worse."""

import contextlib
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab import simulate
from moelab.config import ExpertConfig, ModelConfig
from moelab.config.parallel import EXCHANGES, ParallelConfig
from moelab.simulate.decoding import decode_sweep
from moelab.simulate.layouts import Layouts
from moelab.simulate.search import OBJECTIVES
from moelab.simulate.systems import check_layout, system


@st.composite
def models(draw):
    """An MoE, plain, pyramid or residual, or a dense model."""
    layers = draw(st.integers(1, 3))
    heads = draw(st.sampled_from([4, 6, 16]))
    counts = st.sampled_from([0, 4, 6, 12, 60, 128])
    return ModelConfig(
        layers=layers,
        hidden=heads * draw(st.sampled_from([64, 128])),
        heads=heads,
        experts=tuple(draw(st.lists(counts, min_size=layers, max_size=layers))),
        top_k=draw(st.sampled_from([1, 2, 4])),
        residual=draw(st.booleans()),
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
