"""Check jobs, scripts and snapshots of a submission without a Slurm. tests/cluster runs the rest on a real one."""

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from moelab import paths
from moelab.config import DistillConfig
from moelab.config.parallel import ParallelConfig
from moelab.design.parameters import resolve
from moelab.experiments import EXPERIMENTS
from moelab.files import read_json, write_json
from moelab.runs.branching import token_budgets
from moelab.runs.store import RunStore
from moelab.slurm import callables, executor, profiles, queue, snapshot, status, submission, submit
from moelab.slurm.queue import Job

pytestmark = pytest.mark.usefixtures("workshop")


def _lines(text: str) -> set[str]:
    return {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}


def seeds(spec, count: int) -> list:
    return [replace(spec, train=replace(spec.train, seed=seed)) for seed in range(count)]


def test_a_job_is_sized_by_the_layout(tiny_spec):
    profile = profiles.load("a100")
    train = replace(tiny_spec.train, device="cuda", batch_size=32, micro_batch=1)
    big = replace(tiny_spec, train=train, parallel=ParallelConfig(data=32, expert=2))
    size = executor.size(big, profile)
    each = {"ntasks_per_node": 8, "gpus_per_node": "a100:8", "cpus_per_task": 8, "mem": "819200M"}
    assert size == {"nodes": 4, **each}
    named = {"job_name": "x", "comment": "moelab a runs-0"}
    text = executor.for_runs(profile, size, Path("/w/code"), Path("/w"), **named).script(6)
    assert {"nodes=4", "ntasks-per-node=8", "gpus-per-node=a100:8", "mem=819200M", "cpus-per-task=8"} <= _lines(text)
    assert {"array=0-5%6", "requeue", "signal=USR1@300", "partition=gpu", "time=1440"} <= _lines(text)
    assert "export NCCL_SOCKET_IFNAME='^lo,docker'" in text
    assert "export PYTHONPATH=/w/code" in text and "export PYTHONSAFEPATH=1" in text
    assert text.splitlines()[-1].startswith("exec ") and text.endswith("-m submitit.core._submit /w\n")
    single = executor.size(tiny_spec, replace(profile, memory_per_rank=""))
    assert single == {"nodes": 1, "ntasks_per_node": 1, "cpus_per_task": 8}
    smaller = executor.size(big, replace(profile, gpus_per_node=4, gpu_type=""))
    assert smaller == {"nodes": 8, **each, "ntasks_per_node": 4, "gpus_per_node": "4", "mem": "409600M"}
    hierarchical = replace(big, parallel=replace(big.parallel, exchange="hierarchical"))
    with pytest.raises(ValueError, match="do not fit profile a100's nodes of 4"):
        executor.size(hierarchical, replace(profile, gpus_per_node=4))


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


def test_a_site_may_want_a_comment_and_a_user_have_an_account(tiny_spec, slurm, monkeypatch):
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab7")
    profile = profiles.Profile("site", sbatch=("--comment=project 42", "--export=NONE"), qos="high")
    plan = submit.submit("x", [({}, [tiny_spec])], profile, dry_run=True)
    lines = _lines(plan.scripts["runs-0"])
    assert {"account=lab7", "qos=high", "export=NONE"} <= lines
    (comment,) = [line.removeprefix("comment=").strip("'\"") for line in lines if line.startswith("comment")]
    assert comment == f"project 42 moelab {plan.submission.id} runs-0"
    assert "--export=ALL" in plan.calls["notebook-0"].command, "a notebook's step has the job's variables all the same"
    slurm.says(f"12|RUNNING|None|node1|1:00|2:00|{comment}")
    assert list(queue.jobs()) == [(plan.submission.id, "runs-0", 0)]


def test_nodes_that_are_down_refuse_no_job(slurm, tmp_path):
    """`sbatch --test-only` leaves them out, where a queued job would wait for them."""
    sbatch = tmp_path / "bin" / "sbatch"
    for said, refused in (
        ("Requested node configuration is not available", nullcontext()),
        ("Invalid account", pytest.raises(ValueError, match="Invalid account")),
    ):
        sbatch.write_text(f"#!/bin/sh\ncat > /dev/null\necho 'allocation failure: {said}' >&2\nexit 1\n")
        with refused:
            queue.check("#!/bin/sh")


