"""Runs on several ranks, through the worker, the executors and the lab. The ranks do all but the training, which is a stand-in."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from moelab.config.parallel import ParallelConfig
from moelab.engine.launch.launcher import RankFailed
from moelab.engine.launch.postmortem import End
from moelab.lab import Lab
from moelab.runs import branching, executors, supervisor
from moelab.runs.collection import NoResult
from moelab.runs.execute import execute
from moelab.runs.states import Status
from moelab.runs.store import Run, RunStore
from moelab.runs.supervisor import RunProcess as start
from moelab.runs.supervisor import supervise
from moelab.slurm import attempt
from tests.conftest import until
from tests.runs.conftest import stand_in, wait_for_step

# What is imported in every process of a test before its own program: `train` replaced, as Python's start-up hook allows.
STAND_IN = '''
import os, sys, time

class Training:
    """In place of moelab.training.loop and distill: the ranks agree on a sum each step."""
    Branch = Teacher = None
    class TrainingStopped(Exception): pass
    class Progress:
        def __init__(self, step, steps): self.step, self.steps, self.loss, self.tokens_per_s = step, steps, 1.0, 10.0
    @classmethod
    def train(cls, model, config, data, context, path, *, on_progress, should_stop, parallel, teacher, **_):
        import torch, torch.distributed as dist
        from moelab.engine.launch import process
        rank, steps = dist.get_rank(), config.steps(context)
        print("trains with", parallel.ranks, "ranks as", rank, flush=True)
        for step in range(steps):
            process.beat()
            state = torch.tensor([1.0, float(should_stop())])
            dist.all_reduce(state)
            if rank == 0: on_progress(cls.Progress(step + 1, steps))
            if rank == 1 and os.environ.get("STAND_IN_DIES") == str(step): raise ValueError("expert 7 is lost")
            if state[1] > 0: raise cls.TrainingStopped(f"stopped at step {step + 1}")
            time.sleep(float(os.environ.get("STAND_IN_SLEEP", 0)))
        numbers = "tokens validation_loss bits_per_byte unigram_loss parameters active_parameters flops_per_token seconds"
        return {"ranks": int(state[0]), "steps": steps, **dict.fromkeys(numbers.split(), 1)}

sys.modules["moelab.training.loop"] = sys.modules["moelab.training.distill"] = Training
'''


@pytest.fixture(autouse=True)
def _stand_in(tmp_path, monkeypatch):
    folder = tmp_path / "stand-in"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def spec(tiny_spec):
    """24 steps on two ranks."""
    return replace(
        tiny_spec,
        model=replace(tiny_spec.model, dropout=0.0),
        train=replace(tiny_spec.train, micro_batch=2),
        parallel=ParallelConfig(data=2),
    )


@pytest.fixture
def run(spec) -> Run:
    return RunStore().run(spec)


@pytest.mark.multiprocess
def test_the_dead_rank_is_the_status(spec, monkeypatch):
    monkeypatch.setenv("STAND_IN_DIES", "5")
    with pytest.raises(NoResult, match=r"^1 of 1 runs: rank 1 of 2 .*expert 7 is lost") as error:
        Lab().run([spec])
    runs = error.value.runs
    status = runs[0].status
    assert status.state == "failed" and 5 <= status.step <= 7
    assert status.reason.startswith("rank 1 of 2 on ") and "failed with ValueError: expert 7 is lost" in status.reason
    assert "the last lines of rank-00001.txt" in runs[0].log_tail(60) and "expert 7 is lost" in runs.explain_missing()
    monkeypatch.setenv("MOELAB_HANG_S", "long")
    with pytest.raises(NoResult, match="MOELAB_HANG_S must be a number of seconds, got 'long'"):
        Lab().run([spec])
    monkeypatch.delenv("MOELAB_HANG_S")
    monkeypatch.delenv("STAND_IN_DIES")
    (run,) = Lab().run([spec], executor="inline")  # the next try may do better
    assert (run.result["ranks"], run.result["steps"]) == (2, 24) and run.status.state == "finished"
    assert run.provenance["parallel"]["data"] == 2
    assert "trains with 2 ranks as 0" in run.log_tail(100)
    assert "trains with 2 ranks as 1" in (run.path / "logs" / "rank-00001.txt").read_text()


@pytest.mark.parametrize(
    ("said", "how", "kept"),
    [
        ("data: hf:x cannot be reached", "ended with exit code 1", True),
        ("data: hf:x cannot be reached", "failed with ValueError: expert 7 is lost (exit code 1)", False),
        ("Connection closed by peer", "ended with exit code 1", False),
        (None, "ended with exit code 1", False),
    ],
)
def test_rank_0_is_believed_where_no_log_names_an_error(run, monkeypatch, said, how, kept):
    """The class of an exception may have any name, which no traceback shows to be an error's."""
    run.set_status(Status("failed", reason="of the time before"))

    def launch(*_, **__):
        if said:
            run.set_status(Status("failed", step=3, reason=said))
        end = End.of(1, how.removeprefix("failed with ").removesuffix(" (exit code 1)") if "Error" in how else "")
        assert end.how == how
        raise RankFailed(0, 2, "node1", end, run.path / "logs" / "rank-00000.txt", "")

    monkeypatch.setattr(supervisor, "launch", launch)
    with pytest.raises(RankFailed) as caught:
        supervise(run)
    reason = said if kept else f"rank 0 of 2 on node1 {how}"
    assert (run.status.state, run.status.reason) == ("failed", reason)
    assert attempt.judge(caught.value, run) == ("failed", reason, "node1")


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])  # SIGTERM: in the tests that follow
def test_a_signal_stops_all_ranks_with_a_checkpoint(run, monkeypatch, number):
    monkeypatch.setenv("STAND_IN_SLEEP", "0.5")
    process = start(run)
    wait_for_step(run, 2)
    loaded = psutil.Process(process.pid).memory_maps() if sys.platform == "linux" else []
    assert not any("libtorch" in m.path for m in loaded), "the supervisor waits without torch"
    process.send_signal(number)
    assert process.wait(timeout=300) == 75
    assert run.status.state == "stopped" and run.status.reason.startswith("stopped at step")
    assert not run.locked


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("file", "later_s"),
    [("logs/rank-00001.txt", 0), ("holder.json", 0), ("status.json", 0), ("status.json", 0.3)],
    ids=["ranks start", "rank 0 has the lock", "rank 0 prepares the data", "the data are prepared"],
)
def test_a_signal_while_it_starts_stops_all_ranks(run, monkeypatch, file, later_s):
    """Where the ranks are exactly differs from time to time; none is left alone by the others."""
    monkeypatch.setenv("STAND_IN_SLEEP", "0.5")
    monkeypatch.setenv("MOELAB_DEATH_S", "10")
    process = start(run)
    until((run.path / file).exists)
    time.sleep(later_s)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 75, run.log_tail(40)
    assert run.status.state == "stopped" or (file.startswith("logs") and run.status.state == "new")
    assert not run.locked


