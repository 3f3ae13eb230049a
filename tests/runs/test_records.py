"""Runs passed on without their weights."""

import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import struct
import threading
import tracemalloc
import zipfile
from dataclasses import replace

import pytest

from moelab.cli.runs import export_, import_
from moelab.experiments import pr_moe
from moelab.files import write_json
from moelab.runs import dry_run, preflight, records
from moelab.runs.collection import Runs
from moelab.runs.measurements import FORMAT, file_digest
from moelab.runs.states import Status
from moelab.runs.store import RunStore
from tests.runs.conftest import record


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "ours")


@pytest.fixture
def finished(store, result):
    """A run as training leaves it, its numbers made up."""
    run = store.run(pr_moe.EXPERIMENT.specs("smoke", arms=["PR-MoE-32/64"])[0])
    (run.path / "train.jsonl").write_text('{"step": 1, "loss": 4.6}\n')
    (run.path / "validation.jsonl").write_text('{"step": 1, "tokens": 8, "loss": 4.5}\n')
    (run.path / "checkpoints" / "step-00000001").mkdir(parents=True)
    write_json(run.path / "provenance.json", {"commit": "abc"})
    write_json(run.path / "result.json", result())
    return run


def test_runs_that_will_train_without_the_cpu_kernels_say_so_before_they_begin(tiny_spec, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = [line for line in on_this_machine([tiny_spec]) if line.startswith("no CPU kernels: ")]
    assert len(said) == 1 and "no C++ compiler 'no-such-compiler'" in said[0] and "2.4 times as long" in said[0]
    monkeypatch.setenv("MOELAB_INSTRUCTIONS", "none")
    assert not [line for line in on_this_machine([tiny_spec]) if "kernels" in line], "as was asked for"


def test_a_pack_has_the_runs_of_a_model_and_keeps_what_it_has(store, finished, result, tmp_path, theirs):
    other = store.run(pr_moe.EXPERIMENT.specs("smoke", 2, arms=["PR-MoE-32/64"])[-1])
    write_json(other.path / "result.json", result(4.4))
    (pack,) = records.write([finished], tmp_path / "runs")
    assert records.write([other], tmp_path / "runs") == [pack] and finished.spec.id.startswith(pack.stem)
    assert [one.stem for one in records.archives_in(tmp_path / "runs")] == sorted([finished.spec.id, other.spec.id])
    taken = [records.read(archive, theirs) for archive in records.archives_in(pack)]
    assert {run.spec for run in taken} == {finished.spec, other.spec}
    before = pack.read_bytes()
    records.write([other, finished], tmp_path / "runs")
    assert pack.read_bytes() == before, "the same runs are the same file"


def test_a_pack_of_many_records_is_listed_once(finished, tmp_path, result):
    """A list of names for each record took 1.6 GB at 1,000 records, and time with its square."""
    runs = []
    for seed in range(40):
        train = replace(finished.spec.train, seed=1000 + seed)
        runs.append(RunStore(tmp_path / "many").run(replace(finished.spec, train=train)))
        for name in set(records.FILES) - {"spec.json"}:
            if (finished.path / name).exists():
                shutil.copy(finished.path / name, runs[-1].path / name)
    (pack,) = records.write(runs, tmp_path / "runs")
    found = records.archives_in(pack)
    assert len(found) == 40 and len({id(record.root) for record in found}) == 1
    theirs = RunStore(tmp_path / "theirs")
    assert {records.read(record, theirs).spec for record in found} == {run.spec for run in runs}


def test_exports_at_the_same_time_keep_each_others_runs(store, finished, result, tmp_path, monkeypatch):
    other = store.run(pr_moe.EXPERIMENT.specs("smoke", 2, arms=["PR-MoE-32/64"])[-1])
    write_json(other.path / "result.json", result(4.4))
    both_have_read, write = threading.Barrier(2), records.write_bytes

    def late(path, data):
        with contextlib.suppress(threading.BrokenBarrierError):
            both_have_read.wait(timeout=1)
        write(path, data)

    monkeypatch.setattr(records, "write_bytes", late)
    exports = [threading.Thread(target=records.write, args=([run], tmp_path / "runs")) for run in (finished, other)]
    for export in exports:
        export.start()
    for export in exports:
        export.join()
    ids = {archive.stem for archive in records.archives_in(tmp_path / "runs")}
    assert ids == {finished.spec.id, other.spec.id}


def test_a_damaged_pack_is_not_packed_into_the_new_one(finished, tmp_path):
    (pack,) = records.write([finished], tmp_path)
    pack.write_bytes(pack.read_bytes()[:-30])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(pack))}: damaged; restore or remove it$"):
        records.write([finished], tmp_path)


