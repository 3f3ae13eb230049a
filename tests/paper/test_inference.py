"""The inference figures agree with themselves, except where a contradiction says so."""

import pytest

from moelab import paper

TPG = "throughput-per-gpu"


def value(figure, system, gpus, metric, model="1.3B+MoE-128", variant="standard"):
    rows = paper.inference_results(figure, model, system, metric).where(gpus=gpus, variant=variant)
    (row,) = [row for row in rows if row.how.startswith("read off")]
    return row.value


@pytest.mark.parametrize("system", ["pytorch", "deepspeed"])
@pytest.mark.parametrize("gpus", [8, 16, 32, 64])
def test_fig_10_batch_is_8_tokens_per_gpu(system, gpus):
    """Within the reading's range, except for the bar that `latency-32-gpus` doubts."""
    (latency,) = paper.inference_results("fig-10", system=system, metric="latency").where(gpus=gpus)
    (throughput,) = paper.inference_results("fig-10", system=system, metric=TPG).where(gpus=gpus)
    low = latency.value_low / 1e3 * throughput.value_low
    high = latency.value_high / 1e3 * throughput.value_high
    assert (low <= 8 <= high) == (system != "deepspeed" or gpus != 32)
    assert latency.value / 1e3 * throughput.value == pytest.approx(8, rel=0.03)


@pytest.mark.parametrize("system, gpus", [("pytorch", 128), ("deepspeed", 256)])
def test_fig_11_batch_is_8_tokens_per_tensor_parallel_group(system, gpus):
    model = "24B+MoE-128"
    tokens = value("fig-11", system, gpus, "latency", model) / 1e3
    tokens *= value("fig-11", system, gpus, "throughput-per-gpu", model)
    assert tokens * paper.model(model).inference_tp == pytest.approx(8, rel=0.04)


@pytest.mark.parametrize("system", ["pytorch", "deepspeed"])
@pytest.mark.parametrize("gpus", [8, 16, 32, 64])
def test_slide_23_against_fig_10(system, gpus):
    """sc22-8-gpu-bar: all bars agree with Fig 10 within their reading, except one."""
    error = abs(value("sc22-slide-23", system, gpus, "throughput") - gpus * value(*("fig-10", system, gpus), TPG))
    assert (error > 230) == (system == "deepspeed" and gpus == 8)


def test_printed_speedups():
    for system in ("deepspeed-generic", "deepspeed"):
        for gpus in (8, 32):
            (printed,) = paper.inference_results("tutorial", "1.3B+MoE-128", system, "speedup").where(gpus=gpus)
            slow, fast = (value("tutorial", which, gpus, "latency") for which in ("pytorch", system))
            assert slow / fast == pytest.approx(printed.value, rel=0.035)
    small = {"model": "2.4B+MoE-128", "metric": "latency"}
    baseline = value("tutorial", "pytorch", 8, **small)
    assert baseline / value("tutorial", "deepspeed-generic", 8, **small) == pytest.approx(1.4, abs=0.01)
    pr_moe = value("tutorial", "deepspeed-generic", 8, variant="pr-moe", **small)
    assert baseline / pr_moe == pytest.approx(1.81, abs=0.01)


def test_bars_that_disagree():
    # latency-32-gpus: the same bar in two charts
    for gpus, agree in ((8, True), (16, True), (32, False)):
        gap = value("fig-10", "pytorch", gpus, "latency") - value("tutorial", "pytorch", gpus, "latency")
        assert (abs(gap) <= 0.5) == agree
    # fig11-1t-ratio: label 7.2, bars 7.0, at most 7.19
    model = "24B+MoE-128"
    slow, fast = value("fig-11", "pytorch", 128, "latency", model), value("fig-11", "deepspeed", 256, "latency", model)
    assert slow / fast == pytest.approx(6.99, abs=0.01) and (slow + 0.6) / (fast - 0.6) == pytest.approx(7.19, abs=0.01)
    # early-10x-headline
    early = {row.system: row.value for row in paper.inference_results("early-headline")}
    assert early["pytorch"] / early["deepspeed"] > 10 and early["pytorch"] - slow > 70


def test_fig_15_cost_is_latency_times_slicing():
    savings = {row.metric: row.value for row in paper.inference_results("fig-15")}
    assert savings["speedup"] * 16 / 8 == savings["cost-saving"] == 9
