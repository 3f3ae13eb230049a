"""Serve JupyterLab on a node of a cluster, in a job of its own, and print the ssh tunnel to it.

The command is `moelab lab --profile NAME`.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from moelab import paths
from moelab.engine.launch.child import Child
from moelab.files import read_json
from moelab.slurm import executor, queue
from moelab.slurm.callables import begin
from moelab.slurm.profiles import Profile


@dataclass
class ServeJupyter:
    """Serve JupyterLab as a Slurm step.

    Attributes:
        command: srun and jupyterlab with their options.
        folder: the server writes its port and its token into a file below it that only its owner can read.
        everywhere: whether to listen on the node's address instead of its loopback.
    """

    command: tuple[str, ...]
    folder: str
    everywhere: bool

    def __call__(self) -> None:
        """Serve until the server ends or is stopped."""
        stop = begin()
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        variables = {**os.environ, "JUPYTER_RUNTIME_DIR": f"{self.folder}/{node}"}
        variables.pop("XDG_RUNTIME_DIR", None)
        address = f"--ServerApp.ip={socket.getfqdn() if self.everywhere else '127.0.0.1'}"
        Child([*self.command, address], environment=variables).wait_or_stop(stop, signal.SIGTERM)


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
    folder.mkdir(parents=True, mode=0o700)  # the log, too, has the server's token
    step = executor.step(profile, profile.cpus_per_rank * profile.gpus_per_node)
    command = (*step, "-m", "jupyterlab", f"--ServerApp.root_dir={notebooks}", "--no-browser", *arguments)
    serve = ServeJupyter(command, str(folder), everywhere=profile.lab_address == "node")
    job = executor.for_jupyter(profile, folder).queue(serve, [()])
    log = folder / f"{job}_0_log.out"
    console.print(f"job {job}: JupyterLab on {profile.name}; Ctrl-C ends it (log: {log})")
    try:
        if server := _server(job, folder, console):
            console.print(*_directions(server, profile), sep="\n")
            while queue.retried(queue.state, job) in ("RUNNING", "SUSPENDED"):
                time.sleep(5)
    except KeyboardInterrupt:
        queue.cancel([job])
        console.print(f"\njob {job} cancelled")
        return 0
    console.print(f"job {job} ended; the last lines of {log}:")
    console.print(*log.read_text().splitlines()[-4:] if log.exists() else ["(nothing)"], sep="\n", markup=False)
    return 1


def _server(job: str, folder: Path, console: Console) -> dict:
    """Wait until the server is up, and return what it writes of itself, with its node; empty if its job ends before."""
    said = ""
    while True:
        for file in folder.glob("*/jpserver-*.json"):
            with contextlib.suppress(ValueError):  # it is being written
                return {**read_json(file), "node": file.parent.name}
        state = queue.retried(queue.state, job)
        if state not in ("PENDING", "CONFIGURING", "RUNNING"):
            return {}
        if state != said:
            console.print(f"job {job}: {state.lower()}")
            said = state
        time.sleep(1)


def _directions(server: dict, profile: Profile) -> list[str]:
    port, node, user, login = server["port"], server["node"], getpass.getuser(), profile.login or socket.getfqdn()
    if profile.lab_address == "node":
        tunnel = f"ssh -N -L {port}:{node}:{port} {user}@{login}"
    else:
        tunnel = f"ssh -N -L {port}:127.0.0.1:{port} -J {user}@{login} {user}@{node}"
    address = f"http://127.0.0.1:{port}/lab?token={server['token']}"
    return [f"on your own machine:  {tunnel}", f"then open:            {address}"]
