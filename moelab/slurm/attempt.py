"""Decide whether a run is tried again after an attempt that did not finish it.

An attempt is one start of a run's job. The file `attempts.jsonl` in the run's directory lists the attempts that did not
finish it. When a run is given up, the reason becomes its status. submitit bounds only the number of time limits
(`max_num_timeout`); this module also bounds failures, kills and restarts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

from moelab.config import from_json
from moelab.engine.launch.launcher import RankFailed
from moelab.files import read_lines
from moelab.runs.store import Run

ATTEMPTS = "attempts.jsonl"
Kind = Literal["stopped", "failed", "killed", "restarts"]
_STOPS = 3
"""Stops of one job without a new checkpoint after which the run is given up: each would begin where the last did."""
_BROKEN = re.compile(
    r"uncorrectable ECC|hardware error|NVLink|no CUDA device is available|needs a GPU of its own"
    r"|system not yet initialized|unspecified launch failure|devices? .*(busy|unavailable)",
    re.IGNORECASE,
)
"""What is said of a GPU that is broken or taken, which another node may not have."""


@dataclass(frozen=True)
class Attempt:
    """Describe one start of a run's job that did not finish the run.

    Attributes:
        job: the job's id (``12_3`` in an array); a requeued job keeps it.
        restart: how often the job had been started before.
        kind: "stopped" (on request, with a checkpoint), "failed" (an error), "killed" (a signal, or a rank that hung),
            "restarts" (too many starts).
        reason: one line.
        checkpoint: step of the newest checkpoint; -1 without one.
        node: the node of the rank that died first; without one, the node that ran the job's driver.
        time: end of the attempt, in seconds since the epoch.
        again: whether the run is tried again.
    """

    job: str
    restart: int
    kind: Kind
    reason: str
    checkpoint: int
    node: str
    time: float
    again: bool = False


@dataclass(frozen=True)
class Limits:
    """Bound how often a job is tried.

    Attributes:
        failures: attempts of one job that may fail or be killed. The same failure twice in a row ends the job at once;
            a kill at a later checkpoint than the last one is not the same failure, since the run has advanced.
        restarts: starts of one job for any reason, after the first.
    """

    failures: int
    restarts: int


def history(run: Run) -> list[Attempt]:
    """Return a run's attempts that did not finish it, oldest first, without lines that a full disk cut short."""
    attempts = []
    for line in read_lines(run.path / ATTEMPTS):
        with contextlib.suppress(ValueError):
            attempts.append(from_json(Attempt, line, known=True))
    return attempts


def why_not(run: Run, attempt: Attempt, limits: Limits) -> str:
    """Return the reason not to try a run again after an attempt; an empty text if it is tried again."""
    started = f"started {attempt.restart + 1} times without finishing; last: "
    if attempt.kind == "restarts":
        return started + (run.status.reason or "no reason known")
    if attempt.restart >= limits.restarts:
        return started + attempt.reason
    earlier = [a for a in history(run) if a.job == attempt.job]
    if attempt.kind == "stopped":
        stops = 1 + sum(a.kind == "stopped" and a.checkpoint >= attempt.checkpoint for a in earlier)
        if stops < _STOPS:
            return ""
        where = f"after step {attempt.checkpoint}" if attempt.checkpoint >= 0 else "of it"
        return (
            f"told to stop {stops} times before there was a new checkpoint {where}: the time limit less lead_s is too "
            f"short to start and go on; raise the profile's time; last: {attempt.reason}"
        )
    for last in earlier[-1:]:
        same = (last.kind, _reason_on_any_node(last)) == (attempt.kind, _reason_on_any_node(attempt))
        if same and (attempt.kind == "failed" or last.checkpoint >= attempt.checkpoint):
            return f"failed twice the same way: {attempt.reason}"
    count = 1 + sum(a.kind in ("failed", "killed") for a in earlier)
    return f"failed {count} times; last: {attempt.reason}" if count > limits.failures else ""


def record(run: Run, job: str, restart: int, kind: Kind, reason: str, node: str, limits: Limits) -> bool:
    """Write an attempt to the run's history and status, and return whether to try again."""
    attempt = Attempt(job, restart, kind, reason, newest_checkpoint(run), node, time.time())
    why = why_not(run, attempt, limits)
    try:
        with open(run.path / ATTEMPTS, "a") as f:
            f.write(json.dumps(asdict(replace(attempt, again=not why))) + "\n")
        if why:
            run.move("give up", why)
        elif kind != "stopped":
            run.move("retry", f"{reason}; tried again")
    except OSError as error:  # a disk without room for one line: without a history there is no bound on retries
        print(f"{run.path}: {error}; not tried again", file=sys.stderr)
        return False
    return not why


def newest_checkpoint(run: Run) -> int:
    """Return the step of a run's newest checkpoint, by its name; -1 without one."""
    names = (p.name for p in (run.path / "checkpoints").glob("step-*"))
    return max((int(name[5:]) for name in names if name[5:].isdigit()), default=-1)


def judge(failure: RankFailed | OSError | ValueError, run: Run) -> tuple[Kind, str, str]:
    """Return kind, reason and node of an attempt that ended with an exception of the launcher."""
    here = os.environ.get("SLURMD_NODENAME", "")
    if not isinstance(failure, RankFailed):
        return "failed", str(failure), here
    end, status = failure.end, run.status
    if end.killed and end.code in (-signal.SIGUSR1, -signal.SIGTERM, -signal.SIGINT):
        return "stopped", "asked to stop before it could handle the signal", here
    if end.killed:
        unknown = end.how == "was killed by SIGKILL"  # the kernel gives no reason
        return "killed", str(failure) + " (out of memory?)" * unknown, failure.host
    if _BROKEN.search(f"{end.how} {status.reason}"):
        return "killed", str(failure), failure.host  # another node may have whole GPUs
    if (run.spec.parallel.ranks == 1 or end.unexplained) and status.state == "failed" and status.reason:
        return "failed", status.reason, failure.host  # the reason that the rank itself, or rank 0, recorded
    return "failed", str(failure), failure.host


def _reason_on_any_node(attempt: Attempt) -> str:
    """Return the reason without the node that it names."""
    return attempt.reason.replace(f" on {attempt.node} ", " ") if attempt.node else attempt.reason
