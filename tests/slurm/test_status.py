"""Check how submissions are shown and cancelled."""

import json
import os
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from moelab.cli import app
from moelab.files import read_json, write_json
from moelab.report.sweep import Sweep
from moelab.runs.states import Status
from moelab.runs.store import RunStore
from moelab.slurm import attempt, notebook_job, profiles, queue, snapshot, status, submit
from moelab.slurm.attempt import Limits
from moelab.slurm.jobs import Jobs
from moelab.slurm.queue import Job
from moelab.slurm.submission import CANCELLED, Outcome, Part, Submission, outcome, set_outcome

pytestmark = pytest.mark.usefixtures("workshop")


def test_the_overview_believes_the_run_and_slurm_where_each_knows_better(submitted):
    runs, job, record, _ = submitted
    job("runs-0", 0, "RUNNING", node="node3")
    runs[0].set_status(Status("running", 12, 24, 3.5, tokens_per_s=128.0))  # no lock is held in this test
    job("runs-0", 1, "PENDING", "Priority")
    write_json(runs[2].path / "result.json", {})
    job("notebook-0", 0, "PENDING", "Dependency")
    rows = status.overview().rows
    assert [row.state for row in rows] == ["running", "waiting", "finished", "lost", "waiting"]
    assert (rows[0].node, rows[0].step, rows[0].left_s) == ("node3", 12, 12 * 4 * 32 / 128.0)
    assert rows[1].reason == "Priority" and "submit again" in rows[3].reason
    assert not rows[0].over and rows[2].over and rows[3].over

    write_json(record.folder / "notebook-0.json", {"result": "/r", "missing": [runs[3].spec.id]})
    job("notebook-0", 0, "COMPLETED")
    (row,) = status.overview(["20260101-000000-x-abc/notebook"]).rows
    assert row.state == "incomplete" and runs[3].spec.id in row.reason


def test_a_requeued_run_waits_and_says_what_was_before(submitted):
    runs, job, _, _ = submitted
    runs[0].set_status(Status("stopped", step=12, steps=24, reason="stopped at step 12 of 24"))
    job("runs-0", 0, "PENDING", "BeginTime")
    row = status.overview([runs[0].spec.id]).rows[0]
    assert (row.state, row.step) == ("waiting", 12) and row.reason == "BeginTime; before: stopped at step 12 of 24"
    job("runs-0", 0, "RUNNING", node="node1")
    assert status.overview([runs[0].spec.id]).rows[0].state == "starting"


def nobody_answers(*_):
    raise queue.SlurmError("squeue: nobody answers")


def test_a_job_that_slurm_holds_says_what_lets_it_go(submitted):
    runs, job, record, _ = submitted
    runs[0].set_status(Status("stopped", step=12, steps=24, reason="stopped at step 12 of 24"))
    job("runs-0", 0, "PENDING", "launch failed requeued held")
    job("runs-0", 1, "REQUEUE_HOLD")
    job("notebook-0", 0, "PENDING", "JobHeldAdmin")
    rows = {row.id: row for row in status.overview().rows}
    released = "it starts again after `scontrol release"
    assert rows[runs[0].spec.id].reason == (
        f"launch failed requeued held: {released} 7_0`; before: stopped at step 12 of 24"
    )
    assert rows[runs[1].spec.id].reason == f"REQUEUE_HOLD: {released} 7_1`"
    assert rows[f"{record.id}/notebook-0"].reason == f"JobHeldAdmin: {released} 7_0`"


def test_without_slurm_the_runs_still_speak(submitted, shown, monkeypatch):
    runs, _, _, _ = submitted
    write_json(runs[0].path / "result.json", {})
    monkeypatch.setattr(queue, "jobs", nobody_answers)
    now = status.overview()
    assert now.trouble == "squeue: nobody answers" and [row.state for row in now.rows[:2]] == ["finished", "new"]
    assert "1 finished, 3 new" in shown() and "nobody answers" in shown()
    assert shown("none").strip() == "nothing submitted (by these names) · squeue: nobody answers"


