"""Check the Slurm side without a Slurm: profiles, scripts, decisions, tables. tests/cluster runs the rest on a real one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from moelab import paths
from moelab.cli import app
from moelab.config.parallel import ParallelConfig
from moelab.engine.launch import RankFailed
from moelab.files import read_json, write_json
from moelab.runs.branching import token_budgets
from moelab.runs.store import RunStore, Status
from moelab.slurm import attempt, callables, executor, profiles, queue, snapshot, status, submit
from moelab.slurm.attempt import Attempt, Limits
from moelab.slurm.executor import Size
from moelab.slurm.queue import Job
from moelab.slurm.submission import Part, Submission


@pytest.fixture(autouse=True)
def workshop(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path / "results"))
    return tmp_path / "home"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands of a Slurm that accepts everything, in front of any real ones: its calls, and what its squeue says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    calls, answer = tmp_path / "calls", tmp_path / "squeue.txt"
    calls.touch()
    answer.touch()
    head = f'#!/bin/sh\necho "$(basename $0) $*" >> {calls}\n'
    for name in ("srun", "scancel", "scontrol"):
        (folder / name).write_text(head)
    (folder / "sinfo").write_text(f"{head}printf 'node1\\nnode2\\n'\n")
    (folder / "squeue").write_text(f"{head}cat {answer}\n")
    (folder / "sbatch").write_text(
        f'{head}case "$1" in --test-only) cat > /dev/null ;; *) echo "Submitted batch job $(wc -l < {calls})" ;; esac\n'
    )
    for command in folder.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    class Fake:
        def calls(self) -> list[str]:
            """The commands since the last time, without their arguments."""
            return [line.split()[0] for line in self.commands()]

        def commands(self) -> list[str]:
            """The commands since the last time, in full."""
            lines = calls.read_text().splitlines()
            calls.write_text("")
            return lines

        def says(self, *lines: str) -> None:
            answer.write_text("".join(f"{line}\n" for line in lines))

    return Fake()


# -- profiles ------------------------------------------------------------------------------------------------------------


def test_profiles_that_ship_are_valid_and_the_example_shows_every_field():
    assert profiles.load("a100").gpus_per_node == 8 and profiles.load("local").partition == "debug"
    text = (paths.checkout() / "slurm" / "example.yaml").read_text()
    names = [f.name for f in fields(profiles.Profile) if f.name != "name"]
    assert [f for f in names if f"\n{f}:" not in text] == []
    documented = profiles.Profile.__doc__
    assert [f for f in names if f not in documented] == []


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("partiton: gpu", "unknown field partiton; did you mean partition? allowed: name, cluster, partition"),
        ("nodes: many", "profile site.nodes must be a valid integer, got 'many'"),
        ("nodes: 0", "nodes must be at least 1, got 0"),
        ("time: soon", "time: expected minutes, H:M:S or D-H:M:S, got 'soon'"),
        ("memory_per_rank: 60", "memory_per_rank: expected a size such as 60G or 500M, got '60'"),
        ("time: 0:02:00", "lead_s must leave at least 30 s of the time limit 0:02:00, got 180"),
        ("environment: [NCCL]", "environment takes NAME=VALUE lines, got 'NCCL'"),
        ("sbatch: [-x node1]", "sbatch takes --name=value or --name, got '-x node1'"),
        ("setup: module load", "profile site.setup must be a list, got 'module load'"),
        ("lab_address: all", "lab_address must be 'loopback' or 'node', got 'all'"),
        ("name: other", "a profile is named by its file"),
        ('partition: "gpu\\n#SBATCH --uid=0"', "partition must be one line without control characters, got 'gpu"),
        ('account: "a\\nrm -rf /"', "account must be one line without control characters"),
        ('qos: "a\\rb"', "qos must be one line"),
        ('constraint: "a\\u2028b"', "constraint must be one line"),
        ('gpu_type: "a\\0"', "gpu_type must be one line"),
        ('sbatch: ["--comment=a\\nb"]', "sbatch must be one line"),
        ('environment: ["A=1\\nB=2"]', "environment must be one line"),
        ("cluster: moon", "cluster must be 'slurm' or 'local', got 'moon'"),
        ("a: [", "not valid YAML"),
        ("- a", "expected `field: value` lines"),
    ],
)
def test_a_bad_profile_is_one_line(tmp_path, text, part):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        profiles.load(str(path))
    assert part in str(error.value) and "\n" not in str(error.value)


def test_texts_that_yaml_takes_for_numbers_stay_texts(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text("time: 24:00:00\naccount: no\nqos: 007\n")
    profile = profiles.load(str(path))
    assert (profile.time, profile.account, profile.qos) == ("24:00:00", "no", "007")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30", 1.5), ("2:00:00", 120), ("1-12", 2160), ("1-0:30", 1470), ("1-00:00:30", 1440.5)],
)
def test_time_limits(text, minutes):
    assert profiles.minutes(text, "time") == minutes


# -- scripts -------------------------------------------------------------------------------------------------------------


def _lines(text: str) -> set[str]:
    return {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}


def test_a_job_is_sized_by_the_layout(tiny_spec):
    profile = profiles.load("a100")
    train = replace(tiny_spec.train, device="cuda", batch_size=32, micro_batch=1)
    big = replace(tiny_spec, train=train, parallel=ParallelConfig(data=32, expert=2))
    size = Size.of(big, profile)
    assert size == Size(ranks=32, nodes=4, per_node=8, gpus=8, cpus=8, memory=8 * 100 * 1024)
    text = executor.for_runs(
        profile, size, Path("/w/code"), Path("/w"), job_name="x", comment="moelab a runs-0"
    ).script(6)
    assert {"nodes=4", "ntasks-per-node=8", "gpus-per-node=a100:8", "mem=819200M", "array=0-5%6", "requeue"} <= _lines(
        text
    )
    assert {"signal=USR1@300", "partition=gpu", "time=1440", "cpus-per-task=8"} <= _lines(text)
    assert "export NCCL_SOCKET_IFNAME='^lo,docker'" in text and "export PYTHONPATH=/w/code" in text
    assert text.splitlines()[-1].startswith("exec ") and text.endswith("-m submitit.core._submit /w\n")
    single = Size.of(tiny_spec, profile)
    assert (single.ranks, single.nodes, single.gpus) == (1, 1, 0)
    with pytest.raises(ValueError, match="32 ranks in nodes of 8 need 4 nodes; profile a100 allows 2"):
        Size.of(big, replace(profile, nodes=2))
    smaller = Size.of(big, replace(profile, gpus_per_node=4))
    assert (smaller.nodes, smaller.per_node, smaller.gpus) == (8, 4, 4)
    hierarchical = replace(big, parallel=replace(big.parallel, exchange="hierarchical"))
    with pytest.raises(ValueError, match="do not fit profile a100's nodes of 4"):
        Size.of(hierarchical, replace(profile, gpus_per_node=4))


def test_containers_setup_and_further_arguments(tiny_spec):
    profile = replace(
        profiles.load("a100"), container=("--container-image=/i.sqsh",), setup=("module load cuda",), srun=("--cpu-bind=cores",),
        sbatch=("--exclusive", "--mail-type=FAIL"), python="/env/bin/python",
    )  # fmt: skip
    plan = submit.submit("x", [({}, [tiny_spec])], profile, dry_run=True)
    text = plan.scripts["runs-0"]
    assert {"exclusive", "mail-type=FAIL"} <= _lines(text) and not [x for x in _lines(text) if x.startswith("array")]
    assert "\nmodule load cuda\n" in text
    # The driver, which calls srun, stays outside the container; its ranks and the notebook are inside.
    assert f"exec {sys.executable} -u" in text
    train, notebook = plan.calls["runs-0"], plan.calls["notebook-0"]
    assert train.python == "/env/bin/python" and train.srun == ("--cpu-bind=cores", "--container-image=/i.sqsh")
    assert notebook.command[-3:] == ("--cpu-bind=cores", "--container-image=/i.sqsh", "/env/bin/python")


def test_a_folder_that_slurm_and_submitit_would_rewrite_is_refused(tiny_spec, monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", "/work/%j/home")
    with pytest.raises(ValueError, match="would replace what follows the % of a path; set MOELAB_HOME") as error:
        submit.submit("x", [({}, [tiny_spec])], profiles.load("local"), dry_run=True)
    assert "\n" not in str(error.value)


def test_equal_sizes_share_an_array_and_notebooks_wait_for_their_own_runs(tiny_spec):
    profile = profiles.load("local")
    specs = [replace(tiny_spec, train=replace(tiny_spec.train, seed=seed)) for seed in range(3)]
    wide = replace(
        specs[0],
        train=replace(specs[0].train, micro_batch=2, seed=9),
        parallel=ParallelConfig(data=2, expert=2, gpus_per_node=1),
    )
    plan = submit.submit(
        "x", [({"a": 1}, specs[:2]), ({"a": 2}, [specs[0], wide]), ({"a": 3}, specs)], profile, dry_run=True
    )
    assert {name: len(group) for name, group in plan.specs.items()} == {"runs-0": 3, "runs-1": 1}
    waits = {
        name: next((x for x in _lines(text) if x.startswith("dependency")), "") for name, text in plan.scripts.items()
    }
    assert waits == {
        "runs-0": "",
        "runs-1": "",
        "notebook-0": "dependency=afterany:@runs-0@_0:@runs-0@_1",
        "notebook-1": "dependency=afterany:@runs-0@_0:@runs-1@",
        "notebook-2": "dependency=afterany:@runs-0@",
    }
    assert {"nodes=2", "ntasks-per-node=1"} <= _lines(plan.scripts["runs-1"])
    assert "export MOELAB_EXECUTOR=read" in plan.scripts["notebook-0"]
    assert not (paths.home() / "submissions").exists(), "a dry run writes nothing"


def test_runs_that_wait_for_a_teacher_are_jobs_of_their_own(tiny_spec, monkeypatch):
    teacher = replace(tiny_spec, train=replace(tiny_spec.train, seed=5))
    monkeypatch.setattr(type(tiny_spec), "requires", lambda self: [teacher] if self.train.seed < 2 else [])
    students = [replace(tiny_spec, train=replace(tiny_spec.train, seed=seed)) for seed in range(2)]
    plan = submit.submit("x", [({}, students)], profiles.load("local"), dry_run=True)
    assert [[s.train.seed for s in group] for group in plan.specs.values()] == [[5], [0, 1]]
    assert {"dependency=afterok:@runs-0@", "kill-on-invalid-dep=yes"} <= _lines(plan.scripts["runs-1"])
    write_json(RunStore().run(teacher).path / "result.json", {})
    plan = submit.submit("x", [({}, students)], profiles.load("local"), dry_run=True)
    assert "dependency" not in plan.scripts["runs-0"] and plan.finished == 1


def test_the_notebook_and_the_submission_ask_for_the_same_runs():
    from moelab.design.parameters import resolve
    from moelab.experiments import EXPERIMENTS

    for chosen in EXPERIMENTS.values():
        request = resolve(chosen, {"scale": "smoke"})
        seeds = {"seeds": request.values["seeds"]} if "seeds" in request.values else {}
        wanted = {spec.id for spec in chosen.specs("smoke", **seeds)}
        assert {spec.id for spec in request.specs} == wanted, chosen.name


def test_a_snapshot_is_the_code_with_its_commit_and_made_once(tmp_path):
    place = snapshot.place(tmp_path)
    snapshot.take(place)
    assert (place / "moelab" / "kernels" / "gating.py").exists() and (place / "notebooks").is_dir()
    assert read_json(place / "SNAPSHOT.json")["commit"] and not (place / "tests").exists()
    assert snapshot.place(tmp_path) == place


def test_code_that_no_job_uses_goes_after_a_week(submitted, workshop, tiny_spec, slurm):
    _, job, record, jobs = submitted
    old = time.time() - 8 * 24 * 3600
    copies = {name: workshop / "snapshots" / name for name in ("live", "idle", "recent")}
    for copy in copies.values():
        (copy / "moelab").mkdir(parents=True)
        os.utime(copy, (old, old) if copy.name != "recent" else None)
    record.snapshot = str(copies["live"])
    record.write()
    job("runs-0", 0, "PENDING")
    new = replace(tiny_spec, train=replace(tiny_spec.train, seed=8))
    plan = submit.submit("x", [({}, [new])], profiles.load("local"))
    left = {path.name for path in (workshop / "snapshots").iterdir()}
    assert left == {"live", "recent", Path(plan.submission.snapshot).name}
    jobs["unknown", "runs-0", 0] = next(iter(jobs.values()))
    os.utime(copies["recent"], (old, old))
    submit.submit("x", [({}, [replace(new, train=replace(new.train, seed=9))])], profiles.load("local"))
    assert copies["recent"].exists(), "a job whose submission is gone may need it"


def test_two_hundred_runs_are_one_array_and_a_handful_of_calls(workshop, tiny_spec, slurm):
    specs = [replace(tiny_spec, train=replace(tiny_spec.train, seed=seed)) for seed in range(200)]
    plan = submit.submit("x", [({}, specs)], profiles.load("local"))
    assert [len(group) for group in plan.specs.values()] == [200]
    assert slurm.calls() == ["squeue", *["sbatch"] * 4], "two scripts: each judged, each queued"
    assert len(status.overview().rows) == 201 and slurm.calls() == ["squeue"]
    runs, notebook = plan.submission.parts
    scripts = {job: (plan.submission.folder / f"{job}_submission.sh").read_text() for job in (runs.job, notebook.job)}
    assert f"dependency=afterany:{runs.job}" in scripts[notebook.job] and "array=0-199%2" in scripts[runs.job]
    calls = sorted(plan.submission.folder.glob(f"{runs.job}_*_submitted.pkl"))
    assert len(calls) == 200 and max(path.stat().st_size for path in calls) < 2000, "names and numbers, no code"


def test_what_was_cancelled_can_be_submitted_at_once(workshop, tiny_spec, slurm):
    """A cancelled job is COMPLETING while its run writes a checkpoint; so is one that Slurm requeues, with its whole time left."""
    ask = lambda: submit.submit("x", [({"a": 1}, [tiny_spec])], profiles.load("local"))  # noqa: E731
    first = ask().submission
    runs, notebook = (f"moelab {first.id} {part.name}" for part in first.parts)
    slurm.says(f"3|COMPLETING|None|node1|59:58|1:00:00|{runs}", f"5|COMPLETING|None|node1|0:59|1:00|{notebook}")
    assert [row.slurm for row in status.overview().rows] == ["COMPLETING"] * 2, "still shown"
    again = ask()
    assert (again.queued, list(again.scripts)) == (0, ["runs-0", "notebook-0"])
    assert "dependency" not in again.scripts["runs-0"]
    second = again.submission
    runs, notebook = (f"moelab {second.id} {part.name}" for part in second.parts)
    slurm.says(f"8|COMPLETING|None|node1|1:00:00|1:00:00|{runs}", f"9|PENDING|Dependency||1:00|1:00|{notebook}")
    assert not ask().scripts, "it is about to be requeued"


def test_a_job_keeps_the_layout_that_it_was_sized_for(tiny_spec, slurm, monkeypatch):
    """Another layout is asked for while the job waits; its ranks read the spec on disk."""
    plain = replace(tiny_spec, train=replace(tiny_spec.train, micro_batch=1))
    two, sliced, four = (
        replace(plain, model=replace(plain.model, dropout=0.0), parallel=layout)
        for layout in (ParallelConfig(data=2), ParallelConfig(tensor=2), ParallelConfig(data=4))
    )
    other = replace(sliced, train=replace(sliced.train, seed=5))
    plan = submit.submit("x", [({}, [two, other])], profiles.load("local"), with_notebooks=False)
    assert [call.parallel for call in plan.calls.values()] == [two.parallel, sliced.parallel], "of equal size"
    run = RunStore().run(four)
    supervised = []
    monkeypatch.setattr(callables, "supervise", lambda run, **_: supervised.append(run.spec.parallel) or 0)
    monkeypatch.setattr(callables.submitit, "JobEnvironment", lambda: SimpleNamespace(job_id="12"))
    call = plan.calls["runs-0"]
    call.stop = threading.Event()
    call.work(str(run.path))
    assert supervised == [two.parallel] == [RunStore().at(run.spec.id).spec.parallel]


@pytest.mark.parametrize("profile", ["local", "processes"])
def test_a_run_in_the_queue_learns_of_checkpoints_that_branches_need(tiny_spec, slurm, monkeypatch, profile):
    step = 4 * 32
    train = replace(tiny_spec.train, cooldown_tokens=6 * step, micro_batch=1)
    trunk = replace(tiny_spec, train=train, label="trunk")
    monkeypatch.setattr(submit.local, "start", lambda *_: None)
    cluster = profiles.load(profile)
    first = submit.submit("x", [({}, [trunk.with_checkpoints([step])])], cluster, with_notebooks=False).submission
    if cluster.cluster == "slurm":
        slurm.says(f"3|PENDING|Priority||1:00|1:00|moelab {first.id} runs-0")
    else:
        job = Job("local-7", first.id, "runs-0", 0, "PENDING", "None", "", "")
        monkeypatch.setattr(submit.local, "jobs", lambda *_: {(first.id, "runs-0", 0): job})
    branch = token_budgets(replace(trunk, label="other", parallel=ParallelConfig(data=4)), [12 * step])[0]
    second = submit.submit("y", [({}, [branch])], cluster, with_notebooks=False)
    assert second.queued == 1
    stored = RunStore().at(trunk.id).spec
    assert stored.train.keep_at == (step, branch.start.tokens)
    assert (stored.label, stored.parallel) == ("trunk", trunk.parallel)


# -- what comes after an attempt -----------------------------------------------------------------------------------------


def _attempt(kind: str, reason: str = "x", *, restart: int = 0, checkpoint: int = 0, job: str = "7") -> Attempt:
    return Attempt(job, restart, kind, reason, checkpoint, "node1", 0.0)


def test_what_is_tried_again(tiny_spec, workshop):
    run = RunStore().run(tiny_spec)

    def after(*earlier: Attempt, now: Attempt, failures: int = 3, restarts: int = 10) -> bool:
        lines = [json.dumps(a.__dict__) for a in earlier]
        (run.path / attempt.ATTEMPTS).write_text("".join(f"{line}\n" for line in lines) + '{"cut sho')
        return attempt.decide(run, now, Limits(failures, restarts))[0]

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


def test_the_same_failure_on_another_node_is_the_same(tiny_spec):
    run = RunStore().run(tiny_spec)
    for node, again in (("node1", True), ("node2", False)):
        kind, reason, where = attempt.judge(_death("failed with ValueError: x (exit code 1)", node), run)
        assert (kind, where) == ("failed", node)
        assert attempt.record(run, "7", 0, kind, reason, where, Limits(3, 10)) is again


def _death(how: str, host: str = "node1") -> RankFailed:
    return RankFailed(0, 1, host, how, Path("rank-00000.txt"), "")


def test_the_reason_stays_with_the_run(tiny_spec, capsys):
    run, limits = RunStore().run(tiny_spec), Limits(3, 10)

    def record(failure: RankFailed, job: str, restart: int) -> bool:
        return attempt.record(run, job, restart, *attempt.judge(failure, run), limits)

    failed = Status("failed", step=3, steps=24, reason="loss is nan at step 4")
    run.set_status(failed)
    assert record(_death("failed with FloatingPointError (exit code 1)"), "7", 0)
    assert run.status.state == "stopped" and run.status.reason == "loss is nan at step 4; tried again"
    run.set_status(failed)
    assert not record(_death("failed with FloatingPointError (exit code 1)"), "7", 1)
    assert run.status.reason == "failed twice the same way: loss is nan at step 4" and run.status.step == 3
    assert record(_death("was killed by SIGKILL", "node3"), "8", 0), "another job"
    last = attempt.history(run)[-1]
    assert last.reason == "rank 0 of 1 on node3 was killed by SIGKILL (out of memory?)" and last.node == "node3"
    assert record(_death("hangs: no sign of life for 300 s; it stands at a.py:3 in f"), "9", 0)
    assert attempt.history(run)[-1].kind == "killed"
    assert record(_death("was killed by SIGUSR1"), "8", 1)
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
    assert requeue("node1") == ["scontrol requeue 12_3", "scontrol update JobId=12_3 ExcNodeList=node1"]
    assert requeue("") == requeue("node1", nodes=2) == requeue("node9") == ["scontrol requeue 12_3"]
    slurm.says("COMPLETING")
    assert requeue("node1") == [], "it has been cancelled meanwhile"


# -- how things stand ----------------------------------------------------------------------------------------------------


@pytest.fixture
def submitted(tiny_spec, monkeypatch):
    """Four runs and a notebook on record; the test says what Slurm knows."""
    specs = [replace(tiny_spec, train=replace(tiny_spec.train, seed=seed)) for seed in range(4)]
    runs = [RunStore().run(spec) for spec in specs]
    record = Submission("20260101-000000-x-abc", "x", "local", None, "2026-01-01T00:00:00Z")
    record.parts = [
        Part("runs-0", "7", [run.spec.id for run in runs]),
        Part("notebook-0", "8", [run.spec.id for run in runs], {"seeds": 4}),
    ]
    record.write()
    jobs: dict = {}
    monkeypatch.setattr(queue, "jobs", lambda *_: jobs)

    def job(part: str, index: int, state: str, reason: str = "None", node: str = "") -> None:
        jobs[record.id, part, index] = Job(f"7_{index}", record.id, part, index, state, reason, node, "1:00")

    return runs, job, record, jobs


def test_the_overview_believes_the_run_and_slurm_where_each_knows_better(submitted):
    runs, job, record, _ = submitted
    job("runs-0", 0, "RUNNING", node="node3")
    runs[0].set_status(
        Status("running", step=12, steps=24, loss=3.5, tokens_per_s=128.0)
    )  # no lock is held in this test
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


def test_without_slurm_the_runs_still_speak(submitted, monkeypatch):
    runs, _, _, _ = submitted
    write_json(runs[0].path / "result.json", {})
    monkeypatch.setattr(queue, "jobs", lambda *_: (_ for _ in ()).throw(queue.SlurmError("squeue: nobody answers")))
    now = status.overview()
    assert now.trouble == "squeue: nobody answers" and [row.state for row in now.rows[:2]] == ["finished", "new"]
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(now)
    shown = console.export_text()
    assert "1 finished, 3 new" in shown and "nobody answers" in shown
    console.print(status.overview(["none"]))
    assert console.export_text().strip() == "nothing submitted (by these names) · squeue: nobody answers"


def test_one_bad_file_hides_nothing_else(submitted, tiny_spec, slurm, monkeypatch):
    runs, job, record, jobs = submitted
    for index in range(4):
        job("runs-0", index, "PENDING", "Priority")
    (runs[0].path / "status.json").write_text("")
    (runs[1].path / "spec.json").write_text('{"train": {')
    shutil.rmtree(runs[2].path)
    for name in ("20260102-000000-x-abd", "20260103-000000-x-abe"):
        (record.folder.parent / name).mkdir()
    (record.folder.parent / "20260102-000000-x-abd" / "submission.json").write_text("")
    (record.folder.parent / "20260103-000000-x-abe" / "submission.json").write_text('{"id": 3, "parts": []}')
    jobs["20260102-000000-x-abd", "runs-0", 0] = Job("9_0", "", "runs-0", 0, "PENDING", "Priority", "", "1:00")
    (record.folder / "notebook-0.json").write_text("{")
    rows = {row.id: row for row in status.overview(everything=True).rows}
    by_run = [rows[run.spec.id] for run in runs]
    assert [row.state for row in by_run] == ["waiting", "unreadable", "unreadable", "waiting"], "a torn status is none"
    assert "spec.json: not valid JSON" in by_run[1].reason
    assert "was the run removed?" in by_run[2].reason and "submission.json" in rows["20260103-000000-x-abe"].reason
    assert rows[f"{record.id}/notebook-0"].state == "unreadable"
    assert all("\n" not in row.reason for row in rows.values())
    done = CliRunner().invoke(app, ["cancel", "--all"], catch_exceptions=False)
    assert done.exit_code == 0 and "cancelled 5 jobs" in done.output and slurm.calls() == ["scancel"]
    # And submitting goes on: the torn spec is written again.
    jobs.clear()
    plan = submit.submit("x", [({}, [run.spec for run in runs])], profiles.load("local"), with_notebooks=False)
    assert [len(group) for group in plan.specs.values()] == [4]
    assert RunStore().at(runs[1].spec.id).spec == runs[1].spec


ODD = [None, True, 1e300, "x", [], [1], {"a": 1}]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["submission", "spec", "status", "result", "notebook", "progress", "attempts"])
def test_valid_json_of_the_wrong_type_is_a_row_or_one_line(submitted, slurm, name, monkeypatch):
    """Every field of every file, and each file as a whole, in turn replaced by a value of each type."""
    from rich.console import Console

    runs, job, record, jobs = submitted
    run, folder = runs[0], record.folder
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
            Console(width=160, file=open(os.devnull, "w")).print(status.overview(everything=True))  # noqa: SIM115
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
        down.setattr(queue, "jobs", lambda *_: (_ for _ in ()).throw(queue.SlurmError("squeue: nobody answers")))
        assert states() == [said, said]
        (record.folder / "notebook-0.json").unlink()  # cancelled by scancel
        assert states()[1] == ("unknown", "")
    job("notebook-0", 0, "CANCELLED")
    assert states()[1] == said
    jobs.clear()
    assert states()[1][0] == "lost"


def test_a_notebook_that_is_cancelled_while_it_is_executed_says_so(submitted, monkeypatch):
    from moelab.slurm import notebook_job
    from moelab.slurm.submission import CANCELLED, Outcome, outcome, set_outcome

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


def test_the_last_notebook_of_a_sweep_compares_its_points(submitted, monkeypatch, capsys):
    from moelab.report.sweep import Sweep
    from moelab.slurm import notebook_job
    from moelab.slurm.submission import Part, Submission, outcome

    _, _, record, _ = submitted
    points = tuple({"scale": "smoke", "seeds": seeds} for seeds in (1, 2))
    record.experiment, record.sweep = "pr-moe", Sweep(("seeds",), points)
    record.parts = [record.parts[0], *(Part(f"notebook-{i}", None, [], point) for i, point in enumerate(points))]
    record.write()
    assert Submission.read(record.folder / "submission.json").sweep == record.sweep
    compared = []

    def fails(*_, **__):
        raise ValueError("no luck")

    monkeypatch.setattr(notebook_job.notebooks, "execute", fails)
    monkeypatch.setattr(notebook_job, "_compare", lambda submission, points: compared.append(points))
    for name, calls in (("notebook-0", 0), ("notebook-1", 1), ("notebook-0", 2)):
        assert notebook_job.main(record.folder, name) == 1 and len(compared) == calls
    monkeypatch.setattr(notebook_job, "_compare", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert notebook_job.main(record.folder, "notebook-1") == 1
    assert outcome(record.folder, "notebook-1").error == "no luck", "the notebook's own outcome stands"
    assert "the sweep's comparison: disk full" in capsys.readouterr().err


def test_a_controller_that_is_down_is_said_to_be_waited_for(submitted, slurm, monkeypatch, capsys, tmp_path):
    monkeypatch.undo()  # of `queue.jobs`
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(queue, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(status, "_ANSWER_S", 1.0)
    started = time.monotonic()
    now = status.overview()
    assert time.monotonic() - started < 10 and len(now.rows) == 5
    assert now.trouble == "squeue: Slurm's controller does not answer within 1 s"
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
    monkeypatch.setattr("moelab.cli.slurm.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    done = invoke("tiny", input="n\n")
    assert done.exit_code == 1 and slurm.commands() == []
    assert all(run.spec.id in done.output for run in runs[:3]) and "cancel these 3?" in done.output
    done = invoke("tiny", input="y\n")
    assert done.exit_code == 0 and slurm.commands() == ["scancel 7_0 7_1 7_2"]


def test_a_parameter_is_not_markup(submitted):
    from rich.console import Console

    _, _, record, _ = submitted
    record.parts[1].values = {"arms": ["[/b]", "[red]"]}
    record.write()
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(status.overview())
    assert "arms=['[/b]', '[red]']" in console.export_text()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 220])
def test_a_narrow_terminal_sees_run_and_state_whole(submitted, width):
    from rich.console import Console

    runs, job, _, _ = submitted
    job("runs-0", 0, "RUNNING", node="a-node-with-a-long-name-0001")
    runs[0].set_status(Status("running", 12, 24, 3.5, 128.0))
    job("runs-0", 1, "PENDING", "JobArrayTaskLimit")
    runs[2].set_status(Status("failed", 3, 24, reason="train: " + "a long story " * 12))
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(status.overview(everything=True))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    shown = "\n".join(lines)
    for word in ("running", "waiting", "failed", "lost", *(f"tiny · seed {i}" for i in range(4))):
        assert word in shown, word
    assert (runs[0].spec.id.rpartition("-")[2] in shown) == (width >= 60)
    assert ("12/24" in shown) == (width >= 60) and ("a-node" in shown) == (width >= 220)


def test_a_reason_does_not_command_the_terminal(submitted):
    """Reasons are texts of exceptions, labels those of users."""
    from rich.console import Console

    runs, job, record, _ = submitted
    hostile = "\x1b]0;title\x07\x1b[2J\x9b31m\r\u202egone"
    runs[0].set_status(Status("failed", reason=hostile))
    spec = read_json(runs[1].path / "spec.json")
    write_json(runs[1].path / "spec.json", {**spec, "label": hostile})
    job("runs-0", 1, "PENDING", hostile)
    console = Console(width=400, record=True, force_terminal=False, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(status.overview(everything=True))
    for said in (console.export_text(), runs[0].why_missing(), runs[0].status.reason):
        assert "gone" in said and not set("\x1b\x07\x9b\r\u202e") & set(said)


def test_a_machine_without_a_cluster_is_told_as_such(monkeypatch, tmp_path):
    """What Slurm's own commands say where there is no slurm.conf fills three lines."""
    squeue = tmp_path / "squeue"
    squeue.write_text(
        "#!/bin/sh\necho 'squeue: error: fetch_config: DNS SRV lookup failed' >&2\n"
        "echo 'squeue: fatal: Could not establish a configuration source' >&2\nexit 1\n"
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(queue.SlurmError, match=r"^squeue: no slurm.conf here: .*cluster.sh env\)\"$"):
        queue.jobs()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(queue.SlurmError, match="squeue is not installed here"):
        queue.jobs()


def test_a_full_queue_is_asked_for_once_and_read_right(monkeypatch):
    lines = [
        "12_0|RUNNING|None|node1|1:00|2:00|moelab s runs-0",
        "12_1|PENDING|JobArrayTaskLimit||2:00|2:00|moelab s runs-0",
        "13|PENDING|Dependency||1:00|1:00|moelab s notebook-0",
        "14|RUNNING|None|node1|1:00|2:00|(null)",
        "11_0|COMPLETED|None|node1|1:00|2:00|moelab s runs-0",
    ]
    asked = []
    monkeypatch.setattr(queue, "_run", lambda *command, **_: asked.append(command) or "\n".join(lines))
    jobs = queue.jobs()
    assert len(asked) == 1 and jobs["s", "runs-0", 0].id == "12_0", "the live job of two with the same place"
    assert set(jobs) == {("s", "runs-0", 0), ("s", "runs-0", 1), ("s", "notebook-0", 0)}


def test_logs_are_found_by_the_beginning_of_an_id(submitted):
    runs, _, record, _ = submitted
    for run in runs[:2]:
        (run.path / "log.txt").write_text("hello")
    assert status.log_of(runs[0].spec.id[:-2]) == runs[0].path / "log.txt"
    with pytest.raises(ValueError, match="several logs of 'tiny'"):
        status.log_of("tiny")
    with pytest.raises(ValueError, match="no log of 'nothing'"):
        status.log_of("nothing")
    (record.folder / "8_0_log.out").write_text("cell 1")
    assert status.log_of(f"{record.id}/notebook-0").read_text() == "cell 1"


def test_a_snapshot_needs_no_git(tmp_path, monkeypatch):
    """A downloaded archive has no `.git`."""
    checkout = tmp_path / "moelab-main"
    for name in ("moelab/a.py", "moelab/__pycache__/a.pyc", "moelab/.hidden", "kernels/b.py", "results/c.json"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    monkeypatch.setattr(paths, "checkout", lambda: checkout)
    snapshot.take(place := snapshot.place(tmp_path / "snapshots"))
    copied = {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()}
    assert {"moelab/a.py", "kernels/b.py"} <= copied
    assert not any("pycache" in name or "hidden" in name or "results" in name for name in copied)


def test_a_profile_that_is_not_utf_8_is_named(tmp_path):
    (file := tmp_path / "site.yaml").write_bytes("# Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"site\.yaml: not UTF-8"):
        profiles.load(str(file))


# -- the development cluster ---------------------------------------------------------------------------------------------


@pytest.fixture
def cluster_sh(tmp_path):
    """`slurm/local/cluster.sh up` with stand-ins for Slurm's daemons; munged runs, slurmctld fails."""
    folder = tmp_path / "daemons"
    folder.mkdir()
    pid = '$(echo "$@" | tr " " "\\n" | sed -n "s/^--pid-file=//p")'
    for name, does in {
        "munged": f"sleep 600 >/dev/null 2>&1 & echo $! > {pid}",
        "slurmctld": "exit 1",
        "mungekey": 'touch "${2#--keyfile=}"',
        **dict.fromkeys(("slurmd", "sbatch", "sinfo", "squeue"), "exit 0"),
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{does}\n")
        (folder / name).chmod(0o755)

    def up(port: int) -> subprocess.CompletedProcess:
        places = {"MOELAB_SLURM_DIR": str(tmp_path / "slurm"), "MOELAB_SLURM_PORT": str(port)}
        script = str(paths.checkout() / "slurm" / "local" / "cluster.sh")
        where = {**os.environ, **places, "PATH": f"{folder}:{os.environ['PATH']}"}
        return subprocess.run([script, "up"], env=where, capture_output=True, text=True, timeout=60)

    return up


@pytest.mark.parametrize("offset", [0, 3])
def test_a_port_in_use_is_told_before_anything_is_made(cluster_sh, tmp_path, offset):
    with socket.create_server(("127.0.0.1", 0)) as used:
        number = used.getsockname()[1]
        done = cluster_sh(number - offset)
    assert (
        done.returncode == 1
        and done.stderr == f"port {number} is in use; MOELAB_SLURM_PORT names the first of others\n"
    )
    assert not (tmp_path / "slurm").exists()


def test_what_was_started_is_stopped_when_a_part_does_not_start(cluster_sh, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    done = cluster_sh(number)
    assert done.returncode == 1 and "not up; what was started is stopped" in done.stderr
    assert list((tmp_path / "slurm" / "run").glob("*.pid")) == []
    left = subprocess.run(["pgrep", "-f", f"--socket={tmp_path}"], capture_output=True, text=True)
    assert not left.stdout
