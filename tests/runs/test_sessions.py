"""Which machines and commits trained a run."""

import json
from dataclasses import replace

import pytest

from moelab import paths
from moelab.data.preparation import prepare
from moelab.files import write_json
from moelab.runs import records, sessions
from moelab.runs.card import model_card
from moelab.runs.execute import execute
from moelab.runs.store import RunStore
from moelab.training.loop import TrainingStopped
from tests.conftest import stop_after
from tests.runs.conftest import record


def about(cpu, commit="a"):
    return {"commit": commit, "modified": False, "hardware": {"cpu": cpu, "cores": 2}, "python": "3"}


@pytest.fixture
def session(tmp_path):
    """Begin a session after so many steps."""

    def begin(cpu, step=0, folder=tmp_path, **options):
        if step:
            (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        sessions.begin(tmp_path, about(cpu, **options))

    return begin


def contributing(folder):
    return [(one["hardware"]["cpu"], one["commit"], one["step"]) for one in sessions.contributing(folder)]


def test_each_commit_and_machine_counts_once(session, tmp_path):
    session("x")
    session("x", 5)
    session("y", 10)
    session("x", 15)
    session("y", 20, commit="b")
    assert contributing(tmp_path) == [("x", "a", 0), ("y", "a", 10), ("y", "b", 20)]


def test_a_session_that_left_no_checkpoint_does_not_count(session, tmp_path):
    session("x")
    session("y")
    session("z", 5)
    session("x")
    assert contributing(tmp_path) == [("y", "a", 0), ("x", "a", 5)]


def test_the_trunk_that_is_trained_again_counts(session, tmp_path):
    session("x")
    session("y", 7, tmp_path / "prefix" / "prefix")
    session("z", 10, tmp_path / "prefix")
    assert [cpu for cpu, _, _ in contributing(tmp_path)] == ["x", "y", "z"]


def test_a_torn_file_loses_no_more_than_its_lines(session, tmp_path):
    session("x")
    with open(tmp_path / sessions.FILE, "a") as file:
        file.write("[" * 100_000 + '\n[1]\n{"step": "7"}\n{"step": 3, "com')
    session("y", 5)
    assert contributing(tmp_path) == [("x", "a", 0), ("y", "a", 5)]
    assert len((tmp_path / sessions.FILE).read_text().splitlines()) == 2


def test_a_run_that_is_resumed_elsewhere_names_both_machines(tiny_spec, tmp_path, theirs, monkeypatch):
    run = RunStore().run(tiny_spec)
    prepare(tiny_spec.data, paths.home() / "data")  # which asks, too, whether to stop
    monkeypatch.setattr("moelab.runs.execute.provenance", lambda: about("x"))
    with pytest.raises(TrainingStopped):
        execute(run, should_stop=stop_after(10))
    monkeypatch.setattr("moelab.runs.execute.provenance", lambda: about("y"))
    execute(run)
    assert run.provenance["hardware"]["cpu"] == "y"
    assert [(s["hardware"]["cpu"], s["step"]) for s in run.provenance["sessions"]] == [("x", 0), ("y", 10)]
    taken = records.read(record(run, tmp_path), theirs)
    assert taken.provenance == run.provenance and not (taken.path / sessions.FILE).exists()


def test_a_run_on_a_cpu_does_not_name_the_gpus_beside_it(tiny_spec, result, monkeypatch):
    hardware = {"cpu": "Test", "cores": 2, "gpus": ["GPU"]}
    monkeypatch.setattr(
        "moelab.runs.execute.provenance", lambda: {"commit": "a", "modified": False, "hardware": {**hardware}}
    )
    monkeypatch.setattr("moelab.runs.execute._train", lambda *_: result())
    execute(run := RunStore().run(tiny_spec))
    assert run.provenance["hardware"] == {"cpu": "Test", "cores": 2}
    assert [one["hardware"] for one in sessions.contributing(run.path)] == [run.provenance["hardware"]]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_card_names_all_machines_and_commits_that_trained(tiny_spec, result, device):
    run = RunStore().run(replace(tiny_spec, train=replace(tiny_spec.train, device=device)))
    write_json(run.path / "result.json", result(3.0))
    about = [{"commit": c * 40, "hardware": {"cpu": c, "cores": 2, "gpus": [f"GPU {c}"]}} for c in "ab"]
    write_json(run.path / "provenance.json", {**about[1], "sessions": about})
    card = model_card(run.path, "x", "fp32")
    machines = "a; b" if device == "cpu" else "1 x GPU a; 1 x GPU b"
    assert f"| trained on | {machines}, 0.0 hours |\n| run | `{run.spec.id}`, commit `aaaaaaaa`, `bbbbbbbb` |" in card


def test_a_run_of_one_machine_names_it_once(trained):
    assert "sessions" not in trained.provenance
    (line,) = (trained.path / sessions.FILE).read_text().splitlines()
    assert json.loads(line)["hardware"] == trained.provenance["hardware"]
