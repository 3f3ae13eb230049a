"""Every experiment's notebook at smoke scale, through the command that users take; and again from stored runs."""

import json
import os
import subprocess
import sys

import pytest

from moelab.workbench.experiments import EXPERIMENTS

SMOKE = [e.name for e in EXPERIMENTS.values() if "smoke" in e.scales]


def run_all(root):
    env = {**os.environ, "MOELAB_HOME": str(root / "home"), "MOELAB_RESULTS": str(root / "results"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "moelab.cli", "run", "--all", "--scale", "smoke"]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def summaries(root, name):
    return [json.loads(file.read_text()) for file in sorted((root / "results" / name / "smoke").glob("*/summary.json"))]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    root = tmp_path_factory.mktemp("everything")
    done = run_all(root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.mark.notebook
@pytest.mark.slow
class TestAllNotebooks:
    @pytest.mark.parametrize("name", SMOKE)
    def test_publishes_figures_and_every_run(self, everything, name):
        (summary,) = summaries(everything, name)
        assert not summary["missing"] and summary["figures"]
        (folder,) = (everything / "results" / name / "smoke").iterdir()
        for figure in summary["figures"]:
            assert (folder / f"{figure['name']}.png").stat().st_size > 5_000 and figure["title"]
            assert (folder / figure["data"]).exists()

    def test_runs_are_shared_and_not_trained_again(self, everything):
        before = {f: f.stat().st_mtime_ns for f in (everything / "home" / "runs").glob("*/result.json")}
        specs = [s.id for e in EXPERIMENTS.values() if e.trains and "smoke" in e.scales for s in e.specs("smoke")]
        assert len(set(specs)) < len(specs), "experiments share runs"
        assert run_all(everything).returncode == 0
        assert {f: f.stat().st_mtime_ns for f in (everything / "home" / "runs").glob("*/result.json")} == before
        for name in SMOKE:
            first, second = (
                sorted(run["result"]["validation_loss"] for run in s["runs"]) for s in summaries(everything, name)
            )
            assert first == second

    def test_the_ledger_knows_what_they_counted(self, everything):
        from moelab.workbench.ledger import ledger

        verdicts = {entry.claim: entry.verdict for entry in ledger(everything / "results")}
        for counted in ("pr-moe-size", "top2-flops-33pct", "residual-halves-exchange", "mos-size-350m"):
            assert verdicts[counted] == "reproduced"
