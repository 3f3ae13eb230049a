"""`moelab check-cluster` as the ranks of a job step on two nodes."""

import json
import os
import subprocess
import sys


def test_the_ranks_of_two_nodes_are_checked(cluster, tmp_path):
    out = tmp_path / "check.json"
    ranks = ("srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem=2G", "--time=10")
    command = ("check-cluster", "--device", "cpu", "--mib", "1", "--profile", "local", "--out", str(out))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MOELAB_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*ranks, sys.executable, "-m", "moelab.cli", *command],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    found = json.loads(out.read_text())
    rows = {row["check"]: row for row in found["checks"]}
    assert found["verdict"] in done.stdout and "4 ranks" in found["verdict"], done.stderr
    # The simulated nodes are one machine: 4 ranks of it where the profile says 8.
    assert rows["ranks of a node"]["verdict"] == "wrong" and done.returncode == 1
    assert rows["all-to-all among all 4 ranks, 1 MiB"]["verdict"] == "note"
    assert next(row for name, row in rows.items() if name.startswith("file locks"))["verdict"] == "ok"
    assert [row["check"] for row in rows.values() if row["verdict"] == "wrong"] == ["ranks of a node"]
