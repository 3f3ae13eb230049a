"""The two clocks against an event-by-event simulation of a host and a device."""

from dataclasses import replace

import numpy as np
import pytest

from moelab import simulate
from moelab.config.parallel import ParallelConfig
from moelab.simulate import paper_figures
from moelab.simulate.clocks import WAIT, Span, kernels
from moelab.simulate.systems import SYSTEMS


def run(program, issue):
    """Kernel by kernel: when host and device are done. `program`: (count, microseconds) stretches, None where the host waits."""
    host = device = 0.0
    for stretch in program:
        if stretch is None:
            host = device = max(host, device)
            continue
        for _ in range(stretch[0]):
            host += issue
            device = max(device, host) + stretch[1]
    return host, device


def compose(program, issue):
    span = Span()
    for stretch in program:
        span = span.then(WAIT if stretch is None else kernels(stretch[0], issue, stretch[1]))
    return span


@pytest.mark.parametrize("issue", [0.0, 10.0])  # 0: a graph, which costs the host nothing
def test_spans_are_what_happens_kernel_by_kernel(issue):
    rng = np.random.default_rng(0)
    for _ in range(20):
        program = [
            None if rng.random() < 0.2 else (int(rng.integers(0, 7)), float(rng.choice([0.5, 3.0, 10.0, 200.0])))
            for _ in range(30)
        ]
        host, device = run(program, issue)
        span = compose(program, issue)
        assert float(span.ends) == pytest.approx(device)
        assert float(np.maximum(span.host_from_host, span.host_from_device)) == pytest.approx(host)
        assert float(compose(program[:13], issue).then(compose(program[13:], issue)).ends) == pytest.approx(device)


def test_counts_and_times_may_differ_from_layout_to_layout():
    counts, each = np.array([0, 1, 5]), np.array([7.0, 40.0, 2.0])
    span = Span().then(kernels(3, 10.0, 1.0)).then(kernels(counts, 10.0, each))
    expected = [run([(3, 1.0), (int(n), float(us))], 10.0)[1] for n, us in zip(counts, each, strict=True)]
    assert span.ends == pytest.approx(expected)


def test_waits_cost_and_only_where_the_device_is_behind():
    """The baseline without its waits is faster on many GPUs, where its exchanges are long; on few it hardly is."""
    never = replace(SYSTEMS["pytorch"], layer_waits=False, gate_wait=0)
    gain = {}
    for bar in paper_figures.fig10()[::2]:
        assert bar.system == "pytorch"
        free = simulate.decode(
            bar.model, bar.parallel, paper_figures.CLUSTER, program=never, context=paper_figures.CONTEXT
        )
        gain[bar.gpus] = bar.simulate().latency_ms / free.latency_ms
    assert all(g >= 1 for g in gain.values()) and gain[64] > gain[16]
    graph = replace(SYSTEMS["pytorch"], graph=True)
    got = simulate.decode("1.3B+MoE-128", ParallelConfig(data=8), "a100", program=graph)
    assert got.parts_ms["launch"] == pytest.approx(0, abs=1e-9)
