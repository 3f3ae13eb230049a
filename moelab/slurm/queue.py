"""Slurm's side: one `squeue` call for everything, `sbatch`, `scancel`. Needs no accounting."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
_MARK = "moelab"


class SlurmError(ValueError):
    """Slurm refused or did not answer; the message is one line, and the command line shows it as such."""


@dataclass(frozen=True)
class Job:
    """One job, or one task of an array, as the controller sees it.

    Attributes:
        id: ``12`` or ``12_3``.
        submission, part: whose it is, from its comment; index: its place in the array, 0 without one.
        state: Slurm's word, such as PENDING or RUNNING.
        reason: why it waits or ended; node: where it runs; left: time to its limit.
    """

    id: str
    submission: str
    part: str
    index: int
    state: str
    reason: str
    node: str
    left: str

    @property
    def live(self) -> bool:
        """Waiting, running, or about to be either."""
        return self.state not in _ENDED


def comment(submission: str, part: str) -> str:
    """The comment by which `jobs` knows a job again, whatever its id."""
    return f"{_MARK} {submission} {part}"


def jobs() -> dict[tuple[str, str, int], Job]:
    """This user's jobs that moelab submitted: (submission, part, index) -> job. Ended ones stay for some minutes (MinJobAge).

    Raises:
        SlurmError: there is no Slurm here, or its controller does not answer.
    """
    out = _run("squeue", "--me", "-h", "-r", "-t", "all", "-o", "%i|%T|%r|%N|%L|%k")
    found = {}
    for line in out.splitlines():
        number, state, reason, node, left, note = line.split("|", 5)
        mark, _, rest = note.partition(" ")
        submission, _, part = rest.partition(" ")
        if mark != _MARK or not part:
            continue
        index = number.partition("_")[2]
        job = Job(number, submission, part, int(index) if index.isdigit() else 0, state, reason, node, left)
        key = (submission, part, job.index)
        if key not in found or job.live:
            found[key] = job
    return found


def check(script: str) -> None:
    """Have Slurm judge a script without queueing it. ValueError, one line, with its objection."""
    try:
        _run("sbatch", "--test-only", stdin=script)
    except SlurmError as error:
        raise ValueError(str(error)) from None


def submit(script: Path) -> str:
    """Queue a script; its job id."""
    return _run("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def state(job: str) -> str:
    """Slurm's word for one job's state; empty when it is no longer known."""
    try:
        return _run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return ""
        raise


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs; running ones write a checkpoint first, if the site's KillWait gives them the time."""
    if ids:
        _run("scancel", *ids)


def _run(*command: str, stdin: str | None = None) -> str:
    from submitit.helpers import clean_env

    conf = os.environ.get("SLURM_CONF")
    try:
        # A job that submits must not hand its own SLURM_ variables on; where the controller is, it must.
        with clean_env():
            environment = {**os.environ, **({"SLURM_CONF": conf} if conf else {})}
            done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, env=environment)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not installed here: this is not a machine of a Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: Slurm's controller does not answer") from None
    if done.returncode:
        lines = [
            line.removeprefix(f"{command[0]}: ").removeprefix("error: ")
            for line in done.stderr.splitlines()
            if line.strip()
        ]
        if "Could not establish a configuration source" in done.stderr:
            raise SlurmError(
                f"{command[0]}: no slurm.conf here: this machine is of no Slurm cluster; for the development cluster: "
                'eval "$(slurm/local/cluster.sh env)"'
            )
        said = [line for line in lines if not line.startswith("Batch job submission failed")] or lines
        raise SlurmError(f"{command[0]}: {'; '.join(said) or f'exit code {done.returncode}'}")
    return done.stdout
