"""A run whose process ended says how: signal, exit code, lack of memory, a full disk."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moelab.engine.launch import postmortem
from moelab.runs import executors
from moelab.runs.execute import execute
from moelab.runs.states import Status
from moelab.runs.store import RunStore
from tests.runs.conftest import stand_in

RUNS = "import sys, os; from pathlib import Path; from moelab.runs.store import Run; from moelab.runs.states import Status; run = Run(None, Path(sys.argv[1]));"
TRAINS = RUNS + "run.set_status(Status('running', 7, 24));"
KILLED, ERROR = "import os; os.kill(os.getpid(), 9)", "raise RuntimeError('no such thing')"


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("code", "earlier", "oom_kills", "state", "reason"),
    [
        (KILLED, "", 0, "stopped", "its process was killed by SIGKILL"),
        (KILLED, "failed last week", 0, "stopped", "its process was killed by SIGKILL"),
        (KILLED, "", 1, "stopped", "its process was killed by SIGKILL, out of memory: the kernel counted a kill"),
        (TRAINS + "os.kill(os.getpid(), 9)", "", 0, "stopped", "its process was killed by SIGKILL"),
        (TRAINS + "import ctypes; ctypes.string_at(0)", "", 0, "stopped", "its process was killed by SIGSEGV"),
        (TRAINS + "os._exit(3)", "", 0, "failed", "its process ended with exit code 3"),
        (ERROR, "", 0, "failed", "its process failed with RuntimeError: no such thing (exit code 1)"),
        (ERROR, "failed last week", 0, "failed", "its process failed with RuntimeError: no such thing (exit code 1)"),
        (TRAINS + "raise MemoryError", "", 0, "failed", "its process ran out of memory: MemoryError (exit code 1)"),
        (RUNS + "run.set_status(Status('failed', reason='it says so')); sys.exit(1)", "", 0, "failed", "it says so"),
        (RUNS + "run.set_status(Status('stopped', reason='asked')); sys.exit(75)", "last week", 0, "stopped", "asked"),
    ],
)
def test_a_process_that_ends_without_a_word_is_said_how(
    tiny_spec, monkeypatch, code, earlier, oom_kills, state, reason
):
    run = RunStore().run(tiny_spec)
    if earlier:
        run.set_status(Status("failed", reason=earlier))

    counted = iter((3, 3 + oom_kills))
    monkeypatch.setattr(postmortem, "oom_kills", lambda: next(counted))
    monkeypatch.setattr(executors, "RunProcess", lambda run: stand_in(run, code))
    executors.processes([run], 1, poll_s=0.01)
    assert (run.status.state, run.status.reason) == (state, reason)
    assert run.status.step == (7 if code.startswith(TRAINS) else 0)


def test_a_full_disk_is_named(tiny_spec, monkeypatch):
    run = RunStore().run(tiny_spec)
    run.set_status(Status("running", 7, 24))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    assert run.status.reason.endswith(
        f"its process died; run it again to resume; the disk of {run.path} is full, make room"
    )


def test_a_run_killed_before_its_result_keeps_its_last_loss(tiny_spec):
    """All steps are trained and the last checkpoint is written; no row follows when the run goes on."""
    run = RunStore().run(tiny_spec)
    last: list[Status] = []
    execute(run, on_progress=lambda _: last.append(run.status))
    (run.path / "result.json").unlink()
    run.set_status(last[-1])
    execute(run)
    assert run.status == replace(last[-1], state="finished") and run.status.loss and run.status.tokens_per_s


def test_a_worker_shows_its_stack_to_a_launcher_that_asks_and_when_the_kernel_ends_it(tmp_path):
    code = (
        "import ctypes, os, signal, sys; from pathlib import Path; from moelab.runs import store, worker\n"
        "store.read_json = lambda _: (os.kill(os.getpid(), signal.SIGUSR2), ctypes.string_at(0))\n"
        "worker.main(Path(sys.argv[1]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    asked, _, killed = ended.stderr.partition("Segmentation fault")
    assert ended.returncode == -signal.SIGSEGV and " in main" in asked and " in main" in killed