@pytest.mark.multiprocess
def test_a_signal_while_it_waits_for_another_process_stops_all_ranks(run):
    with run.lock():
        process = start(run)
        until(lambda: "waits for another process" in run.log_tail())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 75, run.log_tail(40)
    assert "stopped while another process trains this run" in run.log_tail(40)
    assert "stopped with rank 0" in (run.path / "logs" / "rank-00001.txt").read_text()
    assert run.status.state == "new"


@pytest.mark.multiprocess
def test_two_that_ask_for_one_run_train_it_once(run, monkeypatch):
    monkeypatch.setenv("STAND_IN_SLEEP", "0.08")
    both = [start(run), start(run)]
    assert [p.wait(timeout=300) for p in both] == [0, 0]
    assert (run.path / "log.txt").read_text().count("trains with 2 ranks as 0") == 1


@pytest.mark.multiprocess
def test_torchrun_starts_ranks_as_well(run):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "moelab.runs.worker", str(run.path)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert run.result["ranks"] == 2


def test_a_wrong_number_of_ranks_is_one_line(run, monkeypatch):
    with pytest.raises(ValueError, match="is for 2 ranks, this process is not one of several"):
        execute(run)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="is for 2 ranks, this is rank 0 of 4"):
        execute(run)


def test_ranks_count_as_workers(spec, monkeypatch):
    """Sleeping stand-ins for workers: what goes at a time."""
    seen, most = [], []

    def started(run):
        seen.append(run.spec.parallel.ranks)
        return stand_in(run, "import time; time.sleep(0.3)", "-S")

    monkeypatch.setattr(executors, "RunProcess", started)
    specs = [
        replace(spec, train=replace(spec.train, seed=s), parallel=ParallelConfig(data=n))
        for s, n in enumerate((2, 1, 1, 2))
    ]
    runs = [RunStore().run(s) for s in specs]
    executors.processes(runs, 3, lambda: most.append(len(seen)), poll_s=0.05)
    assert sorted(seen) == [1, 1, 2, 2] and most[0] == 2
    seen.clear()
    executors.processes(runs[:1], 1, poll_s=0.05)
    assert seen == [2], "one always goes"
    seen.clear(), most.clear()
    on_gpus = [RunStore().run(replace(s, train=replace(s.train, device="cuda"))) for s in specs[:2]]
    executors.processes(on_gpus, 8, lambda: most.append(len(seen)), poll_s=0.05)
    assert most[0] == 1 and len(seen) == 2, "each takes the first GPU"


