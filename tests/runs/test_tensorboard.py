"""Runs in TensorBoard, without having asked for it when they trained."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from moelab.files import write_json
from moelab.runs import tensorboard
from moelab.training.metrics import TRAIN, VALIDATION


@pytest.fixture
def run(home):
    folder = home / "runs" / "350m-moe-128-twin-s0-0123456789"
    write_json(folder / "spec.json", {})
    rows = [{"step": s, "loss": 7.0 - s, "time_s": 2.0 * s, "expert_load": {"2": [0.1, 0.2, 0.3, 0.4]}} for s in (1, 2)]
    (folder / TRAIN).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / VALIDATION).write_text(
        json.dumps({"step": 2, "loss": 5.5, "by_pair": {"new": {"loss": 6.5}}, "by_domain": {"law": {"loss": 5.5}}})
        + "\n"
    )
    return folder


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, round(e.value, 6)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_events_follow_a_run(run, tmp_path):
    events = tensorboard.Events([run], tmp_path / "board")
    assert events.update() == 3 and events.update() == 0
    with open(run / TRAIN, "a") as f:
        f.write(json.dumps({"step": 3, "loss": 4.0}) + "\n" + '{"step": 4, "lo')  # torn: the run is writing
    assert events.update() == 1
    events.close()
    found = read(tmp_path / "board" / run.name)
    assert found["train/loss"] == [(1, 6.0), (2, 5.0), (3, 4.0)] and found["validation/loss"] == [(2, 5.5)]
    assert found["by_pair/new"] == [(2, 6.5)] and found["by_domain/law"] == [(2, 5.5)]
    assert found["expert_load/layer2/p100"] == [(1, 1.6), (2, 1.6)]
    assert not any("time_s" in tag for tag in found)


def test_what_has_not_changed_is_not_read_again_and_a_finished_run_holds_no_file_open(run, tmp_path, monkeypatch):
    events, reads = tensorboard.Events([run], tmp_path / "board"), []
    read_rows = tensorboard.read_rows
    monkeypatch.setattr(tensorboard, "read_rows", lambda path: reads.append(path.name) or read_rows(path))
    assert events.update() == 3 and events.update() == 0 and reads == [TRAIN, VALIDATION] and events._writers
    with open(run / TRAIN, "a") as f:
        f.write(json.dumps({"step": 3, "loss": 4.0}) + "\n")
    write_json(run / "result.json", {})
    assert events.update() == 1 and reads[2:] == [TRAIN] and not events._writers
    assert read(tmp_path / "board" / run.name)["train/loss"] == [(1, 6.0), (2, 5.0), (3, 4.0)]


def test_a_run_that_does_not_exist_is_one_line(run):
    assert tensorboard.select(["350m-moe"]) == tensorboard.select([]) == [run]
    with pytest.raises(ValueError, match=r"run '6.7b': no id of a run starts with it; 1 are in"):
        tensorboard.select(["6.7b"])


@pytest.mark.multiprocess
def test_the_server_ends_with_an_error_of_the_metrics(run, monkeypatch):
    started, real = [], subprocess.Popen

    def server(_):
        (run / TRAIN).write_text("no row\nand no row\n")
        started.append(real([sys.executable, "-c", "import time; time.sleep(300)"]))
        return started[0]

    monkeypatch.setattr(tensorboard, "FOLLOW_S", 0.1)
    monkeypatch.setattr(subprocess, "Popen", server)
    with pytest.raises(ValueError, match="line 1 of 2 is damaged"):
        tensorboard.serve([run], 0)
    assert started[0].poll() is not None


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_command_serves_on_localhost(run, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "moelab.cli", "tensorboard", "--port", "0"],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = iter(process.stdout.readline, "")
        address = next(line.split(" at ")[1].split()[0] for line in lines if " at http" in line)
        assert address.startswith("http://127.0.0.1:") or address.startswith("http://localhost:")
        deadline = time.monotonic() + 300
        tags = {}
        while not tags and time.monotonic() < deadline:
            with urllib.request.urlopen(address + "data/plugin/scalars/tags") as answer:
                tags = json.load(answer)
            time.sleep(0.5)
        assert "expert_load/layer2/p90" in tags[run.name]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=300)
