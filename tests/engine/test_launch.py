"""Ranks that end well, die, hang and run out of memory. Stand-ins for training; torch only where ranks must talk."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from moelab.engine.launch import launcher, postmortem, process
from moelab.engine.launch.launcher import Limits, RankFailed, launch
from moelab.engine.launch.process import rank_name
from moelab.engine.launch.ranks import SlurmRanks
from moelab.files import sweep
from tests.conftest import until

pytestmark = pytest.mark.multiprocess

# Long enough for ranks that get little of a busy machine. Nothing waits for these to pass but what tests them.
QUICK = Limits(hang_s=120, death_s=6, stop_s=120, collective_s=240)
IMPATIENT = Limits(hang_s=4, death_s=8)

ALONE = """
import os, signal, subprocess, sys, time
from moelab.engine.launch import process
place = process.find()
asked = []
for name in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(name, lambda number, frame: asked.append(number))
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
from moelab.engine.launch import process
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

    def go(code, n=2, limits=QUICK, how="local", **options):
        environment = {**os.environ, "MOELAB_TEST_MARK": str(tmp_path), "OMP_NUM_THREADS": "1"}
        return launch(
            [sys.executable, "-c", code], n, tmp_path, limits=limits, environment=environment, how=how, **options
        )

    yield go
    assert alive(tmp_path) == [], "orphans"


@pytest.fixture
def ready(tmp_path):
    """Whether all ranks of a text in ALONE have come so far that they can be asked to stop."""
    return lambda n=2: sum("hello" in log.read_text() for log in tmp_path.glob("rank-*.txt")) == n


def alive(folder):
    """The processes that have a test's mark."""
    return [
        p
        for p in psutil.process_iter(["environ", "status"])
        if (p.info["environ"] or {}).get("MOELAB_TEST_MARK") == str(folder) and p.info["status"] != psutil.STATUS_ZOMBIE
    ]


def fails(go, *arguments, **options):
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        go(*arguments, **options)
    assert time.monotonic() - started < 300, "the ranks would have slept for 600"
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
        "if place.rank == 0: time.sleep(0.5); process.publish('data', 'here')\n"
        "else: print('got', process.wait_for('data'))\n"
        "process.leave()"
    )
    assert ranks(code) == process.FINISHED
    assert "sum 3.0" in (tmp_path / "rank-00000.txt").read_text()
    assert "got here" in (tmp_path / "rank-00001.txt").read_text()


@pytest.mark.parametrize(
    ("rank_1", "told"),
    [
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        (
            "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)); torch.ones(1 << 32)",
            "ran out of memory: RuntimeError",
        ),
    ],
    ids=["SIGKILL", "no memory"],
)
def test_the_end_of_a_rank_is_told_and_not_that_others_lost_the_connection(ranks, rank_1, told):
    """An exception: tests/runs/test_ranks.py."""
    failure = fails(ranks, TOGETHER + f"step()\nif place.rank == 1: {rank_1}\nwhile True: step()")
    assert failure.rank == 1 and told in str(failure) and failure.host in str(failure)
    assert ("Traceback" in failure.tail) == ("Error" in told)


def test_the_rank_that_hangs_is_told_from_those_that_wait_for_it(ranks):
    code = TOGETHER + (
        "def stuck(): time.sleep(600)\nstep()\nfor i in range(3):\n    step()\nif place.rank == 1: stuck()\nwhile True: step()"
    )
    failure = fails(ranks, code, limits=IMPATIENT)
    assert failure.rank == 1
    assert "hangs: no sign of life for 4 s; it stands at <string>:" in str(failure) and "in stuck" in str(failure)
    assert str(failure).endswith("rank 0 waits for others")


def test_a_slow_write_of_a_checkpoint_is_no_hang(ranks):
    limits = replace(IMPATIENT, hang_s=8)  # and what imports much comes first: on a busy machine that takes seconds
    first = (
        "import time, torch\n"
        "from pathlib import Path\n"
        "from moelab.engine import checkpoint\n"
        "from moelab.engine.checkpoint import storage\n"
        "from moelab.training.optimizer import AdamW\n"  # torch's own import the compiler
        "model = torch.nn.Linear(2, 2)\n"
        "optimizer = AdamW(model.parameters())\n"
        f"sleeps = iter([{1.5 * limits.hang_s}, 0])\n"
        "storage.write = lambda *_: time.sleep(next(sleeps))\n"
    )
    then = (
        "with checkpoint.Writer(Path('checkpoints')) as checkpoints:\n"
        "    step()\n"
        "    checkpoints.save(1, model, optimizer, {})\n"
        "    checkpoints.save(2, model, optimizer, {})\n"  # waits for the first
        "process.leave()"
    )
    assert ranks(first + TOGETHER + then, limits=limits) == process.FINISHED


