"""The record of versions names the pinned ones."""

import subprocess
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moelab import paths
from moelab.runs import provenance


def test_constraints_pin_every_dependency_but_those_of_the_machine():
    root = paths.checkout()
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(text) for text in (*project["dependencies"], *extras["test"], *extras["eval"])]
    pins = dict(line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if line[0] != "#")
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    missing = {r.name for r in wanted if canonicalize_name(r.name) not in pins} - {"torch", "triton", "moelab"}
    assert not missing
    for requirement in wanted:
        if version := pins.get(canonicalize_name(requirement.name)):
            assert version in requirement.specifier, requirement


def test_provenance_names_the_constraints_and_what_differs(tmp_path, monkeypatch):
    assert len(provenance.constraints()["sha256"]) == 12
    (tmp_path / "constraints.txt").write_text("# pins\nnumpy==0.0.1\n\nno-such-package==1\nown @ file:///own\n")
    monkeypatch.setattr(paths, "checkout", lambda: tmp_path)
    provenance.constraints.cache_clear()
    assert provenance.constraints()["differ"] == ["numpy"]
    (tmp_path / "constraints.txt").unlink()
    provenance.constraints.cache_clear()
    assert provenance.constraints() is None
    provenance.constraints.cache_clear()


def test_a_tree_that_git_does_not_look_at_in_time_is_not_called_unmodified(tmp_path, monkeypatch):
    said = {"rev-parse": "abc\n", "status": " M moelab/a.py\n"}
    monkeypatch.setattr(paths, "checkout", lambda: tmp_path)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, said[command[3]], "")
    )
    assert provenance.commit() == {"commit": "abc", "modified": True}
    said["status"] = ""
    assert provenance.commit() == {"commit": "abc", "modified": False}

    def slow(command, timeout, **_):
        if command[3] == "status":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0, "abc\n", "")

    monkeypatch.setattr(subprocess, "run", slow)
    assert provenance.commit() == {"commit": "abc", "modified": None}
