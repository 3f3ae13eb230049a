import gc
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moelab.config import RoutingConfig
from moelab.config.parallel import ParallelConfig
from moelab.engine import checkpoint
from moelab.engine.checkpoint import storage
from moelab.engine.launch import process
from moelab.engine.mesh import Mesh
from moelab.environment import HEARTBEAT
from moelab.models import build
from moelab.training import loop
from moelab.training import trainer as trainer_module
from moelab.training.loop import TrainingDiverged, TrainingStopped, evaluate, train
from moelab.training.metrics import TRAIN, VALIDATION, Metrics, Window, missing_rows, read_rows
from moelab.training.schedule import branch_learning_rate, learning_rate
from moelab.training.trainer import Trainer
from tests.conftest import numbers, stop_after


@pytest.fixture
def run(tiny_model, tiny_train, data):
    """`run(folder, **options)`: train the small model, or go on with it."""
    return lambda folder, **options: train(tiny_model, tiny_train, data, 32, folder, **options)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(run, shared):
    """The folder of an undisturbed run, which is trained once."""
    run(shared)
    return shared


@pytest.fixture
def cut(run, tmp_path):
    """The folder of a run that was stopped at step 12, with checkpoints of steps 10 and 12."""
    with pytest.raises(TrainingStopped, match="stopped at step 12 of 24"):
        run(tmp_path / "cut", should_stop=stop_after(12))
    return tmp_path / "cut"


def test_learns_and_reports(tiny_model, tiny_train, data, tmp_path):
    config = replace(tiny_train, tokens=120 * 128, tensorboard=True)
    seen = []
    result = train(tiny_model, config, data, 32, tmp_path, on_progress=seen.append)
    assert result["validation_loss"] < data.unigram_loss - 0.5
    assert result["steps"] == 120 and seen[-1].step == 120
    assert set(result["validation_by_domain"]) == {"sea", "field"}
    parts = result["validation_by_pair"].values()
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    whole = sum(part["share"] * part["loss"] for part in parts)
    assert whole == pytest.approx(result["validation_loss"], rel=0.01)  # domains are weighted by their whole text
    assert result["bits_per_byte"] == pytest.approx(result["validation_loss"] / math.log(2) / data.bytes_per_token())
    rows = read_rows(tmp_path / TRAIN)
    assert [row["step"] for row in rows] == list(range(3, 121, 3))
    assert rows[0]["expert_load"].keys() == {"2", "4"}
    assert all(sum(load) == pytest.approx(1.0) for row in rows for load in row["expert_load"].values())
    assert all(0 <= row["dropped_share"] < 1 for row in rows) and any(row["dropped_share"] > 0 for row in rows)
    assert [row["step"] for row in read_rows(tmp_path / VALIDATION)][:2] == [0, 8]
    assert list((tmp_path / "tensorboard").iterdir())
    assert rows[0]["router_entropy"] > 0.9, "a router begins undecided"
    for row in rows:
        assert 0 <= row["max_violation"] <= 3, "with four experts, the busiest has at most four shares"
        assert 0 <= row["dead_experts"] < 1 and 0 < row["load_entropy"] <= 1 and 0 < row["router_entropy"] <= 1
        assert row["balance"].keys() == row["load_percentiles"].keys() == {"2", "4"}
        assert row["load_percentiles"]["4"][-1] == pytest.approx(max(row["expert_load"]["4"]) * 4)


def test_a_training_until_its_last_step_leaves_the_last_validation_to_others(run, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_LAST_VALIDATION", None)  # nobody asks for it
    assert run(tmp_path, until=24) == {}
    assert [row["step"] for row in read_rows(tmp_path / VALIDATION)][-1] == 24


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5, 17])
def test_a_stopped_and_resumed_run_is_the_undisturbed_one(step, run, whole, tmp_path):
    with pytest.raises(TrainingStopped, match=f"stopped at step {step} of 24"):
        run(tmp_path, should_stop=stop_after(step))
    run(tmp_path)
    assert numbers(tmp_path) == numbers(whole)