def test_a_damaged_neighbour_in_a_pack_is_one_line_unless_it_is_replaced(finished, store, result, tmp_path):
    other = store.run(replace(finished.spec, train=replace(finished.spec.train, seed=9)))
    write_json(other.path / "result.json", result())
    (pack,) = records.write([finished, other], tmp_path)
    data = bytearray(pack.read_bytes())
    data[data.index(b"spec.json")] ^= 1  # in the first record, whose checksum is then wrong
    pack.write_bytes(data)
    broken, whole = sorted([finished, other], key=lambda run: run.spec.id)
    with pytest.raises(ValueError, match=r"damaged .*; restore or remove it") as error:
        records.write([whole], tmp_path)
    assert "\n" not in str(error.value)
    assert records.write([broken], tmp_path) == [pack] and len(records.archives_in(pack)) == 2


def test_a_directory_that_zipfile_cannot_read_keeps_no_other_from_being_found(finished, tmp_path):
    (pack,) = records.write([finished], tmp_path)
    data = bytearray(pack.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 6] = 200  # the version of zip that is needed
    (tmp_path / "a.zip").write_bytes(data)
    assert [archive.name for archive in records.archives_in(tmp_path)] == [f"{finished.spec.id}.zip", "a.zip"]


def test_a_run_whose_status_is_just_looked_at_is_taken_over(finished, tmp_path, theirs):
    archive = record(finished, tmp_path)
    (lock := theirs.run(finished.spec).path / "run.lock").touch()
    with lock.open("rb") as seen:
        fcntl.flock(seen, fcntl.LOCK_SH)
        threading.Timer(0.3, fcntl.flock, (seen, fcntl.LOCK_UN)).start()
        assert records.read(archive, theirs).finished


def test_a_record_says_what_the_run_says_and_has_no_weights(finished, tmp_path, theirs):
    archive = record(finished, tmp_path / "passed on")
    taken = records.read(archive, theirs)
    assert taken.path != finished.path and taken.spec == finished.spec and taken.finished
    assert Runs([taken]).final().equals(Runs([finished]).final())
    assert Runs([taken]).curves().equals(Runs([finished]).curves()) and taken.provenance == finished.provenance
    assert not (taken.path / "checkpoints").exists()
    assert archive.read_bytes() == record(finished, tmp_path / "again").read_bytes()


def test_a_record_has_the_experts_loads_of_the_last_row_and_the_percentiles_of_all(finished, tmp_path, theirs):
    rows = [{"step": n, "expert_load": {"2": [0.75, 0.25]}, "load_percentiles": {"2": [0.5, 1.5]}} for n in (1, 2)]
    old = [{"step": 0, "expert_load": {"2": [0.5, 0.5]}}]  # of a version that wrote no percentiles
    (finished.path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*old, *rows]))
    taken = records.read(record(finished, tmp_path / "first"), theirs).rows("train.jsonl")
    assert taken["expert_load"].isna().tolist() == [False, True, False] and taken["load_percentiles"].notna().sum() == 2


