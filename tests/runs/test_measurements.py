"""Measurements are kept, and read back only where they would come out alike."""

import json
import threading
import time
from dataclasses import replace

import pytest

from moelab.config import DataConfig, ModelConfig
from moelab.lab import Lab
from moelab.report.publication import SUMMARY
from moelab.runs import measurements
from moelab.runs.measurements import MeasurementStore
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run

CALLS = []


def timing(*arguments):
    """Time it.

    Twice.
    """
    CALLS.append(arguments)
    time.sleep(0.05)
    return {"ms": (1.5, len(CALLS))}


timing.__module__ = "moelab.testing"  # a measurement is stored under moelab's code, and is of it


@pytest.fixture
def store():
    CALLS.clear()
    return MeasurementStore()


def test_the_same_is_read_back_and_said_so(store):
    first, second = store.measure(timing, 8, "smoke"), store.measure(timing, 8, "smoke")
    assert first.value == second.value == {"ms": [1.5, 1]}, "as JSON has it, the first time, too"
    assert (first.read_back, second.read_back) == (False, True) and len(CALLS) == 1
    assert first.seconds >= 0.05 and second.measured == first.measured and second.provenance["hardware"]["cpu"]
    assert "read back, measured 20" in str(second) and str(first).startswith("timing: measured 20")


@pytest.mark.parametrize(
    "arguments",
    [(9, "smoke"), (8, "cpu"), (8,), ("8", "smoke"), ([8], "smoke"), (ModelConfig.parse("350M"), "smoke"), ({"a": 8}, "smoke")],
)  # fmt: skip
def test_other_arguments_are_another_measurement(store, arguments):
    assert store.measure(timing, 8, "smoke").id != store.measure(timing, *arguments).id and len(CALLS) == 2


@pytest.mark.parametrize(("what", "now"), [("code", "another"), ("machine", {"cpu": "another"}), ("FORMAT", 2)])
def test_other_code_or_another_machine_measures_anew(store, monkeypatch, what, now):
    store.measure(timing, 8)
    monkeypatch.setattr(measurements, what, now if what == "FORMAT" else lambda: now)
    assert not store.measure(timing, 8).read_back and len(CALLS) == 2


def test_what_computes_is_part_of_the_machine(store, tmp_path, monkeypatch):
    from moelab.kernels import _cpp

    from moelab.models import products

    ids = [store.measure(timing, 8).id]
    with _cpp.limited("none"):
        plain = store.measure(timing, 8)
        assert plain.provenance["cpu_kernels"]["instructions"] == "none"
    with monkeypatch.context() as other:  # nothing is set, but there is no compiler and nothing compiled
        other.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        other.setenv("CXX", "no-such-compiler")
        other.setattr(_cpp, "_load", _cpp._load.__wrapped__)  # which keeps what this process has loaded
        _cpp._forget()
        without = store.measure(timing, 8)
    _cpp._forget()
    ids += [plain.id, without.id]
    assert ids[1] == ids[2] != ids[0], "the same computed"
    for name in ("MKL_NUM_THREADS", "ONEDNN_MAX_CPU_ISA"):
        with monkeypatch.context() as other:
            other.setenv(name, "1")
            ids.append(store.measure(timing, 8).id)
    other_choice = not products.onednn_is_faster()
    monkeypatch.setattr(products, "onednn_is_faster", lambda: other_choice)
    ids.append(store.measure(timing, 8).id)
    assert len(set(ids)) == 5