def test_a_full_disk_leaves_the_earlier_checkpoint(run, whole, tmp_path, monkeypatch):
    """And a stop on one claims none."""
    calls, real = iter(range(100)), storage.save_file

    def full(tensors, path):
        if next(calls) >= 2:  # the first checkpoint has two files
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        real(tensors, path)

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "cut")
    folder = tmp_path / "cut" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-00000005"], "nothing half-written is left"
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "stopped", should_stop=stop_after(2))
    monkeypatch.setattr(storage, "save_file", real)
    run(tmp_path / "cut")
    assert numbers(tmp_path / "cut") == numbers(whole)


def test_divergence_names_step_and_checkpoint(tiny_model, tiny_train, data, tmp_path):
    config = replace(tiny_train, lr=1e30, min_lr=0.0, warmup_tokens=6 * 128, clip=0.0, weight_decay=0.0)
    config = replace(config, checkpoint_every=1)
    with pytest.raises(TrainingDiverged) as error:
        train(tiny_model, config, data, 32, tmp_path)
    assert "at step 2" in str(error.value) and "step-00000001" in str(error.value) and "\n" not in str(error.value)
    assert checkpoint.latest(tmp_path / "checkpoints").step == 1, "no checkpoint of the diverged model"


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_a_model_that_is_not_finite_leaves_no_checkpoint(what, run, whole, tmp_path, monkeypatch):
    """The loss stays finite where no token meets the bad number: the last checkpoint is still a good one."""
    step = Trainer.step

    def broken(self, number, *rest):
        done = step(self, number, *rest)
        if number == 9:
            weight = self.model.module.get_parameter("blocks.1.ffn.experts.up_bias")
            with torch.no_grad():
                (weight if what == "weight" else self.optimizer.state[weight]["exp_avg"])[0, 0] = math.inf
        return done

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(TrainingDiverged, match=r"a weight or moment is nan at step 10; the last good .*step-00000005"):
        run(tmp_path)
    assert checkpoint.latest(tmp_path / "checkpoints").step == 5
    monkeypatch.setattr(Trainer, "step", step)
    run(tmp_path)
    assert numbers(tmp_path) == numbers(whole)


def test_a_checkpoint_of_other_data_is_refused(data, cut, run, monkeypatch):
    monkeypatch.setattr(data, "fingerprint", "other")
    with pytest.raises(ValueError, match="was written with other data"):
        run(cut)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"vocab": 200}, "the model's embedding only 200"),
        ({"context": 16}, "longer than the model's context of 16"),
        ({"device": "cuda"}, "no CUDA device is available; allowed here: cpu"),
        (
            {"routing": RoutingConfig(aux_scope="step"), "micro_batch": 2},
            "needs one micro-batch per data rank, got 2 on 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, part, tiny_model, tiny_train, data, tmp_path):
    if "device" in change and torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    model, config = (
        replace(c, **{name: value for name, value in change.items() if name in vars(c)})
        for c in (tiny_model, tiny_train)
    )
    with pytest.raises(ValueError, match=part):
        train(model, config, data, 32, tmp_path)


def test_micro_batches_give_the_gradient_of_the_whole_batch(tiny_model, tiny_train, data):
    dense = replace(tiny_model, experts=(), residual=False, dropout=0.0)
    weights = []
    for micro in (0, 1, 2):
        config = replace(tiny_train, micro_batch=micro)
        trainer = Trainer(dense, config, loop.TrainBatches(data, 4, 32, 0), 32)
        trainer.step(0, Window())
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.module.parameters()]))
    for other in weights[1:]:
        # Adam's first step is lr * sign(gradient): rounding may flip the sign of a gradient that is nothing.
        assert (weights[0] - other).abs().gt(1e-6).float().mean() < 2e-3


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_no_recomputed_block_outlives_its_micro_batch(scores, tiny_model, tiny_train, data, monkeypatch):
    """With sigmoid scores and no z-loss, nothing runs the gate's backward pass, which held the block's input."""
    model = replace(tiny_model, routing=replace(tiny_model.routing, scores=scores))
    mesh = Mesh(ParallelConfig(recompute=True), model.experts, "cpu")
    trainer = Trainer(model, replace(tiny_train, micro_batch=1), loop.TrainBatches(data, 4, 32, 0), 32, mesh)
    alive = []
    agree = trainer._agree

    def counting(*arguments):
        gc.collect()
        alive.append(sum(type(one).__name__ == "_CheckpointFrame" for one in gc.get_objects()))
        return agree(*arguments)

    monkeypatch.setattr(trainer, "_agree", counting)
    trainer.step(0, Window())
    assert alive == [0]


