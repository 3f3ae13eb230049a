"""`moelab lab --profile NAME`: JupyterLab on a node of the cluster, in an allocation of its own, and the way to it."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moelab import paths
from moelab.files import write_text
from moelab.slurm import queue, script
from moelab.slurm.profiles import Profile


def start(profile: Profile, arguments: Sequence[str]) -> int:
    """Queue JupyterLab, wait for it, print the ssh tunnel and the address; ends, and cancels the job, with Ctrl-C.

    Returns:
        exit code: 0 when stopped by the user, 1 when the job ended by itself.

    Raises:
        ValueError: Slurm is not there or refuses the job.
    """
    console = Console(highlight=False, soft_wrap=True)
    folder = paths.home() / "lab" / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"
    folder.mkdir(parents=True, mode=0o700)
    token = secrets.token_hex(24)
    (folder / "token").touch(mode=0o600)  # in a file only its owner reads: a command line is seen by all
    (folder / "token").write_text(token)
    write_text(folder / "lab.sbatch", script.lab_script(profile, folder=folder, arguments=list(arguments)))
    try:
        job = queue.submit(folder / "lab.sbatch")
    except queue.SlurmError as error:
        raise ValueError(str(error)) from None
    console.print(f"job {job}: JupyterLab on {profile.name}; Ctrl-C ends it (log: {folder / 'lab.out'})")
    try:
        server = _wait(job, folder, console)
        if server is not None:
            console.print(*_directions(server, (folder / "node").read_text().strip(), token, profile), sep="\n")
            while queue.state(job) in ("RUNNING", "SUSPENDED"):
                time.sleep(5)
    except KeyboardInterrupt:
        queue.cancel([job])
        console.print(f"\njob {job} cancelled")
        return 0
    log = folder / "lab.out"
    console.print(f"job {job} ended; the last lines of {log}:")
    console.print(*log.read_text().splitlines()[-4:] if log.exists() else ["(nothing)"], sep="\n", markup=False)
    return 1


def _wait(job: str, folder: Path, console: Console) -> dict | None:
    """What the server wrote about itself, once it is up; None when the job ended before."""
    said = ""
    while True:
        for file in folder.glob("jpserver-*.json"):
            try:
                return json.loads(file.read_text())
            except ValueError:
                pass  # being written
        state = queue.state(job)
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
