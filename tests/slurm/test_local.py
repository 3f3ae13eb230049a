"""Submit without Slurm: the same commands, records and jobs, in a process of this machine."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import MagicMock

import psutil
import pytest
from submitit.core.utils import FailedJobError
from typer.testing import CliRunner

from moelab import paths
from moelab.cli import app
from moelab.engine.launch.child import Child
from moelab.engine.launch.process import FAILED, STOPPED
from moelab.files import read_json
from moelab.lab import Lab
from moelab.runs import branching
from moelab.runs.execute import execute
from moelab.runs.store import Run, RunStore
from moelab.slurm import attempt, local, preflight, queue, submit
from moelab.slurm.jobs import RunJob
from moelab.slurm.profiles import Profile
from moelab.slurm.status import log_of, overview
from moelab.slurm.submission import Outcome, Part, Submission, set_outcome, submissions
from tests.conftest import until

pytestmark = pytest.mark.multiprocess

PROFILE = Profile("processes", cluster="local", array_parallelism=2)


@pytest.fixture
def lab(workshop, monkeypatch):
    # Nothing here may ask Slurm.
    monkeypatch.setattr(queue, "_run", lambda *command, **_: pytest.fail(f"{command} was called"))
    yield Lab()
    for record in submissions():
        local.cancel([str(part.job) for part in record.parts])


def losses(run: Run) -> list:
    return run.rows("train.jsonl")["loss"].tolist()


def test_jobs_are_submitits_but_for_the_truth_of_the_run(lab, tiny_spec, monkeypatch):
    monkeypatch.setattr(preflight, "check", lambda *_: None)  # as if the text went away after the submission
    monkeypatch.setenv("PYTHONPATH", own := "/packages/of/the/user")
    bad = replace(tiny_spec, data=replace(tiny_spec.data, corpus="folder:/nowhere/at/all"))
    with lab.store.run(tiny_spec).lock():  # the job waits for it, so it has not ended here
        jobs = lab.submit([tiny_spec, bad], cluster="local")
        good, failed = jobs
        assert good.job_id.startswith("local-") and not good.done()
        assert driver(good.job_id).environ()["PYTHONPATH"].endswith(f":{own}")
        assert lab.submit([tiny_spec], cluster="local")[0].job_id == good.job_id, "nothing is queued twice"
    jobs.wait()
    assert good.done() and good.state == "finished" and good.result() == good.run.result
    assert good.result() == read_json(good.run.path / "result.json") and "step 24 of 24" in good.stdout()
    assert failed.done() and failed.state == "failed" and "/nowhere/at/all" in str(failed.exception())
    assert [a.kind for a in attempt.history(failed.run)] == ["failed", "failed"]
    with pytest.raises(FailedJobError, match="failed twice the same way"):
        failed.result()
    assert list(jobs.frame()["state"]) == ["finished", "failed"]


def driver(job: str) -> psutil.Process:
    return psutil.Process(int(job.removeprefix("local-")))


def test_a_run_that_is_stopped_or_cancelled_goes_on_when_it_is_submitted_again(lab, tiny_spec, tmp_path):
    train = replace(tiny_spec.train, tokens=6 * tiny_spec.train.tokens, checkpoint_every=20)
    spec = replace(tiny_spec, train=train)
    alone = RunStore(tmp_path / "alone").run(spec)
    execute(alone)
    ids = set()

    def ended_after(step: int, end: Callable[[RunJob], object]) -> int:
        (job,) = lab.submit([spec], cluster="local")
        ids.add(job.job_id)
        until(lambda: job.run.status.step > step)
        end(job)
        until(lambda: not local.jobs(submissions(), lab.store))
        assert (job.state, job.done()) == ("stopped", True) and attempt.newest_checkpoint(job.run) > step
        return attempt.newest_checkpoint(job.run)

    first = ended_after(30, lambda job: driver(job.job_id).send_signal(signal.SIGUSR2))
    ended_after(first + 10, lambda job: job.cancel())
    (again,) = lab.submit([spec], cluster="local")
    assert len(ids | {again.job_id}) == 3
    again.wait()
    steps = [int(number) for number in re.findall(r"step (\d+) of", again.stdout())]
    assert again.state == "finished" and steps == sorted(steps), "it went on from the checkpoints"
    assert losses(again.run) == losses(alone) and again.result()["validation_loss"] == alone.result["validation_loss"]


def process(lab: Lab, *parts: Part, workers: int = 2) -> int:
    """What the process of a submission with these parts does; its exit code."""
    record = Submission("20260101-000000-x-000001", "x", "processes", None, list(parts), cluster="local")
    record.write()
    return local.main(record.folder, lab.store, workers, attempt.Limits(1, 1))


def test_a_run_whose_spec_is_unreadable_leaves_the_others_alone(lab, tiny_spec, monkeypatch, capsys):
    specs = [replace(tiny_spec, train=replace(tiny_spec.train, seed=seed)) for seed in range(3)]
    runs = [lab.store.run(spec) for spec in specs]
    (runs[0].path / "spec.json").write_text('{"train": {')
    (runs[1].path / "spec.json").unlink()
    trained = []
    monkeypatch.setattr(local, "train", lambda run, *_, **__: trained.append(run.spec))
    monkeypatch.setattr(local, "told_by", lambda *_: lambda: False)
    assert process(lab, Part("runs-0", None, [run.spec.id for run in runs])) == FAILED
    said = capsys.readouterr().err
    assert f"failed: {runs[0].spec.id}, {runs[1].spec.id}; see moelab status" in said
    assert trained == [specs[2]] and "spec.json: not valid JSON" in said


def test_a_run_waits_for_those_that_it_requires_and_for_no_other(lab, tiny_spec, monkeypatch):
    train = replace(tiny_spec.train, batch_size=8, tokens=24 * 1024, warmup_tokens=1024, cooldown_tokens=4 * 1024)
    trunk = replace(tiny_spec, train=train)
    (branch,) = branching.token_budgets(trunk, [6 * 1024])
    other = replace(trunk, train=replace(train, seed=1))
    begun, ended = threading.Event(), []

    def stand_in(run, *_, **__):
        if run.spec.id == branch.id:
            assert ended == [trunk.id]
            begun.set()
        elif run.spec.id == other.id:
            assert begun.wait(60), "the branch waits for a run that it does not need"
        ended.append(run.spec.id)

    monkeypatch.setattr(local, "train", stand_in)
    monkeypatch.setattr(local, "told_by", lambda *_: lambda: False)
    assert process(lab, Part("runs-0", None, [lab.store.run(spec).spec.id for spec in (branch, other, trunk)])) == 0
    assert ended == [trunk.id, branch.id, other.id]


def test_a_local_job_that_is_cancelled_begins_no_further_notebook(lab, monkeypatch):
    begun = []

    def notebook(command, folder, part):
        begun.append(part)
        return Child([sys.executable, "-S", "-c", "raise SystemExit(1)"])

    monkeypatch.setattr(local, "notebook", notebook)
    monkeypatch.setattr(local, "told_by", lambda *_: lambda: bool(begun))
    assert process(lab, *(Part(f"notebook-{i}", None, [], {"a": i}) for i in range(2))) == STOPPED
    assert begun == ["notebook-0"]


def test_a_run_of_another_local_job(lab, tiny_spec, monkeypatch):
    """A second notebook's job waits for the run itself; a job of Slurm cannot wait for a local one."""
    monkeypatch.setattr(local, "start", lambda *_: None)
    first = submit.submit("x", [({"a": 1}, [tiny_spec])], PROFILE).submission
    keys = [(first.id, part.name, 0) for part in first.parts]
    jobs = {key: queue.Job("local-7", *key, state="PENDING", reason="None", node="") for key in keys}
    monkeypatch.setattr(local, "jobs", lambda *_: dict(jobs))
    again = submit.submit("x", [({"a": 1}, [tiny_spec])], PROFILE)
    assert (again.queued, again.scripts) == (1, {})
    other = submit.submit("x", [({"a": 2}, [tiny_spec])], PROFILE)
    assert list(other.scripts) == ["runs-0", "notebook-0"]
    monkeypatch.setattr(queue, "jobs", dict)
    monkeypatch.setattr(queue, "check", lambda text: None)
    monkeypatch.setattr(submit, "_queue", lambda *_: None)
    there = submit.submit("x", [({"a": 3}, [tiny_spec])], Profile("site"))
    assert list(there.scripts) == ["notebook-0"] and "local-7" not in there.scripts["notebook-0"]