def test_a_rank_that_is_halted_is_told(ranks):
    code = ALONE + "steps(3)\nif place.rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\nsteps(1000)"
    failure = fails(ranks, code, limits=replace(IMPATIENT, death_s=2))
    assert failure.rank == 1 and "halted by a signal" in str(failure)


@pytest.mark.slow
def test_a_collective_that_times_out_names_the_rank_it_waited_for(ranks):
    code = TOGETHER + "step()\nif place.rank == 1: time.sleep(600)\nwhile True: step()"
    failure = fails(ranks, code, limits=Limits(hang_s=100, death_s=6, collective_s=10))
    assert failure.rank == 1 and "hangs: rank 0 waited for it" in str(failure)


def test_what_does_not_answer_and_what_it_started_is_killed(ranks):
    code = ALONE + (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen(['sleep', '600'])\n"
        "if place.rank == 1: sys.exit(3)\n"
        "time.sleep(600)"
    )
    failure = fails(ranks, code, limits=replace(QUICK, death_s=3))
    assert failure.rank == 1 and "ended with exit code 3" in str(failure)


def test_stopping_is_no_failure(ranks, ready, tmp_path):
    code = ALONE + "steps(10_000) if place.rank else steps(10_000, 0.2)"
    assert ranks(code, should_stop=ready) == process.STOPPED
    assert "checkpoint written" in (tmp_path / "rank-00000.txt").read_text()


def test_one_that_stops_by_itself_takes_the_others_along(ranks, tmp_path):
    code = ALONE + "if place.rank == 0:\n    steps(40)\n    sys.exit(75)\nsteps(10_000)"
    assert ranks(code) == process.STOPPED
    assert "checkpoint written" in (tmp_path / "rank-00001.txt").read_text()


def test_one_that_stays_when_the_others_have_stopped_fails(ranks, ready):
    code = ALONE + "if place.rank == 0: steps(10_000)\nwhile True: process.beat(); time.sleep(0.1)"
    failure = fails(ranks, code, limits=Limits(death_s=2, stop_s=2), should_stop=ready)
    assert failure.rank == 1 and "did not stop within 2 s" in str(failure)


def test_one_that_was_asked_before_it_could_answer_fails_nobody(ranks, ready, tmp_path):
    """The others have not met it and would wait in vain."""
    code = ALONE + (
        "if place.rank == 0:\n"
        "    for name in (signal.SIGTERM, signal.SIGUSR1): signal.signal(name, signal.SIG_DFL)\n"
        "    print('deaf', flush=True)\n"
        "time.sleep(600)"
    )

    def asked():
        return ready() and "deaf" in (tmp_path / "rank-00000.txt").read_text()

    assert ranks(code, limits=replace(QUICK, death_s=2), should_stop=asked) == process.STOPPED


def test_an_interrupt_lets_ranks_write_a_checkpoint(ranks, ready, tmp_path):
    def interrupt():
        if ready():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ranks(ALONE + "steps(10_000)", tick=interrupt)
    assert all("checkpoint written" in (tmp_path / f"rank-0000{rank}.txt").read_text() for rank in (0, 1))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_no_rank_outlives_its_launcher(tmp_path):
    code = (
        "import sys; from pathlib import Path; from moelab.engine.launch.launcher import launch\n"
        "launch([sys.executable, '-c', 'import time; time.sleep(600)'], 3, Path(sys.argv[1]), how='local')"
    )
    environment = {**os.environ, "MOELAB_TEST_MARK": str(tmp_path)}
    launcher = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    until(lambda: len(alive(tmp_path)) == 4)
    launcher.kill()
    launcher.wait()
    until(lambda: alive(tmp_path) == [])


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
    assert (found and (found.rank, found.world_size, found.local_rank)) == place
    assert process.find(process.without_rank(environment)) is None


