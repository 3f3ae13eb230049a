"""Run the cases of one stage: the worker process of `moelab gpu`.

A module of a stage has `cases(context)`, which yields `Case` objects, most valuable first. A case returns rows: its
numbers, as JSON values. What it raises is recorded with its name; the next case goes on, in a new process where the
device may have become unusable.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelab.acceptance import stages
from moelab.acceptance.stages import Setup
from moelab.files import write_json

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        name: unique in its stage: what, and the sizes.
        run: returns its rows.
        needs: packages without which it is skipped.
        least_s: it is not begun with less time left.
    """

    name: str
    run: Callable[[], Numbers | Iterable[Numbers]]
    needs: tuple[str, ...] = ()
    least_s: float = 2.0


@dataclass(frozen=True)
class Context:
    """What a stage's cases know: the setup, and when their time is up (of `time.monotonic`)."""

    setup: Setup
    deadline: float
    rows: list[Numbers] = field(default_factory=list)

    @property
    def device(self) -> str:
        """Return "cuda" or "cpu"."""
        return self.setup.device

    @property
    def tiny(self) -> bool:
        """Whether this is a rehearsal with small numbers."""
        return self.setup.tiny

    def left(self) -> float:
        """Return the seconds until the stage is ended."""
        return self.deadline - time.monotonic()

    def earlier(self, stage: str, case: str) -> list[Numbers]:
        """Return the rows of a case that has succeeded, in this run or an earlier one."""
        return [row for row in self.rows if (row["stage"], row["case"], row["status"]) == (stage, case, "ok")]


def work(
    stage: str, setup: Setup, session: str, seconds: float, *, module: str = "", say: Callable[[str], None] = print
) -> int:
    """Run the cases that have not succeeded yet and did not fail in this session; return the exit code."""
    context = Context(setup, time.monotonic() + seconds, stages.rows(setup))
    mine = [row for row in context.rows if row["stage"] == stage]
    over = {row["case"] for row in mine if row["status"] == "ok" or row.get("session") == session}
    found = importlib.import_module(module or f"moelab.acceptance.{stage}")
    for case in found.cases(context):
        if case.name in over:
            continue
        if context.left() < case.least_s:
            return stages.OUT_OF_TIME
        if not _run(stage, case, context, session, say):
            return stages.START_AGAIN
    return 0


def _run(stage: str, case: Case, context: Context, session: str, say: Callable[[str], None]) -> bool:
    """Run a case and write its rows; False if the device may be unusable afterwards."""
    setup, usable, started = context.setup, True, time.monotonic()
    mark = {"stage": stage, "case": case.name, "session": session}
    found: list[Numbers]
    if absent := [name for name in case.needs if importlib.util.find_spec(name) is None]:
        found = [{"status": "skipped", "error": f"needs {', '.join(absent)}: not installed"}]
    else:
        write_json(setup.out / "current.json", mark)
        try:
            value = case.run()
            found = [{"status": "ok", **row} for row in ([value] if isinstance(value, dict) else value)]
        except Exception as error:
            found = [{"status": "failed", "error": one_line(error)}]
            usable = not _device_lost(error)
        (setup.out / "current.json").unlink(missing_ok=True)
    seconds = round(time.monotonic() - started, 3)
    for row in found:
        row = {**mark, "seconds": seconds, **row}
        stages.append(setup, row)
        context.rows.append(row)
    say(f"  {case.name}: {summary(found)} ({seconds:.1f} s)")
    gc.collect()
    if usable and setup.device == "cuda":
        import torch

        torch.cuda.empty_cache()
    return usable


def summary(found: list[Numbers]) -> str:
    """Return what the rows of a case say, in a few words: the error, or what they call their `finding`."""
    first = found[0] if found else {"status": "ok"}
    if first["status"] != "ok":
        return f"{first['status']}: {first['error']}"
    return next((row["finding"] for row in found if row.get("finding")), "ok")


def one_line(error: Exception) -> str:
    """Return an exception as one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:500]


def _device_lost(error: Exception) -> bool:
    """Return whether CUDA may answer every later call with the same error."""
    return type(error).__name__ == "AcceleratorError" or any(
        word in str(error) for word in ("CUDA error", "illegal memory", "device-side assert", "misaligned address")
    )


if __name__ == "__main__":
    _stage, _module, _out, _device, _session, _seconds = sys.argv[1:]
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(work(_stage, Setup(Path(_out), _device), _session, float(_seconds), module=_module))