def test_a_long_step_and_a_long_check_give_signs_of_life(tiny_model, tiny_train, data, tmp_path, monkeypatch):
    """After each micro-batch, and after each file of a checkpoint."""
    beats = []
    config = replace(tiny_train, tokens=128, micro_batch=1)
    trainer = Trainer(tiny_model, config, loop.TrainBatches(data, 4, 32, 0), 32)
    monkeypatch.setattr(process, "beat", lambda **_: beats.append(1))
    trainer.step(0, Window())
    assert len(beats) == 4
    train(tiny_model, config, data, 32, tmp_path)
    beats.clear()
    last = checkpoint.latest(tmp_path / "checkpoints")
    assert len(beats) >= len(list(last.path.glob("*.safetensors"))) == 2


def test_a_checkpoint_does_not_begin_the_watch_of_a_loop_that_gives_no_signs(tmp_path, monkeypatch):
    for name, value in {HEARTBEAT.name: str(tmp_path), "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    model, sign = torch.nn.Linear(1, 1), tmp_path / process.rank_name(0)
    with process.unwatched(), checkpoint.Writer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, model, torch.optim.AdamW(model.parameters()), {})
    checkpoint.latest(tmp_path / "checkpoints")
    assert not sign.exists()
    process.beat()
    sign.unlink()
    monkeypatch.setattr(process, "_last_beat", 1e-9)  # long ago
    checkpoint.latest(tmp_path / "checkpoints")
    assert sign.exists()


def test_a_start_is_not_watched(tiny_model, tiny_train, data, tmp_path, monkeypatch):
    """It may be silent for long, also after steps of a trunk, and its own signs of life do not count."""
    for name, value in {HEARTBEAT.name: str(tmp_path), "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    sign, seen, real = tmp_path / process.rank_name(0), [], trainer_module.engine.build

    def watched_build(*arguments):
        seen.append(sign.exists())
        process.beat()
        seen.append(sign.exists())
        return real(*arguments)

    monkeypatch.setattr(trainer_module.engine, "build", watched_build)
    process.beat()
    sign.touch()
    train(tiny_model, replace(tiny_train, tokens=128), data, 32, tmp_path / "run")
    assert seen == [False, False] and sign.exists()


def test_evaluation_does_not_depend_on_batch_size_when_drop_free(tiny_model, tiny_train, data):
    model = build(replace(tiny_model, routing=replace(tiny_model.routing, drop_tokens=False)), 0)
    losses = [evaluate(model, data, replace(tiny_train, batch_size=b), 32)["loss"] for b in (1, 4, 7)]
    assert max(losses) - min(losses) < 1e-5


def test_bf16_follows_fp32(tiny_model, tiny_train, data, run, whole, tmp_path):
    fp32 = run(whole)["validation_loss"]
    bf16 = train(tiny_model, replace(tiny_train, dtype="bf16"), data, 32, tmp_path)["validation_loss"]
    assert fp32 != bf16 and abs(fp32 - bf16) < 0.1


def test_schedules(tiny_train):
    config = replace(tiny_train, tokens=1000, warmup_tokens=100, lr=1.0, min_lr=0.1)
    decay, cooldown = replace(config, decay_tokens=500), replace(config, cooldown_tokens=200)
    rates = [learning_rate(decay, tokens) for tokens in (50, 100, 300, 500, 999)]
    assert rates == pytest.approx([0.5, 1.0, 0.55, 0.1, 0.1])
    rates = [learning_rate(cooldown, tokens) for tokens in (50, 100, 800, 900, 1000, 1040)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1, 0.1])
    with pytest.raises(ValueError, match="more than tokens 1000"):
        replace(config, cooldown_tokens=901)
    for decay_tokens in (1, 100):
        with pytest.raises(
            ValueError, match=f"after warmup_tokens 100, so decay_tokens must be more.*got {decay_tokens}"
        ):
            replace(config, decay_tokens=decay_tokens)
    rates = [branch_learning_rate(cooldown, tokens, 500, 100) for tokens in (525, 550, 600, 700, 900)]
    assert rates == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.55]), "a branch warms up again"
    assert branch_learning_rate(cooldown, 525, 500, 0) == 1.0


