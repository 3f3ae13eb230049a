import math
from dataclasses import replace

import pytest

from moelab.config.distill import DistillConfig
from moelab.training.distill import Teacher
from moelab.training.loop import TrainingStopped, train
from moelab.training.metrics import TRAIN, read_rows
from tests.conftest import numbers, stop_after


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (DistillConfig(schedule="off"), [0, 0, 0, 0, 0]),
        (DistillConfig(weight=2.0), [2, 2, 2, 2, 2]),
        (DistillConfig(schedule="stop", unit="steps", stop=3), [1, 1, 1, 0, 0]),
        (DistillConfig(schedule="stop", stop=200), [1, 1, 0, 0, 0]),
        (DistillConfig(schedule="linear", unit="steps", start=1, stop=3), [1, 1, 0.5, 0, 0]),
        (DistillConfig(schedule="cosine", unit="steps", stop=4), [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0]),
    ],
)  # fmt: skip
def test_schedules(config, weights):
    assert [config.weight_at(step, 100 * step) for step in range(5)] == pytest.approx(weights)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"schedule": "late"}, "schedule must be one of 'off', .*, got 'late'"),
        ({"schedule": "stop"}, "needs a stop above 0"),
        ({"stop": 5}, "stop belongs to"),
        ({"schedule": "linear", "start": 5, "stop": 5}, "start must be before stop"),
        ({"schedule": "stop", "start": 1, "stop": 5}, "start belongs to"),
    ],
)
def test_bad_configurations_are_one_line(arguments, part):
    with pytest.raises(ValueError, match=part) as error:
        DistillConfig(**arguments)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    return tmp_path_factory.mktemp("teacher")


@pytest.fixture
def taught(tiny_model, tiny_train, data, school, tmp_path):
    """A function that trains a student into a folder; its teacher is trained once."""
    teacher = replace(tiny_model, experts=(0, 4, 0, 4), name="teacher")
    train(teacher, replace(tiny_train, tokens=60 * 128), data, 32, school)

    def student(name, distill, **options):
        who = Teacher(teacher, school, distill) if distill else None
        config = replace(tiny_train, seed=1, **options.pop("train", {}))
        return train(tiny_model, config, data, 32, tmp_path / name, teacher=who, **options)

    return student


def test_a_student_learns_from_its_teacher_while_it_is_taught(taught, school, tmp_path):
    # One epoch has few batches here: at equal steps the teacher's whole distributions tell more than single next tokens.
    before = numbers(school)
    alone, full = taught("alone", None), taught("full", DistillConfig(weight=3.0))
    assert full["validation_loss"] < alone["validation_loss"] - 0.01
    rows = read_rows(tmp_path / "full" / TRAIN)
    assert rows[-1]["distill_loss"] < rows[0]["distill_loss"]
    assert "distill_loss" not in read_rows(tmp_path / "alone" / TRAIN)[0]
    taught("off", DistillConfig(schedule="off"))
    assert numbers(tmp_path / "alone") == numbers(tmp_path / "off")
    taught("staged", DistillConfig(schedule="stop", unit="steps", stop=9))
    rows = read_rows(tmp_path / "staged" / TRAIN)
    assert [row["step"] for row in rows if row.get("distill_loss")] == [3, 6, 9]
    assert numbers(school) == before


def test_a_stopped_student_goes_on_bit_for_bit(taught, tmp_path):
    distill = DistillConfig(schedule="linear", unit="steps", stop=20, temperature=2.0)
    taught("whole", distill)
    with pytest.raises(TrainingStopped):
        taught("cut", distill, should_stop=stop_after(11))
    taught("cut", distill)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_a_teacher_without_checkpoint_is_one_line(tiny_model, tiny_train, data, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint yet"):
        train(tiny_model, tiny_train, data, 32, tmp_path, teacher=Teacher(tiny_model, tmp_path / "no", DistillConfig()))


@pytest.mark.parametrize("setting", [{"top_k": 8}, {"cache_bytes": 9}])
def test_settings_of_earlier_versions_are_refused_in_one_line(tiny_model, tiny_train, data, tmp_path, setting):
    teacher = Teacher(tiny_model, tmp_path / "no", DistillConfig(**setting))
    with pytest.raises(ValueError, match=r"^distill: top_k and cache_bytes are settings of earlier versions"):
        train(tiny_model, tiny_train, data, 32, tmp_path, teacher=teacher)
