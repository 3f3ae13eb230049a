"""Validation losses of a run by mode of inference and dtype."""

import json

import pytest
from typer.testing import CliRunner

from moelab.cli import app
from moelab.evaluation import rounding
from moelab.lab import Lab
from moelab.runs.store import RunStore


@pytest.fixture
def run(tiny_spec, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    return Lab(RunStore()).run([tiny_spec], executor="inline")[0]


def test_rows(run, tmp_path):
    """Modes of one dtype differ by rounding, and the first row's loss is that of the run's own validation."""
    name = run.path.name
    arguments = ["eval", name, "--losses", "--out", str(tmp_path)]
    output = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    rows = [json.loads(line) for line in (tmp_path / f"losses-{name}.jsonl").read_text().splitlines()]
    assert (rows[0]["mode"], rows[0]["dtype"], rows[0]["minus_reference"]) == (*rounding.VARIANTS[0], 0.0)
    assert [(row["mode"], row["dtype"]) for row in rows] == list(rounding.VARIANTS)
    for row in rows:
        assert row["run"] == name and row["minus_reference"] == row["loss"] - rows[0]["loss"]
        assert abs(row["minus_reference"]) < (1e-5 if row["dtype"] == "fp32" else 0.05)
    assert any(row["minus_reference"] for row in rows if row["dtype"] == "bf16")
    assert rows[0]["loss"] == pytest.approx(run.result["validation_loss"], abs=0.05)
    assert sum(part["share"] for part in rows[0]["by_pair"].values()) == pytest.approx(1)
    assert f"repeated {rows[0]['by_pair']['repeated']['loss']:.4f} (" in " ".join(output.split())
    assert "validation tokens" in output and (tmp_path / f"losses-{name}.provenance.json").is_file()
