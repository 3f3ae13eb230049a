"""Runs that are killed at random times end with the files of an undisturbed one.

`pytest tests/runs/test_kills.py --kills 50 -s` kills so often, starting a new run whenever one has come to its end, and
prints what was killed after which step. A failure names the seed of its times; PYTEST_SEED draws them again.
"""

import contextlib
import itertools
import os
import random
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from moelab.config.parallel import ParallelConfig
from moelab.engine.checkpoint.format import directories
from moelab.files import read_json, sweep
from moelab.runs.store import Run, RunStore
from moelab.training.metrics import TRAIN, read_rows
from tests.conftest import CLOCK, numbers, tensors

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

ELSEWHERE = {"log.txt", "run.lock", "holder.json"}
"""Files that say who trained a run; with the logs of ranks, all that may differ."""


@pytest.fixture
def kills(request) -> int:
    return request.config.getoption("--kills")


def start(run: Run) -> psutil.Popen:
    with open(run.path / "log.txt", "ab") as log:
        command = [sys.executable, "-m", "moelab.runs.worker", str(run.path)]
        return psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finish(run: Run) -> None:
    process = start(run)
    try:
        assert process.wait(1800) == 0, run.log_tail(40)  # the machine may be busy
    finally:
        if process.is_running():
            process.terminate()  # its ranks end with it


def rows(run: Run) -> int:
    """The number of rows of training metrics."""
    file = run.path / TRAIN
    return file.read_bytes().count(b"\n") if file.exists() else 0


def halt(processes: list[psutil.Process]) -> None:
    """Halt processes, and wait until every one has halted or is gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                time.sleep(0.01)


def kill_once(run: Run, draw: random.Random) -> str:
    """Start the run, kill it or one of its ranks, and return what was killed after which logged step.

    An empty text if it was finished first.
    """
    early = draw.random() < 0.25  # in the midst of starting; else some rows, and so checkpoints, after the last kill
    goal = 0 if early else rows(run) + draw.randint(1, 8)
    before, done = run.status.state, rows(run)
    process = start(run)
    while process.poll() is None and rows(run) < goal:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 3 if early else 0.2))
    if process.poll() is not None:
        assert process.returncode == 0, run.log_tail(40)
        return ""
    ranks = process.children(recursive=True)
    what = draw.choice(["all", "launcher", "rank"]) if ranks else "all"
    if what == "all":
        # All halt before one dies: else a rank sees another die before its own turn, and reports a failure. The launcher
        # halts first, so that it starts no more ranks.
        halt([process])
        ranks = process.children(recursive=True)
        halt(ranks)
    for victim in {"all": [process, *ranks], "launcher": [process], "rank": [draw.choice(ranks or [process])]}[what]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait(120)
    psutil.wait_procs(ranks, 120)
    if what == "all" and rows(run) and not run.finished:
        # A run that is killed before its first step may still have the state that the last start left, such as "failed".
        seen = {"stopped"} if rows(run) > done else {"stopped", before}
        assert run.status.state in seen, "a killed run is seen as stopped"
    return f"{what}@{last['step'] if (last := (read_rows(run.path / TRAIN) or [None])[-1]) else 0}"


def contents(run: Run) -> dict:
    """All that a run left, without times and without who trained it."""
    sweep(run.path, older_s=0)
    names = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()}
    found = {"names": {n for n in names if n not in ELSEWHERE and not n.startswith("logs/")}}
    for file in ("status.json", "spec.json"):
        found[file] = {k: v for k, v in read_json(run.path / file).items() if k not in CLOCK}
    for folder in directories(run.path / "checkpoints"):
        found |= tensors(folder)
    return found | numbers(run.path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_times_it_ends_as_undisturbed(ranks, kills, tiny_spec, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train = replace(tiny_spec.train, tokens=60 * 128, micro_batch=1, checkpoint_every=7, eval_every=25)
    model = replace(tiny_spec.model, dropout=0.0)
    spec = replace(tiny_spec, model=model, train=train, parallel=ParallelConfig(data=ranks))
    undisturbed = RunStore(tmp_path / "undisturbed").run(spec)
    finish(undisturbed)
    expected = contents(undisturbed)
    seed = int(os.environ.get("PYTEST_SEED", time.time_ns() % 10_000))
    draw, count = random.Random(seed), 0
    for attempt in itertools.count():
        run, killed = RunStore(tmp_path / f"killed-{attempt}").run(spec), []
        while count + len(killed) < kills and not run.finished:
            killed += filter(None, [kill_once(run, draw)])
        finish(run)
        count += len(killed)
        print(f"seed {seed}, {ranks} ranks, run {attempt}: killed {', '.join(killed) or 'never'}", flush=True)
        found = contents(run)
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name] == expected[name], f"{name} differs; seed {seed}, killed {killed}"
        if count == kills:
            break