SRUN = """
import os, re, signal, subprocess, sys
# Stands in for srun on one machine: starts the tasks, passes signals on, and words their ends as Slurm 24.11 does.
options = [a for a in sys.argv[1:] if a.startswith("--")]
command = sys.argv[1 + len(options):]
value = dict(o[2:].partition("=")[::2] for o in options)
tasks, nodes = int(value["ntasks"]), int(value.get("nodes", 1))
if tasks > int(os.environ["SLURM_NTASKS"]):
    sys.exit("srun: error: Unable to create step for job 7: More processors requested than permitted")
started = []
def close(number, frame):
    for p in started: p.kill()
    sys.exit(1)
signal.signal(signal.SIGTERM, close)
for name in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(name, lambda number, frame: [p.send_signal(number) for p in started if p.poll() is None])
for rank in range(tasks):
    local = {"SLURM_PROCID": rank, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": tasks, "SLURM_LOCALID": rank // nodes,
             "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    with open(re.sub("%5t", f"{rank:05d}", value["output"]), "ab") as out:
        started.append(subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **{k: str(v) for k, v in
        local.items()}}))
codes = [None] * tasks
while None in codes:
    pid, status = os.wait()
    rank = next(r for r, p in enumerate(started) if p.pid == pid)
    code = codes[rank] = os.waitstatus_to_exitcode(status)
    started[rank].returncode = code
    if code:
        how = f"Exited with exit code {code}" if code > 0 else signal.strsignal(-code)
        print(f"srun: error: node{rank * nodes // tasks + 1}: task {rank}: {how}", file=sys.stderr, flush=True)
sys.exit(max(abs(c) for c in codes))
"""


@pytest.fixture
def install_srun(tmp_path, monkeypatch):
    """Puts a program in front of the machine's own srun."""

    def install(text):
        program = tmp_path / "bin" / "srun"
        program.parent.mkdir()
        program.write_text(text)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return install


@pytest.fixture
def srun(ranks, install_srun, monkeypatch):
    """As `ranks`, inside a job of two nodes and four tasks."""
    install_srun(f"#!{sys.executable}\n{SRUN}")
    job = {
        "JOB_ID": os.getpid(),
        "JOB_NUM_NODES": 2,
        "NTASKS": 4,
        "TASKS_PER_NODE": "2(x2)",
        "JOB_NODELIST": "node[1-2]",
    }
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return functools.partial(ranks, n=4, how="auto", per_node=2)


def test_srun_ranks_meet_by_address_and_end_well(srun, tmp_path):
    assert srun(TOGETHER + "print(place, step())\nprocess.leave()", n=2, per_node=1) == process.FINISHED
    assert re.match(r"rank 1 of 2 on \S+ 3.0", (tmp_path / "rank-00001.txt").read_text())
    assert not list(tmp_path.glob(".session*"))


def test_the_session_of_ranks_that_start_slowly_stays(srun, tmp_path, monkeypatch):
    """Whoever gets the run's lock sweeps the logs; what srun says may be removed besides."""
    monkeypatch.setattr(launcher, "_RENEW_S", 0.2)
    began, aged = time.monotonic(), []

    def tick():
        (session,) = tmp_path.glob(".session-*")
        (session / "srun.txt").unlink(missing_ok=True)
        if not aged:
            os.utime(session, (5, 5))
            aged.append(session)
        elif session.stat().st_mtime > 5:
            sweep(tmp_path, older_s=60)
            (tmp_path / "go").touch()
        assert time.monotonic() - began < 120, "the folder's time stamp is not renewed"

    code = ALONE + f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.05)"
    assert srun(code, n=2, per_node=1, tick=tick) == process.FINISHED


def test_srun_names_the_task_that_died(srun):
    failure = fails(srun, ALONE + "steps(5)\nif place.rank == 2: os.kill(os.getpid(), 9)\nsteps(1000)")
    assert str(failure) == "rank 2 of 4 on node2 was killed by SIGKILL"
    failure = fails(srun, ALONE + "steps(5)\nif place.rank == 1: raise OSError('no disk')\nsteps(1000)")
    assert str(failure) == "rank 1 of 4 on node1 failed with OSError: no disk (exit code 1)"


@pytest.mark.parametrize(
    ("ranks", "tasks", "options"),
    [
        (32, "8(x4)", "--nodes=4 --ntasks-per-node=8"),
        (16, "8(x4)", "--nodes=2 --ntasks-per-node=8"),
        (8, "8(x4)", "--nodes=1"),
        (2, "8(x4)", "--nodes=1"),
        (12, "8(x4)", ""),
        (2, "1(x4)", ""),
        (1, "", "--nodes=1"),
    ],
)
def test_srun_fills_nodes_of_a_larger_allocation(install_srun, tmp_path, ranks, tasks, options):
    install_srun(f'#!/bin/sh\necho "$*" > {tmp_path}/argv\n')
    ended(ranks, tmp_path, SLURM_JOB_NUM_NODES="4", SLURM_TASKS_PER_NODE=tasks)
    said = (tmp_path / "argv").read_text().partition(" --distribution")[0]
    assert said == f"--ntasks={ranks} {options}".strip()


