"""Progress of a set of runs, read from their status files: as a table in a notebook, as bars in a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moelab.runs.store import Run, Status


@dataclass(frozen=True)
class Snapshot:
    """Statuses of the runs at one moment, and the share of all their FLOPs that is done."""

    statuses: tuple[Status, ...]
    done: float

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Snapshot:
        """Read the statuses of runs."""
        statuses = tuple(run.status for run in runs)
        total = sum(run.spec.cost for run in runs) or 1.0
        # A failed run asks for no more time.
        shares = [
            1.0 if s.state in ("finished", "failed") else max(0, s.step - first) / max(1, s.steps - first)
            for s, first in zip(statuses, (run.spec.first_step for run in runs), strict=True)
        ]
        return cls(statuses, sum(run.spec.cost * share for run, share in zip(runs, shares, strict=True)) / total)


class Estimate:
    """Time left, from how the share done has grown since this object was made."""

    def __init__(self, done: float) -> None:
        self._started, self._first = time.monotonic(), done

    def seconds_left(self, done: float) -> float | None:
        """None while nothing has moved yet."""
        gained = done - self._first
        return (1 - done) * (time.monotonic() - self._started) / gained if gained > 1e-3 else None


def duration(seconds: float | None) -> str:
    """``1 h 05 min``, ``3 min 20 s``, ``12 s``; an ellipsis for None."""
    if seconds is None:
        return "…"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def table(runs: Sequence[Run], snapshot: Snapshot, left: float | None) -> Any:
    """Return a rich table, one row per run, for terminals and notebooks."""
    from rich.table import Table

    title = (
        "all runs read back from the store"
        if snapshot.done >= 1 and left is None
        else f"{snapshot.done:.0%} done, {duration(left)} left"
    )
    if snapshot.done >= 1:
        title = "all runs done"
    view = Table("run", "state", "step", "loss", "tokens/s", title=title, title_justify="left")
    for run, s in zip(runs, snapshot.statuses, strict=True):
        view.add_row(
            f"{run.spec.title} · seed {run.spec.train.seed}",
            s.state + (f": {s.reason}" if s.reason else ""),
            f"{s.step}/{s.steps}" if s.steps else "",
            f"{s.loss:.3f}" if s.loss is not None else "",
            f"{s.tokens_per_s:,.0f}" if s.tokens_per_s else "",
        )
    return view


def in_notebook(view: Any) -> Any:
    """Display something in the notebook cell that runs; its handle, to update it, or None outside a notebook."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return None
    return display(view, display_id=True) if get_ipython() is not None else None


class NotebookProgress:
    """Keeps one table up to date in a notebook cell (or prints nothing outside one)."""

    def __init__(self, runs: Sequence[Run], every_s: float = 2.0) -> None:
        self._runs, self._every, self._shown = runs, every_s, 0.0
        self._estimate = Estimate(Snapshot.of(runs).done)
        self._handle = in_notebook(self._table())

    def _table(self) -> Any:
        snapshot = Snapshot.of(self._runs)
        return table(self._runs, snapshot, self._estimate.seconds_left(snapshot.done))

    def __call__(self, final: bool = False) -> None:
        """Update the table, unless that was done a moment ago; `final` updates it in any case."""
        if self._handle is not None and (final or time.monotonic() - self._shown > self._every):
            self._shown = time.monotonic()
            self._handle.update(self._table())
