"""What was measured with a run's weights stays with the run."""

import pytest

from moelab.experiments import pr_moe
from moelab.files import read_json, write_json
from moelab.runs import evaluations, measurements, records
from moelab.runs.measurements import EVALUATIONS
from moelab.runs.store import RunStore
from tests.runs.conftest import record

CALLS = []


def words(run, count, suffix="", show=None):
    CALLS.append(count)
    if show:
        show(count)
    return {"words": [f"{run.spec.label}{suffix}"] * count, "pair": (1, 2)}


class Scores:
    @staticmethod
    def wordsOf(run, count):
        return count


@pytest.fixture
def run(tmp_path, result):
    """A finished run with weights, its numbers made up."""
    CALLS.clear()
    run = RunStore(tmp_path / "ours").run(pr_moe.EXPERIMENT.specs("smoke", arms=["Dense"])[0])
    (run.path / "checkpoints" / "step-00000001").mkdir(parents=True)
    write_json(run.path / "result.json", result())
    return run


def without_weights(run):
    (run.path / "checkpoints" / "step-00000001").rmdir()
    return run


def test_a_value_is_measured_once_for_the_same_arguments(run):
    shown = []
    first = evaluations.measure(run, words, 2, show=shown.append)
    assert first == {"words": ["Dense", "Dense"], "pair": [1, 2]}  # as JSON has it
    assert evaluations.measure(run, words, 2, show=None) == first and CALLS == [2] and shown == [2]
    assert evaluations.measure(run, words, 1)["words"] == ["Dense"]
    assert evaluations.measure(run, words, 2, "!")["words"] == ["Dense!", "Dense!"] and CALLS == [2, 1, 2]


def test_without_weights_it_is_read_back_and_nothing_else_is_measured(run):
    found = evaluations.measure(run, words, 2)
    without_weights(run)
    evaluations.require(run, words, 2)
    assert evaluations.measure(run, words, 2) == found
    for call in (evaluations.require, evaluations.measure):
        with pytest.raises(ValueError, match="numbers only, no weights"):
            call(run, words, 3)
    assert CALLS == [2]


def test_earlier_weights_are_not_the_results(run):
    """The checkpoint of the last step is gone, one that branches start from is kept."""
    found = evaluations.measure(run, words, 2)
    (run.path / "checkpoints" / "step-00000000").mkdir()
    without_weights(run)
    assert not run.has_weights and evaluations.measure(run, words, 2) == found
    with pytest.raises(ValueError, match="the checkpoint of its result, step 1, is missing") as error:
        evaluations.measure(run, words, 3)
    assert "\n" not in str(error.value) and CALLS == [2]


def test_other_code_measures_again_while_the_weights_are_there(run, monkeypatch):
    found = evaluations.measure(run, words, 2)
    monkeypatch.setattr(evaluations, "code", lambda: "another")
    assert evaluations.measure(run, words, 2) == found and CALLS == [2, 2]
    monkeypatch.setattr(evaluations, "code", lambda: "a third")
    assert evaluations.measure(without_weights(run), words, 2) == found and CALLS == [2, 2]


def test_a_run_trained_again_has_other_weights(run, result):
    evaluations.measure(run, words, 2)
    (file,) = evaluations.files(run)
    assert read_json(file)["arguments"] == [2] and read_json(file)["function"].endswith("test_evaluations.words")
    write_json(run.path / "result.json", result(4.4))
    assert evaluations.files(run) == []
    evaluations.measure(run, words, 2)
    assert CALLS == [2, 2]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1}', '{"format": 2, "result": "", "code": "", "value": 1}']
)
def test_a_damaged_file_is_measured_again(run, content):
    evaluations.measure(run, words, 2)
    (file,) = evaluations.files(run)
    file.write_text(content)
    assert evaluations.files(run) == []
    assert evaluations.measure(run, words, 2)["words"] == ["Dense", "Dense"] and CALLS == [2, 2]


