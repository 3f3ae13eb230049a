"""A run killed on 4 ranks goes on on 2, with another expert parallelism, on the same curve."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from moelab.config.parallel import ParallelConfig
from moelab.lab import Lab
from moelab.runs.spec import RunSpec
from moelab.runs.store import RunStore
from moelab.training.metrics import TRAIN, VALIDATION, read_rows

pytestmark = pytest.mark.multiprocess


def test_killed_at_expert_4_resumed_at_expert_2(tiny_spec, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    train = replace(tiny_spec.train, micro_batch=1, tokens=16 * 128, checkpoint_every=3, log_every=1, eval_every=4)
    spec: RunSpec = replace(tiny_spec, train=train)
    four, two = ParallelConfig(data=4, expert=4), ParallelConfig(data=2, expert=2)
    assert replace(spec, parallel=four).id == replace(spec, parallel=two).id == spec.id

    whole = Lab(RunStore(tmp_path / "whole")).run([spec], executor="inline")[0]
    lab = Lab(RunStore(tmp_path / "moved"))
    run = lab.store.run(replace(spec, parallel=four))
    process = subprocess.Popen([sys.executable, "-m", "moelab.runs.worker", str(run.path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(read_rows(run.path / TRAIN)) < 6 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in reversed(family):  # no warning to anybody
        os.kill(member.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=300)
    assert not run.finished
    assert 6 <= len(read_rows(run.path / TRAIN)) < 16

    moved = lab.run([replace(spec, parallel=two)])[0]
    assert moved.finished, moved.status.reason
    assert moved.provenance["parallel"]["data"] == 2
    assert moved.result["validation_loss"] == pytest.approx(whole.result["validation_loss"], rel=1e-5)
    for file in (TRAIN, VALIDATION):
        rows, expected = read_rows(moved.path / file), read_rows(whole.path / file)
        assert [row["step"] for row in rows] == [row["step"] for row in expected]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