def test_a_run_that_stopped_may_wait_in_a_queue_that_does_not_answer(submitted, monkeypatch):
    runs, job, _, jobs = submitted
    spec = runs[0].spec
    runs[0].set_status(Status("stopped", step=12, steps=24, reason="stopped at step 12 of 24"))
    (one,) = Jobs.of([spec], RunStore())
    job("runs-0", 0, "PENDING", "BeginTime")
    answers, seen = iter([nobody_answers, lambda *_: jobs, nobody_answers]), []

    def ask(*_):
        return next(answers)()

    monkeypatch.setattr(queue, "jobs", ask)
    monkeypatch.setattr(status.time, "sleep", lambda _: None)

    def show(now):
        seen.append((now.rows[0].state, now.rows[0].slurm, now.rows[0].reason))
        if len(seen) == 3:
            write_json(runs[0].path / "result.json", {})
            monkeypatch.setattr(queue, "jobs", nobody_answers)

    last = status.watch(show, [spec.id])
    said = "stopped at step 12 of 24"
    assert seen[:3] == [("stopped", "?", said), ("waiting", "PENDING", f"BeginTime; before: {said}"), seen[0]]
    assert (last.rows[0].state, last.rows[0].slurm) == ("finished", "") and one.done()
    (runs[0].path / "result.json").unlink()
    assert not one.done(), "nobody has said that its job is gone"


def test_one_bad_file_hides_nothing_else(submitted, tiny_spec, slurm, monkeypatch):
    runs, job, record, jobs = submitted
    for index in range(4):
        job("runs-0", index, "PENDING", "Priority")
    (runs[0].path / "status.json").write_text("")
    (runs[1].path / "spec.json").write_text('{"train": {')
    shutil.rmtree(runs[2].path)
    for name, text in {"20260102-000000-x-abd": "", "20260103-000000-x-abe": '{"id": 3, "parts": []}'}.items():
        (record.folder.parent / name).mkdir()
        (record.folder.parent / name / "submission.json").write_text(text)
    jobs["20260102-000000-x-abd", "runs-0", 0] = Job("9_0", "", "runs-0", 0, "PENDING", "Priority", "")
    (record.folder / "notebook-0.json").write_text("{")
    rows = {row.id: row for row in status.overview(everything=True).rows}
    by_run = [rows[run.spec.id] for run in runs]
    assert [row.state for row in by_run] == ["waiting", "unreadable", "unreadable", "waiting"], "a torn status is none"
    assert "spec.json: not valid JSON" in by_run[1].reason
    assert "was the run removed" in by_run[2].reason and "submission.json" in rows["20260103-000000-x-abe"].reason
    assert rows[f"{record.id}/notebook-0"].state == "unreadable"
    assert all("\n" not in row.reason for row in rows.values())
    done = CliRunner().invoke(app, ["cancel", "--all"], catch_exceptions=False)
    assert done.exit_code == 0 and "cancelled 5 jobs" in done.output and slurm.calls() == ["scancel"]
    # And submitting goes on: the torn spec is written again.
    jobs.clear()
    plan = submit.submit("x", [({}, [run.spec for run in runs])], profiles.load("local"), with_notebooks=False)
    assert [len(group) for group in plan.specs.values()] == [4]
    assert RunStore().at(runs[1].spec.id).spec == runs[1].spec


def test_a_spec_of_a_newer_version_is_shown_or_named(submitted):
    """It may have fields that this version does not know, or values that it does not allow."""
    runs, *_ = submitted
    for run, (part, name, value) in zip(runs, (("model", "new", 1), ("train", "dtype", "fp4")), strict=False):
        spec = run.spec.to_json()
        write_json(run.path / "spec.json", {**spec, "newer": {"a": 1}, part: {**spec[part], name: value}})
    known, unknown, *_ = status.overview().rows
    assert (known.what, known.state) == ("tiny · seed 0", "lost")
    assert unknown.state == "unreadable" and "train.dtype must be" in unknown.reason and "spec.json" in unknown.reason
    with pytest.raises(ValueError, match="unknown field"):
        RunStore().at(runs[0].spec.id)  # to train it would make another run


