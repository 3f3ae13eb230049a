"""Training on gloo ranks: the loss curve does not depend on the layout, and a run goes on with another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moelab.config import DecoderConfig, ExpertConfig, ModelConfig, RoutingConfig, TrainConfig
from moelab.config.distill import DistillConfig
from moelab.config.parallel import ParallelConfig
from moelab.data.tokens import TokenData
from moelab.engine import checkpoint
from moelab.engine.testing import Ranks
from moelab.models import build
from moelab.training.distill import Teacher
from moelab.training.loop import TrainingStopped, train
from moelab.training.metrics import TRAIN, VALIDATION, read_rows

pytestmark = pytest.mark.multiprocess

CLOSE = ("loss", "routing_loss", "distill_loss", "grad_norm", "validation_loss", "router_entropy")
SAME = ("step", "tokens", "lr", "dropped_share", "expert_load", "validation_tokens", "max_violation", "dead_experts")


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as four, Ranks(2) as two:
        yield {4: four, 2: two}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("one")


@pytest.fixture
def run(ranks, data, tmp_path, here):
    """Trains on as many ranks as the layout asks for, or here when it is None; "one …" is trained once a file."""

    def start(
        name: str,
        layout: ParallelConfig | None,
        model: ModelConfig,
        config: TrainConfig,
        stop_after: int = 0,
        teacher: Teacher | None = None,
    ) -> Path:
        folder = (here if name.startswith("one") else tmp_path) / name
        folder.mkdir(exist_ok=True)
        if layout is None:
            train(model, config, data, 32, folder, teacher=teacher)
        else:
            ranks[layout.ranks].run(on_rank, model, config, data.folder, folder, layout, stop_after, teacher)
        return folder

    return start


def on_rank(model, config, tokens, folder, layout, stop_after, teacher) -> None:
    data = TokenData(tokens)
    asked = iter(range(1, 10_000))
    # Only one rank is told to stop: the others must hear of it.
    told = stop_after and dist.get_rank() == layout.ranks - 1

    def stop() -> bool:
        return bool(told) and next(asked) >= stop_after

    try:
        train(model, config, data, 32, folder, parallel=layout, should_stop=stop, teacher=teacher)
        assert not stop_after
    except TrainingStopped as stop:
        assert "the checkpoint is written" in str(stop)


def assert_same_curve(a: Path, b: Path) -> None:
    for file in (TRAIN, VALIDATION):
        rows_a, rows_b = read_rows(a / file), read_rows(b / file)
        assert [row["step"] for row in rows_a] == [row["step"] for row in rows_b]
        for row_a, row_b in zip(rows_a, rows_b, strict=True):
            for key in row_a.keys() & set(SAME):
                assert row_a[key] == row_b[key], (key, row_a["step"])
            for key in row_a.keys() & set(CLOSE):
                assert row_a[key] == pytest.approx(row_b[key], rel=1e-5, abs=1e-5), (key, row_a["step"])


LAYOUTS = {
    "expert 4": ParallelConfig(data=4),
    "expert 2, hierarchical": ParallelConfig(data=4, gpus_per_node=2, exchange="hierarchical"),
    "tensor 2, coordinated": ParallelConfig(tensor=2, data=2, exchange="coordinated"),
    "slicing 2, recompute": ParallelConfig(data=4, expert_slicing=2, recompute=True),
    "shard": ParallelConfig(data=4, shard=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_curve_does_not_depend_on_the_layout(run, tiny_model, tiny_train, layout):
    # Without dropout, so that tensor slicing is allowed; few steps, because rounding grows.
    model, config = replace(tiny_model, dropout=0.0), replace(tiny_train, micro_batch=1, tokens=12 * 128)
    one, many = run("one", None, model, config), run("many", LAYOUTS[layout], model, config)
    assert_same_curve(one, many)
    assert not any("busiest_rank" in row for row in read_rows(one / TRAIN))
    if layout == "expert 4":  # each rank of a group has one expert
        for row in read_rows(many / TRAIN):
            excess = [max(load) * len(load) - 1 for load in row["expert_load"].values()]
            assert row["busiest_rank"] == pytest.approx(sum(excess) / len(excess))


@pytest.mark.parametrize("layout", ["expert 4", "tensor 2, coordinated", "shard"])
def test_a_student_learns_the_same_under_any_layout(run, tiny_model, tiny_train, layout):
    """Its teacher is distributed by the student's layout."""
    student, config = replace(tiny_model, dropout=0.0), replace(tiny_train, micro_batch=1, tokens=12 * 128)
    model = replace(student, experts=(0, 4, 0, 4), residual=False)
    teacher = Teacher(
        model, run("one teacher", None, model, config), DistillConfig(schedule="stop", unit="steps", stop=9)
    )
    one = run("one student", None, student, config, teacher=teacher)
    many = run("many", LAYOUTS[layout], student, config, teacher=teacher)
    assert_same_curve(one, many)
    assert [row["step"] for row in read_rows(many / TRAIN) if row.get("distill_loss")] == [3, 6, 9]


@pytest.mark.parametrize("layout", ["expert 4", "shard"])
def test_the_balancing_bias_is_that_of_all_ranks(run, tiny_model, tiny_train, layout):
    routing = RoutingConfig(drop_tokens=False, scores="sigmoid", balance_rate=0.01, aux_loss=0.0)
    expert = ExpertConfig(ffn=48, shared=1, shared_gate=True)
    model = replace(tiny_model, dropout=0.0, residual=False, routing=routing, expert=expert)
    model = replace(model, decoder=DecoderConfig.modern(kv_heads=1))
    config = replace(tiny_train, micro_batch=1, tokens=11 * 128)  # odd: as many steps up as down would leave no bias
    one, many = run("one with a bias", None, model, config), run("many", LAYOUTS[layout], model, config)
    assert_same_curve(one, many)
    found = []
    for folder in (one, many):
        loaded = build(model, 0)
        checkpoint.load_model(checkpoint.weights_of(folder), loaded)
        found.append({name: p for name, p in loaded.named_parameters() if name.endswith("balance_bias")})
    assert len(found[0]) == 2
    for name, bias in found[0].items():
        assert torch.equal(bias, found[1][name]) and 0 < float(bias.abs().max()) < 0.01 * 11 + 1e-6


def test_a_stopped_run_goes_on_with_another_layout(run, tiny_model, tiny_train):
    config = replace(tiny_train, micro_batch=1, tokens=12 * 128, checkpoint_every=4)
    undisturbed = run("one undisturbed", None, tiny_model, config)
    moved = run("moved", ParallelConfig(data=4), tiny_model, config, stop_after=5)
    assert read_rows(moved / TRAIN)[-1]["step"] < 6
    run("moved", ParallelConfig(data=2, shard=True), tiny_model, config, stop_after=3)
    run("moved", ParallelConfig(data=2, expert_slicing=2), tiny_model, config, stop_after=2)
    run("moved", None, tiny_model, config)
    assert_same_curve(undisturbed, moved)
