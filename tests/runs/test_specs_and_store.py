import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from filelock import FileLock

from moelab import lab, paths
from moelab.config import ModelConfig, TrainConfig
from moelab.config.distill import DistillConfig
from moelab.config.parallel import ParallelConfig
from moelab.data import preparation
from moelab.files import new_directory, read_json, write_json, write_text
from moelab.lab import Lab
from moelab.runs import dry_run, executors, preflight
from moelab.runs.collection import NoResult
from moelab.runs.execute import execute
from moelab.runs.spec import RunSpec
from moelab.runs.states import Status
from moelab.runs.store import Run, RunStore
from moelab.runs.supervisor import RunProcess as start
from moelab.training.metrics import TRAIN, read_rows
from tests.conftest import until
from tests.runs.conftest import stand_in, wait_for_step


@pytest.fixture
def run(tiny_spec) -> Run:
    """The run of `tiny_spec`, not begun."""
    return RunStore().run(tiny_spec)


def test_ids_are_stable():
    """Ids name the runs that people have: a change here orphans them (raise `GENERATION` if numbers change)."""
    spec = RunSpec(model=ModelConfig.parse("350M+PR-MoE-32/64").shrink(), train=TrainConfig(seed=3))
    assert spec.id == "350m-pr-moe-32-64-twin-s3-f8e69d8fa3"
    assert replace(spec, label="x").id == spec.id
    assert replace(spec, train=replace(spec.train, checkpoint_every=1)).id == spec.id
    assert replace(spec, train=replace(spec.train, lr=1e-3)).id != spec.id


def test_numbers_that_json_turns_into_floats_name_the_same_run(tiny_spec):
    """Workers and jobs read the spec from a file; a run must have one name there and in a notebook."""
    model = replace(tiny_spec.model, routing=replace(tiny_spec.model.routing, aux_loss=0, capacity_factor=2))
    train = replace(tiny_spec.train, min_lr=0, weight_decay=0, clip=1, betas=[0, 0.95])
    spec = replace(tiny_spec, model=model, train=train)
    again = RunSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again.id == spec.id and replace(spec, train=replace(train, min_lr=0.0)).id == spec.id
    assert (
        replace(spec, teacher=spec, distill=DistillConfig()).id
        == replace(again, teacher=again, distill=DistillConfig()).id
    )


def test_values_of_another_type_are_refused_before_a_worker_reads_them(tiny_spec):
    spec = replace(tiny_spec, train=replace(tiny_spec.train, tokens=3e3))
    with pytest.raises(ValueError, match=r"TrainConfig.tokens must be a whole number, got 3000.0"):
        _ = spec.id


def test_an_unfinished_run_takes_the_last_wishes_that_do_not_name_it(tiny_spec):
    store = RunStore()
    run = store.run(tiny_spec.with_checkpoints([256]))
    wished = replace(tiny_spec, train=replace(tiny_spec.train, checkpoint_every=1, tensorboard=True), label="other")
    assert store.run(wished.with_checkpoints([128])).path == run.path
    kept = wished.with_checkpoints([128, 256])
    assert store.at(run.path.name).spec == kept, "and all checkpoints that were ever asked to be kept"
    assert store.run(wished).spec == kept


@pytest.mark.parametrize(
    ("workers", "flops", "where"), [(4, 1e11, "inline"), (5, 1e11, "processes"), (4, 1.0, "processes")]
)
def test_short_runs_train_in_the_callers_process(tiny_spec, monkeypatch, workers, flops, where):
    """Unless many would train at a time, for whom processes are faster."""
    called = []
    for name in ("inline", "processes"):
        monkeypatch.setattr(executors, name, lambda *args, name=name: called.append(name))
    monkeypatch.setattr(lab, "_SHORT_FLOPS", flops)
    with pytest.raises(NoResult):
        Lab().run([tiny_spec], workers=workers)
    assert called == [where]