ODD = [None, True, 1e300, "x", [], [1], {"a": 1}]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["submission", "spec", "status", "result", "notebook", "progress", "attempts"])
def test_valid_json_of_the_wrong_type_is_a_row_or_one_line(submitted, shown, name, monkeypatch):
    """Every field of every file, and each file as a whole, in turn replaced by a value of each type."""
    runs, job, record, jobs = submitted
    run, folder = runs[0], record.folder
    monkeypatch.setattr(queue, "_run", lambda *words, **_: " ".join(words))  # as a process, it takes texts alone
    monkeypatch.setattr(submit, "_queue", lambda *_: None)
    monkeypatch.setattr(snapshot, "place", lambda _: None)
    run.set_status(Status("stopped", 3, 24, 4.5, 100.0, "x"))
    attempt.record(run, "7", 0, "stopped", "x", "node1", Limits(3, 10))
    write_json(folder / "notebook-0.json", {"result": "/r", "missing": [runs[3].spec.id], "job": "8", "node": None})
    write_json(folder / "notebook-0.progress.json", {"cell": 3, "cells": 7})
    file = {
        "submission": folder / "submission.json",
        "notebook": folder / "notebook-0.json",
        "progress": folder / "notebook-0.progress.json",
        "attempts": run.path / attempt.ATTEMPTS,
    }.get(name, run.path / f"{name}.json")
    whole = read_json(file) if file.exists() else {}
    for values in ([{**whole, key: odd} for key in whole for odd in ODD], [{**whole, "new": 1}], ODD):
        for value in values:
            file.write_text(json.dumps(value) + "\n")
            jobs.clear()
            if record.cluster == "slurm":
                job("runs-0", 0, "PENDING", "Priority")
            shown(everything=True)
            status.overview(["tiny"])
            status.cancel([row for row in status.overview().rows if row.job])
            file.write_text(json.dumps(value) + "\n")
            jobs.clear()
            attempt.history(run)
            try:
                submit.submit("x", [({"seeds": 4}, [run.spec])], profiles.load("local"))
            except ValueError as error:
                assert "\n" not in str(error), value


@pytest.mark.parametrize("name", ["spec.json", "status.json", "train.jsonl"])
def test_a_file_that_never_ends_is_named(submitted, name):
    runs, *_ = submitted
    (runs[0].path / name).unlink(missing_ok=True)
    os.mkfifo(runs[0].path / name)
    row = status.overview(everything=True).rows[0]
    assert row.state == ("unreadable" if name == "spec.json" else "lost")
    assert ("not a regular file" in row.reason) == (name == "spec.json")
    if name == "train.jsonl":
        with pytest.raises(ValueError, match=r"train\.jsonl: not a regular file"):
            runs[0].rows(name)


def test_a_notebook_that_waits_for_too_few_runs_is_queued_anew(tiny_spec, slurm):
    """A task of its array was cancelled; the notebook in the queue would be executed without that run."""
    specs = [replace(tiny_spec, train=replace(tiny_spec.train, seed=seed)) for seed in range(3)]
    ask = lambda: submit.submit("x", [({"a": 1}, specs)], profiles.load("local"))  # noqa: E731
    first = ask().submission
    runs, notebook = first.parts
    mark = f"moelab {first.id}"
    rest = f"1:00|1:00|{mark}"
    alive = [f"{runs.job}_{i}|PENDING|Priority||{rest} runs-0" for i in range(3)]
    for state, cancelled in (("PENDING", [f"scancel {notebook.job}"]), ("RUNNING", [])):
        waits = f"{notebook.job}|{state}|Dependency||{rest} notebook-0"
        slurm.says(*alive, waits)
        assert not ask().scripts
        slurm.says(alive[0], alive[2], waits)
        slurm.commands()
        again = ask()
        assert [again.queued, list(again.scripts)] == [2, ["runs-0", "notebook-0"]]
        new = again.submission.parts[0].job
        script = (again.submission.folder / f"{again.submission.parts[1].job}_submission.sh").read_text()
        waited_for = script.partition("dependency=afterany:")[2].split()[0].split(":")
        assert set(waited_for) == {f"{runs.job}_0", f"{runs.job}_2", new}
        assert [line for line in slurm.commands() if line.startswith("scancel")] == cancelled
        if cancelled:
            slurm.says(alive[0], alive[2])
            shown = [row.id for row in status.overview().rows if "/" in row.id]
            assert shown == [f"{again.submission.id}/notebook-0"], "what is replaced is not shown as lost"
        shutil.rmtree(again.submission.folder)


