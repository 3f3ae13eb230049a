"""`moelab bench memory`: two processes that train in turns, one of which keeps what it frees."""

import json

import pytest
from typer.testing import CliRunner

from moelab.bench import harness, memory
from moelab.bench.harness import Timing
from moelab.cli import app

pytestmark = pytest.mark.multiprocess


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(harness, "product_rate", lambda *_: 1e11)


def test_rows(quick, tmp_path):
    arguments = ["--width", "32", "--family", "dense", "--dtype", "fp32", "--steps", "1", "--rounds", "2"]
    CliRunner().invoke(app, ["bench", "memory", *arguments, "--out", str(tmp_path)], catch_exceptions=False)
    returned, kept = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert (returned["candidate"], kept["candidate"]) == (memory.RETURNED, memory.KEPT) and returned["ratio"] == 1
    assert kept["ratio"] == pytest.approx(
        sum(a / b for a, b in zip(*(r["rounds_ms"] for r in (kept, returned)), strict=True)) / 2
    )
    for row in (returned, kept):
        assert row["faults_per_step"] >= 0 and row["peak_bytes"] > 64 << 20 and row["median_ms"] > 0
    assert (tmp_path / "memory.provenance.json").is_file()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"widths": [33]}, "bench memory: width must be a multiple of 16"),
        ({"families": ["PR-MoE+L21 + KD"]}, "has a teacher, which it does not measure"),
        ({"steps": 0}, "bench memory: steps must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_one_line(given, said):
    usual = dict(widths=[32], families=["dense"], dtypes=["fp32"], steps=1, threads=1, timing=Timing(1), out=None)
    with pytest.raises(ValueError, match=said):
        memory.main(**usual | given)
