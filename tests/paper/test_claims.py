"""The claims: well-formed, and their numbers follow from the other tables."""

import re

import pytest

from moelab import paper


@pytest.mark.parametrize("row", paper.claims(), ids=lambda row: row.id)
def test_claim(row):
    assert re.fullmatch(r"[a-z0-9.]+(-[a-z0-9.]+)*", row.id) and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.experiment)
    assert row.kind in paper.KINDS and row.direction in paper.DIRECTIONS and row.testable_at in paper.TESTABLE_AT
    assert row.statement.endswith(".") and row.where and row.quantity and row.left
    assert (row.kind == "bound") or row.right
    assert row.kind != "ordering" or (row.value is None and row.unit == "")
    assert row.kind not in {"difference", "bound"} or (row.value is not None and row.unit)
    assert row.kind != "ratio" or row.unit == "x"
    assert row.direction != "equal" or row.kind == "bound" or row.testable_at == "simulated" or row.gain_of
    if row.value is not None:
        assert row.value_low is None or row.value_low <= row.value
        assert row.value_high is None or row.value <= row.value_high
    if row.kind == "ratio" and row.value is not None and row.direction != "equal":
        assert (row.value > 1) == (row.direction == "higher")
    if row.kind == "difference" and row.direction != "equal":
        assert (row.value > 0) == (row.direction == "higher")


def test_experiments_stand_in_the_order_of_the_paper():
    of_training = ("scaling", "zero-shot", "throughput", "half-moe", "top2-vs-residual", "pr-moe", "distillation")
    of_inference = ("all-to-all", "gating-kernels", "inference-scaling", "inference-large", "model-variants-latency")
    assert paper.experiments() == (*of_training, *of_inference, "moe-vs-dense-inference")
    rows = [row.experiment for row in paper.claims()]
    assert rows == sorted(rows, key=paper.experiments().index), "the claims of an experiment stand together"


def test_loss_and_task_differences_follow_from_the_tables():
    rows = [row for row in paper.claims() if row.kind == "difference" and row.id != "pr-moe-matches-moe128"]
    assert len(rows) == 12
    for row in rows:
        if row.experiment == "scaling":
            left, right = paper.loss_curve(row.left), paper.loss_curve(row.right)
            assert row.value == pytest.approx(left.final - right.final, abs=1e-4)
            assert row.value_low == pytest.approx(left.final_low - right.final_high, abs=1e-4)
            assert row.value_high == pytest.approx(left.final_high - right.final_low, abs=1e-4)
        else:
            corpus = "pile" if "(Pile)" in row.left else "internal"
            names = [name.removesuffix(" (Pile)") for name in (row.left, row.right)]
            (left,), (right,) = (paper.zero_shot(name, corpus) for name in names)
            assert row.value == pytest.approx(left.average - right.average, abs=1e-4)


def test_size_ratios_agree_with_the_computed_sizes():
    for row in paper.claims():
        if row.quantity == "total parameters":
            computed = paper.model(row.left).computed_B / paper.model(row.right).computed_B
            assert row.value_low <= computed <= row.value_high
            assert f"{computed:.3f}" in row.note


def test_retention():
    small, large = paper.claim("mos-retention-350m"), paper.claim("mos-retention-1.3b")
    for row in (small, large):
        (student,), (teacher,) = paper.zero_shot(row.left), paper.zero_shot(row.right)
        assert row.value == pytest.approx(student.average / teacher.average, abs=1e-3)
    assert small.value_high == 0.995 and "mos-350m-average" in small.conflict and not large.conflict


def test_arithmetic_claims():
    hidden = 1024
    assert 1 + 8 * hidden**2 / (24 * hidden**2) == pytest.approx(paper.claim("top2-flops-33pct").value, abs=0.005)
    ranks, per_node = 32, 8
    hops = (per_node - 1 + ranks // per_node - 1) / (ranks - 1)
    assert paper.claim("hierarchical-hops").value == pytest.approx(hops, abs=1e-4)
    volume = (1 - 1 / per_node) + (1 - per_node / ranks)  # what leaves the rank in the two steps
    assert round(volume / (1 - 1 / ranks), 2) == 1.68 and "1.68" in paper.claim("hierarchical-volume").note
    assert paper.claim("pcc-hops").value == 16 / 128
    rows = paper.inference_results("fig-10", "1.3B+MoE-128", "deepspeed", "throughput-per-gpu")
    first, last = (row.value for row in (*rows.where(gpus=8), *rows.where(gpus=64)))
    assert paper.claim("52b-superlinear").value == pytest.approx(last / first, abs=1e-3)