def test_a_refusal_half_way_names_what_was_queued(workshop, tiny_spec, slurm, tmp_path):
    sbatch = tmp_path / "bin" / "sbatch"
    says = "QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
    sbatch.write_text(
        '#!/bin/sh\ncase "$1" in --test-only) cat > /dev/null; exit 0 ;; esac\n'
        f"grep -q notebook $1 || exec echo Submitted batch job 7\nprintf 'sbatch: error: {says}' >&2\nexit 1\n"
    )
    said = "sbatch: QOSMaxSubmitJobPerUserLimit; Job violates accounting/QOS policy; queued before: 7; submit again"
    with pytest.raises(queue.SlurmError, match=f"^{said} for the rest$"):
        submit.submit("x", [({}, [tiny_spec])], profiles.load("local"))
    assert [part.job for part in submission.submissions()[0].parts] == ["7", None]


def test_a_folder_that_slurm_and_submitit_would_rewrite_is_refused(tiny_spec, monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", "/work/%j/home")
    with pytest.raises(ValueError, match="would replace what follows the % of a path; set MOELAB_HOME") as error:
        submit.submit("x", [({}, [tiny_spec])], profiles.load("local"), dry_run=True)
    assert "\n" not in str(error.value)


def test_equal_sizes_share_an_array_and_notebooks_wait_for_their_own_runs(tiny_spec):
    profile = profiles.load("local")
    specs = seeds(tiny_spec, 3)
    layout = ParallelConfig(data=2, expert=2, gpus_per_node=1)
    wide = replace(tiny_spec, train=replace(tiny_spec.train, micro_batch=2, seed=9), parallel=layout)
    asked = [({"a": 1}, specs[:2]), ({"a": 2}, [specs[0], wide]), ({"a": 3}, specs)]
    plan = submit.submit("x", asked, profile, dry_run=True)
    assert {name: len(group) for name, group in plan.specs.items()} == {"runs-0": 3, "runs-1": 1}
    waits = {name: [x for x in _lines(text) if x.startswith("dependency")] for name, text in plan.scripts.items()}
    assert waits == {
        "runs-0": [],
        "runs-1": [],
        "notebook-0": ["dependency=afterany:@runs-0@_0:@runs-0@_1"],
        "notebook-1": ["dependency=afterany:@runs-0@_0:@runs-1@"],
        "notebook-2": ["dependency=afterany:@runs-0@"],
    }
    assert {"nodes=2", "ntasks-per-node=1"} <= _lines(plan.scripts["runs-1"])
    assert "export MOELAB_EXECUTOR=read" in plan.scripts["notebook-0"]
    assert not (paths.home() / "submissions").exists(), "a dry run writes nothing"


def test_runs_that_wait_for_a_teacher_are_jobs_of_their_own(tiny_spec):
    teacher = replace(tiny_spec, train=replace(tiny_spec.train, seed=5))
    students = seeds(replace(tiny_spec, teacher=teacher, distill=DistillConfig()), 2)
    here, plan = (
        submit.submit("x", [({}, students)], profiles.load(name), dry_run=True) for name in ("processes", "local")
    )
    for one in (here, plan):
        assert [[s.train.seed for s in group] for group in one.specs.values()] == [[5], [0, 1]]
        assert list(one.scripts) == ["runs-0", "runs-1", "notebook-0"]
    assert set(here.scripts.values()) == {""}, "without Slurm there are none"
    assert {"dependency=afterok:@runs-0@", "kill-on-invalid-dep=yes"} <= _lines(plan.scripts["runs-1"])
    write_json(RunStore().run(teacher).path / "result.json", {})
    plan = submit.submit("x", [({}, students)], profiles.load("local"), dry_run=True)
    assert "dependency" not in plan.scripts["runs-0"] and plan.finished == 1


def test_the_notebook_and_the_submission_ask_for_the_same_runs():
    for chosen in EXPERIMENTS.values():
        request = resolve(chosen, {"scale": "smoke"})
        seeds = {"seeds": request.values["seeds"]} if "seeds" in request.values else {}
        wanted = {spec.id for spec in chosen.specs("smoke", **seeds)}
        assert {spec.id for spec in request.specs} == wanted, chosen.name


def test_a_snapshot_is_the_code_with_its_commit_and_made_once(tmp_path, monkeypatch):
    place = snapshot.place(tmp_path)
    snapshot.take(place)
    assert (place / "moelab" / "kernels" / "gating.py").exists() and (place / "notebooks").is_dir()
    assert read_json(place / "SNAPSHOT.json")["commit"] and not (place / "tests").exists()
    assert (place / "constraints.txt").exists(), "which runs' provenance compares with what is installed"
    assert snapshot.place(tmp_path) == place
    # What a job's script exports (`test_a_job_is_sized_by_the_layout`) makes this the code that it runs.
    probe = "from importlib.util import find_spec as f; print(f('moelab.runs').origin, f('moelab.kernels').origin)"
    env = {**os.environ, "PYTHONPATH": str(place), "PYTHONSAFEPATH": "1"}
    out = subprocess.check_output([sys.executable, "-c", probe], env=env, cwd=paths.checkout(), text=True)
    assert out.count(f"{place}/") == 2, "not the checkout, which may be edited"
    checkout = tmp_path / "moelab-main"  # a downloaded archive, without `.git`
    for name in ("moelab/a.py", "moelab/__pycache__/a.pyc", "moelab/.hidden", "kernels/b.py", "results/c.json"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    monkeypatch.setattr(paths, "checkout", lambda: checkout)
    snapshot.take(place := snapshot.place(tmp_path / "snapshots"))
    copied = {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()}
    assert {"moelab/a.py", "kernels/b.py"} <= copied
    assert not any("pycache" in name or "hidden" in name or "results" in name for name in copied)


def test_code_that_no_job_uses_goes_after_a_week(submitted, workshop, tiny_spec, slurm, monkeypatch):
    _, job, record, jobs = submitted
    old = time.time() - 8 * 24 * 3600
    copies = {name: workshop / "snapshots" / name for name in ("live", "idle", "recent")}
    for copy in copies.values():
        (copy / "moelab").mkdir(parents=True)
        os.utime(copy, (old, old) if copy.name != "recent" else None)
    record.snapshot = str(copies["live"])
    record.write()
    monkeypatch.setattr(submit.local, "start", lambda *_: None)
    submit.submit("x", [({}, [tiny_spec])], profiles.load("processes"), with_notebooks=False)
    assert copies["live"].exists() and not copies["idle"].exists(), "what does not ask Slurm leaves its jobs their code"
    (copies["idle"] / "moelab").mkdir(parents=True)
    os.utime(copies["idle"], (old, old))
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
    specs = seeds(tiny_spec, 200)
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
    slurm.says(*(ends := (f"3|COMPLETING|||59:58|1:00:00|{runs}", f"5|COMPLETING|||0:59|1:00|{notebook}")))
    assert [row.slurm for row in status.overview().rows] == ["COMPLETING"] * 2, "still shown"
    again = ask()
    assert (again.queued, list(again.scripts)) == (0, ["runs-0", "notebook-0"])
    assert "dependency" not in again.scripts["runs-0"]
    second = again.submission
    runs, notebook = (f"moelab {second.id} {part.name}" for part in second.parts)
    slurm.says(*ends, f"8|COMPLETING|||1:00:00|1:00:00|{runs}", f"9|PENDING|Dependency||1:00|1:00|{notebook}")
    assert not ask().scripts, "it is about to be requeued, and the first has not ended yet"


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
    monkeypatch.setattr(callables, "begin", lambda: lambda: False)
    plan.calls["runs-0"](str(run.path))
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
        job = Job("local-7", first.id, "runs-0", 0, "PENDING", "None", "")
        monkeypatch.setattr(submit.local, "jobs", lambda *_: {(first.id, "runs-0", 0): job})
    branch = token_budgets(replace(trunk, label="other", parallel=ParallelConfig(data=4)), [12 * step])[0]
    second = submit.submit("y", [({}, [branch])], cluster, with_notebooks=False)
    assert second.queued == 1
    stored = RunStore().at(trunk.id).spec
    assert stored.train.keep_at == (step, branch.start.tokens)
    assert (stored.label, stored.parallel) == ("trunk", trunk.parallel)
