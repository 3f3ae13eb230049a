"""Ranks that end well, die, hang and run out of memory. Stand-ins for training; torch only where ranks must talk."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from moelab.engine import postmortem, process
from moelab.engine.launch import Limits, RankFailed, launch

pytestmark = pytest.mark.multiprocess

QUICK = Limits(hang_s=2, death_s=6, stop_s=6, collective_s=30)

ALONE = """
import os, signal, subprocess, sys, time
from moelab.engine import process
place = process.find()
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
def steps(n, sleep=0.05):
    for step in range(n):
        process.beat()
        time.sleep(sleep)
        if asked:
            print("checkpoint written"); sys.exit(75)
print("hello from", place, flush=True)
"""

TOGETHER = """
import os, resource, signal, sys, time
from moelab.engine import process
place = process.join()
import torch, torch.distributed as dist
def step():
    process.beat()
    x = torch.ones(4) * (place.rank + 1)
    dist.all_reduce(x)
    return x[0].item()
"""


@pytest.fixture
def ranks(tmp_path):
    """`launch` of a Python text; afterwards nothing of it may live."""
    mark = f"MOELAB_TEST_MARK={tmp_path}"

    def go(code, n=2, limits=QUICK, **options):
        environment = {**os.environ, "MOELAB_TEST_MARK": str(tmp_path), "OMP_NUM_THREADS": "1"}
        return launch(
            [sys.executable, "-c", code], n, tmp_path, limits=limits, environment=environment, how="local", **options
        )

    yield go
    assert alive(mark) == [], "orphans"


def alive(mark):
    found = []
    for p in psutil.process_iter():
        try:
            name, _, value = mark.partition("=")
            if p.pid != os.getpid() and p.environ().get(name) == value and p.status() != psutil.STATUS_ZOMBIE:
                found.append(p)
        except psutil.Error:
            continue
    return found


def fails(go, *arguments, within, **options):
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        go(*arguments, **options)
    assert time.monotonic() - started < within
    assert "\n" not in str(caught.value)
    return caught.value


def test_all_end_well_and_speak_in_their_own_logs(ranks, tmp_path):
    ticks = []
    assert ranks(ALONE + "steps(3)", 3, tick=lambda: ticks.append(1)) == process.FINISHED
    said = [(tmp_path / f"rank-0000{rank}.txt").read_text() for rank in range(3)]
    assert all(re.search(f"hello from rank {rank} of 3 on ", text) for rank, text in enumerate(said))
    assert ticks and sorted(p.name for p in tmp_path.iterdir()) == [f"rank-0000{rank}.txt" for rank in range(3)]


def test_ranks_meet_talk_and_leave(ranks, tmp_path):
    code = TOGETHER + (
        "print('sum', step())\n"
        "if place.rank == 0: time.sleep(0.5); process.tell('data', 'here')\n"
        "else: print('heard', process.hear('data'))\n"
        "process.leave()"
    )
    assert ranks(code) == process.FINISHED
    assert "sum 3.0" in (tmp_path / "rank-00000.txt").read_text()
    assert "heard here" in (tmp_path / "rank-00001.txt").read_text()


def test_an_exception_is_told_by_rank_and_not_by_those_who_lost_the_connection(ranks):
    code = TOGETHER + "step()\nif place.rank == 1: raise ValueError('no such expert')\nwhile True: step()"
    failure = fails(ranks, code, within=40)
    assert failure.rank == 1 and "failed with ValueError: no such expert (exit code 1)" in str(failure)
    assert "Traceback" in failure.tail and failure.host in str(failure)


def test_sigkill_is_told_even_if_another_speaks_first(ranks):
    code = TOGETHER + "step()\nif place.rank == 1: os.kill(os.getpid(), 9)\nwhile True: step()"
    failure = fails(ranks, code, within=40)
    assert failure.rank == 1 and "was killed by SIGKILL" in str(failure)


def test_no_memory_is_told(ranks):
    code = TOGETHER + (
        "step()\nif place.rank == 1:\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n    torch.ones(1 << 32)\n"
        "while True: step()"
    )
    failure = fails(ranks, code, within=40)
    assert failure.rank == 1 and "ran out of memory: RuntimeError" in str(failure)


def test_the_rank_that_hangs_is_told_from_those_that_wait_for_it(ranks):
    code = TOGETHER + (
        "def stuck(): time.sleep(600)\nstep()\nfor i in range(3):\n    step()\nif place.rank == 1: stuck()\nwhile True: step()"
    )
    failure = fails(ranks, code, within=40)
    assert failure.rank == 1
    assert "hangs: no sign of life for 2 s; it stands at <string>:" in str(failure) and "in stuck" in str(failure)
    assert str(failure).endswith("rank 0 waits for others")


def test_a_rank_that_is_halted_is_told(ranks):
    code = ALONE + "steps(3)\nif place.rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\nsteps(1000)"
    failure = fails(ranks, code, within=20)
    assert failure.rank == 1 and "halted by a signal" in str(failure)


def test_a_collective_that_times_out_names_the_rank_it_waited_for(ranks):
    code = TOGETHER + "step()\nif place.rank == 1: time.sleep(600)\nwhile True: step()"
    failure = fails(ranks, code, within=40, limits=Limits(hang_s=100, death_s=6, collective_s=4))
    assert failure.rank == 1 and "hangs: rank 0 waited for it" in str(failure)


def test_what_does_not_answer_and_what_it_started_is_killed(ranks):
    code = ALONE + (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen(['sleep', '600'])\n"
        "if place.rank == 1: sys.exit(3)\n"
        "time.sleep(600)"
    )
    failure = fails(ranks, code, within=12)
    assert failure.rank == 1 and "ended with exit code 3" in str(failure)


def test_stopping_is_no_failure(ranks, tmp_path):
    started = time.monotonic()
    code = ALONE + "steps(1000) if place.rank else steps(1000, 0.2)"
    assert ranks(code, should_stop=lambda: time.monotonic() - started > 1.5) == process.STOPPED
    assert "checkpoint written" in (tmp_path / "rank-00000.txt").read_text()


def test_one_that_stops_by_itself_takes_the_others_along(ranks, tmp_path):
    assert ranks(ALONE + "steps(1000) if place.rank else sys.exit(75)") == process.STOPPED
    assert "checkpoint written" in (tmp_path / "rank-00001.txt").read_text()


def test_one_that_stays_when_the_others_have_stopped_fails(ranks):
    code = (
        ALONE
        + "if place.rank == 1: asked = None\nif place.rank == 0: steps(1000)\nwhile True: process.beat(); time.sleep(0.1)"
    )
    started = time.monotonic()
    limits = Limits(hang_s=60, death_s=2, stop_s=2)
    failure = fails(ranks, code, within=12, limits=limits, should_stop=lambda: time.monotonic() - started > 1)
    assert failure.rank == 1 and "did not stop within 2 s" in str(failure)


def test_an_interrupt_lets_ranks_write_a_checkpoint(ranks, tmp_path):
    started = time.monotonic()

    def interrupt():
        if time.monotonic() - started > 1.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ranks(ALONE + "steps(1000)", tick=interrupt)
    assert all("checkpoint written" in (tmp_path / f"rank-0000{rank}.txt").read_text() for rank in (0, 1))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_no_rank_outlives_its_launcher(tmp_path):
    code = (
        "import sys; from pathlib import Path; from moelab.engine.launch import launch\n"
        "launch([sys.executable, '-c', 'import time; time.sleep(600)'], 3, Path(sys.argv[1]), how='local')"
    )
    environment = {**os.environ, "MOELAB_TEST_MARK": str(tmp_path)}
    launcher = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    mark = f"MOELAB_TEST_MARK={tmp_path}"
    deadline = time.monotonic() + 20
    while len(alive(mark)) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(alive(mark)) == 4
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 5
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(mark) == []


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, (5, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, None),  # a batch script
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"},
            None,
        ),  # a shell
    ],
)
def test_a_rank_finds_its_place(environment, place):
    found = process.find(environment)
    assert (found and (found.rank, found.world, found.local_rank)) == place
    assert process.find(process.forget(environment)) is None


def test_bad_surroundings_are_one_line():
    with pytest.raises(ValueError, match="RANK must be a whole number, got 'x'"):
        process.find({"RANK": "x", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="rank 2 of 2; allowed"):
        process.find({"RANK": "2", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="MOELAB_HANG_S must be a number of seconds, got 'long'"):
        Limits.read({"MOELAB_HANG_S": "long"})
    with pytest.raises(ValueError, match="death_s must be more than 0"):
        Limits(death_s=0)
    assert Limits.read({"MOELAB_HANG_S": "7"}) == Limits(hang_s=7)


def test_a_kill_for_want_of_memory_is_recognised(monkeypatch):
    monkeypatch.setattr(postmortem, "memory_limit", lambda: 10 << 30)
    say = postmortem.death_by_signal
    assert say(signal.SIGKILL, 1, [1 << 30, 2 << 30], oom_kill=True).endswith(
        "a kill (last seen with 2.0 GiB of 10.0 GiB)"
    )
    assert "likely out of memory (last seen with 6.0 GiB" in say(signal.SIGKILL, 1, [1 << 30, 6 << 30], oom_kill=False)
    assert "likely" not in say(signal.SIGKILL, 1, [1 << 30, 2 << 30], oom_kill=False)
    assert say(signal.SIGSEGV, 0, [0, 0], oom_kill=True) == "was killed by SIGSEGV"