def test_spec_round_trip(tiny_spec):
    assert RunSpec.from_json(json.loads(json.dumps(tiny_spec.to_json()))) == tiny_spec
    with pytest.raises(ValueError, match=r"spec.json.train: unknown field speed; did you mean seed\? allowed: tokens"):
        RunSpec.from_json({**tiny_spec.to_json(), "train": {"speed": 1}}, where="spec.json")


def test_runs_on_a_text_that_has_changed_between_them_are_no_one_result(tiny_spec, data, result):
    specs = [replace(tiny_spec, train=replace(tiny_spec.train, seed=seed)) for seed in range(4)]
    for spec, text in zip(specs, (data.fingerprint, None, data.fingerprint, "new"), strict=True):
        write_json(RunStore().run(spec).path / "result.json", result(**{"data_fingerprint": text} if text else {}))
    assert len(Lab().run(specs[:3]).finished) == 3
    with pytest.raises(
        ValueError, match=rf"^runs {specs[0].id} and {specs[3].id}: the text folder:\S+ has changed"
    ) as e:
        Lab().run(specs)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("writable", [True, False])
def test_what_keeps_a_run_from_starting_is_told(tiny_spec, monkeypatch, capsys, writable):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Run, "lock", refused)
    if not writable:
        monkeypatch.setattr(Run, "set_status", refused)
    with pytest.raises(NoResult, match=r"^1 of 1 runs: \[Errno 13\] Permission denied" if writable else "new"):
        Lab().run([tiny_spec], executor="inline")
    assert ("Permission denied" in capsys.readouterr().err) != writable


def test_a_run_whose_process_cannot_be_started_takes_no_other_with_it(tiny_spec, monkeypatch):
    """Its folder is another user's."""
    runs = [RunStore().run(replace(tiny_spec, train=replace(tiny_spec.train, seed=seed))) for seed in range(2)]
    begun = []

    def started(run):
        begun.append(run.spec.train.seed)
        if begun == [0]:
            raise PermissionError(13, "Permission denied", str(run.path / "log.txt"))
        return stand_in(run, "", "-S")

    monkeypatch.setattr(executors, "RunProcess", started)
    executors.processes(runs, 1, poll_s=0.02)
    assert begun == [0, 1] and runs[0].status.state == "failed"
    assert runs[0].status.reason == f"[Errno 13] Permission denied: '{runs[0].path / 'log.txt'}'"


def test_a_plan_names_the_runs_that_there_are(tiny_spec, tmp_path, monkeypatch):
    """Where runs are only read, nobody writes the specs of those that the store lacks."""
    monkeypatch.setenv("MOELAB_PLAN", str(tmp_path / "plan.json"))
    there = RunStore().run(tiny_spec)
    Lab().run([tiny_spec, replace(tiny_spec, train=replace(tiny_spec.train, seed=1))], executor="read")
    assert read_json(tmp_path / "plan.json") == [str(there.path)]
    assert list(RunStore().root.iterdir()) == [there.path]


def test_a_finished_run_is_read_back(tiny_spec, monkeypatch):
    written = []
    monkeypatch.setattr(
        "moelab.runs.execute.write_json",
        lambda path, value, durable=False: written.append((path.name, durable)) or write_json(path, value),
    )
    lab = Lab()
    first = lab.run([tiny_spec], executor="inline")
    assert written[-2:] == [("provenance.json", True), ("result.json", True)], "on the disk in this order"
    assert read_json(first[0].path / "holder.json")["process"] == os.getpid()
    stamp = (first[0].path / "result.json").stat().st_mtime_ns
    again = lab.run([replace(tiny_spec, label="other name")], executor="inline")
    assert (again[0].path / "result.json").stat().st_mtime_ns == stamp
    assert again.final()["arm"].tolist() == ["other name"]
    assert again[0].status.state == "finished" and not again.missing
    record = first[0].provenance
    assert record["versions"]["torch"] and record["hardware"]["cores"] >= 1 and record["data"]["fingerprint"]


