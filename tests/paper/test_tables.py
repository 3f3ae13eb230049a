"""Every file: provenance on every row, clean cells, resolvable contradictions."""

import math
from dataclasses import fields
from importlib import resources

import pytest

from moelab import paper

TABLES = {
    "models.csv": (paper.models, ("model",)),
    "training.csv": (paper.all_training_settings, ("run",)),
    "training_throughput.csv": (paper.training_throughput, ("model",)),
    "zero_shot.csv": (paper.zero_shot, ("run", "corpus")),
    "val_loss.csv": (paper.loss_points, ("model", "kind", "tokens_B")),
    "inference.csv": (
        paper.inference_results,
        ("figure", "model", "variant", "system", "baseline", "gpus", "metric", "how"),
    ),
    "claims.csv": (paper.claims, ("id",)),
    "conflicts.csv": (paper.conflicts, ("id",)),
    "clark.csv": (paper.routed_models, ("setting",)),
    "clark_curves.csv": (paper.routed_curves, ("setting",)),
    "reported.csv": (paper.reported, ("project", "model", "metric")),
}
"""File -> its rows, and the fields by which they are told apart."""


def test_every_file_is_read():
    assert {entry.name for entry in resources.files(paper).iterdir() if entry.name.endswith(".csv")} == set(TABLES)


@pytest.mark.parametrize(("read", "key"), TABLES.values(), ids=TABLES)
def test_rows(read, key):
    table = read()
    assert table
    keys = [tuple(getattr(row, name) for name in key) for row in table]
    assert len(set(keys)) == len(keys)
    for row in table:
        assert row.source.strip(), row
        assert row.how.startswith(paper.HOW), row.how
        for field in fields(row):
            value = getattr(row, field.name)
            if isinstance(value, float):
                assert math.isfinite(value), (row, field.name)
            if isinstance(value, str):
                assert value == value.strip() and "\n" not in value, (row, field.name)
                assert "../" not in value and "://" not in value and not value.startswith("/"), (row, field.name)


def test_conflict_cells_repeat_the_conflicts_table_and_every_conflict_touches_a_row():
    touched = {part for read, _ in TABLES.values() for row in read() for part in row.conflict.split(" | ") if part}
    assert touched <= {row.cell for row in paper.conflicts()}
    assert {row.id for row in paper.conflicts()} <= {part.split(":")[0] for part in touched}


def test_names_of_models_resolve():
    known = {row.model for row in paper.models()}
    assert {row.model for row in paper.all_training_settings()} <= known
    assert {row.model for row in paper.loss_points()} <= known
    assert {row.model for row in paper.zero_shot() if row.group == "paper"} <= known
    runs = {row.run for row in paper.all_training_settings()}
    assert {row.run for row in paper.zero_shot() if row.group == "paper"} <= runs
    for row in paper.all_training_settings():
        assert paper.model(row.run).model == row.model
        assert row.assumed == bool(row.assumed_from)
        assert not row.assumed_from or not paper.training_settings(row.assumed_from).assumed
        assert (row.teacher != "") == (row.kd != "none")
        assert row.teacher == "" or paper.model(row.teacher)
