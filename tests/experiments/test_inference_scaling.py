"""Inference scaling: measurements of a cluster."""

import json

import pytest

from moelab.experiments import decoding, inference_scaling, moe_vs_dense_inference
from moelab.lab import Lab


def test_measurements_of_a_cluster_are_read_and_drawn(tmp_path):
    import matplotlib.pyplot as plt

    from moelab.plotting import serving

    def row(mode, ranks, ms):
        times = {"median_ms": ms, "p95_ms": 2 * ms, "floor_ms": 1.0, "empty_collective_ms": 0.1}
        parts = {"attention": ms / 2, "all-to-all": ms / 2}
        return {"candidate": mode, "ranks": ranks, "batch": 64, "parts_ms": parts, **times}

    rows = [row(mode, ranks, ms) for ranks, ms in ((64, 4.0), (8, 9.0)) for mode in ("baseline", "optimised")]
    file = tmp_path / "decode.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = inference_scaling.measured_steps(Lab().measure, "paper", str(file))
    assert list(found["label"]) == ["8 ranks", "8 ranks", "64 ranks", "64 ranks"]
    assert decoding.speedups(found) == {"8 ranks": 1.0, "64 ranks": 1.0}
    fig, axes = plt.subplots(1, 2)
    serving.decoding_steps(found, *axes)
    for ax in axes:
        shown = {t.get_text() for t in (*ax.texts, *ax.get_yticklabels())}
        assert {"8 ranks", "64 ranks"} <= shown
    plt.close(fig)
    file.write_text("".join(json.dumps(r | {"model": m}) + "\n" for m in ("1.3B+MoE-128", "6.7B") for r in rows[:2]))
    with pytest.raises(ValueError, match=r"^inference-scaling: .*two rows of baseline at ranks 64; keep the one"):
        inference_scaling.EXPERIMENT.check({"scale": "paper", "measured_file": str(file)})
    steps = decoding.steps(Lab().measure, "moe-vs-dense-inference", {}, "paper", str(file))
    line = moe_vs_dense_inference.steps_headline(steps)
    assert line == "Step over 6.7B's: 1.3B+MoE-128 1.00", "in any order"
    file.write_text("{}")
    with pytest.raises(ValueError, match="no rows"):
        inference_scaling.measured_steps(Lab().measure, "paper", str(file))