def test_what_a_finished_run_was_stays_on_record(tiny_spec):
    """Asking for another layout or checkpoint rewrites the spec of a run that will train, not of one that has."""
    store, spec = RunStore(), replace(tiny_spec, train=replace(tiny_spec.train, micro_batch=2))
    run = store.run(spec)
    store.run(replace(spec, parallel=ParallelConfig(data=2)))
    assert store.at(run.path.name).spec.parallel.data == 2
    before = (run.path / "spec.json").read_bytes()
    (run.path / "result.json").write_text("{}")
    assert store.run(spec.with_checkpoints((128,))).spec.id == run.spec.id
    assert (run.path / "spec.json").read_bytes() == before


@pytest.mark.slow
def test_one_failing_run_takes_no_other_with_it(tiny_spec):
    bad = replace(tiny_spec, model=replace(tiny_spec.model, vocab=100), label="bad")
    with pytest.raises(
        NoResult, match=r"^1 of 2 runs: train: .*embedding only 100 \(bad, seed 0; .*log.txt\)$"
    ) as error:
        Lab().run([bad, tiny_spec], executor="processes", workers=2)
    runs = error.value.runs
    assert [run.finished for run in runs] == [False, True]
    assert runs[0].status.state == "failed" and "embedding only 100" in runs[0].status.reason
    assert "bad, seed 0: failed" in runs.explain_missing() and "embedding only 100" in runs[0].log_tail()
    with pytest.raises(RuntimeError, match="has no result: failed"):
        _ = runs[0].result
    assert len(runs.final()) == 1 and set(runs.curves()["arm"]) == {"tiny"}


@pytest.mark.multiprocess
def test_sigterm_writes_a_checkpoint_and_goes(tiny_spec):
    spec = replace(tiny_spec, train=replace(tiny_spec.train, tokens=2000 * 128, checkpoint_every=0))
    run = RunStore().run(spec)
    process = start(run)
    wait_for_step(run, 3)
    process.terminate()
    assert process.wait(timeout=300) == 75
    assert run.status.state == "stopped" and "the checkpoint is written" in run.status.reason
    assert list((run.path / "checkpoints").glob("step-*"))


@pytest.mark.multiprocess
def test_a_training_loads_no_more_than_it_needs(run):
    """torch's compiler, its symbolic algebra and FSDP2 double the time of a start; Triton adds a tenth."""
    heavy = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "pandas", "triton"}
    code = f"""
import sys; from pathlib import Path; from moelab.runs import worker
assert worker.main(Path(sys.argv[1])) == 0
print("loaded", sorted({heavy} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["loaded []"], done.stderr


@pytest.mark.multiprocess
def test_two_processes_asking_for_one_run_train_it_once(tiny_spec):
    run = RunStore().run(replace(tiny_spec, train=replace(tiny_spec.train, tokens=60 * 128)))
    both = [start(run), start(run)]
    assert [p.wait(timeout=300) for p in both] == [0, 0]
    steps = [row["step"] for row in read_rows(run.path / TRAIN)]
    assert steps == sorted(set(steps)) and steps[-1] == 60


@pytest.mark.multiprocess
def test_a_worker_goes_when_its_parent_dies(tiny_spec):
    run = RunStore().run(replace(tiny_spec, train=replace(tiny_spec.train, tokens=20_000 * 128)))
    code = """
