"""Represent submitted runs by jobs with submitit's words: `job_id`, `state`, `done`, `wait`, `result`, `cancel`.

submitit's own `Job` reads states from `sacct`, and results and errors from pickles. A pickle executes code as it loads,
and it may be of an earlier attempt at the run. A `RunJob` reads the run's directory and `squeue` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.jupyter import JupyterMixin
from submitit.core.utils import FailedJobError

from moelab.lazy import pd
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run, RunStore
from moelab.slurm.rows import Overview, Row
from moelab.slurm.status import cancel, overview, watch
from moelab.slurm.submission import submissions


@dataclass(frozen=True)
class RunJob:
    """Represent the job of one run.

    Attributes:
        run: the run, whose files determine state and result.
        store: where it is.
        job_id: ``12_3``, or ``local-4711`` without Slurm; empty for a run that had finished before it was submitted.
    """

    run: Run
    store: RunStore
    job_id: str = ""

    @property
    def row(self) -> Row:
        """Return the run's present state as a row, with one call to Slurm (`Jobs.overview`: one for all)."""
        own = [row for row in overview([self.run.spec.id], store=self.store).rows if row.id == self.run.spec.id]
        return own[0] if own else Row("", self.run.spec.title, self.run.spec.id, self.run.status.state)

    @property
    def state(self) -> str:
        """Return the state, one of those of `moelab.slurm.rows.Row`."""
        return "finished" if self.run.finished else self.row.state

    def done(self) -> bool:
        """Return whether the run has finished, failed for good, or been cancelled."""
        return self.run.finished or self.row.over

    def wait(self) -> None:
        """Wait until the run is done; ask Slurm every ten seconds, at first more often."""
        watch(lambda _: None, [self.run.spec.id], store=self.store)

    def exception(self) -> FailedJobError | None:
        """Wait, and return why there is no result; None when there is one."""
        self.wait()
        if self.run.finished:
            return None
        row = self.row
        return FailedJobError(f"run {self.run.spec.id}: {row.state}: {row.reason or 'no reason known'}")

    def result(self) -> dict[str, Any]:
        """Wait, and return the run's result; submitit's FailedJobError, with the reason, where it has none."""
        if error := self.exception():
            raise error
        return self.run.result

    def stdout(self) -> str | None:
        """Return the run's log, with what its ranks printed; None before it exists."""
        log = self.run.path / "log.txt"
        return log.read_text(errors="replace") if log.exists() else None

    def cancel(self) -> None:
        """Cancel the job, which then writes a checkpoint. A local job ends with all runs of its submission."""
        if self.job_id:
            cancel([replace(self.row, job=self.job_id)], self.store)


class Jobs(tuple[RunJob, ...], JupyterMixin):
    """Hold the jobs of specs that were submitted together, in their order, and show the table of their states."""

    @classmethod
    def of(cls, specs: Sequence[RunSpec], store: RunStore) -> Jobs:
        """Find the newest job of each spec."""
        ids: dict[str, str] = {}
        for submission in reversed(submissions()):
            for part in submission.parts:
                for index, run in enumerate(part.runs if part.values is None and part.job else ()):
                    alone = submission.cluster == "local" or len(part.runs) == 1
                    ids[run] = f"{part.job}" if alone else f"{part.job}_{index}"
        return cls(RunJob(store.run(spec), store, ids.get(spec.id, "")) for spec in specs)

    @property
    def overview(self) -> Overview:
        """Return the jobs' present states, with one call to Slurm."""
        return overview([job.run.spec.id for job in self], store=self[0].store) if self else Overview(())

    def frame(self) -> pd.DataFrame:
        """Return the jobs' states as a table; `moelab.slurm.rows.Row` describes its columns."""
        return self.overview.frame()

    def wait(self) -> None:
        """Wait until all are done."""
        if self:
            watch(lambda _: None, [job.run.spec.id for job in self], store=self[0].store)

    def __rich__(self) -> Any:
        return self.overview
