"""Each thing that befalls a job, once; the run must end with the numbers of one that was never disturbed."""

import contextlib
import os
import shutil
import signal
import subprocess

import pytest

from moelab.slurm import attempt, queue
from tests.cluster.conftest import EVERY, told, until
from tests.conftest import numbers

pytestmark = pytest.mark.slow


def scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True).stdout


def test_time_limit(workplace, spec, undisturbed):
    run, pid = workplace.halts(spec)
    job = workplace.job(run).id
    scontrol("update", f"JobId={job}", "TimeLimit=1")  # the warning is due a minute before it
    until(lambda: told(pid, signal.SIGUSR1), "the warning")
    with contextlib.suppress(ProcessLookupError):  # Slurm may have woken it
        os.kill(pid, signal.SIGCONT)
    workplace.until_requeued(run)
    scontrol("update", f"JobId={job}", "TimeLimit=60")
    (first,) = attempt.history(run)
    assert (first.kind, first.again) == ("stopped", True)
    assert first.checkpoint >= 60, "a checkpoint of the step it was stopped at"
    assert workplace.numbers(run) == numbers(undisturbed.path)


def test_preemption(workplace, spec, undisturbed):
    run, _ = workplace.halts(spec)
    node = workplace.job(run).node
    urgent = ("-p", "urgent", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
    subprocess.run(["sbatch", *urgent], check=True, capture_output=True)
    workplace.until_requeued(run)
    assert workplace.numbers(run) == numbers(undisturbed.path)


def test_submitits_own_signal(workplace, spec, undisturbed):
    run, pid = workplace.halts(spec)
    job = workplace.job(run).id
    subprocess.run(["scancel", "--batch", "--signal=USR2", job], check=True)
    until(lambda: told(pid, signal.SIGUSR1), "the driver to ask its rank to stop")
    os.kill(pid, signal.SIGCONT)
    workplace.until_requeued(run)
    (first,) = attempt.history(run)
    assert (first.kind, first.again) == ("stopped", True) and first.checkpoint >= 60
    assert workplace.numbers(run) == numbers(undisturbed.path)


def test_a_killed_task(workplace, spec, undisturbed):
    run, pid = workplace.halts(spec)
    os.kill(pid, signal.SIGKILL)
    until(lambda: attempt.history(run), "the attempt's record")
    (first,) = attempt.history(run)
    assert (first.kind, first.checkpoint, first.again) == ("killed", EVERY, True)
    assert "SIGKILL (out of memory?)" in first.reason
    workplace.until_over(run)
    assert first.node and workplace.job(run).node != first.node, "requeued without the node that killed it"
    assert numbers(run.path) == numbers(undisturbed.path)


def test_a_full_disk(workplace, spec, undisturbed):
    runs = workplace.home / "runs"
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24M", "none", str(runs)]
    small = subprocess.run(mount, capture_output=True, text=True)
    if small.returncode:
        pytest.skip(f"a small file system needs mount: {small.stderr.strip()}")
    try:
        run, pid = workplace.halts(spec)
        ballast = runs / "ballast"
        with open(ballast, "wb") as file:
            file.write(b"\0" * (shutil.disk_usage(runs).free - 500_000))
        os.kill(pid, signal.SIGCONT)
        until(lambda: attempt.history(run), "the attempt's record")
        ballast.unlink()
        (first,) = attempt.history(run)
        assert first.kind == "failed" and "make room" in first.reason and first.checkpoint == EVERY and first.again
        assert workplace.numbers(run) == numbers(undisturbed.path)
    finally:
        workplace.until_over(run)
        subprocess.run(["umount", str(runs)], check=True)


def test_cancelled_runs_keep_a_checkpoint_and_go_on_when_submitted_again(workplace, spec, undisturbed):
    run, _ = workplace.halts(spec)
    queue.cancel([workplace.job(run).id])
    workplace.until_over(run)
    assert run.status.state == "stopped" and attempt.newest_checkpoint(run) >= 60
    workplace.submit(spec)
    assert workplace.numbers(run) == numbers(undisturbed.path)
