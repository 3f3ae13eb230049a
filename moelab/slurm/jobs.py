"""Represent submitted runs by jobs with submitit's interface: `job_id`, `state`, `done`, `wait`, `result`, `cancel`.

submitit's own `Job` reads states from `sacct`, and results and errors from pickles. A pickle executes code as it loads,
and it may be of an earlier attempt at the run. A `RunJob` reads the run's directory and `squeue` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from moelab.lazy import pd
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run, RunStore
from moelab.slurm.rows import Overview, Row
from moelab.slurm.status import cancel, overview, watch
from moelab.slurm.submission import root, submissions


class RunJob(submitit.Job[dict[str, Any]]):
    """Represent the job of one run.

    Attributes:
        run: the run, whose files determine state and result.
        job_id: ``12_3``, or ``local-4711`` without Slurm; empty for a run that had finished before it was submitted.
    """

    def __init__(self, run: Run, store: RunStore, folder: str = "", job_id: str = "") -> None:
        super().__init__(folder or run.path, job_id)
        self.run, self._store = run, store

    @property
    def row(self) -> Row:
        """Return the run's present state as a row, with one call to Slurm (`Jobs.overview`: one for all)."""
        own = [row for row in overview([self.run.spec.id], store=self._store).rows if row.id == self.run.spec.id]
        return own[0] if own else Row("", self.run.spec.title, self.run.spec.id, self.run.status.state)

    @property
    def state(self) -> str:
        """Return the state, one of those of `moelab.slurm.rows.Row`."""
        return "finished" if self.run.finished else self.row.state

    def done(self, force_check: bool = False) -> bool:
        """Return whether the run has finished, failed for good, or been cancelled."""
        return self.run.finished or self.row.over

    def wait(self) -> None:
        """Wait until the run is done; ask Slurm every ten seconds, at first more often."""
        watch(lambda _: None, [self.run.spec.id], store=self._store)

    def result(self) -> dict[str, Any]:
        """Wait, and return the run's result.

        Raises:
            FailedJobError: the run has no result; the message gives the reason.
        """
        if error := self.exception():
            raise error
        return self.run.result

    def results(self) -> list[dict[str, Any]]:
        """Return `result` in a list."""
        return [self.result()]

    def exception(self) -> FailedJobError | None:
        """Wait, and return why there is no result; None when there is one."""
        self.wait()
        if self.run.finished:
            return None
        return FailedJobError(f"run {self.run.spec.id}: {self.row.state}: {self.row.reason or 'no reason known'}")

    def stdout(self) -> str | None:
        """Return the run's log, with what its ranks printed; None before it exists. `paths.stdout` is the driver's."""
        log = self.run.path / "log.txt"
        return log.read_text(errors="replace") if log.exists() else None

    def stderr(self) -> None:
        """Return None: `stdout` holds standard error as well."""

    def cancel(self, check: bool = True) -> None:
        """Cancel the job, which then writes a checkpoint. A local job ends with all runs of its submission."""
        if self.job_id:
            cancel([replace(self.row, job=self.job_id)], self._store)

    def get_info(self, mode: str = "force") -> dict[str, str]:
        """Return the state and node, named as submitit names them."""
        return {"JobID": self.job_id, "State": self.state, "NodeList": self.row.node}


class Jobs(tuple[RunJob, ...]):
    """Hold the jobs of specs that were submitted together, in their order, and show the table of their states."""

    @classmethod
    def of(cls, specs: Sequence[RunSpec], store: RunStore) -> Jobs:
        """Find the newest job of each spec."""
        places = {}
        for submission in reversed(submissions()):
            for part in submission.parts:
                for index, run in enumerate(part.runs if part.values is None and part.job else ()):
                    alone = submission.cluster == "local" or len(part.runs) == 1
                    places[run] = (str(root() / submission.id), f"{part.job}" if alone else f"{part.job}_{index}")
        return cls(RunJob(store.run(spec), store, *places.get(spec.id, ())) for spec in specs)

    @property
    def overview(self) -> Overview:
        """Return the jobs' present states, with one call to Slurm."""
        if not self:
            return Overview(())
        return overview([job.run.spec.id for job in self], store=self[0]._store)

    def frame(self) -> pd.DataFrame:
        """Return the jobs' states as a table; `moelab.slurm.rows.Row` describes its columns."""
        return self.overview.frame()

    def wait(self) -> None:
        """Wait until all are done."""
        if self:
            watch(lambda _: None, [job.run.spec.id for job in self], store=self[0]._store)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.overview._repr_mimebundle_(**options)

    def __rich__(self) -> Any:
        return self.overview.table()