def test_a_pack_of_many_records_with_folders_grows_by_what_was_added(finished, store, tmp_path, theirs):
    first, *others = [
        store.run(replace(finished.spec, train=replace(finished.spec.train, seed=seed))) for seed in range(100, 180)
    ]
    digest = file_digest(finished.path / "result.json")
    for n, run in enumerate((first, *others)):
        shutil.copy(finished.path / "result.json", run.path)
        (run.path / "measured").mkdir()
        for name in ("validation-limits", "zero-shot.score"):
            value = {"format": FORMAT, "result": digest, "code": "abc", "value": {"loss": n}}
            write_json(run.path / "measured" / f"{name}-{n:012x}.json", value)
    records.write(others, tmp_path / "runs")
    before = {archive.stem: archive.read_bytes() for archive in records.archives_in(tmp_path / "runs")}
    (pack,) = records.write([first], tmp_path / "runs")
    found = {archive.stem: archive for archive in records.archives_in(pack)}
    assert found.keys() == {run.spec.id for run in (first, *others)}
    assert {id: found[id].read_bytes() for id in before} == before, "git stores the bytes that are new alone"
    for n, run in enumerate((first, *others)):
        taken = records.read(found[run.spec.id], theirs)
        measured = sorted(file.relative_to(taken.path).as_posix() for file in taken.path.glob("*/*.json"))
        assert measured == [f"measured/{name}-{n:012x}.json" for name in ("validation-limits", "zero-shot.score")]
        assert (taken.path / "result.json").read_bytes() == (run.path / "result.json").read_bytes()


def test_names_of_hosts_are_not_passed_on(finished, tmp_path, theirs):
    earlier = {"commit": "abc", "host": "node7", "process": 41}  # as earlier versions wrote it
    write_json(finished.path / "provenance.json", earlier)
    taken = records.read(record(finished, tmp_path), theirs)
    assert taken.provenance == finished.provenance == {"commit": "abc"}
    assert "node7" not in (taken.path / "provenance.json").read_text()


def test_what_the_store_has_stays(finished, store, tmp_path, result):
    archive = record(finished, tmp_path)
    write_json(finished.path / "result.json", result(4.4))
    assert records.read(archive, store) is None and finished.result["validation_loss"] == 4.4
    (finished.path / "result.json").unlink()
    assert records.read(archive, store) is None, "it has a checkpoint and goes on from there"


def test_a_run_that_is_being_trained_stays(finished, tmp_path, theirs):
    """It holds its lock for a while before it has a checkpoint."""
    archive = record(finished, tmp_path)
    trained = theirs.run(finished.spec)
    with trained.lock():
        assert records.read(archive, theirs) is None and not trained.finished
    assert records.read(archive, theirs) == trained and trained.finished
    assert not (trained.path / "run.lock").exists(), "what was not trained here has no lock"


def test_a_run_that_was_only_begun_here_is_not_taken_for_one_of_this_machine(finished, tmp_path, theirs):
    begun = theirs.run(finished.spec)
    write_json(begun.path / "holder.json", {"host": "here"})
    (begun.path / "prefix" / "checkpoints").mkdir(parents=True)
    begun.set_status(Status("failed", reason="no space"))
    records.read(record(finished, tmp_path), theirs)
    assert not (begun.path / "holder.json").exists() and not (begun.path / "prefix").exists()
    assert begun.status == Status("finished")


def on_this_machine(specs):
    return dry_run.on_this_machine(dry_run.planned_runs(specs))


def test_a_dry_run_says_how_long_it_takes_and_what_is_published(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path / "results"))
    others = pr_moe.EXPERIMENT.specs("smoke", 2, arms=["PR-MoE-32/64"])
    assert on_this_machine(others) == []
    seconds = 7200 * finished.spec.cost / sum(spec.cost for spec in others)
    write_json(finished.path / "result.json", {**finished.result, "seconds": seconds})
    records.write([finished], records.folder())
    took, published = on_this_machine(others)
    assert took == "about 2.0 hours on one core, at the speed of the published runs"
    assert published.startswith("1 of these are published (PR-MoE-32/64): `moelab runs import`")
    records.read(record(finished, tmp_path), RunStore())
    (took,) = on_this_machine(others)
    assert "at the speed of the published runs" in took, "another machine's numbers say nothing of this one"
    write_json(RunStore().run(finished.spec).path / "holder.json", {})
    (took,) = on_this_machine(others)
    assert "at the speed of the finished runs here" in took


