"""Run the stages of `moelab gpu`: each in a process of its own with a time limit, its results written as they come.

A stage is a list of *cases* (`moelab.acceptance.cases`), most valuable first; a worker process runs them one after
the other and appends rows to `results.jsonl`. A case that ends its process (an illegal memory access, no memory) is
recorded as failed, and a new process goes on with the next one; a stage whose time is up is ended. Called again, a
stage leaves out the cases that have succeeded. So all takes at most the sum of the limits, whatever a card does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import environment, paths
from moelab.files import read_json, read_object, write_json

MOST_S = 25 * 60
"""The longest that all stages take together."""
LEAST_S = 15.0
"""A stage with less time left is not begun: a process with CUDA takes about that long to start."""
RESTARTS = 12
END_S = 5.0
"""Time in which a stage is ended and the next one begins; part of its limit."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: in the results, and of the module with its cases.
        what: what it answers, in a line.
        limit_s: seconds after which it is ended.
        needs: packages without which it is left out.
        module: the module with its cases, if it is not `moelab.acceptance.<name>`.
    """

    name: str
    what: str
    limit_s: int
    needs: tuple[str, ...] = ("torch", "triton")
    module: str = ""


_TEXT = ("torch", "triton", "tokenizers")
STAGES = (
    Stage("checks", "kernels, a model and a CUDA graph against their references", 150),
    Stage("speed", "memory and product ceilings; gate and layer: floor, baseline, peers", 330, _TEXT),
    Stage("tune", "tile sizes, warps and stages of the kernels: the card's table", 240),
    Stage("decode", "host time of a kernel, decoding and the simulator, with and without a CUDA graph", 270),
    Stage("train", "tokens/s of the twins; dense, MoE-128 and PR-MoE on equal tokens", 420, _TEXT),
)
PAGE_S = 30
"""For the page, which needs no device."""

Outcome = dict[str, Any]
"""How a stage ended: stage, status (done, cut, failed, skipped), reason, seconds, and counts of cases by status."""


@dataclass(frozen=True)
class Setup:
    """Where and on what the stages run.

    Attributes:
        out: folder of the results.
        device: "cuda", or "cpu" to rehearse: tiny sizes, Triton's interpreter, gloo; such times mean nothing.
    """

    out: Path
    device: str = "cuda"

    @property
    def tiny(self) -> bool:
        """Whether this is a rehearsal."""
        return self.device == "cpu"

    @property
    def results(self) -> Path:
        """The file of all rows."""
        return self.out / "results.jsonl"


def total_s(stages: Sequence[Stage] = STAGES) -> int:
    """Return the longest time of the stages and the page, in seconds."""
    return sum(stage.limit_s for stage in stages) + PAGE_S


def chosen(names: Sequence[str] | None) -> tuple[Stage, ...]:
    """Return the stages of these names in their order, all by default; ValueError for an unknown name."""
    known = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"gpu: no stage {unknown[0]!r}; allowed: {', '.join(known)}")
    return tuple(stage for stage in STAGES if not names or stage.name in names)


def missing(stage: Stage, device: str) -> str:
    """Return in one line why a stage cannot run here; empty if it can."""
    absent = [name for name in stage.needs if importlib.util.find_spec(name) is None]
    if absent:
        return f"needs {', '.join(absent)}: not installed"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        built = "" if torch.version.cuda else f" (torch {torch.__version__} is built without CUDA)"
        return f"no CUDA device{built}"
    return ""


def card(device: str) -> str:
    """Return the device's name as the name of a folder: "nvidia-h100-80gb-hbm3", "rehearsal" for a CPU."""
    if device == "cpu":
        return "rehearsal"
    import torch

    if not torch.cuda.is_available():
        return "none"
    name = torch.cuda.get_device_name()
    return "-".join("".join(c if c.isalnum() else " " for c in name).split()).lower()


