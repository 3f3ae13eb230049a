"""Runs passed on without their weights."""

import json
import zipfile
from dataclasses import replace

import pytest

from moelab.experiments import pr_moe
from moelab.files import write_json
from moelab.runs import preflight, records
from moelab.runs.collection import Runs
from moelab.runs.store import RunStore

RESULT = {
    "tokens": 8,
    "steps": 1,
    "validation_loss": 4.5,
    "bits_per_byte": 2.0,
    "unigram_loss": 6.0,
    "parameters": 10,
    "active_parameters": 5,
    "flops_per_token": 60.0,
    "seconds": 2.0,
}


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "ours")


@pytest.fixture
def finished(store):
    """A run as training leaves it, its numbers made up."""
    run = store.run(pr_moe.EXPERIMENT.specs("smoke", arms=["PR-MoE-32/64"])[0])
    (run.path / "train.jsonl").write_text('{"step": 1, "loss": 4.6}\n')
    (run.path / "validation.jsonl").write_text('{"step": 1, "tokens": 8, "loss": 4.5}\n')
    (run.path / "checkpoints" / "step-00000001").mkdir(parents=True)
    write_json(run.path / "provenance.json", {"commit": "abc"})
    write_json(run.path / "result.json", RESULT)
    return run


def test_a_record_says_what_the_run_says_and_has_no_weights(finished, tmp_path):
    archive = records.write(finished, tmp_path / "passed on")
    taken = records.read(archive, RunStore(tmp_path / "theirs"))
    assert taken.path != finished.path and taken.spec == finished.spec and taken.finished
    assert Runs([taken]).final().equals(Runs([finished]).final())
    assert Runs([taken]).curves().equals(Runs([finished]).curves()) and taken.provenance == finished.provenance
    assert not (taken.path / "checkpoints").exists()
    assert archive.read_bytes() == records.write(finished, tmp_path / "again").read_bytes()


def test_what_the_store_has_stays(finished, store, tmp_path):
    archive = records.write(finished, tmp_path)
    write_json(finished.path / "result.json", {**RESULT, "validation_loss": 4.4})
    assert records.read(archive, store) is None and finished.result["validation_loss"] == 4.4
    (finished.path / "result.json").unlink()
    assert records.read(archive, store) is None, "it has a checkpoint and goes on from there"


def test_an_unfinished_run_is_not_passed_on(store, tmp_path):
    run = store.run(pr_moe.EXPERIMENT.specs("smoke", arms=["Dense"])[0])
    with pytest.raises(ValueError, match="not finished"):
        records.write(run, tmp_path)


def rewritten(archive, to, change):
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(to, "w") as out:
        for name, data in change({n: source.read(n) for n in source.namelist()}).items():
            out.writestr(name, data)
    return to


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: {k: v for k, v in c.items() if k != "result.json"}, "not a run's record"),
        (lambda c: {**c, "../outside.txt": b"x"}, "not a run's record"),
        (lambda c: {**c, "result.json": b"{"}, "unreadable"),
        (lambda c: {**c, "spec.json": b"{}"}, "spec.json"),
        (
            lambda c: {**c, "spec.json": json.dumps(replace_seed(json.loads(c["spec.json"]))).encode()},
            "it is of another version",
        ),
    ],
)
def test_a_bad_record_is_one_line_and_leaves_nothing(change, part, finished, tmp_path):
    archive = records.write(finished, tmp_path)
    (tmp_path / "bad").mkdir()
    bad = rewritten(archive, tmp_path / "bad" / archive.name, change)
    theirs = RunStore(tmp_path / "theirs")
    with pytest.raises(ValueError, match=part) as error:
        records.read(bad, theirs)
    assert "\n" not in str(error.value) and not theirs.root.exists()


def replace_seed(spec):
    return {**spec, "train": {**spec["train"], "seed": 7}}


def test_a_file_that_is_no_zip_is_one_line(store, tmp_path):
    (tmp_path / "x.zip").write_text("no")
    with pytest.raises(ValueError, match=r"x\.zip: unreadable"):
        records.read(tmp_path / "x.zip", store)


def test_a_teacher_without_weights_says_what_to_do(finished, tmp_path, monkeypatch):
    from moelab.config.distill import DistillConfig
    from moelab.runs.execute import execute

    theirs = RunStore(tmp_path / "theirs")
    records.read(records.write(finished, tmp_path), theirs)
    student = theirs.run(replace(finished.spec, teacher=finished.spec, distill=DistillConfig()))
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    with pytest.raises(ValueError, match=r"numbers only, .* to train it here: remove it and run its experiment again"):
        execute(student)
    with pytest.raises(ValueError, match="numbers only"):
        preflight.check([student.spec], theirs)


def test_what_needs_weights_says_at_once_that_there_are_none(finished, tmp_path, monkeypatch):
    from moelab.experiments import specialisation, zero_shot
    from moelab.inference.text import open_text

    taken = records.read(records.write(finished, tmp_path), RunStore(tmp_path / "theirs"))
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    for need in (
        lambda: open_text(taken.path, cache=tmp_path),
        lambda: specialisation.measure(Runs([finished, taken])),
        lambda: zero_shot.measure(Runs([finished, taken]), 1),
    ):
        with pytest.raises(ValueError, match=r"numbers only, .* to train it here") as error:
            need()
        assert "\n" not in str(error.value) and str(taken.path) in str(error.value)
    assert not (tmp_path / "home").exists(), "no text was prepared, no other run routed"


def test_a_damaged_result_says_what_to_do(finished):
    (finished.path / "result.json").write_text('{"tokens": 8, "st')
    with pytest.raises(ValueError, match=r"result.json: not valid JSON .*; remove the file and ask for the run again"):
        Runs([finished]).final()
