"""What comes after an attempt at a run that did not finish it: `python -m moelab.slurm.attempt RUN_DIRECTORY --code ...`.

Called by the batch script when the ranks have ended and Slurm still counts the job as running. Prints ``again`` or ``stop``; writes
the attempt to the run's `attempts.jsonl` and, when it stops, the reason to the run's status. Loads no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from moelab.engine.launch.process import FINISHED, STOPPED
from moelab.files import read_json
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run, Status

ATTEMPTS = "attempts.jsonl"


@dataclass(frozen=True)
class Attempt:
    """One start of a run's job that did not finish it.

    Attributes:
        job: Slurm's id (``12_3`` in an array); stays the same when it is requeued.
        restart: how often the job had been started before.
        kind: "stopped" (told to, with a checkpoint), "failed" (an error), "killed" (a signal), "restarts" (too many starts).
        reason: one line.
        checkpoint: step of the newest checkpoint; -1 without one.
        node, time: where; end, seconds since the epoch.
        again: whether it is tried again.
    """

    job: str
    restart: int
    kind: Literal["stopped", "failed", "killed", "restarts"]
    reason: str
    checkpoint: int
    node: str
    time: float
    again: bool = False


def history(run: Run) -> list[Attempt]:
    """The attempts of a run that did not finish it, oldest first; a line cut short by a full disk is left out."""
    attempts = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run.path / ATTEMPTS).read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                attempts.append(Attempt(**json.loads(line)))
    return attempts


def decide(run: Run, attempt: Attempt, failures: int, restarts: int) -> tuple[bool, str]:
    """Whether to try again, and why not.

    Args:
        failures: how many attempts of this job may fail or be killed; two in a row for the same reason are enough. Being killed at
            a later checkpoint than the time before is not the same: the run gets on.
        restarts: how often the job may be started again for whatever reason.
    """
    if attempt.kind == "restarts":
        return (
            False,
            f"started {attempt.restart + 1} times without finishing; last: {run.status.reason or 'no reason known'}",
        )
    if attempt.restart >= restarts:
        return False, f"started {attempt.restart + 1} times without finishing; last: {attempt.reason}"
    if attempt.kind == "stopped":
        return True, ""
    earlier = [a for a in history(run) if a.job == attempt.job]
    last = earlier[-1] if earlier else None
    same = last is not None and (last.kind, last.reason) == (attempt.kind, attempt.reason)
    if same and (attempt.kind == "failed" or last.checkpoint >= attempt.checkpoint):
        return False, f"failed twice the same way: {attempt.reason}"
    count = 1 + sum(a.kind in ("failed", "killed") for a in earlier)
    if count > failures:
        return False, f"failed {count} times; last: {attempt.reason}"
    return True, ""


def record(path: Path, job: str, restart: int, code: str, failures: int, restarts: int) -> bool:
    """Judge the attempt that ended with `code` (an exit code, or "restarts"), write it down, and say whether to try again."""
    run = Run(RunSpec.from_json(read_json(path / "spec.json"), where=str(path / "spec.json")), path)
    status = run.status
    kind, reason = _what(code, status)
    if (kind == "failed" and run.finished) or code == str(FINISHED):
        return False
    node = os.environ.get("SLURMD_NODENAME", "")
    attempt = Attempt(job, restart, kind, reason, newest_checkpoint(path), node, time.time())
    again, why = decide(run, attempt, failures, restarts)
    try:
        with open(path / ATTEMPTS, "a") as f:
            f.write(json.dumps(asdict(replace(attempt, again=again))) + "\n")
        if not again:
            run.set_status(replace(status, state="failed", reason=why))
        elif kind != "stopped":
            run.set_status(replace(status, state="stopped", reason=f"{reason}; tried again"))
    except OSError as error:  # a disk without room for one line: without a history there is no bound on retries
        print(f"{path}: {error}; not tried again", file=sys.stderr)
        return False
    return again


def newest_checkpoint(path: Path) -> int:
    """Step of a run's newest checkpoint, by its name; -1 without one."""
    steps = [int(p.name.removeprefix("step-")) for p in (path / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return max(steps, default=-1)


def _what(code: str, status: Status) -> tuple[Literal["stopped", "failed", "killed", "restarts"], str]:
    if code == "restarts":
        return "restarts", ""
    number = int(code)
    if number == STOPPED:
        return "stopped", status.reason or "stopped with a checkpoint"
    if number - 128 in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        return "stopped", "told to stop before it could listen"
    if number > 128:
        name = signal.Signals(number - 128).name if number - 128 in set(signal.Signals) else f"signal {number - 128}"
        return "killed", f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return "failed", status.reason if status.state == "failed" else f"ended with exit code {number}; see its log.txt"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moelab.slurm.attempt")
    parser.add_argument("run", type=Path)
    parser.add_argument("--job", required=True)
    parser.add_argument("--code", required=True)
    for name in ("restart", "failures", "restarts"):
        parser.add_argument(f"--{name}", type=int, required=True)
    a = parser.parse_args()
    print("again" if record(a.run, a.job, a.restart, a.code, a.failures, a.restarts) else "stop")


if __name__ == "__main__":
    main()