def rows(setup: Setup) -> list[dict[str, Any]]:
    """Return all rows written so far; a torn last line, of a process that was killed, is left out."""
    try:
        lines = setup.results.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append(setup: Setup, row: dict[str, Any]) -> None:
    """Add a row to the results; it is on the disk when this returns."""
    setup.out.mkdir(parents=True, exist_ok=True)
    with setup.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run(
    setup: Setup,
    stages: Sequence[Stage] = STAGES,
    *,
    minutes: float = MOST_S / 60,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run stages one after the other; return their outcomes, which also stand in `stages.json`.

    Args:
        minutes: for all of them; a stage gets its limit or what is left.
        say: called with a line of text at each step.
    """
    deadline = time.monotonic() + 60 * minutes - PAGE_S
    session = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.urandom(2).hex()}"  # two may begin in one second
    outcomes: list[Outcome] = []
    for stage in stages:
        limit_s = min(stage.limit_s, deadline - time.monotonic())
        if reason := missing(stage, setup.device):
            outcome = {"status": "skipped", "reason": reason}
        elif limit_s < LEAST_S:
            outcome = {"status": "skipped", "reason": f"none of the {minutes:g} minutes is left"}
        else:
            say(f"{stage.name}: {stage.what} (at most {limit_s:.0f} s)")
            outcome = _supervise(setup, stage, limit_s, session)
        outcome = {"stage": stage.name, "limit_s": stage.limit_s, **outcome, **_counts(setup, stage)}
        outcomes.append(outcome)
        say(describe(outcome))
        if setup.out.is_dir():
            write_json(setup.out / "stages.json", {"session": session, "outcomes": _merged(setup, outcomes)})
    return outcomes


def _merged(setup: Setup, outcomes: list[Outcome]) -> list[Outcome]:
    """Return these outcomes and, of stages that were not run this time or not possible, the earlier ones."""
    earlier = (read_object(setup.out / "stages.json") or {}).get("outcomes", [])
    merged = {outcome["stage"]: outcome for outcome in earlier}
    for outcome in outcomes:
        if outcome["status"] != "skipped" or outcome["stage"] not in merged:
            merged[outcome["stage"]] = outcome
    return [merged[stage.name] for stage in STAGES if stage.name in merged]


def describe(outcome: Outcome) -> str:
    """Return an outcome as a line of text."""
    if outcome["status"] == "skipped":
        return f"{outcome['stage']}: skipped: {outcome['reason']}"
    counts = ", ".join(f"{outcome[status]} {status}" for status in ("ok", "failed", "skipped") if outcome.get(status))
    reason = f": {outcome['reason']}" if outcome.get("reason") else ""
    return f"{outcome['stage']}: {outcome['status']} in {outcome['seconds']:.0f} s ({counts or 'no case'}){reason}"


def _counts(setup: Setup, stage: Stage) -> dict[str, int]:
    """Return how many cases of a stage have each status, by their last rows."""
    last = {row["case"]: row["status"] for row in rows(setup) if row["stage"] == stage.name}
    return {status: list(last.values()).count(status) for status in ("ok", "failed", "skipped")}


def _supervise(setup: Setup, stage: Stage, limit_s: float, session: str) -> Outcome:
    """Run a stage's worker until it is done or its time is up; start it again after a case that ended it."""
    started = time.monotonic()
    deadline = started + limit_s - END_S
    setup.out.mkdir(parents=True, exist_ok=True)
    outcome: Outcome = {"status": "cut", "reason": f"the limit of {limit_s:.0f} s"}
    for _ in range(RESTARTS):
        left = deadline - time.monotonic()
        if left < 1:
            break
        code = _work(setup, stage, left, session)
        if code == 0:
            outcome = {"status": "done", "reason": ""}
            break
        if code is None or code == OUT_OF_TIME:
            _close_case(setup, stage, session, "ended: the stage's time is up")
            break
        if code == START_AGAIN:
            continue
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        end += f": {_last_line(setup.out / 'log.txt')}"
        if not _close_case(setup, stage, session, f"its process ended with {end}"):
            outcome = {"status": "failed", "reason": end}
            break
    else:
        outcome = {"status": "failed", "reason": f"its process ended {RESTARTS} times"}
    return {**outcome, "seconds": round(time.monotonic() - started, 1)}


OUT_OF_TIME, START_AGAIN = 3, 4
"""Exit codes of a worker: its time is up; a case left the device unusable and is recorded as failed."""


def _work(setup: Setup, stage: Stage, seconds: float, session: str) -> int | None:
    """Run the worker; return its exit code, None if it was ended when its time was up."""
    command = [sys.executable, "-m", "moelab.acceptance.cases", stage.name, stage.module, str(setup.out), setup.device]
    command += [session, f"{seconds:.1f}"]
    tree = str(Path(__file__).resolve().parents[2])
    inherited = dict(os.environ) | {environment.HOME.name: str(paths.home())}
    inherited["PYTHONPATH"] = os.pathsep.join([tree, *filter(None, [inherited.get("PYTHONPATH")])])
    if setup.tiny:
        inherited |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if stage.name in ("checks", "tune") else {})
    with (setup.out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"-- {stage.name}, session {session}\n")
        log.flush()
        worker = subprocess.Popen(command, stderr=log, env=inherited, start_new_session=True)
        try:
            return worker.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()


def _close_case(setup: Setup, stage: Stage, session: str, reason: str) -> bool:
    """Record the case that was running as failed; return whether there was one."""
    current = setup.out / "current.json"
    if (running := read_json(current)) is None:
        return False
    append(
        setup, {"stage": stage.name, "case": running["case"], "status": "failed", "error": reason, "session": session}
    )
    current.unlink()
    return True


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
