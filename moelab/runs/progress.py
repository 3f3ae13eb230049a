"""Progress of a set of runs, read from their status files, as a table in notebooks and terminals."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moelab import terminal
from moelab.runs.states import OVER, Status
from moelab.runs.store import Run
from moelab.terminal import duration


@dataclass(frozen=True)
class Snapshot:
    """Statuses of the runs at one moment.

    Attributes:
        done: share of all their FLOPs that is done.
        left: share that is still to be done; what a failed run lacks is in neither.
    """

    statuses: tuple[Status, ...]
    done: float
    left: float

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Snapshot:
        """Read the statuses of runs."""
        statuses = tuple(run.status for run in runs)
        total = sum(run.spec.cost for run in runs) or 1.0
        done = left = 0.0
        for run, s in zip(runs, statuses, strict=True):
            share = _share(run, s)
            done += run.spec.cost * share / total
            left += run.spec.cost * (1 - share) / total if s.state != "failed" else 0.0
        return cls(statuses, done, left)

    @property
    def over(self) -> bool:
        """Return whether no run goes on: each is finished or has failed."""
        return all(s.state in OVER for s in self.statuses)

    def describe(self, seconds_left: float | None) -> str:
        """Return the state in one line: ``5 of 8 runs finished, 1 failed, 70% done, 3 min 20 s left``."""
        counts = Counter(s.state for s in self.statuses)
        words = [f"{counts['finished']} of {len(self.statuses)} runs finished"]
        words += [f"{counts['failed']} failed"] if counts["failed"] else []
        if not self.over:
            words += [f"{self.done:.0%} done", f"{duration(seconds_left)} left"]
        return ", ".join(words)


def _share(run: Run, status: Status) -> float:
    first = run.spec.first_step
    return 1.0 if status.state == "finished" else max(0, status.step - first) / max(1, status.steps - first)


class Estimate:
    """Time left, from how the share done has grown since this object was made."""

    def __init__(self, now: Snapshot) -> None:
        self._started, self._first = time.monotonic(), now.done

    def seconds_left(self, now: Snapshot) -> float | None:
        """None while nothing has moved yet."""
        gained = now.done - self._first
        return now.left * (time.monotonic() - self._started) / gained if gained > 1e-3 else None


def table(runs: Sequence[Run], snapshot: Snapshot, left: float | None, *, most: int | None = None) -> Any:
    """Return a rich table of the runs for terminals and notebooks; of more than `most`, those under way or failed."""
    from rich.text import Text

    view = terminal.table("run", "state", "step", "training loss", "tokens/s", title=snapshot.describe(left))
    rows = list(zip(runs, snapshot.statuses, strict=True))
    if most is not None and len(rows) > most:
        rows = [(run, s) for run, s in rows if s.state not in ("new", "finished")]
    for run, s in rows:
        view.add_row(
            # As `Text`: in a string, rich would take a reason such as "[enforce fail at ...]" for markup.
            Text(f"{run.spec.title} · seed {run.spec.train.seed}"),
            Text(s.state + (f": {s.reason}" if s.reason else "")),
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
    show: Any = display  # IPython's has no annotations
    return show(view, display_id=True) if get_ipython() is not None else None


class NotebookProgress:
    """Keeps one table up to date in a notebook cell (or prints nothing outside one)."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs, self._shown = runs, 0.0
        self._estimate = Estimate(Snapshot.of(runs))
        self._handle = in_notebook(self._table())

    def _table(self) -> Any:
        snapshot = Snapshot.of(self._runs)
        return table(self._runs, snapshot, self._estimate.seconds_left(snapshot))

    def __call__(self, final: bool = False) -> None:
        """Update the table, unless that was done less than two seconds ago; `final` updates it in any case."""
        if self._handle is not None and (final or time.monotonic() - self._shown > 2.0):
            self._shown = time.monotonic()
            self._handle.update(self._table())
