"""Rows of what was submitted, each a run or a notebook, and the table that shows them in a terminal or a notebook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from rich.jupyter import JupyterMixin
from rich.text import Text

from moelab.lazy import pd
from moelab.terminal import duration, plain, table

_COLORS = {
    **dict.fromkeys(("failed", "lost", "unreadable"), "red"),
    **dict.fromkeys(("stopped", "incomplete"), "yellow"),
    **{"finished": "green", "running": "cyan"},
}


@dataclass(frozen=True)
class Row:
    """Describe one run or notebook of a submission.

    Attributes:
        experiment: name of the experiment.
        what: title of the run, or "notebook" with its parameters.
        id: id of the run, or ``<submission>/<part>`` of a notebook.
        state: new (never started), waiting, starting, running, finished, incomplete (a notebook with missing runs),
            failed, stopped (cancelled, too), lost (its job ended and left no record), unknown (a notebook without a
            record while Slurm does not answer) or unreadable (one of its files is invalid).
        job, slurm, node: id, state and node of its job in Slurm; empty when the job has left the queue. `slurm` is "?"
            for an unfinished run while Slurm does not answer.
        step, steps: steps done and steps in all (of a notebook: cells).
        tokens_per_s, loss: speed and loss, from the last metric row.
        left_s: seconds to the end at that speed.
        reason: why it waits, stopped or failed.
    """

    experiment: str
    what: str
    id: str
    state: str
    job: str = ""
    slurm: str = ""
    node: str = ""
    step: int = 0
    steps: int = 0
    tokens_per_s: float | None = None
    loss: float | None = None
    left_s: float | None = None
    reason: str = ""

    @property
    def over(self) -> bool:
        """Return whether its state will not change any more."""
        return not self.slurm and self.state not in ("new", "waiting", "starting", "running", "unknown")


@dataclass(frozen=True)
class Overview(JupyterMixin):
    """Hold all rows and, when Slurm did not answer, its error in `trouble`."""

    rows: tuple[Row, ...]
    trouble: str = ""

    def frame(self) -> pd.DataFrame:
        """Return the rows as a data frame."""
        return pd.DataFrame([row.__dict__ for row in self.rows], columns=[f.name for f in fields(Row)])

    def table(self) -> Any:
        """Return the rows as a rich table, or one line when there are none, for terminals and notebooks."""
        counts = Counter(row.state for row in self.rows)
        title = ", ".join(f"{n} {state}" for state, n in counts.items()) or "nothing submitted (by these names)"
        title += f" · {plain(self.trouble)}" if self.trouble else ""
        if not self.rows:
            return Text(title)
        columns: dict[str, Callable[[Row], str]] = {
            "run": lambda row: row.what,
            "experiment": lambda row: row.experiment,
            "log": lambda row: row.id if "/" in row.id else row.id.rpartition("-")[2],
            "state": lambda row: row.state,
            "Slurm": lambda row: row.slurm,
            "job": lambda row: row.job,
            "node": lambda row: row.node,
            "step": lambda row: f"{row.step}/{row.steps}" if row.steps else "",
            "loss": lambda row: f"{row.loss:.3f}" if row.loss is not None else "",
            "tokens/s": lambda row: f"{row.tokens_per_s:,.0f}" if row.tokens_per_s else "",
            "left": lambda row: duration(row.left_s) if row.left_s is not None else "",
            "why": lambda row: row.reason,
        }
        cells = {name: [plain(text(row)) for row in self.rows] for name, text in columns.items()}
        cells = {name: texts for name, texts in cells.items() if any(texts)}
        view = table(*cells, title=Text(title, "table.title"))
        for column in view.columns:
            column.justify = "right" if column.header in ("step", "loss", "tokens/s", "left") else "left"
        for texts in zip(*cells.values(), strict=True):
            # As `Text`: in a string, rich would take a parameter such as [/b] for markup.
            view.add_row(
                *(Text(t, _COLORS.get(t, "") if n == "state" else "") for n, t in zip(cells, texts, strict=True))
            )
        return view

    __rich__ = table