@pytest.mark.parametrize("kept", [False, True])
def test_a_branch_waits_for_its_trunk_or_the_checkpoint_alone(spec, monkeypatch, kept):
    """Sleeping stand-ins for workers, beside a longer run of no concern."""
    train = replace(spec.train, batch_size=8, tokens=24 * 1024, warmup_tokens=1024, cooldown_tokens=4 * 1024)
    trunk = replace(spec, train=train, parallel=ParallelConfig())
    (branch,) = branching.token_budgets(trunk, [6 * 1024])
    other = replace(trunk, train=replace(train, seed=1, tokens=48 * 1024))
    going: dict[str, start] = {}

    def started(run):
        if run.spec.id == trunk.id:  # the checkpoints before and, if `kept`, at the branch point
            for step in (1, *([branch.first_step] if kept else [])):
                (run.path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        elif run.spec.id == branch.id:
            assert (going[trunk.id].poll() is None) == kept and going[other.id].poll() is None
            for process in going.values():
                process.kill()
        sleep = 600 if run.spec.id == other.id or (kept and run.spec.id == trunk.id) else 0
        going[run.spec.id] = stand_in(run, f"import time; time.sleep({sleep})", "-S")
        return going[run.spec.id]

    monkeypatch.setattr(executors, "RunProcess", started)
    executors.processes([RunStore().run(s) for s in (branch, trunk, other)], 3 if kept else 2, poll_s=0.05)
    assert list(going) == [trunk.id, other.id, branch.id]


def test_a_batch_that_is_stopped_early_has_whole_seeds(spec, monkeypatch):
    """Of a seed the longest run comes first, so that the others fill what it leaves idle."""
    one = replace(spec, parallel=ParallelConfig())
    trains = [replace(spec.train, seed=seed, tokens=tokens) for tokens in (1024, 2048) for seed in (1, 0)]
    runs = [RunStore().run(replace(one, train=train)) for train in trains]
    begun = []

    def started(run):
        begun.append((run.spec.train.seed, run.spec.train.tokens))
        return stand_in(run, "", "-S")

    monkeypatch.setattr(executors, "RunProcess", started)
    executors.processes(runs, 1, poll_s=0.02)
    assert begun == [(0, 2048), (0, 1024), (1, 2048), (1, 1024)]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("limit", "code"), [("60", 75), ("0.5", -signal.SIGKILL)])
def test_an_interrupt_gives_processes_the_time_to_stop_that_is_set(run, tmp_path, monkeypatch, limit, code):
    """A stand-in for a worker that writes its checkpoint for three seconds."""
    slow = (
        "import signal, sys, time; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(3), sys.exit(75)))\n"
        "Path(sys.argv[1], 'ready').touch()\n"
        "time.sleep(600)"
    )
    ready, started = run.path / "ready", []

    def begin(run):
        started.append(stand_in(run, slow, "-S"))
        return started[-1]

    def interrupt():
        if ready.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(executors, "RunProcess", begin)
    monkeypatch.setattr(executors, "_MARGIN_S", 0.0)
    monkeypatch.setenv("MOELAB_STOP_S", limit)
    with pytest.raises(KeyboardInterrupt):
        executors.processes([run], 2, interrupt, poll_s=0.05)
    assert started[0].wait(60) == code
