"""Check how the cluster of slurm/local starts."""

import os
import socket
import subprocess

import pytest

from moelab import paths


@pytest.fixture
def cluster_sh(tmp_path):
    """`slurm/local/cluster.sh up` with stand-ins for Slurm's daemons; munged runs, slurmctld fails."""
    folder = tmp_path / "daemons"
    folder.mkdir()
    pid = '$(echo "$@" | tr " " "\\n" | sed -n "s/^--pid-file=//p")'
    for name, does in {
        "munged": f"sleep 600 >/dev/null 2>&1 & echo $! > {pid}",
        "slurmctld": "exit 1",
        "mungekey": 'touch "${2#--keyfile=}"',
        **dict.fromkeys(("slurmd", "sbatch", "sinfo", "squeue"), "exit 0"),
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{does}\n")
        (folder / name).chmod(0o755)

    def up(port: int) -> subprocess.CompletedProcess:
        places = {"MOELAB_SLURM_DIR": str(tmp_path / "slurm"), "MOELAB_SLURM_PORT": str(port)}
        script = str(paths.checkout() / "slurm" / "local" / "cluster.sh")
        where = {**os.environ, **places, "PATH": f"{folder}:{os.environ['PATH']}"}
        return subprocess.run([script, "up"], env=where, capture_output=True, text=True, timeout=60)

    return up


@pytest.mark.parametrize("offset", [0, 3])
def test_a_port_in_use_is_told_before_anything_is_made(cluster_sh, tmp_path, offset):
    with socket.create_server(("127.0.0.1", 0)) as used:
        number = used.getsockname()[1]
        done = cluster_sh(number - offset)
    assert done.returncode == 1
    assert done.stderr == f"port {number} is in use; MOELAB_SLURM_PORT names the first of others\n"
    assert not (tmp_path / "slurm").exists()


def test_what_was_started_is_stopped_when_a_part_does_not_start(cluster_sh, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    done = cluster_sh(number)
    assert done.returncode == 1 and "not up; what was started is stopped" in done.stderr
    assert list((tmp_path / "slurm" / "run").glob("*.pid")) == []
    left = subprocess.run(["pgrep", "-f", f"--socket={tmp_path}"], capture_output=True, text=True)
    assert not left.stdout
