"""How ranks find each other: a TCPStore that rank 0 serves on one address, never on all of the machine's.

The store has no password, so whoever can reach it can disturb the run. Ranks that `launch` started on this machine
meet on the loopback interface. Those of a Slurm step meet on the job's network: rank 0 lets the system choose a free
port and publishes address and port through a file that all nodes see. torchrun itself sets the address and port
(MASTER_ADDR, MASTER_PORT).
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from moelab.environment import LAUNCHER, RENDEZVOUS
from moelab.files import read_json, write_json

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore


def meet(rank: int, world_size: int, limit: timedelta, folder: Path | None = None) -> Store:
    """Return the store that all ranks share.

    Args:
        limit: how long to wait for the others.
        folder: a folder that all nodes see, for ranks of a Slurm step that `launch` did not start; by default the
            working directory.

    Raises:
        RuntimeError: the others did not come in time, or the environment does not say where to meet.
    """
    import torch.distributed as dist

    if _has_master(os.environ):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=limit))
        return store
    file = _file(os.environ, folder)
    if rank == 0:
        store = _serve(own_address(os.environ), world_size, limit)
        write_json(file, {"address": store.host, "port": store.port})
        return store
    deadline = time.monotonic() + limit.total_seconds()
    while (address := read_json(file)) is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {rank} of {world_size}: rank 0 did not come within {limit.total_seconds():.0f} s")
        time.sleep(0.02)
    return dist.TCPStore(address["address"], address["port"], world_size, is_master=False, timeout=limit)


def met(rank: int, folder: Path | None = None) -> None:
    """Remove, as rank 0, the file that `meet` published; call it when all ranks have met."""
    if rank == 0 and not _has_master(os.environ):
        with contextlib.suppress(OSError):
            _file(os.environ, folder).unlink()


def own_address(environment: Mapping[str, str]) -> str:
    """Return the address at which the other ranks reach this process.

    It is the loopback address for ranks of one machine. Among nodes it is that of the interface which
    GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names, else of the one through which the node that called srun is reached.
    """
    if LAUNCHER.get(environment):
        return "127.0.0.1"
    usable = interfaces()
    if (name := gloo_interface(environment, usable)) and (own := usable.get(name.split(",")[0])):
        return own
    target = environment.get("SLURM_LAUNCH_NODE_IPADDR") or socket.gethostname()
    family, _, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing: the system chooses the interface
        return probe.getsockname()[0]


def interfaces() -> dict[str, str]:
    """Return the IPv4 addresses of the interfaces that can carry traffic, by name, in the system's order.

    A node has others: network ports without a cable, and the one to its management controller, which have no address or
    one of their own link (169.254).
    """
    import psutil

    addresses, states = psutil.net_if_addrs(), psutil.net_if_stats()
    found: dict[str, str] = {}
    for _, name in socket.if_nameindex():
        own = [a.address for a in addresses.get(name, ()) if a.family == socket.AF_INET]
        if (name in states and states[name].isup) and (usable := [a for a in own if not a.startswith("169.254.")]):
            found[name] = usable[0]
    return found


def gloo_interface(environment: Mapping[str, str], interfaces: Iterable[str]) -> str | None:
    """Return the value for GLOO_SOCKET_IFNAME, or None to let gloo take the interface of the host's name.

    If unset, it follows NCCL_SOCKET_IFNAME, so that on GPU clusters the checkpoints' gloo group uses the network that
    was chosen for NCCL. gloo takes a full name; NCCL a list of prefixes, of full names after "=", or of names to leave
    out after "^".

    Args:
        interfaces: names of those that can carry traffic.
    """
    if given := environment.get("GLOO_SOCKET_IFNAME"):
        return given
    if LAUNCHER.get(environment):
        return "lo" if sys.platform == "linux" else None
    nccl = environment.get("NCCL_SOCKET_IFNAME", "")
    names = tuple(name for name in nccl.lstrip("^=").split(",") if name)
    if not names:
        return None
    exact = nccl.lstrip("^").startswith("=")
    for interface in interfaces:
        match = interface in names if exact else interface.startswith(names)
        if match != nccl.startswith("^") and interface != "lo":
            return interface
    return None


def _has_master(environment: Mapping[str, str]) -> bool:
    return not RENDEZVOUS.get(environment) and "MASTER_ADDR" in environment and "MASTER_PORT" in environment


def _file(environment: Mapping[str, str], folder: Path | None) -> Path:
    if file := RENDEZVOUS.get(environment):
        return Path(file)
    if "SLURM_JOB_ID" not in environment or "SLURM_STEP_ID" not in environment:
        raise RuntimeError("ranks: MASTER_ADDR and MASTER_PORT are not set, and this is no step of Slurm")
    step = [environment.get(f"SLURM_{what}", "0") for what in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
    return (folder or Path.cwd()) / f".rendezvous-{'-'.join(step)}.json"


def _serve(address: str, world_size: int, limit: timedelta) -> TCPStore:
    """Serve a store on one address, at a port that the system chooses.

    Given only a name, TCPStore would listen on all interfaces.
    """
    import torch.distributed as dist

    family = socket.getaddrinfo(address, None)[0][0]
    listening = socket.create_server((address, 0), family=family, backlog=4096)
    port = listening.getsockname()[1]
    return dist.TCPStore(
        address, port, world_size, is_master=True, timeout=limit, wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )  # fmt: skip