def test_metrics_drop_a_torn_line_and_what_lies_after_the_checkpoint(tmp_path):
    metrics = Metrics(tmp_path, resume_step=-1)
    for step in (1, 2):
        metrics.write(TRAIN, {"step": step})
    recorded = metrics.state()
    with open(tmp_path / TRAIN, "a") as file:
        file.write('{"step": 3}\n{"st')
    Metrics(tmp_path, resume_step=2, recorded=recorded).write(TRAIN, {"step": 3, "again": True})
    assert read_rows(tmp_path / TRAIN) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    new = tmp_path / "new"
    new.mkdir()
    metrics = Metrics(new, resume_step=-1)  # a checkpoint before the first row counts on none
    metrics.write(VALIDATION, {"step": 0})
    recorded = metrics.state()
    (new / TRAIN).unlink()
    assert missing_rows(new, recorded) is None
    Metrics(new, resume_step=1, recorded=recorded)
    assert (new / TRAIN).read_bytes() == b"" and read_rows(new / VALIDATION) == [{"step": 0}]


def tear(file, number):
    lines = file.read_text().splitlines(keepends=True)
    lines[number] = lines[number][: len(lines[number]) // 2] + "\n"
    file.write_text("".join(lines))


def test_a_checkpoint_without_its_metrics_is_named_and_the_one_before_used(run, whole, cut, caplog):
    tear(cut / TRAIN, -1)  # the row of step 12
    run(cut)
    assert "step-00000012" in caplog.text and "written before the checkpoint" in caplog.text
    assert numbers(cut) == numbers(whole)


@pytest.mark.parametrize(("file", "harm"), [(TRAIN, lambda path: tear(path, 0)), (VALIDATION, Path.unlink)])
def test_metrics_lost_before_every_checkpoint_are_one_line(file, harm, run, cut):
    harm(cut / file)
    before = sorted(path.name for path in (cut / "checkpoints").iterdir())
    with pytest.raises(ValueError, match=f"no checkpoint with whole metrics: .*{file}.*to train again") as error:
        run(cut)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == before


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        patch.setattr(Metrics, "state", lambda self: None)
        run(tmp_path, should_stop=stop_after(2))
    with pytest.raises(ValueError, match=r"are of an earlier version; remove .* to train again$"):
        run(tmp_path)


def test_metrics_are_on_disk_before_the_checkpoint(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    metrics = Metrics(tmp_path, resume_step=-1)
    metrics.write(TRAIN, {"step": 1})
    monkeypatch.setattr(os, "fsync", fsync)
    assert metrics.state()[TRAIN]["bytes"] == len((tmp_path / TRAIN).read_bytes())
    assert {str(tmp_path / TRAIN), str(tmp_path / VALIDATION)} <= set(synced)
