"""Imports run one way (see the README's table): a package may import those on its own line and above."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {"files", "config", "distill_config", "layout", "paper", "kernels"},
    {"models", "data", "simulate"},
    {"engine"},
    {"training", "inference", "evaluation"},
    {"workbench"},
    {"cli", "notebooks"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "moelab" else [node.module]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("moelab."))


FILES = [*(ROOT / "moelab").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    room = "kernels" if parts[0] == "kernels" else parts[1]
    if room == "__init__":
        assert not list(imports(path)), "import moelab loads nothing"
        return
    for other in imports(path):
        if room == "kernels":
            assert other == "kernels", "kernels import nothing else of moelab"
        if other in FLOOR:
            assert FLOOR[other] <= FLOOR[room], f"{room} imports {other}, which stands above it"


def test_no_file_is_too_long_to_read_in_one_sitting():
    assert {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 620} == {}