import sys, time
from moelab.runs import store, supervisor
supervisor.RunProcess(store.RunStore().at(sys.argv[1]))
time.sleep(300)"""
    parent = subprocess.Popen([sys.executable, "-c", code, run.path.name])
    wait_for_step(run, 3)
    parent.kill()
    parent.wait()
    until(lambda: not run.locked)
    assert run.status.state == "stopped"


def test_full_disk_is_told_in_the_status(tiny_spec, monkeypatch):
    from moelab.engine.checkpoint import storage

    def full(tensors, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(NoResult, match=r"^1 of 1 runs: No space left on device") as error:
        Lab().run([tiny_spec], executor="inline")
    runs = error.value.runs
    assert runs[0].status.state == "failed"
    assert "No space left on device" in runs[0].status.reason and "make room" in runs[0].status.reason


def test_another_error_of_the_system_is_no_full_disk(tiny_spec, monkeypatch):
    def closed(*_):
        raise PermissionError(13, "Permission denied", "/texts/secret.txt")

    monkeypatch.setattr("moelab.data.preparation.prepare", closed)
    with pytest.raises(NoResult) as error:
        Lab().run([tiny_spec], executor="inline")
    assert error.value.runs[0].status.reason == "Permission denied: /texts/secret.txt"


def test_an_arm_with_one_result_is_enough_and_reading_asks_for_none(tiny_spec):
    bad = replace(tiny_spec, model=replace(tiny_spec.model, vocab=100), train=replace(tiny_spec.train, seed=1))
    runs = Lab().run([tiny_spec, bad], executor="inline")
    assert [run.finished for run in runs] == [True, False]
    assert not Lab().run([bad], executor="read").finished


def test_a_batch_job_that_reads_goes_on_with_one_arm(tiny_spec, monkeypatch):
    other = replace(tiny_spec, train=replace(tiny_spec.train, seed=1), label="other")
    monkeypatch.setenv("MOELAB_EXECUTOR", "read")
    with pytest.raises(NoResult, match=r"^2 of 2 runs: new"):
        Lab().run([tiny_spec, other])
    write_text(RunStore().run(tiny_spec).path / "result.json", "{}")
    assert [run.finished for run in Lab().run([tiny_spec, other])] == [True, False]


def test_the_teachers_failure_is_the_reason(tiny_spec):
    teacher = replace(tiny_spec, data=replace(tiny_spec.data, corpus="folder:/nowhere"))
    with pytest.raises(NoResult, match=r"^1 of 1 runs: data: corpus 'folder:/nowhere' is no folder"):
        Lab().run([student_of(teacher)], executor="inline")


def test_reading_a_read_only_store_writes_nothing(run, tiny_spec, monkeypatch):
    run.set_status(Status("running", 3, 24))
    write_text(run.path / "run.lock", "")
    before = {path: path.stat().st_mtime_ns for path in [run.path, *run.path.iterdir()]}

    def refused(*arguments, **options):
        raise OSError(30, "Read-only file system", str(run.path))

    monkeypatch.setattr("moelab.files.write_bytes", refused)
    monkeypatch.setattr(FileLock, "acquire", refused)
    assert run.status.state == "stopped" and not run.locked
    assert Lab().run([tiny_spec, replace(tiny_spec, label="x")], executor="read").missing
    unknown = replace(tiny_spec, train=replace(tiny_spec.train, seed=9))
    assert Lab().run([unknown], executor="read")[0].status.state == "new"
    assert {path: path.stat().st_mtime_ns for path in [run.path, *run.path.iterdir()]} == before


@pytest.mark.parametrize("text", ["", '{"state": "run', "[]", "7", '{"step": 3}'])
def test_a_torn_status_counts_as_missing(run, text):
    """A crash of the machine may leave it so. The run goes on from its checkpoint."""
    write_text(run.path / "status.json", text)
    assert run.status == Status("new")
    write_text(run.path / "result.json", "{}")
    assert run.status == Status("finished")


def test_a_status_of_a_later_version_is_read(run):
    write_text(run.path / "status.json", '{"state": "stopped", "step": 3, "mood": "good"}')
    assert run.status == Status("stopped", step=3)


def test_who_waits_for_a_run_says_for_whom(run, capsys):
    write_text(run.path / "holder.json", '{"host": "node7", "process": 41, "since": "2026-01-01T00:00:00Z"}')
    asked = iter([False, True])
    with run.lock(), pytest.raises(KeyboardInterrupt, match="while another process trains"):
        assert run.locked
        execute(run, should_stop=lambda: next(asked))
    out = capsys.readouterr().out
    assert out.count("waits for process 41 on node7, which trains it since 2026-01-01T00:00:00Z; if it is gone") == 1


def test_who_waits_for_another_process_to_prepare_the_text_stops_when_asked(run, data, monkeypatch):
    monkeypatch.setattr(preparation, "WAIT_S", 0.1)
    cache = paths.home() / "data"
    cache.mkdir(parents=True)
    with FileLock(cache / f".{data.folder.name}.lock"), pytest.raises(KeyboardInterrupt, match="training began"):
        execute(run, should_stop=lambda: True)
    assert (run.status.state, run.status.reason) == ("stopped", "stopped before the training began")


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_directory(tmp_path / "a") as new:
        (new / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with new_directory(tmp_path / "a") as new:
        write_text(new / "b" / "c", "x")
    assert (tmp_path / "a" / "b" / "c").read_text() == "x" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_bad_executor_is_one_line(tiny_spec):
    with pytest.raises(ValueError, match="executor must be one of auto, inline, processes, slurm, read"):
        Lab().run([tiny_spec], executor="cloud")


def student_of(spec: RunSpec, **distill) -> RunSpec:
    model = replace(spec.model, layers=3, experts=(0, 2, 0), name="student")
    return replace(spec, model=model, teacher=spec, distill=DistillConfig(**distill), label="student")


def test_a_students_identity_includes_its_teachers(tiny_spec):
    student = student_of(tiny_spec)
    assert student.requires() == [tiny_spec]
    assert replace(student, distill=replace(student.distill, weight=0.5)).id != student.id
    assert replace(student, distill=replace(student.distill, top_k=4)).id != student.id
    kept = replace(student.distill, top_k=4, cache_bytes=9)
    assert replace(student, distill=kept).id == replace(student, distill=replace(kept, cache_bytes=0)).id
    other = replace(tiny_spec, train=replace(tiny_spec.train, seed=7))
    assert replace(student, teacher=other).id != student.id
    grandchild = student_of(student)
    assert grandchild.requires() == [tiny_spec, student]
    assert RunSpec.from_json(json.loads(json.dumps(grandchild.to_json()))) == grandchild
    alone, half = replace(student, teacher=None, distill=None), student.train.tokens // 2
    staged = replace(student, distill=DistillConfig(schedule="stop", stop=half))
    assert student.cost > staged.cost > alone.cost
    assert staged.cost - alone.cost == pytest.approx((student.cost - alone.cost) / 2, rel=0.01)
    steps = DistillConfig(schedule="stop", stop=student.train.steps(student.data.context) // 2, unit="steps")
    assert replace(student, distill=steps).cost == staged.cost


def on_two_ranks_with_an_odd_teacher(spec: RunSpec) -> RunSpec:
    few = replace(spec, train=replace(spec.train, micro_batch=1))
    odd = replace(few, model=replace(few.model, experts=(0, 3, 0, 3)))
    return replace(replace(student_of(few), parallel=ParallelConfig(data=2)), teacher=odd)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda s: replace(s, train=replace(s.train, tokens=100)), "less than one step of 4 x 32 = 128 tokens"),
        (
            lambda s: replace(s, data=replace(s.data, context=64)),
            "longer than the context of tiny (32); set data.context and model.context together",
        ),
        (
            lambda s: replace(s, train=replace(s.train, eval_tokens=31)),
            "spec: train.eval_tokens 31 must be at least data.context, 32",
        ),
        (lambda s: replace(student_of(s), distill=None), "teacher is given without distill"),
        (lambda s: replace(student_of(s), teacher=None), "distill is given without teacher"),
        (
            lambda s: replace(student_of(s), data=replace(s.data, tokenizer="bpe-301")),
            "must share their text, tokenizer is",
        ),
        (
            lambda s: replace(student_of(s), model=replace(s.model, vocab=321)),
            "must share their vocabulary, it has 321 and 320",
        ),
        (
            lambda s: replace(student_of(replace(s, data=replace(s.data, context=16))), data=s.data),
            "spec: sequences of 32 tokens are longer than the teacher's context of 16",
        ),
        (on_two_ranks_with_an_odd_teacher, "spec: the teacher runs in the student's layout, which does not fit it: "),
    ],
)
def test_specs_that_cannot_train_are_refused(tiny_spec, change, part):
    with pytest.raises(ValueError) as error:
        change(tiny_spec)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_teachers_are_trained_first(tiny_spec):
    """Processes wait for what a run requires: tests/runs/test_ranks.py."""
    student = student_of(tiny_spec)
    runs = Lab().run([student], executor="inline")
    assert len(runs) == 1 and runs[0].finished, runs.explain_missing()
    assert (runs[0].path.parent / tiny_spec.id / "result.json").exists()
    assert "distill_loss" in runs.curves("train.jsonl")


def test_a_teacher_that_is_gone_is_not_trained_again_for_a_finished_student(tiny_spec, result):
    student = student_of(tiny_spec)
    write_json(RunStore().run(student).path / "result.json", result())
    assert Lab().run([student], executor="inline")[0].finished
    assert RunStore().ids() == [student.id] and not preflight.unfinished([student], RunStore())
    assert [row.spec.id for row in dry_run.planned_runs([student])] == [student.id]
    other = replace(student, train=replace(student.train, seed=1))
    assert list(RunStore().needed([student, other])) == [tiny_spec.id, student.id, other.id]


def test_a_student_without_its_teacher_says_so(tiny_spec):
    run = RunStore().run(student_of(tiny_spec))
    with pytest.raises(ValueError, match=f"its teacher {tiny_spec.id} has no result: new"):
        execute(run)


def test_a_run_that_is_being_trained_keeps_its_layout(tiny_spec):
    """Its processes are started again for the layout that it has, whoever else asks for the run meanwhile."""
    store = RunStore()
    run = store.run(replace(tiny_spec, parallel=ParallelConfig(recompute=True)))
    other = replace(tiny_spec, label="x", train=replace(tiny_spec.train, checkpoint_every=1)).with_checkpoints([4096])
    with run.lock():
        asked = store.run(other)
    stored = store.at(run.path.name).spec
    assert asked.spec.parallel.recompute and stored.parallel.recompute and asked.spec.label == "x"
    assert stored.train.keep_at == (4096,) and stored.train.checkpoint_every == tiny_spec.train.checkpoint_every
    assert not store.run(other).spec.parallel.recompute, "the last wish counts again"


@pytest.mark.parametrize("torn", ["", '{"model": {', "[]", "7"])
def test_a_torn_spec_is_written_again(run, torn):
    path = run.path / "spec.json"
    whole = path.read_text()
    path.write_text(torn)
    RunStore().run(run.spec)
    assert path.read_text() == whole


def test_a_missing_result_is_explained_by_the_status_first(run):
    assert run.why_missing() == "new"
    write_text(run.path / "log.txt", "Traceback\nMemoryError: no memory\n")
    assert run.why_missing() == "MemoryError: no memory"
    run.set_status(Status("running", step=24))
    assert run.why_missing() == "its process died; run it again to resume"


def test_the_home_of_nobody_is_no_run():
    with pytest.raises(ValueError, match="no such run"):
        RunStore().find("~nouser-of-this-name")


def test_no_name_is_no_run(run):
    """Of a shell's variable that is not set, say; neither the current folder nor any run is meant."""
    with pytest.raises(ValueError, match=r"^run '': no such run or directory; runs are in "):
        RunStore().find("")
