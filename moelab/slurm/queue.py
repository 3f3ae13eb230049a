"""Call Slurm's commands: one `squeue` for all jobs, `sbatch --test-only`, `scancel`, `scontrol requeue`.

None of them needs accounting. submitit asks `sacct` for the states of jobs, which does.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

_ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
_MARK = "moelab"
_PATIENCE_S = 2.0
"""After which a command of Slurm that has not answered is said to be waited for."""
LOCAL = "local-"  # precedes the process id in the id of a local job


class SlurmError(ValueError):
    """Report, in one line, that Slurm refused or did not answer."""


@dataclass(frozen=True)
class Job:
    """Describe one job or one task of an array, as Slurm's controller reports it, or the job of a local submission.

    Attributes:
        id: ``12``, ``12_3`` or ``local-4711`` (process id).
        submission, part: submission and part that the job belongs to, from its comment.
        index: its index in the array; 0 without an array.
        state: Slurm's state, such as PENDING or RUNNING.
        reason: why it waits or ended.
        node: the node on which it runs.
        ending: whether it is COMPLETING and will not be requeued.
    """

    id: str
    submission: str
    part: str
    index: int
    state: str
    reason: str
    node: str
    ending: bool = False

    @property
    def live(self) -> bool:
        """Return whether the job waits, runs, or still holds its nodes."""
        return self.state not in _ENDED

    @property
    def local(self) -> bool:
        """Return whether the job is a process of this machine."""
        return self.id.startswith(LOCAL)


def comment(submission: str, part: str) -> str:
    """Return the comment from which `jobs` reads a job's submission and part."""
    return f"{_MARK} {submission} {part}"


def jobs(limit_s: float = 120) -> dict[tuple[str, str, int], Job]:
    """Return this user's jobs that moelab submitted: (submission, part, index) -> job.

    Slurm also reports jobs that ended in the last minutes (MinJobAge).

    Raises:
        SlurmError: there is no Slurm here, or its controller does not answer within `limit_s`.
    """
    # --all: also in partitions that the site hides.
    out = _run("squeue", "--me", "--all", "-h", "-r", "-t", "all", "-o", "%i|%T|%r|%N|%L|%l|%k", limit_s=limit_s)
    states = {}
    for line in out.splitlines():
        fields = line.split("|", 6)
        if len(fields) < 7:  # a comment of another program may have several lines
            continue
        number, state, reason, node, left, limit, note = fields
        state = _without_signal(state)
        _, mark, rest = f" {note}".rpartition(f" {_MARK} ")  # after the profile's own comment
        submission, _, part = rest.partition(" ")
        if not mark or not part:
            continue
        index = number.partition("_")[2]
        # A job that is about to be requeued is COMPLETING, too, but its whole time is left.
        ending = state == "COMPLETING" and left != limit
        job = Job(number, submission, part, int(index) if index.isdigit() else 0, state, reason, node, ending)
        key = (submission, part, job.index)
        if key not in states or job.live:
            states[key] = job
    return states


def check(script: str) -> None:
    """Have Slurm check a script without queueing it.

    Raises:
        ValueError: one line, with Slurm's objection.
    """
    try:
        _run("sbatch", "--test-only", stdin=script)
    except SlurmError as error:
        # The test leaves out nodes that are down or drained; a queued job waits for them.
        busy = "Requested node configuration is not available" in str(error) or "nodes are busy" in str(error)
        if not busy or all(state in _USABLE for _, state, _ in _nodes()):
            raise ValueError(str(error)) from None


def state(job: str) -> str:
    """Return the state of one job; an empty text when Slurm no longer knows the job."""
    try:
        return _without_signal(_run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip())
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return ""
        raise


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs; running ones write a checkpoint first, if the site's KillWait gives them the time."""
    if ids:
        _run("scancel", *ids)


def requeue(job: str, exclude: str = "") -> bool:
    """Requeue the job whose driver is this process; the caller then exits.

    Args:
        job: the job's id.
        exclude: a node on which the job should not run again; ignored unless the partition has enough others.

    Returns:
        False when the job is not requeued, because it has been cancelled meanwhile.
    """
    if retried(state, job) != "RUNNING":
        return False
    left_out = _left_out(job, exclude) if exclude else ""
    retried(_run, "scontrol", "requeue", job)
    if left_out:
        # Only a pending job can be changed; this one stays pending until its driver has exited. The requeue sends
        # SIGTERM to all processes of the job, so that the first call of scontrol may die.
        with contextlib.suppress(SlurmError):
            retried(_run, "scontrol", "update", f"JobId={job}", f"ExcNodeList={left_out}", times=5, pause_s=0.5)
            print(f"requeued without {exclude}", flush=True)
    return True


