"""Read the environment variables of moelab: all of them stand here, and nothing but the kernels reads one by its name.

`VARIABLES` is the table that docs/environment.md shows. "user" variables are for people; "moelab" ones are set by one
process of moelab for another (the command for the kernel of a notebook, the launcher for its ranks).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

LONGEST_S = 1e9
"""No limit is longer: torch and the operating system count in whole milliseconds."""


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        name: such as ``MOELAB_HOME``.
        meaning: what it decides, in one sentence.
        default: what holds when it is not set, in words.
        set_by: who sets it.
    """

    name: str
    meaning: str
    default: str
    set_by: Literal["user", "moelab"] = "user"

    def get(self, environment: Mapping[str, str] | None = None) -> str | None:
        """Return its value in `environment` (by default this process's), or None where it is not set or empty."""
        return (os.environ if environment is None else environment).get(self.name) or None

    def seconds(self, environment: Mapping[str, str] | None = None) -> float:
        """Return its value, or the default, as a number of seconds; ValueError, one line, for what is none."""
        text = self.get(environment) or self.default
        with contextlib.suppress(ValueError):
            if 0 < (value := float(text)) <= LONGEST_S:
                return value
        raise ValueError(f"{self.name} must be a number of seconds, got {text!r}")


HOME = Variable(
    "MOELAB_HOME", "Workspace: runs, tokens, measurements, drafts, own results and pages.", "`.moelab` in the checkout"
)
RESULTS = Variable(
    "MOELAB_RESULTS", "Folder of published results, written only with `--publish`.", "`results` in the checkout"
)
EXECUTOR = Variable(
    "MOELAB_EXECUTOR",
    'How `lab.run` trains when it is told "auto": "inline", "processes", "slurm", or "read", which trains nothing.',
    "processes, but runs of seconds in the caller's",
)
PROFILE = Variable("MOELAB_PROFILE", "Cluster profile of submit, sweep and `lab.submit` without --profile.", "none")
HANG_S = Variable("MOELAB_HANG_S", "Seconds without a sign of life after which a rank counts as hanging.", "300")
DEATH_S = Variable("MOELAB_DEATH_S", "Seconds from the first death of a rank to the end of all.", "20")
STOP_S = Variable("MOELAB_STOP_S", "Seconds that ranks get to write a checkpoint when they are stopped.", "120")
COLLECTIVE_S = Variable("MOELAB_COLLECTIVE_S", "Seconds until a collective operation gives up.", "600")
PUBLICATION = Variable("MOELAB_PUBLICATION", "Folder into which a notebook publishes.", "a draft", "moelab")
PLAN = Variable("MOELAB_PLAN", "File in which a notebook or batch lists the runs that it awaits.", "none", "moelab")
RENDEZVOUS = Variable("MOELAB_RENDEZVOUS", "File in which rank 0 says where its store listens.", "none", "moelab")
HEARTBEAT = Variable("MOELAB_HEARTBEAT", "Folder in which each rank touches a file of its own.", "none", "moelab")
LAUNCHER = Variable("MOELAB_LAUNCHER", "Process id of the parent that watches a run or a rank.", "none", "moelab")
INSTRUCTIONS = Variable(
    "MOELAB_INSTRUCTIONS",
    'Instruction set of the CPU kernels: "amx_bf16", "avx512_bf16", "avx512", "avx2" or "baseline"; "none" is plain '
    "PyTorch.",
    "the fastest that the processor has",
)
SLURM_DIR = Variable(
    "MOELAB_SLURM_DIR", "Folder of the development cluster (slurm/local/cluster.sh).", "`.moelab/slurm`"
)
SLURM_PORT = Variable("MOELAB_SLURM_PORT", "First port of the development cluster.", "17800")
BROWSER = Variable("MOELAB_BROWSER", '"require": tests fail instead of being skipped without a browser.', "skip")
SLURM = Variable(
    "MOELAB_SLURM", '"require": tests fail instead of being skipped without the development cluster.', "skip"
)

VARIABLES = (
    *(HOME, RESULTS, EXECUTOR, PROFILE, HANG_S, DEATH_S, STOP_S, COLLECTIVE_S),
    *(INSTRUCTIONS, SLURM_DIR, SLURM_PORT, BROWSER, SLURM),
    *(PUBLICATION, PLAN, RENDEZVOUS, HEARTBEAT, LAUNCHER),
)


def table() -> str:
    """Return the variables as a Markdown table, as docs/environment.md shows them."""
    rows = [f"| `{v.name}` | {v.meaning} | {v.default} | {v.set_by} |" for v in VARIABLES]
    return "\n".join(("| variable | meaning | default | set by |", "| --- | --- | --- | --- |", *rows)) + "\n"


@contextlib.contextmanager
def overridden(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the length of a block; processes started in it inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
