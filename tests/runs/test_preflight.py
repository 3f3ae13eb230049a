"""What a batch is refused for before it begins."""

import json
import os
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moelab import machine
from moelab.config.distill import DistillConfig
from moelab.data.preparation import is_prepared, prepare
from moelab.experiments import EXPERIMENTS
from moelab.files import write_json
from moelab.lab import Lab
from moelab.runs import preflight
from moelab.runs.spec import Start
from moelab.runs.store import RunStore


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path / "results"))


def on_cuda(spec, ranks=1):
    parallel = replace(spec.parallel, data=ranks)
    return replace(spec, train=replace(spec.train, device="cuda"), parallel=parallel)


def test_what_can_be_trained_passes_at_once_and_writes_nothing(tiny_spec, tmp_path):
    before = time.thread_time()
    preflight.check([tiny_spec])
    assert time.thread_time() - before < 1 and not list(tmp_path.iterdir())


def test_a_trunk_that_is_trained_again_needs_its_teachers_weights(tiny_spec, result):
    """Staged distillation from runs that were taken over without weights."""
    taught = replace(tiny_spec, teacher=tiny_spec, distill=DistillConfig())
    staged = replace(taught, teacher=None, distill=None, start=Start(taught, 8 * 4 * 32))
    for spec in (tiny_spec, taught):
        write_json(RunStore().run(spec).path / "result.json", result())
    with pytest.raises(ValueError, match=rf"{tiny_spec.id}: numbers only, no weights"):
        preflight.check([staged])
    (RunStore().root / taught.id / "checkpoints" / f"step-{staged.first_step:08d}").mkdir(parents=True)
    preflight.check([staged])


def test_a_missing_device_is_refused(tiny_spec, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in ({"specs": [on_cuda(tiny_spec)]}, {"specs": [], "device": "cuda"}):
        with pytest.raises(ValueError, match="no CUDA device is available here"):
            preflight.check(**arguments)
    preflight.check(EXPERIMENTS["pr-moe"].specs("smoke"))


def test_a_notebook_hears_of_a_missing_device_before_the_text_is_prepared(tiny_spec, monkeypatch, home):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device is available here"):
        Lab().run([on_cuda(tiny_spec)])
    assert not (home / "data").exists()
    assert not Lab().run([on_cuda(tiny_spec)], executor="read").finished


def test_more_ranks_than_devices_are_refused(tiny_spec, monkeypatch):
    monkeypatch.setattr(machine, "cuda_devices", lambda: 1)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    spec = replace(tiny_spec, train=replace(tiny_spec.train, micro_batch=1))
    preflight.check([on_cuda(spec)])
    with pytest.raises(ValueError, match="a run on 4 ranks needs as many CUDA devices, 1 here"):
        preflight.check([on_cuda(spec, ranks=4)])
    preflight.check([replace(spec, parallel=replace(spec.parallel, data=4))])


def test_a_finished_run_and_one_that_a_cluster_trains_need_no_device(tiny_spec, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = on_cuda(tiny_spec)
    monkeypatch.setenv("MOELAB_EXECUTOR", "slurm")
    preflight.check([spec])
    monkeypatch.delenv("MOELAB_EXECUTOR")
    (RunStore().run(spec).path / "result.json").write_text("{}")
    preflight.check([spec])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"corpus": "mix6"}, "unknown corpus 'mix6'"),
        ({"corpus": "folder:/nowhere"}, "'folder:/nowhere' is no folder"),
        ({"tokenizer": "words"}, "unknown tokenizer 'words'"),
        ({"tokenizer": "bpe-4096"}, "tiny: tokenizer bpe-4096 has 4096 entries, the model's embedding only 320"),
        ({"tokenizer": "gpt2"}, "tokenizer gpt2 has 50257 entries"),
    ],
)
def test_texts_that_do_not_work_are_refused(change, part, tiny_spec):
    with pytest.raises(ValueError, match=part):
        preflight.check([replace(tiny_spec, data=replace(tiny_spec.data, **change))])