def test_what_is_over_says_so_while_its_local_job_goes_on(lab, tiny_spec, monkeypatch):
    monkeypatch.setattr(local, "start", lambda *_: None)
    monkeypatch.setattr(local, "_process", MagicMock())
    specs = [replace(tiny_spec, train=replace(tiny_spec.train, seed=seed)) for seed in range(2)]
    ask = lambda: submit.submit("x", [({"a": 1}, specs), ({"a": 2}, specs)], PROFILE)  # noqa: E731
    record = ask().submission
    record.parts = [replace(part, job="local-7") for part in record.parts]
    record.write()
    for job, spec in (("local-7", specs[0]), ("local-6", specs[1])):  # of the second, a submission before
        attempt.record(lab.store.run(spec), job, 0, "failed", "x", "", attempt.Limits(0, 9))
    set_outcome(record.folder, "notebook-0", Outcome(error="y"))
    ended, waits = ("failed", True), ("waiting", False)
    assert [(row.state, row.over) for row in overview().rows] == [ended, waits, ended, waits]
    again = ask()
    assert list(again.scripts) == ["runs-0", "notebook-0", "notebook-1"] and not again.replaced, "that job goes on"


def test_a_sweep_ends_with_one_table_and_one_figure(lab):
    def moelab(*words: str) -> str:
        done = CliRunner().invoke(app, [*words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    grid = ("-g", "train.tokens=1024,2048", "-p", 'arms=["Dense"]')
    command = ("sweep", "pr-moe", "--scale", "smoke", *grid, "--profile", "processes")
    assert "the same command prints the table of all points" in moelab(*command)
    until(lambda: all(row.over for row in overview().rows))
    rows = overview().rows
    assert [row.state for row in rows] == ["finished"] * 4, rows
    assert "all 1 runs have a result" in log_of(rows[-1].id).read_text()
    (folder,) = (paths.own_results() / "pr-moe" / "smoke-sweep").iterdir()
    summary = read_json(folder / "summary.json")
    assert len(summary["runs"]) == 2 and not summary["missing"] and (folder / "points.svg").stat().st_size > 5_000
    assert "Dense" in (paths.pages() / "pr-moe" / "smoke-sweep" / folder.name / "index.html").read_text()
    again = moelab(*command)
    assert "nothing to submit" in again and again.count("Dense") == 2 and f"{folder.name}/points.svg" in again
    assert len(list(folder.parent.iterdir())) == 1, "published once"


def test_a_job_that_has_gone_does_not_live(lab, tiny_spec, monkeypatch):
    monkeypatch.setattr(local, "start", lambda *_: None)
    submit.submit("x", [({}, [tiny_spec])], PROFILE, with_notebooks=False)
    (record,) = submissions()
    for job in (None, "local-999999999", f"local-{psutil.Process().pid}"):  # none, a dead one, another process
        record.parts[0].job = job
        record.write()
        assert not local.jobs(submissions(), lab.store)
        assert local.cancel([job or "12_3"]) == ([] if job else ["12_3"]), "nobody is sent a signal"
    assert overview().rows[0].state == "lost"
