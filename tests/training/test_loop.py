import math
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from moelab.engine import checkpoint
from moelab.engine.checkpoint import storage
from moelab.engine.launch import process
from moelab.environment import HEARTBEAT
from moelab.training import loop
from moelab.training.loop import Trainer, TrainingDiverged, TrainingStopped, Window, evaluate, train
from moelab.training.metrics import TRAIN, VALIDATION, Metrics, objection, read_rows
from moelab.training.schedule import learning_rate, rewarmed

CLOCK = ("time_s", "tokens_per_s", "seconds")


def numbers(run_dir):
    """Every number of a run but the clock's."""
    rows = [
        {k: v for k, v in row.items() if k not in CLOCK}
        for file in (TRAIN, VALIDATION)
        for row in read_rows(run_dir / file)
    ]
    last = checkpoint.latest(run_dir / "checkpoints")
    return rows, {
        f"{f}/{k}": v
        for f in ("model", "optimizer")
        for k, v in load_file(last.path / f"{f}-00000.safetensors").items()
    }


def assert_same_run(a, b):
    rows_a, tensors_a = numbers(a)
    rows_b, tensors_b = numbers(b)
    assert rows_a == rows_b
    assert tensors_a.keys() == tensors_b.keys()
    assert all(torch.equal(tensors_a[k], tensors_b[k]) for k in tensors_a)


