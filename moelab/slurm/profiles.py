"""Read cluster profiles. A profile describes a cluster in one YAML file, `slurm/<name>.yaml`.

`Profile` describes every field; `slurm/example.yaml` is a file to copy.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from moelab import environment, paths
from moelab.config import from_json, unknown

_OWN = (
    *("array", "signal", "requeue", "no-requeue", "dependency", "output", "open-mode", "kill-on-invalid-dep"),
    *("time", "nodes", "ntasks-per-node", "cpus-per-task", "job-name"),
)
"""Options of sbatch on which moelab's jobs depend, and those that it makes from a profile and a run's layout."""

_Positive = Annotated[int, Ge(1)]
_NotNegative = Annotated[int, Ge(0)]
"""Numbers of a profile, checked where its file is read."""

_EARLY_S = 60
"""By which Slurm may send a job's signal earlier than it was asked to."""
_START_S = 60
"""Seconds that a run has at least to start, load its checkpoint and train; imports alone take 10 on a shared disk."""


@dataclass(frozen=True)
class Profile:
    """Describe a cluster. Where a text is empty, the site's default applies.

    Attributes:
        name: the file's name without its ending; not a field of the file.
        cluster: ``slurm``, or ``local`` for processes of the machine that submits, `array_parallelism` runs at a time.
        partition, account, qos, constraint: values of the sbatch options of these names; the first three by default
            those of SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_QOS.
        nodes: the largest number of nodes of one job.
        gpus_per_node: GPUs of a node; also the number of ranks that share a node, on CPUs, too.
        gpu_type: type of GPU that the site's --gpus-per-node expects before the number (``a100``).
        cpus_per_rank: cores of one rank (one GPU).
        memory_per_rank: memory of one rank, as ``60G`` or ``500M``.
        time: time limit of a run's job: minutes, ``H:M:S`` or ``D-H:M:S``. A run that needs longer is requeued.
        lead_s: seconds before the limit at which a run is told to write its checkpoint.
        array_parallelism: number of runs of one array that train at a time.
        failures: how often a run may fail before it is given up (the same failure twice in a row ends it at once).
        restarts: how often a job may be started again for any reason (preemption, time limit, lost node).
        notebook_time, notebook_cpus, notebook_memory, notebook_gpus: resources of a notebook's job, which only reads
            runs. Notebooks that measure on a GPU need one (`Experiment.measures_on_gpu`), and so does any notebook
            where the partition takes no job without a GPU.
        lab_time: time limit of `moelab lab`.
        lab_address: address at which JupyterLab listens on its node: ``loopback`` (the ssh tunnel ends at the node) or
            ``node`` (for sites that allow no ssh to nodes; a token protects it).
        login: host of the ssh tunnel, if it is not the host that `moelab lab` runs on.
        python: interpreter on the nodes; if empty, the one that submits (the file system must then be shared).
        setup: shell lines that a job runs first (``module load``, ``source activate``).
        container: srun arguments that put runs and notebooks into a container (``--container-image=...``).
        environment: ``NAME=VALUE`` lines for the job (``NCCL_SOCKET_IFNAME=ib0``).
        sbatch, srun: further arguments of these commands, as ``--name=value`` or ``--name``.
    """

    name: str
    cluster: Literal["slurm", "local"] = "slurm"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    nodes: _Positive = 1
    gpus_per_node: _Positive = 8
    gpu_type: str = ""
    cpus_per_rank: _Positive = 1
    memory_per_rank: str = ""
    time: str = "24:00:00"
    lead_s: _Positive = 180
    array_parallelism: _Positive = 32
    failures: _NotNegative = 3
    restarts: _NotNegative = 100
    notebook_time: str = "2:00:00"
    notebook_cpus: _Positive = 2
    notebook_memory: str = "8G"
    notebook_gpus: _NotNegative = 0
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
                if what == "sbatch" and argument[2:].partition("=")[0] in _OWN:
                    raise ValueError(f"{where}: sbatch may not have {argument!r}, which moelab itself sets")

    def tight(self) -> str:
        """Return in one line that runs may be told to stop before they have started; an empty text if not."""
        limit = 60 * math.ceil(minutes(self.time, self.name))
        left = limit - self.lead_s - _EARLY_S
        if left >= _START_S:
            return ""
        return (
            f"profile {self.name}: with time {self.time} and lead_s {self.lead_s}, a run has {max(left, 0)} to "
            f"{limit - self.lead_s} s until it is told to stop (Slurm's signal may come a minute early), and may get "
            "nowhere; raise time"
        )

    def _check_characters(self, where: str) -> None:
        """Refuse texts that would end a line of the batch script: the rest would be read as options or commands."""
        for field in fields(self):
            value = getattr(self, field.name)
            for text in [value] if isinstance(value, str) else value if isinstance(value, tuple) else ():
                if not text.isprintable() and field.name != "setup":  # shell lines may be anything
                    raise ValueError(f"{where}: {field.name} must be one line without control characters, got {text!r}")


def folder() -> Path | None:
    """Return the checkout's `slurm/`; None for an installed wheel, where profiles are given by path."""
    root = paths.checkout()
    return root / "slurm" if root else None


def names() -> list[str]:
    """Return the names of the profiles in `folder`."""
    known = folder()
    return sorted(path.stem for path in known.glob("*.yaml")) if known else []


def load(name: str) -> Profile:
    """Return the profile `slurm/<name>.yaml`, or that of the YAML file whose path is given.

    Raises:
        ValueError: one line: there is no such profile (the message names those that exist), a field does not exist, or
            a value is not allowed.
    """
    import yaml

    known = folder()
    path = Path(name) if name.endswith((".yaml", ".yml")) else (known or Path()) / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None
    except OSError:
        listing = f"{', '.join([*names(), 'or'])} the path of a .yaml file"
        raise ValueError(unknown(f"no cluster profile {name!r}", name, names(), listing=listing)) from None
    try:
        # Everything as text: YAML would read 24:00:00 as a number and the account `no` as false.
        data = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected `field: value` lines")
    if "name" in data:
        raise ValueError(f"{path}: a profile is named by its file; remove the field name")
    return from_json(Profile, {**data, "name": path.stem}, f"profile {path.stem}", texts=True)


def choose(name: str | None) -> Profile:
    """Return the profile of this name or, without a name, that of `MOELAB_PROFILE`."""
    chosen = name or environment.PROFILE.get()
    if not chosen:
        allowed = ", ".join(names()) or "the path of a .yaml file"
        raise ValueError(f"no cluster profile: give --profile NAME or set MOELAB_PROFILE; allowed: {allowed}")
    return load(chosen)


def minutes(text: str, where: str) -> float:
    """Return a time limit of Slurm in minutes: ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M`` or ``D-H:M:S``."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ValueError(f"{where}: expected minutes, H:M:S or D-H:M:S, got {text!r}")
    days, *parts = match.groups()
    a, b, c = (int(p or 0) for p in parts)
    if days is not None:
        return int(days) * 1440 + a * 60 + b + c / 60
    if parts[2] is not None:
        return a * 60 + b + c / 60
    return a + b / 60


def megabytes(text: str, where: str) -> int:
    """Return a size such as ``60G``, ``500M`` or ``1T`` in MiB; 0 for an empty text."""
    if not text:
        return 0
    match = re.fullmatch(r"(\d+)([MGT])B?", text.upper())
    if not match:
        raise ValueError(f"{where}: expected a size such as 60G or 500M, got {text!r}")
    return int(match[1]) * {"M": 1, "G": 1024, "T": 1024**2}[match[2]]