def test_what_was_cancelled_says_so_with_and_without_slurm(submitted, slurm, monkeypatch):
    runs, job, record, jobs = submitted
    job("runs-0", 0, "PENDING", "Priority")
    job("notebook-0", 0, "PENDING", "Dependency")
    rows = {row.id: row for row in status.overview(everything=True).rows}
    notebook = f"{record.id}/notebook-0"
    status.cancel([rows[runs[0].spec.id], rows[notebook]])
    assert slurm.calls() == ["scancel"]
    jobs.clear()

    def states() -> list[tuple[str, str]]:
        rows = {row.id: row for row in status.overview(everything=True).rows}
        return [(rows[id].state, rows[id].reason) for id in (runs[0].spec.id, notebook)]

    said = ("stopped", "cancelled; submit again to go on")
    assert states() == [said, said]
    with monkeypatch.context() as down:
        down.setattr(queue, "jobs", nobody_answers)
        assert states() == [said, said]
        (record.folder / "notebook-0.json").unlink()  # cancelled by scancel
        assert states()[1] == ("unknown", "")
    job("notebook-0", 0, "CANCELLED")
    assert states()[1] == said
    job("runs-0", 1, "PENDING", "Priority")
    (other,) = Jobs.of([runs[1].spec], RunStore())
    slurm.commands()
    other.cancel()
    jobs.clear()
    assert slurm.commands() == ["scancel 7_1"] and (other.state, other.done()) == ("stopped", True)
    jobs.clear()
    assert states()[1][0] == "lost"


def test_a_notebook_that_is_cancelled_while_it_is_executed_says_so(submitted, monkeypatch):
    _, _, record, _ = submitted
    record.experiment = "pr-moe"
    record.write()

    for cancelled, said in ((False, "out of time; raise the profile's notebook_time"), (True, CANCELLED)):

        def interrupted(*_, cancelled=cancelled, **__):
            if cancelled:
                set_outcome(record.folder, "notebook-0", Outcome(error=CANCELLED))
            raise KeyboardInterrupt

        monkeypatch.setattr(notebook_job.notebooks, "execute", interrupted)
        assert notebook_job.main(record.folder, "notebook-0") == 1
        assert outcome(record.folder, "notebook-0").error == said


def test_a_notebooks_outcome_is_told_whatever_its_pages_and_disk_do(submitted, monkeypatch, tmp_path):
    _, _, record, _ = submitted
    record.experiment = "pr-moe"
    record.write()

    def refused(*_, **__):
        raise OSError(28, "No space left on device")

    write_json(tmp_path / "summary.json", {"missing": []})
    monkeypatch.setattr(notebook_job.site, "update", refused)
    monkeypatch.setattr(notebook_job.notebooks, "execute", lambda *_, **__: tmp_path)
    assert notebook_job.main(record.folder, "notebook-0") == 0
    assert outcome(record.folder, "notebook-0").result == str(tmp_path)
    monkeypatch.setattr(notebook_job.notebooks, "execute", refused)
    assert notebook_job.main(record.folder, "notebook-0") == 1
    assert outcome(record.folder, "notebook-0").error == "[Errno 28] No space left on device"


def test_the_last_notebook_of_a_sweep_compares_its_points(submitted, monkeypatch, capsys):
    _, _, record, _ = submitted
    points = tuple({"scale": "smoke", "seeds": seeds} for seeds in (1, 2))
    record.experiment, record.sweep = "pr-moe", Sweep(("seeds",), points)
    record.parts = [record.parts[0], *(Part(f"notebook-{i}", None, [], point) for i, point in enumerate(points))]
    record.write()
    assert Submission.read(record.folder / "submission.json").sweep == record.sweep
    compared = []

    def fails(error):
        def fail(*_, **__):
            raise error

        return fail

    monkeypatch.setattr(notebook_job.notebooks, "execute", fails(ValueError("no luck")))
    monkeypatch.setattr(notebook_job, "_compare", lambda submission, points: compared.append(points))
    for name, calls in (("notebook-0", 0), ("notebook-1", 1), ("notebook-0", 2)):
        assert notebook_job.main(record.folder, name) == 1 and len(compared) == calls
    monkeypatch.setattr(notebook_job, "_compare", fails(OSError("disk full")))
    assert notebook_job.main(record.folder, "notebook-1") == 1
    assert outcome(record.folder, "notebook-1").error == "no luck", "the notebook's own outcome stands"
    assert "the sweep's comparison: disk full" in capsys.readouterr().err


