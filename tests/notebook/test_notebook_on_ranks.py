"""The first experiment's notebook with its runs spread over ranks: expert parallelism per layer, through the command that users take."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.multiprocess
def test_pr_moe_trains_on_two_ranks_through_its_notebook(tmp_path):
    env = {**os.environ, "MOELAB_HOME": str(tmp_path / "home"), "MOELAB_RESULTS": str(tmp_path / "results")}
    command = [sys.executable, "-m", "moelab.cli", "run", "pr-moe", "--scale", "smoke", "-p", "parallel.data=2"]
    command += ["-p", 'arms=["PR-MoE-32/64", "MoE-128"]']
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (summary,) = (tmp_path / "home" / "results" / "pr-moe" / "smoke").glob("*/summary.json")
    assert not json.loads(summary.read_text())["missing"]
    records = [json.loads(f.read_text()) for f in (tmp_path / "home" / "runs").glob("*/provenance.json")]
    assert [record["parallel"]["data"] for record in records] == [2, 2]
