"""`moelab check-cluster` as the ranks of a job step on two nodes."""

import os
import subprocess
import sys


def test_the_ranks_of_two_nodes_are_checked(cluster, tmp_path):
    ranks = ("srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem=2G", "--time=10")
    command = ("check-cluster", "--device", "cpu", "--mib", "1")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MOELAB_HOME": str(tmp_path / "home"), "COLUMNS": "300"}
    done = subprocess.run(
        [*ranks, sys.executable, "-m", "moelab.cli", *command],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert "verdict: ok, 4 ranks" in done.stdout and done.returncode == 0, done.stdout + done.stderr
    for row in ("file locks in", "network interface", "all-to-all among all 4 ranks, 1 MiB"):
        assert row in done.stdout