def retried(function: Callable[..., T], *arguments: str, times: int = 6, pause_s: float = 10) -> T:
    """Call a function of this module until Slurm answers, by default for a minute: a controller may be restarting."""
    for _ in range(times - 1):
        with contextlib.suppress(SlurmError):
            return function(*arguments)
        time.sleep(pause_s)
    return function(*arguments)


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """Remove the SLURM_ variables of a surrounding job, except those that tell where the controller is.

    A user's defaults for Slurm's commands are removed, too: SQUEUE_PARTITION would hide jobs, and SCANCEL_INTERACTIVE
    would have scancel ask and cancel nothing.
    """
    from submitit.helpers import clean_env

    kept = {name: os.environ[name] for name in ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT") if name in os.environ}
    with clean_env([name for name in os.environ if name.startswith(("SQUEUE_", "SINFO_", "SCANCEL_"))]):
        os.environ.update(kept)
        yield


def explain(command: str, stderr: str, code: int) -> SlurmError:
    """Return the error of a Slurm command as one line."""
    if "Could not establish a configuration source" in stderr:
        return SlurmError(
            f"{command}: no slurm.conf here: this machine belongs to no Slurm cluster; for the development cluster: "
            'eval "$(slurm/local/cluster.sh env)"'
        )
    prefixes = re.compile(rf"({command}: )?(error: )?(Batch job submission failed: )?")
    said = [prefixes.sub("", line, count=1) for line in stderr.splitlines() if line.strip()]
    return SlurmError(f"{command}: {'; '.join(said) or f'exit code {code}'}")


def not_installed(command: str) -> SlurmError:
    """Return the error for a machine without Slurm's commands."""
    return SlurmError(f"{command} is not installed here: this is not a machine of a Slurm cluster")


def _without_signal(state: str) -> str:
    """Return RUNNING for SIGNALING, which a running job is called until all its nodes have passed on a signal.

    At the warning before the time limit and at a preemption with a grace time, Slurm sends SIGCONT first.
    """
    return "RUNNING" if state == "SIGNALING" else state


_USABLE = ("idle", "mixed", "allocated", "completing")


def _nodes(*which: str) -> list[tuple[str, str, str]]:
    """Return name, state and devices (GRES) of nodes; flags such as those of saved power do not count.

    Args:
        which: options of sinfo that choose partitions; by default all, also those that the site hides.
    """
    out = _run("sinfo", "-h", "-N", *(which or ("--all",)), "-o", "%N|%T|%G")
    fields = [line.split("|") for line in out.splitlines() if line.count("|") == 2]
    return [(name, state.rstrip("~#%-"), devices) for name, state, devices in fields]


def _left_out(job: str, node: str) -> str:
    """Return the nodes that a job is to leave out, with this one and those before.

    It is empty if the partition has not enough others that are usable and have the same devices.
    """
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    with contextlib.suppress(SlurmError):
        nodes = _nodes("-p", partition)
        alike = {devices for name, _, devices in nodes if name == node}
        before = re.search(r"ExcNodeList=(?!\(null\))(\S+)", _run("scontrol", "show", "job", job))
        out = {node, *(_run("scontrol", "show", "hostnames", before[1]).split() if before else ())}
        others = {name for name, state, devices in nodes if state in _USABLE and devices in alike} - out
        if alike and len(others) >= int(os.environ.get("SLURM_JOB_NUM_NODES", 1)):
            return ",".join(sorted(out))
    return ""


def _run(*command: str, stdin: str | None = None, limit_s: float = 120) -> str:
    try:
        with environment():
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
    except FileNotFoundError:
        raise not_installed(command[0]) from None
    with process:
        try:
            try:
                out, err = process.communicate(stdin, timeout=_PATIENCE_S)
            except subprocess.TimeoutExpired:
                waits = f"{command[0]}: Slurm's controller has not answered yet; waiting at most {limit_s:.0f} s"
                print(waits, file=sys.stderr, flush=True)
                out, err = process.communicate(timeout=limit_s - _PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise SlurmError(f"{command[0]}: Slurm's controller does not answer within {limit_s:.0f} s") from None
        finally:
            process.kill()  # an interrupt must not leave it behind
    if process.returncode:
        raise explain(command[0], err, process.returncode)
    return out