def test_a_record_holds_it(run, tmp_path, theirs):
    found = evaluations.measure(run, words, 2)
    archive = record(run, tmp_path)
    assert archive.read_bytes() == record(run, tmp_path / "again").read_bytes()
    taken = records.read(archive, theirs)
    assert not taken.has_weights and evaluations.measure(taken, words, 2) == found and CALLS == [2]


def test_a_function_may_have_any_name(run, tmp_path, theirs):
    evaluations.measure(run, Scores.wordsOf, 2)
    taken = records.read(record(run, tmp_path), theirs)
    assert evaluations.measure(taken, Scores.wordsOf, 2) == 2


def test_a_later_record_of_the_same_run_brings_what_is_new(run, tmp_path, result, theirs):
    taken = records.read(record(run, tmp_path), theirs)
    found = evaluations.measure(run, words, 2)
    assert records.read(record(run, tmp_path), theirs) is None  # it was here already
    assert evaluations.measure(taken, words, 2) == found
    evaluations.measure(run, words, 1)
    write_json(taken.path / "result.json", result(4.4))  # a run of their own
    assert records.read(record(run, tmp_path), theirs) is None
    assert len(list((taken.path / EVALUATIONS).iterdir())) == 1


def test_a_later_record_replaces_what_was_measured_before_where_there_are_no_weights(run, tmp_path, theirs):
    """The code that measures was mended, and the run published again."""
    evaluations.measure(run, words, 2)
    taken = records.read(record(run, tmp_path), theirs)
    ours, other = evaluations.files(run)[0], taken.path / EVALUATIONS / evaluations.files(run)[0].name
    write_json(ours, {**read_json(ours), "measured": "2999-01-01 00:00:00 UTC", "value": "mended"})
    later = record(run, tmp_path)
    (taken.path / "checkpoints" / "step-00000001").mkdir(parents=True)
    records.read(later, theirs)
    assert read_json(other)["value"] != "mended", "its own weights measure anew"
    without_weights(taken)
    records.read(later, theirs)
    assert evaluations.measure(taken, words, 2) == "mended"
    write_json(ours, {**read_json(ours), "measured": "2000-01-01 00:00:00 UTC", "value": "old"})
    records.read(record(run, tmp_path), theirs)
    assert evaluations.measure(taken, words, 2) == "mended"


def test_what_a_later_record_brings_is_not_hidden_by_what_was_read_before(run, tmp_path, theirs):
    """`Lab.measure` reads back what it found before: of fewer runs, or with earlier code."""
    taken = records.read(record(run, tmp_path), theirs)
    own, before = measurements.as_json(run), measurements.as_json(taken)
    evaluations.measure(run, words, 2)
    assert measurements.as_json(run) == own, "weights give the same again"
    records.read(record(run, tmp_path), theirs)
    assert measurements.as_json(taken) != before == own
    found = measurements.as_json(taken)
    (taken.path / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert not taken.has_weights and measurements.as_json(taken) == found, "of a branch point, it gives no scores"


def test_a_value_that_cannot_be_kept_is_returned_all_the_same(run, monkeypatch, capsys):
    """The run is another user's."""

    def refused(file, value):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(evaluations, "write_json", refused)
    ((_, value),) = evaluations.measure_all([run], words, 2)
    assert value["words"] == ["Dense", "Dense"] and CALLS == [2]
    assert capsys.readouterr().err == f"words: not kept: Permission denied: {run.path / 'measured'}\n"


def test_of_many_runs_each_new_one_is_named_before_it_is_measured(run, tmp_path, result, capsys):
    other = RunStore(tmp_path / "ours").run(pr_moe.EXPERIMENT.specs("smoke", arms=["MoE-32"])[0])
    write_json(other.path / "result.json", result())
    assert evaluations.measure_all([run, other], words, 2) == [(run, evaluations.measure(run, words, 2))]
    assert capsys.readouterr().out == "Dense, seed 0 (1 of 1)\n" and CALLS == [2]
    assert len(evaluations.measure_all([run, other], words, 2)) == 1 and not capsys.readouterr().out
