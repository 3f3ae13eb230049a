"""The development cluster's script ends daemons of its own cluster and nothing else; no Slurm is needed here."""

import os
import shutil
import subprocess

import pytest

from moelab import paths
from tests.conftest import until

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="needs /proc"),
]


@pytest.mark.parametrize("stranger", ["another program", "another cluster", None])
def test_a_pid_file_of_a_daemon_that_is_gone_ends_no_strangers_process(tmp_path, stranger):
    name = "sleep" if stranger == "another program" else "slurmd"
    shutil.copy(shutil.which("sleep"), daemon := tmp_path / name)
    folder = tmp_path / "cluster"
    conf = "/elsewhere/slurm.conf" if stranger == "another cluster" else f"{folder.resolve()}/etc/slurm.conf"
    process = subprocess.Popen([daemon, "600"], env=os.environ | {"SLURM_CONF": conf})
    try:
        (folder / "run").mkdir(parents=True)
        for file in ("slurmd.node1.pid", "munged.pid"):
            (folder / "run" / file).write_text(f"{process.pid}\n")
        (folder / "run" / "slurmctld.pid").write_text("999999999\n")
        script, env = (
            paths.checkout() / "slurm" / "local" / "cluster.sh",
            os.environ | {"MOELAB_SLURM_DIR": str(folder)},
        )
        shown = subprocess.run([script, "status"], env=env, capture_output=True, text=True)
        assert (shown.returncode, shown.stdout) == (1, f"down ({folder.resolve()})\n")
        subprocess.run([script, "down"], env=env, check=True, capture_output=True)
        assert not list((folder / "run").iterdir())
        if stranger:
            assert process.poll() is None
        else:
            until(lambda: process.poll() is not None, "the daemon to be ended")
    finally:
        process.kill()
        process.wait()
