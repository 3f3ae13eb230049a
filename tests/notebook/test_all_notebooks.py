"""Every experiment's notebook at smoke scale, through the command that users take; and again from stored runs."""

import json
import os
import subprocess
import sys
from datetime import datetime

import pytest

from moelab.experiments import EXPERIMENTS
from moelab.lab import Lab

pytestmark = [pytest.mark.notebook, pytest.mark.slow]

SMOKE = [e.name for e in EXPERIMENTS.values() if "smoke" in e.scales]


def run(root, *what):
    places = {"MOELAB_HOME": str(root / "home"), "MOELAB_RESULTS": str(root / "results")}
    command = [sys.executable, "-m", "moelab.cli", "run", *what, "--scale", "smoke"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **places, "COLUMNS": "200"})


def summaries(root, name):
    return [
        json.loads(file.read_text())
        for file in sorted((root / "home" / "results" / name / "smoke").glob("*/summary.json"))
    ]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    root = tmp_path_factory.mktemp("everything")
    done = run(root, "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.mark.parametrize("name", SMOKE)
def test_publishes_figures_and_every_run(everything, name):
    summary = summaries(everything, name)[0]
    assert not summary["missing"] and summary["figures"]
    folder = sorted((everything / "home" / "results" / name / "smoke").iterdir())[0]
    for figure in summary["figures"]:
        assert (folder / f"{figure['name']}.svg").stat().st_size > 5_000 and figure["title"]
        assert (folder / figure["data"]).exists()


def test_runs_are_shared_and_not_trained_again(everything, monkeypatch):
    """Teachers and students too."""
    before = {f: f.stat().st_mtime_ns for f in (everything / "home" / "runs").glob("*/result.json")}
    specs = [s.id for e in EXPERIMENTS.values() if e.trains and "smoke" in e.scales for s in e.specs("smoke")]
    assert len(set(specs)) < len(specs), "experiments share runs"
    monkeypatch.setenv("MOELAB_HOME", str(everything / "home"))
    again = Lab().run(EXPERIMENTS["distillation"].specs("smoke"), executor="inline")
    assert {f: f.stat().st_mtime_ns for f in (everything / "home" / "runs").glob("*/result.json")} == before
    (summary,) = summaries(everything, "distillation")
    assert {run.spec.id: run.result for run in again} == {run["id"]: run["result"] for run in summary["runs"]}


def test_a_notebook_publishes_again_what_was_trained_and_measured(everything):
    name = "top2-vs-residual"
    (first,) = summaries(everything, name)
    before = {f: f.stat().st_mtime_ns for f in (everything / "home" / "runs").glob("*/result.json")}
    assert run(everything, name).returncode == 0
    assert {f: f.stat().st_mtime_ns for f in (everything / "home" / "runs").glob("*/result.json")} == before
    second = summaries(everything, name)[1]
    assert first["runs"] and [r["result"] for r in second["runs"]] == [r["result"] for r in first["runs"]]
    assert first["measurements"] and not any(one["read_back"] for one in first["measurements"])
    assert all(one["read_back"] for one in second["measurements"])
    assert [one["measured"] for one in second["measurements"]] == [one["measured"] for one in first["measurements"]]
    assert (second["title"], second["claims"]) == (first["title"], first["claims"])
    # What the pages say and where they lead: test_site.py and tests/browser.
    pages = everything / "home" / "pages"
    for folder in (everything / "home" / "results" / name / "smoke").iterdir():
        assert f"{name}/smoke/{folder.name}/index.html" in (pages / "figures.html").read_text()
        assert (pages / name / "smoke" / folder.name / "notebook.html").exists()


def test_what_measures_runs_beside_nothing(everything):
    shown = {name: summaries(everything, name)[0] for name in SMOKE}
    ends = {name: datetime.fromisoformat(s["finished"]).timestamp() for name, s in shown.items()}
    begins = {name: ends[name] - s["notebook_seconds"] for name, s in shown.items()}
    for name in (name for name in SMOKE if EXPERIMENTS[name].measures):
        # The time of an end is in whole seconds.
        beside = {n for n in SMOKE if ends[n] > begins[name] + 2 and begins[n] < ends[name] - 2}
        assert beside <= {name}


def test_the_ledger_knows_what_they_counted(everything):
    from moelab.report.ledger import ledger

    verdicts = {entry.claim: entry.verdict for entry in ledger(everything / "home" / "results")}
    for counted in ("pr-moe-size", "top2-flops-33pct", "residual-halves-exchange", "mos-size-350m"):
        assert verdicts[counted] == "holds"
