"""A cluster as one YAML file: `slurm/<name>.yaml`. Every field is described here; `slurm/example.yaml` is one to copy."""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from moelab import environment, paths
from moelab.config import from_json


@dataclass(frozen=True)
class Profile:
    """What a site's Slurm wants to know. Empty texts leave the choice to the site.

    Attributes:
        name: the file's name; not a field of the file.
        cluster: ``slurm``, or ``local`` for processes of the machine that submits, `array_parallelism` runs at a time.
        partition, account, qos, constraint: as sbatch takes them.
        nodes: the most nodes one job may have.
        gpus_per_node: GPUs of a node, and ranks that share a node (on CPUs, too).
        gpu_type: as the site's --gpus-per-node wants it in front of the number (``a100``).
        cpus_per_rank: cores of one rank (one GPU).
        memory_per_rank: memory of one rank, as ``60G`` or ``500M``.
        time: limit of a run's job: minutes, ``H:M:S`` or ``D-H:M:S``. A run that needs longer is requeued as often as it needs.
        lead_s: seconds before the limit at which a run is told to write its checkpoint.
        array_parallelism: runs of one array at a time.
        failures: how often a run may fail before it is given up (the same failure twice in a row ends it at once).
        restarts: how often a job may be started again for any reason (preemption, time limit, lost node).
        notebook_time, notebook_cpus, notebook_memory, notebook_gpus: the job of a notebook, which only reads runs. Those that measure
            by themselves (throughput, inference) want a GPU at the scales that are for one.
        lab_time: limit of `moelab lab`.
        lab_address: where JupyterLab listens on its node: ``loopback`` (the tunnel goes by ssh to the node) or ``node`` (for sites
            that allow no ssh to nodes; a token protects it).
        login: host of the ssh tunnel, when it is not the one that `moelab lab` runs on.
        python: interpreter on the nodes; empty is the one that submits (so a shared file system is assumed).
        setup: shell lines before anything else (``module load``, ``source activate``).
        container: srun arguments that put a step into a container (``--container-image=...``); runs and notebooks start in it.
        environment: ``NAME=VALUE`` lines for the job (``NCCL_SOCKET_IFNAME=ib0``).
        sbatch, srun: further arguments, as ``--name=value`` or ``--name``.
    """

    name: str
    cluster: Literal["slurm", "local"] = "slurm"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    nodes: int = 1
    gpus_per_node: int = 8
    gpu_type: str = ""
    cpus_per_rank: int = 1
    memory_per_rank: str = ""
    time: str = "24:00:00"
    lead_s: int = 180
    array_parallelism: int = 32
    failures: int = 3
    restarts: int = 100
    notebook_time: str = "2:00:00"
    notebook_cpus: int = 2
    notebook_memory: str = "8G"
    notebook_gpus: int = 0
    lab_time: str = "8:00:00"
    lab_address: Literal["loopback", "node"] = "loopback"
    login: str = ""
    python: str = ""
    setup: tuple[str, ...] = ()
    container: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"profile {self.name}"
        self._check_characters(where)
        for what, least in (
            ("nodes", 1),
            ("gpus_per_node", 1),
            ("cpus_per_rank", 1),
            ("lead_s", 1),
            ("array_parallelism", 1),
            ("failures", 0),
            ("restarts", 0),
            ("notebook_cpus", 1),
            ("notebook_gpus", 0),
        ):
            if (value := getattr(self, what)) < least:
                raise ValueError(f"{where}: {what} must be at least {least}, got {value}")
        for what in ("time", "notebook_time", "lab_time"):
            minutes(getattr(self, what), f"{where}: {what}")
        for what in ("memory_per_rank", "notebook_memory"):
            megabytes(getattr(self, what), f"{where}: {what}")
        if self.lead_s >= 60 * minutes(self.time, where) - 30:
            raise ValueError(
                f"{where}: lead_s must leave at least 30 s of the time limit {self.time}, got {self.lead_s}"
            )
        for line in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*=.*", line):
                raise ValueError(f"{where}: environment takes NAME=VALUE lines, got {line!r}")
        for what in ("sbatch", "srun", "container"):
            for argument in getattr(self, what):
                if not re.fullmatch(r"--[a-z][a-z0-9-]*(=.*)?", argument):
                    raise ValueError(f"{where}: {what} takes --name=value or --name, got {argument!r}")

    def _check_characters(self, where: str) -> None:
        """Refuse what would end a line of the batch script: the rest would be read as further options or as commands."""
        for field in fields(self):
            value = getattr(self, field.name)
            for text in [value] if isinstance(value, str) else value if isinstance(value, tuple) else ():
                if not text.isprintable() and field.name != "setup":  # shell lines may be anything
                    raise ValueError(f"{where}: {field.name} must be one line without control characters, got {text!r}")