def ended(ranks, folder, **environment):
    """The exit codes of ranks that are srun's tasks, once all have ended."""
    started = SlurmRanks(["command"], ranks, folder, folder, {**os.environ, **environment}, 8)
    until(lambda: None not in started.codes())
    return started.codes()


def test_slurm_speaks_of_ends(install_srun, tmp_path):
    says = {
        "s 0,2-4, 7": ("Exited with exit code 75", 75),
        " 1": ("Killed", -9),
        " 5": ("Out Of Memory", -9),
        " 6": ("Segmentation fault", -11),
        " 8": ("Segmentation fault (core dumped)", -11),
        " 9": ("Terminated", -15),
    }
    lines = "".join(f"echo 'srun: error: node1: task{tasks}: {how}'\n" for tasks, (how, _) in says.items())
    install_srun(f"#!/bin/sh\n{lines}exit 1\n")
    assert ended(11, tmp_path) == [75, -9, 75, 75, 75, -9, -11, 75, -11, -15, 0]


def test_srun_passes_on_the_wish_to_stop(srun, ready, tmp_path):
    assert srun(ALONE + "steps(10_000)", should_stop=lambda: ready(4)) == process.STOPPED
    assert "checkpoint written" in (tmp_path / "rank-00003.txt").read_text()


def test_what_a_job_cannot_hold_is_one_line(srun, monkeypatch):
    failure = fails(srun, ALONE, n=8, per_node=8)
    assert "was not started: srun: error: Unable to create step for job 7: More processors" in str(failure)
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "3,1")
    with pytest.raises(ValueError, match="the job a node with 1; submit it with --ntasks-per-node=2"):
        srun(ALONE)


def test_bad_surroundings_are_one_line():
    with pytest.raises(ValueError, match="RANK must be a whole number, got 'x'"):
        process.find({"RANK": "x", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="rank 2 of 2; allowed"):
        process.find({"RANK": "2", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="MOELAB_HANG_S must be a number of seconds, got 'long'"):
        Limits.read({"MOELAB_HANG_S": "long"})
    assert Limits.read({"MOELAB_HANG_S": "7"}) == Limits(hang_s=7)
    assert Limits.read({"MOELAB_HANG_S": "3600"}).collective_s == 7200, "the watch comes first"
    for text in ("inf", "1e20", "nan", "0", "ten"):
        with pytest.raises(ValueError, match=f"MOELAB_COLLECTIVE_S must be a number of seconds, got '{text}'"):
            Limits.read({"MOELAB_COLLECTIVE_S": text})


def test_a_kill_for_want_of_memory_is_recognised():
    told = postmortem.End.of
    assert told(-signal.SIGKILL, "", True).how == "was killed by SIGKILL, out of memory: the kernel counted a kill"
    assert told(-signal.SIGKILL, "", False).how == "was killed by SIGKILL"
    assert told(-signal.SIGSEGV, "", True).how == "was killed by SIGSEGV"


def test_only_time_awake_counts_for_a_hang(monkeypatch, tmp_path):
    """Launcher and ranks are halted together (SIGSTOP of all, or a machine that sleeps while its clock goes on)."""
    for rank in range(2):
        (tmp_path / rank_name(rank)).touch()
    now = 1000.0
    monkeypatch.setattr(launcher.time, "monotonic", lambda: now)
    watch = launcher._Watch(None, Limits(hang_s=300), tmp_path)

    def hanging_after(seconds):
        nonlocal now
        for _ in range(2 * seconds):
            now += 0.5
            watch.clock.read()
            if hanging := watch._hanging([None, None]):
                return hanging
        return []

    assert hanging_after(200) == []
    now += 3600
    assert hanging_after(90) == [], "200 and 90 seconds awake are not 300"
    os.utime(tmp_path / rank_name(1), (5, 5))  # rank 1 gives a sign of life
    assert hanging_after(60) == [0], "a rank that hangs after all is still found"


def test_tasks_of_srun_get_paths_that_hold_in_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def start(command, ranks, logs, session, environment, per_node):
        assert logs.is_absolute() and session.parent == logs
        raise OSError("not started")

    monkeypatch.setattr(launcher, "SlurmRanks", start)
    with pytest.raises(OSError, match="not started"):
        launch(["true"], 2, Path("logs"), how="srun")