def test_a_dry_run_goes_by_runs_of_nearly_the_cost_of_each(result):
    """The seconds of a short run are those of its start; of a half-trained run the other half is left."""
    store, hours = RunStore(), {"smoke": 1, "quick": 2, "full": 30}
    ours, others = ([pr_moe.EXPERIMENT.specs(scale, 2, arms=["Dense"])[n] for scale in hours] for n in (0, -1))
    for spec, took in zip(ours, hours.values(), strict=True):
        write_json(store.run(spec).path / "result.json", result(seconds=took * 3600.0))
        write_json(store.run(spec).path / "holder.json", {})
    line, *_ = on_this_machine(others)
    assert line == "about 33.0 hours on one core, at the speed of the finished runs here"
    steps = others[-1].train.steps(others[-1].data.context)
    store.run(others[-1]).set_status(Status("stopped", step=steps // 2, steps=steps))
    line, *_ = on_this_machine(others)
    assert line.startswith("about 18.0 hours")


def test_a_torn_status_is_passed_over(finished, tmp_path, theirs):
    archive = record(finished, tmp_path / "without")
    (finished.path / "status.json").write_text("")
    assert record(finished, tmp_path / "torn").read_bytes() == archive.read_bytes()
    finished.set_status(Status("finished", 1, 1))
    assert records.read(record(finished, tmp_path), theirs).status.step == 1


def test_what_no_import_would_take_is_not_packed(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_BYTES", 1000)
    (finished.path / "train.jsonl").write_text('{"step": 1, "loss": 4.6}\n' * 80)
    with pytest.raises(ValueError, match=r"which no import takes; train\.log_every makes fewer rows$") as error:
        records.write([finished], tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.zip"))


def test_a_copy_of_a_run_and_a_damaged_one_keep_no_other_from_being_packed(finished, tmp_path, capsys, home, result):
    """The copy's numbers would be packed in place of the run's."""
    here = shutil.copytree(finished.path, home / "runs" / finished.path.name)
    copy = shutil.copytree(finished.path, here.with_name(f"{here.name}.before"))
    write_json(copy / "result.json", result(9.9))
    damaged = RunStore().run(replace(finished.spec, train=replace(finished.spec.train, seed=9)))
    (damaged.path / "result.json").write_text("{")
    with pytest.raises(ValueError, match="2 of 3 runs cannot be read and were not packed"):
        export_(to=tmp_path / "zips")
    said = capsys.readouterr()
    assert f"{copy}: the run it describes is called {here.name} here: a copy" in said.err
    assert f"{damaged.path}: unreadable (result.json" in said.err
    ((_, numbers),) = map(records.glance, records.archives_in(tmp_path / "zips"))
    assert numbers["validation_loss"] == 4.5
    with pytest.raises(ValueError, match="run '': no id of a finished run starts with it"):
        export_([""], to=tmp_path / "zips")


def test_a_run_that_was_copied_in_part_is_named(finished, tmp_path, capsys, home):
    here = shutil.copytree(finished.path, home / "runs" / finished.path.name)
    (here / "spec.json").unlink()
    with pytest.raises(ValueError, match="1 of 1 runs cannot be read"):
        export_(to=tmp_path / "zips")
    assert f"{here}: no spec.json there; was the run removed, or copied in part?" in capsys.readouterr().err


def test_an_unfinished_run_is_not_passed_on(store, tmp_path):
    run = store.run(pr_moe.EXPERIMENT.specs("smoke", arms=["Dense"])[0])
    with pytest.raises(ValueError, match="not finished"):
        record(run, tmp_path)


def with_files(change, method=zipfile.ZIP_STORED):
    """Change the files of a record, a dict of their bytes."""

    def changed(data: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as source:
            content = {name: source.read(name) for name in source.namelist()}
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", method) as out:
            for name, part in change(content).items():
                out.writestr(name, part)
        return packed.getvalue()

    return changed


def flipped(data):
    return data[:60] + bytes([data[60] ^ 255]) + data[61:]


def encrypted(data):
    data = bytearray(data)
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + at] |= 1
    return bytes(data)


def lying(data):
    """Its directory says 10 bytes; what is packed are 256 MiB."""
    size = (256 << 20) + 77
    data = with_files(lambda c: {**c, "train.jsonl": bytes(size)}, zipfile.ZIP_DEFLATED)(data)
    return data.replace(struct.pack("<L", size), struct.pack("<L", 10))


def many(content):
    return content | {f"measured/{i}.json": b"{}" for i in range(records.MAX_FILES)}


def heavy(content):
    """Each file is small, packed to nearly nothing; together they are larger than a record may be."""
    large = b'{"a": "' + b"x" * (records.MAX_BYTES // 19) + b'"}'
    return content | {f"measured/{i}.json": large for i in range(20)}


def with_another_seed(content):
    spec = json.loads(content["spec.json"])
    return content | {"spec.json": json.dumps({**spec, "train": {**spec["train"], "seed": 7}}).encode()}


OTHERS = ("../outside.txt", "measured/../../x.json", "measured/a/b.json", "measured/x.py", "other/x.json")


@pytest.mark.parametrize(
    ("harm", "part"),
    [
        (lambda data: b"no", "unreadable"),
        (lambda data: data[: len(data) // 2], "unreadable"),
        (flipped, "unreadable"),
        (encrypted, "unreadable"),
        (lying, "unreadable (Bad CRC-32"),
        (lambda data: data + bytes(records.PACKED), "larger than 16 MiB"),
        (with_files(heavy, zipfile.ZIP_DEFLATED), "more than 256 files, or than 64 MiB in all"),
        (with_files(many), "more than 256 files"),
        (with_files(lambda c: c, zipfile.ZIP_BZIP2), "is packed by another method than deflate"),
        (with_files(lambda c: {"a.zip": b"".join(c.values())}), "not a run's record"),
        (with_files(lambda c: {k: v for k, v in c.items() if k != "result.json"}), "not a run's record"),
        *((with_files(lambda c, name=name: {**c, name: b"{}"}), "not a run's record") for name in OTHERS),
        (with_files(lambda c: c | {"result.json": b"{"}), "unreadable (result.json: "),
        (with_files(lambda c: c | {"result.json": b"[" * 100_000}), "unreadable (result.json: "),
        (with_files(lambda c: c | {"result.json": b"{}"}), "result.json: no result of a training run (steps"),
        (
            with_files(lambda c: c | {"result.json": c["result.json"].replace(b"4.5", b'"4"')}),
            "validation_loss must be a number, got '4'",
        ),
        (with_files(lambda c: c | {"train.jsonl": b"[1]\n"}), "train.jsonl: line 1 of 1 is damaged (no row of metrics"),
        (with_files(lambda c: c | {"train.jsonl": b'{"step": 1, "balance": 3}'}), "train.jsonl: line 1 of 1 is"),
        (with_files(lambda c: c | {"validation.jsonl": b'{"loss": 1}\n{'}), "validation.jsonl: line 1 of 2 is damaged"),
        (
            with_files(lambda c: c | {"validation.jsonl": b'{"step": 1, "loss": "low"}'}),
            "validation.jsonl: line 1 of 1 is damaged",
        ),
        (with_files(lambda c: c | {"spec.json": b"{}"}), "spec.json"),
        (with_files(with_another_seed), "renamed, or of another version"),
    ],
)
def test_a_bad_record_is_one_line_takes_no_memory_and_leaves_nothing(harm, part, finished, theirs, tmp_path, request):
    archive = record(finished, tmp_path)
    archive.write_bytes(harm(archive.read_bytes()))
    tracemalloc.start()
    request.addfinalizer(tracemalloc.stop)
    with pytest.raises(ValueError) as error:
        records.read(archive, theirs)
    peak = tracemalloc.get_traced_memory()[1]
    said = str(error.value)
    assert part in said and str(archive) in said and "\n" not in said
    assert peak < 1 << 20 and not theirs.root.exists()


def test_a_teacher_without_weights_says_what_to_do(finished, tmp_path, theirs):
    from moelab.config.distill import DistillConfig
    from moelab.runs.execute import execute

    records.read(record(finished, tmp_path), theirs)
    student = theirs.run(replace(finished.spec, teacher=finished.spec, distill=DistillConfig()))
    with pytest.raises(ValueError, match=r"numbers only, .* to train it here: remove it and run its experiment again"):
        execute(student)
    with pytest.raises(ValueError, match="numbers only"):
        preflight.check([student.spec], theirs)


def test_what_needs_weights_says_at_once_that_there_are_none(finished, tmp_path, theirs, home):
    from moelab.experiments import specialisation, zero_shot
    from moelab.inference.text import open_text

    taken = records.read(record(finished, tmp_path), theirs)
    for need in (
        lambda: open_text(taken.path, cache=tmp_path),
        lambda: specialisation.measure(Runs([finished, taken])),
        lambda: zero_shot.measure(Runs([finished, taken]), 1),
        lambda: zero_shot.measure_pairs(Runs([finished, taken]), 40),
        lambda: zero_shot.require([finished.spec], theirs, 1, 40),  # before others are trained
        lambda: specialisation.require([finished.spec], theirs, 20_000),
    ):
        with pytest.raises(ValueError, match=r"numbers only, .* to train it here") as error:
            need()
        assert "\n" not in str(error.value) and str(taken.path) in str(error.value)
    assert not home.exists(), "no text was prepared, no other run routed"
    new = replace(finished.spec, train=replace(finished.spec.train, seed=9))
    zero_shot.require([new], theirs, 1, 40)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"tokens": 8, "st', r"result\.json: not valid JSON .*"),
        ("{}", r"result\.json: no result .* got None\)"),
    ],
)
def test_a_damaged_result_says_what_to_do(text, part, finished):
    (finished.path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{part}; remove the file and ask for the run again"):
        Runs([finished]).final()


def test_a_bad_archive_keeps_no_other_from_being_taken(finished, tmp_path, capsys):
    records.write([finished], tmp_path / "zips")
    (tmp_path / "zips" / "a.zip").write_text("no")
    with pytest.raises(ValueError, match="1 of 2 records were not taken over"):
        import_(tmp_path / "zips")
    shown = capsys.readouterr()
    assert "1 runs taken over, 0 were here already" in shown.out and "a.zip: unreadable" in shown.err


def test_a_run_that_has_another_result_here_is_named(finished, tmp_path, capsys, home, result):
    """It was trained here, or published again since it was taken over."""
    records.write([finished], tmp_path / "zips")
    import_(tmp_path / "zips")
    import_(tmp_path / "zips")
    assert "another result" not in capsys.readouterr().out
    write_json(finished.path / "result.json", result(4.4))
    records.write([finished], tmp_path / "zips")
    import_(tmp_path / "zips")
    assert "1 of these have another result here, of another training; remove" in (shown := capsys.readouterr().out)
    assert shown.rstrip().endswith(finished.spec.id)


def test_a_folder_of_another_user_keeps_no_other_run_from_being_taken(finished, store, tmp_path, capsys, monkeypatch):
    other = store.run(replace(finished.spec, train=replace(finished.spec.train, seed=9)))
    write_json(other.path / "result.json", finished.result)
    records.write([finished, other], tmp_path / "zips")
    write = records.write_bytes

    def refused(path, *arguments, **options):
        if path.parent.name == finished.spec.id:
            raise PermissionError(13, "Permission denied", str(path))
        write(path, *arguments, **options)

    monkeypatch.setattr(records, "write_bytes", refused)
    with pytest.raises(ValueError, match="1 of 2 records were not taken over"):
        import_(tmp_path / "zips")
    shown = capsys.readouterr()
    assert "1 runs taken over" in shown.out and "Permission denied" in shown.err and finished.spec.id in shown.err
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError):
        import_(tmp_path / "zips")


def test_a_run_that_has_begun_here_is_named_as_unfinished(finished, tmp_path, capsys, home):
    records.write([finished], tmp_path / "zips")
    here = shutil.copytree(finished.path, home / "runs" / finished.path.name)
    import_(tmp_path / "zips")
    assert "not finished" not in capsys.readouterr().out
    (here / "result.json").unlink()
    import_(tmp_path / "zips")
    shown = capsys.readouterr().out
    assert "1 were here already" in shown and "1 of these are not finished" in shown and here.name in shown


def test_a_run_of_another_version_keeps_no_other_from_being_packed(finished, tmp_path, capsys, home):
    shutil.copytree(finished.path, home / "runs" / finished.path.name)
    old = shutil.copytree(finished.path, home / "runs" / "350m-old")
    spec = json.loads((old / "spec.json").read_text())
    spec["data"]["part"] = "first half"
    (old / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="1 of 2 runs cannot be read and were not packed"):
        export_(to=tmp_path / "zips")
    said = capsys.readouterr()
    assert "1 runs packed" in said.out and "350m-old" in said.err and "got 'first half'" in said.err
    assert [archive.stem for archive in records.archives_in(tmp_path / "zips")] == [finished.path.name]