def folder() -> Path | None:
    """The checkout's `slurm/`, or None for an installed wheel, which takes profiles by path."""
    root = paths.checkout()
    return root / "slurm" if root else None


def load(name: str) -> Profile:
    """The profile `slurm/<name>.yaml`, or of a YAML file by its path.

    Raises:
        ValueError: one line: no such profile (with those there are), a field that does not exist, a value of the wrong kind.
    """
    import yaml

    known = folder()
    path = (
        Path(name) if name.endswith((".yaml", ".yml")) else (known / f"{name}.yaml" if known else Path(f"{name}.yaml"))
    )
    try:
        text = path.read_text()
    except OSError:
        names = ", ".join(sorted(p.stem for p in known.glob("*.yaml"))) if known else "a path to a YAML file"
        raise ValueError(f"no cluster profile {name!r}; allowed: {names}, or the path of a .yaml file") from None
    try:
        # Everything as text: YAML would read 24:00:00 as a number and the account `no` as false.
        data = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected `field: value` lines")
    if "name" in data:
        raise ValueError(f"{path}: a profile is named by its file; remove the field name")
    hints = typing.get_type_hints(Profile)
    for key, value in data.items():
        if hints.get(key) is int:
            try:
                data[key] = int(value)
            except (TypeError, ValueError):
                raise ValueError(f"profile {path.stem}.{key}: expected a whole number, got {value!r}") from None
    return from_json(Profile, {**data, "name": path.stem}, where=f"profile {path.stem}")


def choose(name: str | None) -> Profile:
    """The profile asked for, else that of `MOELAB_PROFILE`."""
    chosen = name or environment.PROFILE.get()
    if not chosen:
        known = folder()
        names = ", ".join(sorted(p.stem for p in known.glob("*.yaml"))) if known else "the path of a .yaml file"
        raise ValueError(f"which cluster? give --profile NAME or set MOELAB_PROFILE; allowed: {names}")
    return load(chosen)


def minutes(text: str, where: str) -> float:
    """A Slurm time limit in minutes: ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M``, ``D-H:M:S``."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise ValueError(f"{where}: expected minutes, H:M:S or D-H:M:S, got {text!r}")
    days, *parts = found.groups()
    a, b, c = (int(p or 0) for p in parts)
    if days is not None:
        return int(days) * 1440 + a * 60 + b + c / 60
    if parts[2] is not None:
        return a * 60 + b + c / 60
    return a + b / 60


def megabytes(text: str, where: str) -> int:
    """``60G``, ``500M`` or ``1T`` in MiB; 0 for an empty text."""
    if not text:
        return 0
    found = re.fullmatch(r"(\d+)([MGT])B?", text.upper())
    if not found:
        raise ValueError(f"{where}: expected a size such as 60G or 500M, got {text!r}")
    return int(found[1]) * {"M": 1, "G": 1024, "T": 1024**2}[found[2]]


def field_names() -> list[str]:
    """The fields a profile's file may have."""
    return [f.name for f in fields(Profile) if f.name != "name"]
