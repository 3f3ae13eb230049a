"""Processes that hang, a node and a controller that are lost; the run must end with the numbers of one that was never disturbed."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from moelab.config.parallel import ParallelConfig
from moelab.engine.launch.process import FINISHED
from moelab.runs.store import RunStore
from moelab.runs.supervisor import supervise
from moelab.slurm import attempt, queue
from moelab.slurm.status import overview
from tests.cluster.conftest import EVERY, processes, until
from tests.conftest import numbers

pytestmark = pytest.mark.slow


def test_a_rank_that_hangs_is_named_and_the_run_goes_on(workplace, spec, tmp_path):
    """A halted process gives no sign of life; the others would wait for it until their collective gives up, after minutes."""
    layout = ParallelConfig(data=2, expert=2, gpus_per_node=1)
    wide = replace(spec, parallel=layout, train=replace(spec.train, micro_batch=2))
    alone = RunStore(tmp_path / "local").run(wide)
    assert supervise(alone) == FINISHED
    patience = ("OMP_NUM_THREADS=1", "MOELAB_HANG_S=12", "MOELAB_DEATH_S=6")
    run, _ = workplace.halts(wide, environment=patience)
    until(lambda: attempt.history(run), "the attempt's record")
    (first,) = attempt.history(run)
    assert first.kind == "killed" and first.again and first.checkpoint == EVERY
    assert first.reason.startswith("rank 0 of 2 on node") and "hangs: no sign of life for 12 s" in first.reason
    workplace.until_over(run)
    assert first.node.startswith("node") and first.node not in workplace.job(run).node
    assert numbers(run.path) == numbers(alone.path)


def test_a_lost_node(workplace, spec, undisturbed):
    run, _ = workplace.halts(spec)
    job = workplace.job(run)
    own = processes(job.id, workplace.cluster)
    daemons = {parent for process in own if (parent := process.parent()) and "slurmstepd" in parent.name()}
    for process in (psutil.Process(workplace.pid(f"slurmd.{job.node}")), *daemons, *own):
        process.kill()
    try:
        until(lambda: workplace.job(run).node not in (job.node, ""), "another node")
    finally:
        workplace.start(job.node)
    assert workplace.numbers(run) == numbers(undisturbed.path)
    workplace.until_idle()


def test_the_controller_restarts(workplace, spec, undisturbed):
    run, pid = workplace.halts(spec)
    try:
        controller = workplace.pid("slurmctld")
        os.kill(controller, signal.SIGTERM)
        until(lambda: not Path(f"/proc/{controller}").exists(), "the controller to go")
        seen = overview([spec.id])
        assert "squeue: " in seen.trouble and seen.rows[0].step >= 60, "the run speaks for itself"
        with pytest.raises(queue.SlurmError, match="squeue: "):
            workplace.submit(replace(spec, train=replace(spec.train, seed=7)))
    finally:
        workplace.start("slurmctld")
    until(lambda: not overview([spec.id]).trouble, "the controller")
    os.kill(pid, signal.SIGCONT)
    assert workplace.numbers(run) == numbers(undisturbed.path)
