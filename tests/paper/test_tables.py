"""Every file: provenance on every row, clean cells, resolvable contradictions."""

import csv
import math
import re
from dataclasses import fields
from importlib import resources

import pytest

from moelab import paper

TABLES = {
    "models.csv": paper.models,
    "training.csv": paper.all_training_settings,
    "training_throughput.csv": paper.training_throughput,
    "zero_shot.csv": paper.zero_shot,
    "val_loss.csv": paper.loss_points,
    "inference.csv": paper.inference_results,
    "claims.csv": paper.claims,
    "conflicts.csv": paper.conflicts,
}
KEYS = {
    "models.csv": ("model",),
    "training.csv": ("run",),
    "training_throughput.csv": ("model",),
    "zero_shot.csv": ("run", "corpus"),
    "val_loss.csv": ("model", "kind", "tokens_B"),
    "claims.csv": ("id",),
    "conflicts.csv": ("id",),
    "inference.csv": ("figure", "model", "variant", "system", "baseline", "gpus", "metric", "how"),
}


def test_every_file_is_read():
    assert {entry.name for entry in resources.files(paper).iterdir() if entry.name.endswith(".csv")} == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_rows(name):
    table = TABLES[name]()
    assert table
    keys = [tuple(getattr(row, key) for key in KEYS[name]) for row in table]
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


@pytest.mark.parametrize("name", TABLES)
def test_prose_stays_out_of_numeric_columns(name):
    """A column with a number in it holds nothing but numbers (lists of numbers, empty cells)."""
    words = {
        "smallest_why", "source", "how", "conflict", "note", "statement", "subject", "readings", "check", "used",
        "where", "role", "model", "run", "base", "id", "figure", "left", "right", "teacher", "assumed_from", "quantity",
        "baseline",
    }  # fmt: skip
    with resources.files(paper).joinpath(name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for column in set(rows[0]) - words:
        cells = [cell for row in rows for cell in row[column].split()]
        numeric = [bool(re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", cell)) for cell in cells]
        assert all(numeric) or not any(numeric), (name, column)


def test_conflict_cells_repeat_the_conflicts_table_and_every_conflict_touches_a_row():
    touched = {part for read in TABLES.values() for row in read() for part in row.conflict.split(" | ") if part}
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