def stop_at(step):
    """A `should_stop` that says yes after `step` steps of its process."""
    done = iter(range(1, 10_000))
    return lambda: next(done) >= step


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


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 5, 17, 23])
def test_a_stopped_and_resumed_run_is_the_undisturbed_one(step, tiny_model, tiny_train, data, tmp_path):
    train(tiny_model, tiny_train, data, 32, tmp_path / "whole")
    with pytest.raises(TrainingStopped, match=f"stopped at step {step} of 24"):
        train(tiny_model, tiny_train, data, 32, tmp_path / "cut", should_stop=stop_at(step))
    train(tiny_model, tiny_train, data, 32, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_corrupt_checkpoint_is_named_and_the_one_before_used(tiny_model, tiny_train, data, tmp_path, caplog):
    train(tiny_model, tiny_train, data, 32, tmp_path / "whole")
    with pytest.raises(TrainingStopped):
        train(tiny_model, tiny_train, data, 32, tmp_path / "cut", should_stop=stop_at(12))
    newest = checkpoint.latest(tmp_path / "cut" / "checkpoints").path
    file = newest / "model-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    train(tiny_model, tiny_train, data, 32, tmp_path / "cut")
    assert "step-00000012" in caplog.text and "does not match its SHA-256" in caplog.text
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_stop_on_a_full_disk_does_not_claim_a_checkpoint(tiny_model, tiny_train, data, tmp_path, monkeypatch):
    from moelab.engine.checkpoint import storage

    def full(tensors, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(tiny_model, tiny_train, data, 32, tmp_path, should_stop=stop_at(2))


def test_a_full_disk_leaves_the_earlier_checkpoint(tiny_model, tiny_train, data, tmp_path, monkeypatch):
    calls = iter(range(100))
    real = storage.save_file

    def full(tensors, path):
        if next(calls) >= 2:  # the first checkpoint has two files
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        real(tensors, path)

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(tiny_model, tiny_train, data, 32, tmp_path / "cut")
    folder = tmp_path / "cut" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-00000005"], "nothing half-written is left"
    monkeypatch.setattr(storage, "save_file", real)
    train(tiny_model, tiny_train, data, 32, tmp_path / "cut")
    train(tiny_model, tiny_train, data, 32, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_divergence_names_step_and_checkpoint(tiny_model, tiny_train, data, tmp_path):
    config = replace(
        tiny_train, lr=1e30, min_lr=0.0, warmup_tokens=6 * 128, clip=0.0, weight_decay=0.0, checkpoint_every=1
    )
    with pytest.raises(TrainingDiverged) as error:
        train(tiny_model, config, data, 32, tmp_path)
    assert "at step 2" in str(error.value) and "step-00000001" in str(error.value) and "\n" not in str(error.value)
    assert checkpoint.latest(tmp_path / "checkpoints").step == 1, "no checkpoint of the diverged model"


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_a_model_that_is_not_finite_leaves_no_checkpoint(what, tiny_model, tiny_train, data, tmp_path, monkeypatch):
    """The loss stays finite where no token meets the bad number: the last checkpoint is still a good one."""
    train(tiny_model, tiny_train, data, 32, tmp_path / "whole")
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
        train(tiny_model, tiny_train, data, 32, tmp_path / "cut")
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints").step == 5
    monkeypatch.setattr(Trainer, "step", step)
    train(tiny_model, tiny_train, data, 32, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_other_data_is_refused(tiny_model, tiny_train, data, tmp_path, monkeypatch):
    with pytest.raises(TrainingStopped):
        train(tiny_model, tiny_train, data, 32, tmp_path, should_stop=stop_at(2))
    monkeypatch.setattr(data, "fingerprint", "other")
    with pytest.raises(ValueError, match="was written with other data"):
        train(tiny_model, tiny_train, data, 32, tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tiny_model, tiny_train, data, tmp_path):
    with pytest.raises(TrainingStopped):
        train(tiny_model, tiny_train, data, 32, tmp_path, should_stop=stop_at(2))
    with pytest.raises(checkpoint.CheckpointError, match="the model has"):
        train(replace(tiny_model, experts=(0, 2, 0, 2)), tiny_train, data, 32, tmp_path)


@pytest.mark.parametrize(
    ("change", "part"),
    [({"vocab": 200}, "the model's embedding only 200"), ({"context": 16}, "longer than the model's context of 16")],
)
def test_model_and_data_that_do_not_fit_are_refused(change, part, tiny_model, tiny_train, data, tmp_path):
    with pytest.raises(ValueError, match=part):
        train(replace(tiny_model, **change), tiny_train, data, 32, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_missing_gpu_is_one_line(tiny_model, tiny_train, data, tmp_path):
    with pytest.raises(ValueError, match="no CUDA device is available; allowed here: cpu"):
        train(tiny_model, replace(tiny_train, device="cuda"), data, 32, tmp_path)


def test_micro_batches_give_the_gradient_of_the_whole_batch(tiny_model, tiny_train, data):
    from moelab.data.batches import TrainBatches

    dense = replace(tiny_model, experts=(), residual=False, dropout=0.0)
    weights = []
    for micro in (0, 1, 2):
        config = replace(tiny_train, micro_batch=micro)
        trainer = Trainer(dense, config, TrainBatches(data, 4, 32, 0), 32)
        trainer.step(0, Window())
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.module.parameters()]))
    for other in weights[1:]:
        # Adam's first step is lr * sign(gradient): rounding may flip the sign of a gradient that is nothing.
        assert (weights[0] - other).abs().gt(1e-6).float().mean() < 2e-3


def test_a_long_step_and_a_long_check_give_signs_of_life(tiny_model, tiny_train, data, tmp_path, monkeypatch):
    """After each micro-batch, and after each file of a checkpoint."""
    beats = []
    config = replace(tiny_train, tokens=128, micro_batch=1)
    trainer = Trainer(tiny_model, config, loop.TrainBatches(data, 4, 32, 0), 32)
    monkeypatch.setattr(process, "beat", lambda: beats.append(1))
    trainer.step(0, Window())
    assert len(beats) == 4
    train(tiny_model, config, data, 32, tmp_path)
    beats.clear()
    last = checkpoint.latest(tmp_path / "checkpoints")
    assert len(beats) >= len(list(last.path.glob("*.safetensors"))) == 2


def test_a_start_is_not_watched(tiny_model, tiny_train, data, tmp_path, monkeypatch):
    """It may be silent for long, also after steps of a trunk, and its own signs of life do not count."""
    for name, value in {HEARTBEAT.name: str(tmp_path), "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    sign, seen, build = tmp_path / process.rank_name(0), [], loop.engine.build

    def watched_build(*arguments):
        seen.append(sign.exists())
        process.beat()
        seen.append(sign.exists())
        return build(*arguments)

    monkeypatch.setattr(loop.engine, "build", watched_build)
    process.beat()
    sign.touch()
    train(tiny_model, replace(tiny_train, tokens=128), data, 32, tmp_path / "run")
    assert seen == [False, False] and sign.exists()


def test_evaluation_does_not_depend_on_batch_size_when_drop_free(tiny_model, tiny_train, data):
    from moelab.models import build

    model = build(replace(tiny_model, routing=replace(tiny_model.routing, drop_tokens=False)), 0)
    losses = [evaluate(model, data, replace(tiny_train, batch_size=b), 32)["loss"] for b in (1, 4, 7)]
    assert max(losses) - min(losses) < 1e-5


def test_bf16_follows_fp32(tiny_model, tiny_train, data, tmp_path):
    losses = [
        train(tiny_model, replace(tiny_train, dtype=dtype), data, 32, tmp_path / dtype)["validation_loss"]
        for dtype in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.1


def test_schedule_warms_up_decays_and_stays(tiny_train):
    config = replace(tiny_train, tokens=1000, warmup_tokens=100, decay_tokens=500, lr=1.0, min_lr=0.1)
    assert learning_rate(config, 50) == pytest.approx(0.5)
    assert learning_rate(config, 100) == pytest.approx(1.0)
    assert learning_rate(config, 300) == pytest.approx(0.55)
    assert learning_rate(config, 500) == learning_rate(config, 999) == pytest.approx(0.1)


def test_a_cooldown_keeps_the_rate_until_its_last_tokens(tiny_train):
    config = replace(tiny_train, tokens=1000, warmup_tokens=100, cooldown_tokens=200, lr=1.0, min_lr=0.1)
    assert learning_rate(config, 50) == pytest.approx(0.5)
    assert learning_rate(config, 100) == learning_rate(config, 800) == 1.0
    assert learning_rate(config, 900) == pytest.approx(0.55)
    assert learning_rate(config, 1000) == learning_rate(config, 1040) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="more than tokens 1000"):
        replace(config, cooldown_tokens=901)


def test_a_branch_warms_up_again(tiny_train):
    config = replace(tiny_train, tokens=1000, warmup_tokens=100, cooldown_tokens=200, lr=1.0, min_lr=0.1)
    rates = [rewarmed(config, tokens, 500, 100) for tokens in (525, 550, 600, 700, 900)]
    assert rates == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.55])
    assert rewarmed(config, 525, 500, 0) == 1.0


def test_metrics_drop_a_torn_line_and_what_lies_after_the_checkpoint(tmp_path):
    metrics = Metrics(tmp_path, resume_step=-1)
    for step in (1, 2):
        metrics.write(TRAIN, {"step": step})
    recorded = metrics.state()
    with open(tmp_path / TRAIN, "a") as file:
        file.write('{"step": 3}\n{"st')
    Metrics(tmp_path, resume_step=2, recorded=recorded).write(TRAIN, {"step": 3, "again": True})
    assert read_rows(tmp_path / TRAIN) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def cut_at_12(tiny_model, tiny_train, data, run_dir):
    """A run stopped at step 12, with checkpoints of steps 10 and 12."""
    with pytest.raises(TrainingStopped):
        train(tiny_model, tiny_train, data, 32, run_dir, should_stop=stop_at(12))


def tear(file, number):
    lines = file.read_text().splitlines(keepends=True)
    lines[number] = lines[number][: len(lines[number]) // 2] + "\n"
    file.write_text("".join(lines))


def test_metrics_lost_before_the_newest_checkpoint_are_trained_again(tiny_model, tiny_train, data, tmp_path, caplog):
    train(tiny_model, tiny_train, data, 32, tmp_path / "whole")
    cut_at_12(tiny_model, tiny_train, data, tmp_path / "cut")
    tear(tmp_path / "cut" / TRAIN, -1)  # the row of step 12; step 10's checkpoint does not count on it
    train(tiny_model, tiny_train, data, 32, tmp_path / "cut")
    assert "step-00000012" in caplog.text and "written before the checkpoint" in caplog.text
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("file", [TRAIN, VALIDATION])
@pytest.mark.parametrize("harm", [lambda path: tear(path, 0), lambda path: path.unlink()], ids=["torn", "deleted"])
def test_metrics_lost_before_every_checkpoint_are_one_line(file, harm, tiny_model, tiny_train, data, tmp_path):
    cut_at_12(tiny_model, tiny_train, data, tmp_path)
    harm(tmp_path / file)
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(ValueError, match=f"no checkpoint with whole metrics: .*{file}.*to train again") as error:
        train(tiny_model, tiny_train, data, 32, tmp_path)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before


def test_a_file_without_rows_may_be_missing(tmp_path):
    """A checkpoint before the first metric row counts on none."""
    metrics = Metrics(tmp_path, resume_step=-1)
    metrics.write(VALIDATION, {"step": 0})
    recorded = metrics.state()
    (tmp_path / TRAIN).unlink()
    assert objection(tmp_path, recorded) is None
    Metrics(tmp_path, resume_step=1, recorded=recorded)
    assert (tmp_path / TRAIN).read_bytes() == b"" and read_rows(tmp_path / VALIDATION) == [{"step": 0}]


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(tiny_model, tiny_train, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "state", lambda self: None)
        cut_at_12(tiny_model, tiny_train, data, tmp_path)
    with pytest.raises(ValueError, match=r"are of an earlier version; remove .* to train again$"):
        train(tiny_model, tiny_train, data, 32, tmp_path)


def test_metrics_are_on_disk_before_the_checkpoint(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))
    )
    metrics = Metrics(tmp_path, resume_step=-1)
    metrics.write(TRAIN, {"step": 1})
    synced.clear()
    assert metrics.state()[TRAIN]["bytes"] == len((tmp_path / TRAIN).read_bytes())
    assert {str(tmp_path / TRAIN), str(tmp_path / VALIDATION)} <= set(synced)
