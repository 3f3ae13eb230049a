"""All environment variables of moelab stand in one table, and the docs show it."""

import os
import re
from pathlib import Path

import pytest

from moelab import environment, paths

ROOT = Path(__file__).resolve().parents[1]


def test_no_other_file_reads_a_variable_of_moelab():
    read = re.compile(r"""(environ(\.get)?[\[(]|getenv\()\s*f?["']MOELAB_""")
    found = [p for folder in ("moelab", "kernels") for p in (ROOT / folder).rglob("*.py") if read.search(p.read_text())]
    assert [str(p.relative_to(ROOT)) for p in found] == []


def test_every_variable_that_is_named_anywhere_is_in_the_table():
    named = set()
    for folder in ("moelab", "kernels", "slurm"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".sh", ".yaml"):
                named |= set(re.findall(r"\bMOELAB_[A-Z_]+\b", path.read_text()))
    assert named <= {v.name for v in environment.VARIABLES}


def test_the_docs_show_the_table():
    assert environment.table() in (ROOT / "docs" / "environment.md").read_text()


def test_an_empty_variable_counts_as_not_set(monkeypatch):
    monkeypatch.setenv("MOELAB_PROFILE", "")
    assert environment.PROFILE.get() is None
    assert environment.PROFILE.get({"MOELAB_PROFILE": "a100"}) == "a100"


def test_a_folder_may_begin_with_a_tilde(monkeypatch, tmp_path):
    """`docker run -e MOELAB_HOME=~/runs` passes it on as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MOELAB_HOME", "~/runs")
    monkeypatch.setenv("MOELAB_RESULTS", "~/results")
    assert (paths.home(), paths.results()) == (tmp_path / "runs", tmp_path / "results")


def test_overridden_variables_are_put_back(monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", "/one")
    monkeypatch.delenv("MOELAB_PLAN", raising=False)
    with pytest.raises(KeyError), environment.overridden({"MOELAB_HOME": "/two", "MOELAB_PLAN": "x"}):
        assert (os.environ["MOELAB_HOME"], os.environ["MOELAB_PLAN"]) == ("/two", "x")
        raise KeyError
    assert os.environ["MOELAB_HOME"] == "/one" and "MOELAB_PLAN" not in os.environ
