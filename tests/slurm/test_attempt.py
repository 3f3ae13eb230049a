"""Check what is decided after an attempt to run a job."""

import json
import signal
from pathlib import Path

import pytest

from moelab.engine.launch.launcher import RankFailed
from moelab.engine.launch.postmortem import End
from moelab.runs.states import Status
from moelab.runs.store import RunStore
from moelab.slurm import attempt, queue
from moelab.slurm.attempt import Attempt, Limits

pytestmark = pytest.mark.usefixtures("workshop")


def _attempt(kind: str, reason: str = "x", *, restart: int = 0, checkpoint: int = 0, job: str = "7") -> Attempt:
    return Attempt(job, restart, kind, reason, checkpoint, "node1", 0.0)


def test_what_is_tried_again(tiny_spec, workshop):
    run = RunStore().run(tiny_spec)

    def after(*earlier: Attempt, now: Attempt, failures: int = 3, restarts: int = 10) -> bool:
        lines = [json.dumps(a.__dict__) for a in earlier]
        (run.path / attempt.ATTEMPTS).write_text("".join(f"{line}\n" for line in lines) + '{"cut sho')
        return not attempt.why_not(run, now, Limits(failures, restarts))

    assert after(now=_attempt("stopped"))
    assert after(now=_attempt("failed")), "once may be chance"
    assert not after(_attempt("failed"), now=_attempt("failed")), "twice the same way is not"
    assert after(_attempt("failed", "x"), now=_attempt("failed", "y"))
    assert after(_attempt("failed"), _attempt("stopped"), now=_attempt("failed")), "not in a row"
    assert after(_attempt("failed", job="6"), now=_attempt("failed")), "a new submission counts anew"
    assert after(_attempt("killed", checkpoint=5), now=_attempt("killed", checkpoint=10)), "it gets on"
    assert not after(_attempt("killed", checkpoint=5), now=_attempt("killed", checkpoint=5))
    assert not after(*(_attempt("failed", str(i)) for i in range(3)), now=_attempt("failed"))
    assert not after(now=_attempt("stopped", restart=10))


def test_a_run_that_is_told_to_stop_before_it_gets_on_is_given_up_with_the_reason(tiny_spec):
    run, limits = RunStore().run(tiny_spec), Limits(3, 100)

    def stops(restart: int, checkpoint: int = -1) -> bool:
        if checkpoint >= 0:
            (run.path / "checkpoints" / f"step-{checkpoint:08d}").mkdir(parents=True, exist_ok=True)
        return attempt.record(run, "7", restart, "stopped", "asked to stop", "node1", limits)

    assert [stops(0), stops(1), stops(2, checkpoint=5), stops(3), stops(4, 10)] == [True] * 5, "it gets on"
    assert [stops(5), stops(6)] == [True, False]
    assert run.status.state == "failed"
    assert run.status.reason == (
        "told to stop 3 times before there was a new checkpoint after step 10: the time limit less lead_s is too short "
        "to start and go on; raise the profile's time; last: asked to stop"
    )
    assert attempt.record(run, "8", 0, "stopped", "x", "node1", limits), "submitted again, with a longer limit perhaps"


def test_the_same_failure_on_another_node_is_the_same(tiny_spec):
    run = RunStore().run(tiny_spec)
    for node, again in (("node1", True), ("node2", False)):
        kind, reason, where = attempt.judge(_death(1, "ValueError: x", node), run)
        assert (kind, where) == ("failed", node)
        assert attempt.record(run, "7", 0, kind, reason, where, Limits(3, 10)) is again


def test_a_broken_gpu_is_its_nodes_fault(tiny_spec):
    run = RunStore().run(tiny_spec)
    for said in (
        "ValueError: train: device is cuda, but no CUDA device is available",
        "CUDA error: uncorrectable ECC error",
    ):
        assert attempt.judge(_death(1, said, "gpu07"), run)[::2] == ("killed", "gpu07")


def _death(code: int | None, said: str = "", host: str = "node1") -> RankFailed:
    end = End(None, said) if code is None else End.of(code, said)
    return RankFailed(0, 1, host, end, Path("rank-00000.txt"), "")


def test_the_reason_stays_with_the_run(tiny_spec, capsys):
    run, limits = RunStore().run(tiny_spec), Limits(3, 10)

    def record(failure: RankFailed, job: str, restart: int) -> bool:
        return attempt.record(run, job, restart, *attempt.judge(failure, run), limits)

    failed = Status("failed", step=3, steps=24, reason="loss is nan at step 4")
    run.set_status(failed)
    assert record(_death(1, "FloatingPointError"), "7", 0)
    assert run.status.state == "stopped" and run.status.reason == "loss is nan at step 4; tried again"
    run.set_status(failed)
    assert not record(_death(1, "FloatingPointError"), "7", 1)
    assert run.status.reason == "failed twice the same way: loss is nan at step 4" and run.status.step == 3
    assert record(_death(-signal.SIGKILL, host="node3"), "8", 0), "another job"
    last = attempt.history(run)[-1]
    assert last.reason == "rank 0 of 1 on node3 was killed by SIGKILL (out of memory?)" and last.node == "node3"
    assert record(_death(None, "hangs: no sign of life for 300 s; it stands at a.py:3 in f"), "9", 0)
    assert attempt.history(run)[-1].kind == "killed"
    assert record(_death(-signal.SIGUSR1), "8", 1)
    assert attempt.history(run)[-1].kind == "stopped", "told to stop before it could listen"


def test_a_disk_without_room_for_a_line_ends_it(tiny_spec, monkeypatch, capsys):
    run = RunStore().run(tiny_spec)
    (run.path / attempt.ATTEMPTS).symlink_to("/dev/full")
    monkeypatch.setattr(attempt, "history", lambda run: [])  # reading that device would never end
    assert not attempt.record(run, "7", 0, "failed", "x", "node1", Limits(3, 10))
    assert "No space left" in capsys.readouterr().err


def test_a_requeued_job_leaves_out_the_node_that_killed_it_if_there_are_others(slurm, monkeypatch):
    def requeue(exclude: str, nodes: int = 1) -> list[str]:
        monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(nodes))
        queue.requeue("12_3", exclude)
        return [line for line in slurm.commands() if line.startswith("scontrol")]

    slurm.says("RUNNING")
    asked, again = ["scontrol show job 12_3", "scontrol show hostnames node[7-8]"], "scontrol requeue 12_3"
    assert requeue("node1") == [*asked, again, "scontrol update JobId=12_3 ExcNodeList=node1,node7,node8"]
    assert requeue("node1", nodes=2) == requeue("node9") == [*asked, again] and requeue("") == [again]
    slurm.says("SIGNALING")
    assert requeue("") == [again], "Slurm still sends the signal by which the ranks have stopped"
    slurm.says("COMPLETING")
    assert requeue("node1") == [], "it has been cancelled meanwhile"