def test_a_run_of_a_sweep_names_its_points(submitted):
    runs, _, record, _ = submitted
    points = tuple({"scale": "smoke", "seeds": 1, "overrides": {"model.hidden": hidden}} for hidden in (32, 64, 96))
    record.sweep, ids = Sweep(("model.hidden",), points), [run.spec.id for run in runs]
    used = ([ids[0], ids[1]], [ids[0], ids[2]], [ids[0], ids[2], ids[3]])
    record.parts = [record.parts[0], *(Part(f"notebook-{i}", None, list(used[i]), points[i]) for i in range(3))]
    record.write()
    *found, first, _, _ = (row.what for row in status.overview().rows)
    title = f"{runs[0].spec.title} · seed"
    expected = ["0", "1 · model.hidden=32", "2 · model.hidden=64, 96", "3 · model.hidden=96"]
    assert found == [f"{title} {rest}" for rest in expected], "one that all points share names none"
    assert first == "notebook scale=smoke seeds=1 model.hidden=32", "no dict"


def test_a_controller_that_is_down_is_said_to_be_waited_for(slurm, monkeypatch, capsys, tmp_path):
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(queue, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(status, "_ANSWER_S", 1.0)
    started = time.monotonic()
    assert status.overview().trouble == "squeue: Slurm's controller does not answer within 1 s"
    assert time.monotonic() - started < 10
    assert capsys.readouterr().err == "squeue: Slurm's controller has not answered yet; waiting at most 1 s\n"


def test_cancel_takes_the_hash_that_status_shows(submitted, slurm, monkeypatch):
    runs, job, record, _ = submitted
    for index in range(3):
        job("runs-0", index, "PENDING", "Priority")
    invoke = lambda *names, **more: CliRunner().invoke(app, ["cancel", *names], **more)  # noqa: E731
    done = invoke(runs[1].spec.id.rpartition("-")[2])
    assert done.exit_code == 0 and "cancelled 1 job: 7_1" in done.output and slurm.commands() == ["scancel 7_1"]
    done = invoke("nothing-so")
    assert done.exit_code == 1 and "nothing in the queue is named so: nothing-so" in done.stderr
    assert str(invoke("").exception).startswith("a name is empty") and slurm.commands() == []
    monkeypatch.setattr("moelab.cli.slurm.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    done = invoke("tiny", input="n\n")
    assert done.exit_code == 1 and slurm.commands() == []
    assert all(run.spec.id in done.output for run in runs[:3]) and "cancel these 3?" in done.output
    done = invoke("tiny", input="y\n")
    assert done.exit_code == 0 and slurm.commands() == ["scancel 7_0 7_1 7_2"]


@pytest.mark.parametrize("width", [40, 60, 80, 220])
def test_a_narrow_terminal_sees_run_and_state_whole(submitted, shown, width):
    runs, job, _, _ = submitted
    job("runs-0", 0, "RUNNING", node="a-node-with-a-long-name-0001")
    runs[0].set_status(Status("running", 12, 24, 3.5, 128.0))
    job("runs-0", 1, "PENDING", "JobArrayTaskLimit")
    runs[2].set_status(Status("failed", 3, 24, reason="train: " + "a long story " * 12))
    text = shown(width=width, everything=True)
    assert max(map(len, text.splitlines())) <= width
    for word in ("running", "waiting", "failed", "lost", *(f"tiny · seed {i}" for i in range(4))):
        assert word in text, word
    for whole in (runs[0].spec.id.rpartition("-")[2], "12/24", "a-node-with-a-long-name-0001"):
        assert whole in text, "a column is stacked where it does not fit, not left out"


def test_a_reason_does_not_command_the_terminal_and_a_parameter_is_not_markup(submitted, shown):
    """Reasons are texts of exceptions, labels those of users."""
    runs, job, record, _ = submitted
    record.parts[1].values = {"arms": ["[/b]", "[red]"]}
    record.write()
    assert "arms=[/b],[red]" in shown(width=200)
    hostile = "\x1b]0;title\x07\x1b[2J\x9b31m\r\u202egone"
    runs[0].set_status(Status("failed", reason=hostile))
    spec = read_json(runs[1].path / "spec.json")
    write_json(runs[1].path / "spec.json", {**spec, "label": hostile})
    job("runs-0", 1, "PENDING", hostile)
    for said in (shown(width=400, everything=True), runs[0].why_missing(), runs[0].status.reason):
        assert "gone" in said and not set("\x1b\x07\x9b\r\u202e") & set(said)


def test_a_machine_without_a_cluster_is_told_as_such(slurm, monkeypatch, tmp_path):
    """What Slurm's own commands say where there is no slurm.conf fills three lines."""
    (tmp_path / "bin" / "squeue").write_text(
        "#!/bin/sh\necho 'squeue: error: fetch_config: DNS SRV lookup failed' >&2\n"
        "echo 'squeue: fatal: Could not establish a configuration source' >&2\nexit 1\n"
    )
    with pytest.raises(queue.SlurmError, match=r"^squeue: no slurm.conf here: .*cluster.sh env\)\"$"):
        queue.jobs()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(queue.SlurmError, match="squeue is not installed here"):
        queue.jobs()


def test_looks_of_watch_are_a_second_apart_at_least(workshop):
    for every in ("0", "-1"):
        done = CliRunner().invoke(app, ["status", "--watch", "--every", every])
        assert done.exit_code == 2 and "'--every'" in done.output


def test_a_full_queue_is_asked_for_once_and_read_right(slurm):
    slurm.says(
        "12_0|RUNNING|None|node1|1:00|2:00|moelab s runs-0",
        "12_1|PENDING|JobArrayTaskLimit||2:00|2:00|moelab s runs-0",
        "13|PENDING|Dependency||1:00|1:00|moelab s notebook-0",
        "14|RUNNING|None|node1|1:00|2:00|(null)",
        "11_0|COMPLETED|None|node1|1:00|2:00|moelab s runs-0",
    )
    jobs = queue.jobs()
    assert slurm.calls() == ["squeue"] and jobs["s", "runs-0", 0].id == "12_0", "the live job of two in one place"
    assert set(jobs) == {("s", "runs-0", 0), ("s", "runs-0", 1), ("s", "notebook-0", 0)}


def test_the_users_defaults_for_slurms_commands_and_hidden_partitions_hide_no_job(slurm, monkeypatch, tmp_path):
    monkeypatch.setenv("SQUEUE_PARTITION", "login")
    monkeypatch.setenv("SCANCEL_INTERACTIVE", "1")
    for name in ("squeue", "scancel"):
        with open(tmp_path / "bin" / name, "a") as script:
            script.write(f'echo "{name} [$SQUEUE_PARTITION$SCANCEL_INTERACTIVE] $*" >> {tmp_path / "given"}\n')
    queue.jobs()
    queue.cancel(["7"])
    asked, cancelled = (tmp_path / "given").read_text().splitlines()
    assert asked.startswith("squeue [] ") and "--all" in asked.split() and cancelled == "scancel [] 7"
    assert os.environ["SQUEUE_PARTITION"] == "login"


def test_logs_are_found_by_the_beginning_of_an_id(submitted):
    runs, _, record, _ = submitted
    for run in runs[:2]:
        (run.path / "log.txt").write_text("hello")
    assert status.log_of(runs[0].spec.id[:-2]) == runs[0].path / "log.txt"
    with pytest.raises(ValueError, match="several logs of 'tiny'"):
        status.log_of("tiny")
    with pytest.raises(ValueError, match="no log of 'nothing'"):
        status.log_of("nothing")
    (record.folder / "notebook-0.out").write_text("cell 1")
    assert status.log_of(f"{record.id}/notebook-0").read_text() == "cell 1"
