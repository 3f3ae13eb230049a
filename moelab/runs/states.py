"""The life of a run: its states, the events that move it from one to another, and who may cause each event.

    new         nothing of it is recorded
    waiting     a job of it is in a queue; the queue says so, no file does
    running     a process holds its lock and trains it
    stopped     it goes on from its last checkpoint when it is asked for again: it was told to stop, killed or cancelled
    failed      an error ended it, or it was given up; when it is asked for again, it is tried again
    finished    it has a result

`Run.move` writes each state and `Run.status` reads it; both know the moves of `TABLE` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from moelab.config import from_json
from moelab.files import read_json
from moelab.terminal import plain

State = Literal["new", "waiting", "running", "stopped", "failed", "finished"]
Event = Literal[
    "queue", "cancel", "import", "reopen",
    "start", "step", "stop", "fail", "finish",
    "die", "crash", "retry", "give up",
]  # fmt: skip
Who = Literal["user", "trainer", "watcher"]
"""A trainer holds the run's lock: the process that trains it, or rank 0. A watcher started the trainer: `lab.run`, the
launcher of ranks, the driver of a job."""

STATES: tuple[State, ...] = get_args(State)
EVENTS: tuple[Event, ...] = get_args(Event)
OVER: tuple[State, ...] = ("finished", "failed")
"""States in which a run stays until it is asked for again."""
_OPEN: tuple[State, ...] = ("new", "waiting", "running", "stopped", "failed")


@dataclass(frozen=True)
class Move:
    """Describe what an event does.

    Attributes:
        who: who may cause it.
        before: the states in which it may happen.
        after: the state that it leads to.
    """

    who: Who
    before: tuple[State, ...]
    after: State


TABLE: dict[Event, Move] = {
    # A job of the run is submitted, and taken out of the queue.
    "queue": Move("user", _OPEN, "waiting"),
    "cancel": Move("user", ("waiting",), "stopped"),
    # The record of a finished run is taken over; a result is removed, so that the run goes on from its checkpoint.
    "import": Move("user", _OPEN, "finished"),
    "reopen": Move("user", ("finished",), "stopped"),
    # "running" is no obstacle to a start: who has the lock knows that the trainer before is dead.
    "start": Move("trainer", _OPEN, "running"),
    "step": Move("trainer", ("running",), "running"),
    "stop": Move("trainer", ("running",), "stopped"),
    "fail": Move("trainer", ("running",), "failed"),
    "finish": Move("trainer", ("running",), "finished"),
    # The trainer ended without recording it, perhaps before its start: by a signal, or with an error.
    "die": Move("watcher", _OPEN, "stopped"),
    "crash": Move("watcher", _OPEN, "failed"),
    # Its job is started once more after a failure, or never again.
    "retry": Move("watcher", _OPEN, "stopped"),
    "give up": Move("watcher", _OPEN, "failed"),
}


def after(state: State, event: Event) -> State:
    """Return the state to which an event leads; ValueError, one line, where the table does not allow it."""
    move = TABLE[event]
    if state not in move.before:
        raise ValueError(
            f"a run that is {state} does not allow the event {event!r} of its {move.who}; "
            f"it may happen to one that is {', '.join(move.before)}"
        )
    return move.after


@dataclass(frozen=True)
class Status:
    """State of a run, and how far it is.

    Attributes:
        step, steps: done, of all.
        loss: training loss in nats at `step`; None before the first metric row.
        tokens_per_s: speed over the last metric row.
        reason: one line, when failed or stopped.
    """

    state: State
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", plain(self.reason))

    def moved(self, event: Event, reason: str = "", **progress: Any) -> Self:
        """Return the status after an event, with a reason and the fields that it changes; ValueError as for `after`."""
        return replace(self, state=after(self.state, event), reason=reason, **progress)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the status that a run's folder records; None where it records none.

        It is derived from the run's other files and not synced to the disk, so that a crash of the machine may tear it.
        A torn file counts as missing, and fields that this version does not know are left out.
        """
        try:
            return from_json(cls, read_json(folder / "status.json"), known=True)
        except ValueError:
            return None
