"""The grid of simulated layouts: models of today stand beside public measurements."""

import pytest

from moelab import simulate
from moelab.config.parallel import ParallelConfig
from moelab.experiments import what_if
from moelab.plotting.serving import CLUSTER_MARKS
from moelab.simulate.published import MODELS


def test_models_of_today_are_published_ones():
    assert set(what_if.TODAY) <= set(MODELS) and set(what_if.TODAY) <= set(what_if.MODELS["cpu"])
    assert len(CLUSTER_MARKS) >= len(simulate.clusters())


def test_a_step_has_its_range_and_the_nearest_measurement():
    today = {"program": "engine", "dtype": "fp8", "batch": 8, "context": 1024}
    step = simulate.decode("deepseek-v3", ParallelConfig(data=8), "h200", **today)
    beside = what_if.beside_measurements("deepseek-v3", step)
    assert beside["low_ms"] < step.latency_ms < beside["high_ms"]
    assert beside["nearest"] == "12.8 ms a token, batch 8, SGLang on h200"
    assert what_if.beside_measurements("qwen3-30b", step)["nearest"] == ""


def test_a_cache_that_fits_nowhere_is_one_line(monkeypatch):
    def plan(*given, **settings):
        raise ValueError("plan: it does not fit")

    monkeypatch.setattr(simulate, "plan", plan)
    with pytest.raises(ValueError, match=r"^what-if: no model fits any cluster with 10000000000 tokens"):
        what_if.grid("smoke", 10**10)
