"""Which machines and commits trained a run: a session is one process's stay at it, or one group of ranks'.

    .moelab/runs/<id>/sessions.jsonl      a line per session: step, started, commit, modified, hardware

`step` is that of the newest checkpoint which the session found, 0 without one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moelab.files import read_lines, write_bytes

FILE = "sessions.jsonl"

_RECORDED = ("commit", "modified", "hardware")


def begin(folder: Path, about: Mapping[str, Any]) -> None:
    """Add the session that begins; the caller holds the run's lock.

    Args:
        folder: the run's.
        about: from `moelab.runs.provenance.provenance`.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    session = {"step": _newest(folder), "started": now, **{name: about.get(name) for name in _RECORDED}}
    lines = [json.dumps(one) + "\n" for one in (*_read(folder), session)]
    write_bytes(folder / FILE, "".join(lines).encode(), durable=True)


def contributing(folder: Path) -> list[dict[str, Any]]:
    """Return the sessions whose steps are in the run's weights: of each commit and machine the first.

    A session's steps are lost where a later one begins no further than it did itself.
    """
    kept: list[dict[str, Any]] = []
    for session in _read(folder):
        kept = [one for one in kept if one["step"] < session["step"]] + [session]
    distinct: list[dict[str, Any]] = []
    for session in kept:
        if not any(all(one.get(name) == session.get(name) for name in _RECORDED) for one in distinct):
            distinct.append(session)
    return distinct


def _newest(folder: Path) -> int:
    """Return the step of the newest checkpoint of a run, or of the trunks that are trained again for it."""
    from moelab.engine.checkpoint.format import directories, step_of

    step = 0
    while folder.exists():
        step = max([step, *map(step_of, directories(folder / "checkpoints"))])
        folder = folder / "prefix"
    return step


def _read(folder: Path) -> list[dict[str, Any]]:
    """Return the sessions so far, without what is unreadable: a run trains without its history, too."""
    lines = read_lines(folder / FILE)
    return [session for session in lines if isinstance(session, dict) and isinstance(session.get("step"), int)]