def test_the_code_is_all_source_with_the_kernels_and_their_tables(tmp_path, monkeypatch):
    from importlib.util import find_spec as find
    from types import SimpleNamespace

    def changed(name):
        place = [str(tmp_path / "kernels")]
        return SimpleNamespace(submodule_search_locations=place) if name == "moelab.kernels" else find(name)

    seen = [measurements.code.__wrapped__()]
    assert seen == [measurements.code.__wrapped__()]
    monkeypatch.setattr(measurements, "find_spec", changed)
    for name, text in (
        ("kernels/gate.py", "x = 1\n"),
        ("kernels/gate.py", "x = 2\n"),
        ("kernels/tables/h100.json", "{}"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        seen.append(measurements.code.__wrapped__())
    (tmp_path / "kernels" / ".#gate.py").symlink_to("me@here.123")  # an editor's lock, a link to nowhere
    seen.append(measurements.code.__wrapped__())
    assert len(set(seen)) == 4


def test_what_was_measured_by_code_that_is_in_no_file_any_more_is_not_kept(tmp_path, monkeypatch, capsys):
    from types import SimpleNamespace

    place = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(measurements, "find_spec", lambda name: place)

    def process():
        measurements.code.cache_clear()
        CALLS.clear()
        return MeasurementStore()

    try:
        (tmp_path / "gate.py").write_text("x = 1\n")
        old = process()
        (tmp_path / "gate.py").write_text("x = 2\n")  # edited while a kernel has imported it
        assert not old.measure(timing, 8).read_back and "restart the kernel" in capsys.readouterr().err
        new = process()
        assert not new.measure(timing, 8).read_back and not capsys.readouterr().err
        assert new.measure(timing, 8).read_back
        (tmp_path / "gate.py").write_text("x = 1\n")
        assert not process().measure(timing, 8).read_back
    finally:
        measurements.code.cache_clear()


def test_a_run_that_was_trained_again_is_another(store, tmp_path):
    run = Run(RunSpec(ModelConfig.parse("350M twin")), tmp_path / "run")
    run.path.mkdir()
    ids = [store.measure(timing, [run]).id]
    for loss in (5.0, 4.9):
        (run.path / "result.json").write_text(json.dumps({"loss": loss}))
        ids.append(store.measure(timing, [run]).id)
    assert len(set(ids)) == 3 and store.measure(timing, [run]).read_back


def test_a_run_under_another_label_is_measured_under_it(store, tiny_spec, tmp_path):
    run, renamed = (Run(replace(tiny_spec, label=label), tmp_path) for label in ("tiny", "mine"))
    assert store.measure(timing, [run]).id != store.measure(timing, [renamed]).id, "values name their arms"


def test_a_text_that_has_changed_is_measured_anew(store, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    data = DataConfig(f"folder:{folder}")
    ids = [store.measure(timing, data).id]  # not there yet
    for text in ("one text", "another text"):
        (folder / "a.txt").write_text(text)
        ids.append(store.measure(timing, data).id)
    assert len(set(ids)) == 3 and store.measure(timing, data).read_back


def test_again_replaces_it(store):
    store.measure(timing, 8)
    assert store.measure(timing, 8, again=True).value == {"ms": [1.5, 2]}
    assert store.measure(timing, 8).value == {"ms": [1.5, 2]}


@pytest.mark.parametrize("torn", ["", "{", "[]", "{}", '{"format": 0}', '{"format": 1}'])
def test_a_torn_file_costs_another_measurement(store, torn):
    first = store.measure(timing, 8)
    (store.root / f"{first.id}.json").write_text(torn)
    assert not store.measure(timing, 8).read_back
    assert store.measure(timing, 8).read_back


def test_a_value_that_the_disk_has_no_room_for_is_returned_all_the_same(store, monkeypatch, capsys):
    def full(file, record):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(measurements, "write_json", full)
    assert not store.measure(timing, 3).read_back
    assert capsys.readouterr().err == f"timing: not kept: No space left on device: {store.root}\n"


def test_what_fails_leaves_nothing(store):
    with pytest.raises(TypeError):
        store.measure(timing_of_nothing)
    assert not list(store.root.glob("*.json"))


def timing_of_nothing():
    return {"ms": {1, 2}}


timing_of_nothing.__module__ = "moelab.testing"


def test_one_at_a_time_and_once(store):
    threads = [threading.Thread(target=store.measure, args=(timing, n)) for n in (1, 1, 2)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(CALLS) == [(1,), (2,)], "the one that waited reads back"
    assert time.monotonic() - started >= 0.1, "not beside each other"


@pytest.mark.parametrize(
    ("function", "arguments", "why"),
    [
        (lambda: 1, (), "is no function of a module of moelab"),
        (json.dumps, (1,), "json.dumps is no function of a module of moelab"),
        (timing, (object(),), "argument of type object"),
        (timing, (b"bytes",), "argument of type bytes"),
    ],
)
def test_what_nothing_can_be_stored_by_is_refused(store, function, arguments, why):
    with pytest.raises(ValueError, match=why) as refused:
        store.measure(function, *arguments)
    assert "\n" not in str(refused.value) and not CALLS


def test_a_publication_lists_what_its_lab_measured(capsys):
    CALLS.clear()
    for again in (False, False, True):
        lab = Lab(measure_again=again)
        publication = lab.publish("throughput", "smoke")
        assert lab.measure(timing, 8)["ms"][0] == 1.5
        publication.finish(title="it takes time")
        (listed,) = json.loads((publication.path / SUMMARY).read_text())["measurements"]
        assert listed["function"] == "moelab.testing.timing" and listed["arguments"] == [8] and "value" not in listed
        said = capsys.readouterr().out
        now = "timing: measures now; it may take minutes. Time it.\n"
        assert said.startswith(now) != listed["read_back"], "said before it is silent for minutes"
    assert len(CALLS) == 2 and not listed["read_back"]