def test_a_text_of_hugging_face_needs_its_package_until_it_is_prepared(tiny_spec, home, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    rows = [json.dumps({"text": f"Text number {i} of a small set."}) for i in range(3000)]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(rows))
    local = replace(tiny_spec.data, corpus=f"hf:{tmp_path / 'set'}")
    remote = replace(tiny_spec.data, corpus="hf:somebody/something", max_documents=10)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    for config in (local, remote):
        spec = replace(tiny_spec, data=config)
        with pytest.raises(ValueError, match=r"by the package datasets, which .* lacks: pip install -e '.\[hf\]'"):
            preflight.check([spec])
        preflight.check([spec], same_packages=False)
        preflight.check([spec], executor="read")
    pytest.importorskip("datasets")
    assert not is_prepared(local, home / "data")
    prepare(local, home / "data")
    assert is_prepared(local, home / "data")
    preflight.check([replace(tiny_spec, data=local)])
    monkeypatch.setattr(preflight, "find_spec", lambda name: object())
    preflight.check([replace(tiny_spec, data=remote)])


@pytest.mark.parametrize(("variable", "publish"), [("MOELAB_HOME", False), ("MOELAB_RESULTS", True)])
def test_folders_that_cannot_be_written_are_refused(variable, publish, tiny_spec, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(variable, str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match=f"file is not a folder; {variable} names another"):
        preflight.check([tiny_spec], publish=publish)
    monkeypatch.setenv(variable, str(tmp_path / "locked"))
    (tmp_path / "locked").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "locked" and real(path, mode))
    with pytest.raises(ValueError, match=f"locked is not writable; {variable} names another"):
        preflight.check([tiny_spec], publish=publish)


def test_a_teacher_that_is_gone_is_trained_again_only_for_a_trunk_that_is(tiny_spec, result):
    taught = replace(tiny_spec, teacher=tiny_spec, distill=DistillConfig())
    staged = replace(taught, teacher=None, distill=None, start=Start(taught, 8 * 4 * 32))
    write_json(RunStore().run(taught).path / "result.json", result())
    assert list(RunStore().needed([staged])) == [tiny_spec.id, taught.id, staged.id]
    (RunStore().root / taught.id / "checkpoints" / f"step-{staged.first_step:08d}").mkdir(parents=True)
    assert list(RunStore().needed([staged])) == [taught.id, staged.id]
    assert list(RunStore().needed([staged, tiny_spec])) == [tiny_spec.id, taught.id, staged.id], "it is asked for"


def test_an_unfinished_run_of_another_user_is_refused(tiny_spec, monkeypatch, result):
    run, real = RunStore().run(tiny_spec), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != run.path and real(path, mode))
    with pytest.raises(ValueError, match=rf"{tiny_spec.id} is not writable; MOELAB_HOME names another"):
        preflight.check([tiny_spec])
    write_json(run.path / "result.json", result())
    preflight.check([tiny_spec])


def test_a_disk_without_room_for_the_checkpoints_is_refused(tiny_spec, monkeypatch, result):
    """Three of a run, one more of a trunk, which a branch starts from."""
    train = replace(tiny_spec.train, cooldown_tokens=6 * 128)
    trunk = replace(tiny_spec, train=train)
    short = replace(train, tokens=14 * 128, cooldown_tokens=4 * 128)
    branch = replace(trunk, train=short, start=Start(trunk, 10 * 128))
    for specs, checkpoints in (([branch, trunk], 7), ([tiny_spec], 3)):
        needed = preflight.ROOM + checkpoints * 12 * tiny_spec.model.parameters()
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=needed: SimpleNamespace(free=free))
        preflight.check(specs)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=needed: SimpleNamespace(free=free - 1))
        with pytest.raises(ValueError, match=rf"GiB free, .* needed for the checkpoints of {len(specs)} runs"):
            preflight.check(specs)
    write_json(RunStore().run(trunk).path / "result.json", result())
    needed = preflight.ROOM + 6 * 12 * tiny_spec.model.parameters()  # the trunk has no checkpoint of the branch point
    monkeypatch.setattr(shutil, "disk_usage", lambda _, free=needed: SimpleNamespace(free=free - 1))
    with pytest.raises(ValueError, match="needed for the checkpoints of 1 runs"):
        preflight.check([branch])
    monkeypatch.setattr(shutil, "disk_usage", lambda _, free=needed: SimpleNamespace(free=free))
    preflight.check([branch])
    (written := RunStore().run(tiny_spec).path / "checkpoints" / "step-00000005").mkdir(parents=True)
    (written / "model.safetensors").write_bytes(bytes(100))
    preflight.check([tiny_spec])  # the checkpoints of a run that was stopped are there
