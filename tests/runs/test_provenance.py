"""The record of versions names the pinned ones."""

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
