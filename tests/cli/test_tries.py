"""`moelab try`, `trace` and `conform` as users call them, at smoke scale."""

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from moelab.cli import app, tries
from moelab.runs.store import Run, RunStore

TOKENS = "train.tokens=2048"
"""Four steps of 8 x 64 tokens, of the variant alone: the test is about the command."""

PART = """
from pathlib import Path

with open(Path(__file__).with_name("executed"), "a") as log:
    log.write("x")

def activation(p):
    return p.relu() ** 2
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("MOELAB_EXECUTOR", "inline")
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def moelab(*arguments):
    done = CliRunner().invoke(app, [*arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.mark.slow
def test_an_idea_and_a_part_of_ones_own_are_tried_against_one_baseline(home):
    asked = ("--scale", "smoke", "--seeds", "1")
    done = moelab("try", "model.routing.z_loss=1e-3", *asked)
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    assert "z_loss=1e-3 against MoE-128, smoke, 1 seed each" in text and "no interval from one seed" in text
    assert "cannot tell yet: fewer than 3 seeds" in text and "times fewer FLOPs to an equal loss" in text
    assert max(map(len, done.stdout.splitlines())) <= 200
    store = RunStore()
    before = {file: file.stat().st_mtime_ns for file in store.root.glob("*/result.json")}
    assert len(before) == 2
    (file := home / "my_layer.py").write_text(PART)
    found = json.loads(moelab("try", TOKENS, "--file", str(file), "--json", *asked).stdout)
    assert {f: f.stat().st_mtime_ns for f in store.root.glob("*/result.json")} == before, "the baseline is read back"
    assert found["idea"] == "activation of my_layer.py tokens=2048" and found["settings"] == {"train.tokens": "2048"}
    (kept,) = (home / "home" / "tries").glob("activation-*")
    (run,) = (kept / "runs").iterdir()
    file.unlink()
    assert Run.at(run).result["tokens"] == 2048 and (kept / "part.py.txt").read_text() == PART
    past = moelab("try").stdout
    assert "z_loss=1e-3" in past and "activation of" in past
    rows = json.loads(moelab("try", "--json").stdout)
    assert [row["idea"] for row in rows] == ["z_loss=1e-3", found["idea"]] and rows[1] == found
    assert (home / "executed").read_text() == "x", "executed where it was asked for, and by no reading"


def test_what_cannot_be_tried_is_refused_before_any_code_is_executed(home):
    (file := home / "my_layer.py").write_text(PART)
    for words, said in (
        (["model.routing.z_loss"], "expected NAME=VALUE, such as model.routing.z_loss=1e-3"),
        (["model.routing.zloss=1"], "no setting 'model.routing.zloss'"),
        (["model.top_k=1"], "the model is the baseline"),
        (["data.corpus=sotu", "--file", str(file)], "data.corpus cannot be tried"),
        (["model.top_k=2", "--scale", "gpu"], "--scale must be smoke or quick or cpu or full, got 'gpu'"),
        (["model.top_k=2", "--seeds", "-1"], r"--seeds must be 0 \(planned\) to 99"),
        (["model.top_k=2", "--effect", "0"], "--effect must be a positive number"),
    ):
        with pytest.raises(ValueError, match=said):
            moelab("try", *words)
    assert "no tries yet" in moelab("try").stdout
    assert not (home / "executed").exists() and not (home / "home").exists()


def test_names_of_settings_are_completed():
    assert "model.routing.z_loss=" in tries.setting_names("model.routing.z")
    assert all(name.startswith(("model.", "train.")) for name in tries.setting_names(""))


def test_a_trace_is_written_where_it_is_asked_for(trained, tmp_path):
    out = tmp_path / "trace.parquet"
    done = moelab("trace", trained.spec.id, str(out), "--tokens", "64")
    assert done.exit_code == 0 and f"2 layers: {out}" in done.stdout.replace("\n", "")
    assert len(pd.read_parquet(out)) == 2 * 128
    for words, said in (
        (["trace.csv"], "must end in .parquet"),
        (["t.parquet", "--tokens", "-1"], "--tokens must be 0"),
    ):
        with pytest.raises(ValueError, match=said):
            moelab("trace", trained.spec.id, *words)


def test_a_layer_is_checked_and_the_exit_code_says_whether_it_passes(tmp_path, monkeypatch):
    done = moelab("conform", "moelab.evaluation.conform:reference", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["checks"] == found["reference"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_bad_layer.py").write_text(
        "from torch import nn\ndef make(hidden, *_): return nn.Linear(hidden, 1)\n"
    )
    done = moelab("conform", "a_bad_layer:make")
    assert done.exit_code == 1 and "FAILS" in done.stdout and "not checked" in done.stdout
    with pytest.raises(ValueError, match="--top-k must be at most the number of experts, 2, got 3"):
        moelab("conform", "a_bad_layer:make", "--experts", "2", "--top-k", "3")
