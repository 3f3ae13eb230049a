"""A run whose process ended says how: signal, exit code, lack of memory, a full disk."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from moelab.runs import executors
from moelab.runs.execute import execute
from moelab.runs.store import RunStore, Status

RUNS = "import sys, os; from pathlib import Path; from moelab.runs.store import Run, Status; run = Run(None, Path(sys.argv[1]));"
TRAINS = RUNS + "run.set_status(Status('running', 7, 24));"


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("code", "state", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "stopped", "its process was killed by SIGKILL"),
        (TRAINS + "os.kill(os.getpid(), 9)", "stopped", "its process was killed by SIGKILL"),
        (TRAINS + "import ctypes; ctypes.string_at(0)", "stopped", "its process was killed by SIGSEGV"),
        (TRAINS + "os._exit(3)", "failed", "its process ended with exit code 3"),
        ("raise RuntimeError('no such thing')", "failed", "its process failed with RuntimeError: no such thing (exit code 1)"),
        (TRAINS + "raise MemoryError", "failed", "its process ran out of memory: MemoryError (exit code 1)"),
        (RUNS + "run.set_status(Status('failed', reason='it says so')); sys.exit(1)", "failed", "it says so"),
        (RUNS + "run.set_status(Status('stopped', reason='asked to')); sys.exit(75)", "stopped", "asked to"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("earlier", ["", "failed last week"])
def test_a_process_that_ends_without_a_word_is_said_how(tiny_spec, tmp_path, monkeypatch, code, state, reason, earlier):
    run = RunStore(tmp_path).run(tiny_spec)
    if earlier:
        run.set_status(Status("failed", reason=earlier))

    def start(run):
        with open(run.path / "log.txt", "ab") as log:
            return subprocess.Popen([sys.executable, "-c", code, str(run.path)], stderr=log)

    monkeypatch.setattr(executors, "start", start)
    executors.processes([run], 1, poll_s=0.01)
    assert (run.status.state, run.status.reason) == (state, reason)
    assert run.status.step == (7 if code.startswith(TRAINS) else 0)


def test_a_kill_for_lack_of_memory_and_a_full_disk_are_named(tiny_spec, tmp_path, monkeypatch):
    run = RunStore(tmp_path).run(tiny_spec)
    kills = iter((3, 4))
    monkeypatch.setattr(executors.postmortem, "oom_kills", lambda: next(kills))
    session = executors._Session.of(run)
    run.set_status(Status("running", 7, 24))
    full = lambda _: shutil._ntuple_diskusage(10 << 30, 10 << 30, 4096)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", full)
        assert (
            run.status.reason
            == f"its process ended without a word; it will resume; the disk of {run.path} is full, make room"
        )
    session.ended(-9)
    assert run.status.reason == "its process was killed by SIGKILL, out of memory: the kernel counted a kill"


def test_a_run_killed_before_its_result_keeps_its_last_loss(tiny_spec, tmp_path):
    """All steps are trained and the last checkpoint is written; no row follows when the run goes on."""
    run = RunStore(tmp_path).run(tiny_spec)
    last: list[Status] = []
    execute(run, on_progress=lambda _: last.append(run.status), cache=tmp_path)
    (run.path / "result.json").unlink()
    run.set_status(last[-1])
    execute(run, cache=tmp_path)
    assert run.status == replace(last[-1], state="finished") and run.status.loss and run.status.tokens_per_s


def test_a_worker_that_the_kernel_ends_leaves_its_stack(tmp_path):
    code = (
        "import sys; from pathlib import Path; from moelab.runs import worker; import ctypes\n"
        "worker.read_json = lambda _: ctypes.string_at(0)\n"
        "worker.main(Path(sys.argv[1]), 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGSEGV and "Segmentation fault" in ended.stderr and "in main" in ended.stderr
