"""Serve JupyterLab on a node of a cluster, in a job of its own, and print the ssh tunnel to it.

The command is `moelab lab --profile NAME`.
"""

from __future__ import annotations

import getpass
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from moelab import paths
from moelab.engine.launch.child import Child
from moelab.slurm import executor, queue
from moelab.slurm.callables import begin
from moelab.slurm.profiles import Profile


@dataclass
class ServeJupyter:
    """Serve JupyterLab as a Slurm step.

    Attributes:
        command: srun with its options, and the interpreter.
        options: options of jupyterlab.
        folder: folder that holds the token; the job writes the node's name beside it.
        everywhere: whether to listen on the node's address instead of its loopback.
    """

    command: tuple[str, ...]
    options: tuple[str, ...]
    folder: str
    everywhere: bool

    def __call__(self) -> None:
        """Serve until the server ends or is stopped."""
        stop = begin()
        folder = Path(self.folder)
        (folder / "node").write_text(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        token = (folder / "token").read_text()
        variables = {**os.environ, "JUPYTER_TOKEN": token, "JUPYTER_RUNTIME_DIR": self.folder}
        variables.pop("XDG_RUNTIME_DIR", None)
        address = f"--ServerApp.ip={socket.getfqdn() if self.everywhere else '127.0.0.1'}"
        command = [*self.command, "-m", "jupyterlab", address, *self.options]
        Child(command, environment=variables).wait_or_stop(stop, signal.SIGTERM)


def start(profile: Profile, notebooks: Path, arguments: Sequence[str]) -> int:
    """Queue JupyterLab, wait for it, and print the ssh tunnel and the address; Ctrl-C cancels the job.

    Args:
        notebooks: the folder that it opens.
        arguments: further options of jupyterlab.

    Returns:
        The exit code: 0 when the user stopped it, 1 when the job ended by itself.

    Raises:
        ValueError: one line; the profile is not of a Slurm cluster, Slurm is not available or refuses the job.
    """
    if profile.cluster != "slurm":
        raise ValueError(f"moelab lab --profile needs Slurm; profile {profile.name} has cluster: {profile.cluster}")
    console = Console(highlight=False, soft_wrap=True)
    folder = paths.home() / "lab" / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"
    folder.mkdir(parents=True, mode=0o700)
    token = secrets.token_hex(24)
    (folder / "token").touch(mode=0o600)  # in a file that only its owner can read: everyone sees command lines
    (folder / "token").write_text(token)
    cores = profile.cpus_per_rank * profile.gpus_per_node
    options = (f"--ServerApp.root_dir={notebooks}", "--no-browser", *arguments)
    step = executor.step(profile, f"--cpus-per-task={cores}")
    serve = ServeJupyter(step, options, str(folder), everywhere=profile.lab_address == "node")
    job = executor.for_jupyter(profile, folder).queue(serve, [()])
    log = folder / f"{job}_0_log.out"
    console.print(f"job {job}: JupyterLab on {profile.name}; Ctrl-C ends it (log: {log})")
    try:
        server = _wait(job, folder, console)
        if server is not None:
            console.print(*_directions(server, (folder / "node").read_text().strip(), token, profile), sep="\n")
            while queue.retried(queue.state, job) in ("RUNNING", "SUSPENDED"):
                time.sleep(5)
    except KeyboardInterrupt:
        queue.cancel([job])
        console.print(f"\njob {job} cancelled")
        return 0
    console.print(f"job {job} ended; the last lines of {log}:")
    console.print(*log.read_text().splitlines()[-4:] if log.exists() else ["(nothing)"], sep="\n", markup=False)
    return 1


def _wait(job: str, folder: Path, console: Console) -> dict | None:
    """Return the record that the server writes when it is up; None when the job ended before."""
    said = ""
    while True:
        for file in folder.glob("jpserver-*.json"):
            try:
                return json.loads(file.read_text())
            except ValueError:
                pass  # being written
        state = queue.retried(queue.state, job)
        if state not in ("PENDING", "CONFIGURING", "RUNNING"):
            return None
        if state != said:
            console.print(f"job {job}: {state.lower()}")
            said = state
        time.sleep(1)


def _directions(server: dict, node: str, token: str, profile: Profile) -> list[str]:
    port = server["port"]
    user, login = getpass.getuser(), profile.login or socket.getfqdn()
    if profile.lab_address == "node":
        tunnel = f"ssh -N -L {port}:{node}:{port} {user}@{login}"
    else:
        tunnel = f"ssh -N -L {port}:127.0.0.1:{port} -J {user}@{login} {user}@{node}"
    return [f"on your own machine:  {tunnel}", f"then open:            http://127.0.0.1:{port}/lab?token={token}"]
