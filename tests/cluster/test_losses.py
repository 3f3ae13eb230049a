"""Processes that hang, a node and a controller that are lost; the run must end with the numbers of one that was never disturbed."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from moelab.config.parallel import ParallelConfig
from moelab.engine.launch.process import FINISHED
from moelab.runs.store import RunStore
from moelab.runs.supervisor import supervise
from moelab.slurm import attempt, queue
from moelab.slurm.status import overview
from tests.cluster.conftest import EVERY, numbers, processes, until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_hangs_is_named_and_the_run_goes_on(workplace, spec, tmp_path, ranks):
    """A halted process gives no sign of life; the others would wait for it until their collective gives up, after minutes."""
    wide = replace(
        spec, parallel=ParallelConfig(data=2, expert=2, gpus_per_node=1), train=replace(spec.train, micro_batch=2)
    )
    chosen = wide if ranks == 2 else spec
    alone = RunStore(tmp_path / "local").run(chosen)
    assert supervise(alone) == FINISHED
    (run,) = workplace.submit(
        chosen, halt=[60], environment=("OMP_NUM_THREADS=1", "MOELAB_HANG_S=12", "MOELAB_DEATH_S=6")
    )
    workplace.halted(run, 60)
    until(lambda: attempt.history(run), "the attempt's record")
    (first,) = attempt.history(run)
    assert first.kind == "killed" and first.again and first.checkpoint == EVERY
    assert first.reason.startswith(f"rank 0 of {ranks} on node") and "hangs: no sign of life for 12 s" in first.reason
    workplace.until_over(run)
    assert first.node.startswith("node") and first.node not in workplace.job(run).node
    assert numbers(run) == numbers(alone)


def test_a_lost_node(workplace, spec, undisturbed):
    (run,) = workplace.submit(spec, halt=[60])
    workplace.halted(run, 60)
    job = workplace.job(run)
    for pid in [workplace.pid(f"slurmd.{job.node}"), *processes(job.id, workplace.cluster)]:
        os.kill(pid, signal.SIGKILL)
    try:
        until(lambda: workplace.job(run).node not in (job.node, ""), "another node")
    finally:
        workplace.start(job.node)
    workplace.until_over(run)
    assert numbers(run) == numbers(undisturbed)
    workplace.until_idle()


def test_the_controller_restarts(workplace, spec, undisturbed):
    (run,) = workplace.submit(spec, halt=[60])
    pid = workplace.halted(run, 60)
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
    workplace.until_over(run)
    assert numbers(run) == numbers(undisturbed)
