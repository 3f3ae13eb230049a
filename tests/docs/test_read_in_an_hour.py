"""The page "Read it in an hour": its files and functions exist, and ten files are read in an hour."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "read-in-an-hour.md").read_text()
FILES = re.findall(r"^\| \[(.+?)\]\(\.\./(.+?)\) \|", PAGE, re.M)
STEPS = re.findall(r"^\| [^|\[]+ \| ((?:moelab|kernels)/\S+\.py) \| (\S+) \|$", PAGE, re.M)


def names(path: str) -> set[str]:
    """Functions and classes of a file, methods as Class.method."""
    tree = ast.parse((ROOT / path).read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = {node.name for node in tree.body if isinstance(node, kinds)}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return found | {f"{c.name}.{node.name}" for c in classes for node in c.body if isinstance(node, kinds)}


def test_ten_files_are_named_and_short_enough_for_an_hour():
    assert len(FILES) == 10 and all(text == target for text, target in FILES)
    assert sum(len((ROOT / target).read_text().splitlines()) for _, target in FILES) <= 2200


@pytest.mark.parametrize(("path", "name"), STEPS)
def test_a_step_names_a_function_that_exists(path, name):
    assert name in names(path)


def test_each_row_of_the_paths_is_read_here():
    rows = [line for line in PAGE.partition("## A token in training")[2].splitlines() if line.startswith("| ")]
    assert len(STEPS) == len([row for row in rows if not row.startswith(("| ---", "| what"))]) > 15
