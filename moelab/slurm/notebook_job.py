"""Execute a notebook of a submission: `python -m moelab.slurm.notebook_job SUBMISSION_FOLDER PART`, a step of its job.

The outcome is `PART.json` in the submission's folder, written once the result is in its place; the pages are built
after it. The executed notebook cannot tell the outcome: papermill marks cells as completed even when the kernel has
died. The last notebook of a sweep to end also publishes the comparison of all points.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moelab.experiments import experiment
from moelab.files import read_json
from moelab.notebook import execute as notebooks
from moelab.notebook.watch import not_packed
from moelab.report import site, sweep
from moelab.report.publication import SUMMARY
from moelab.runs.store import RunStore
from moelab.slurm.submission import Outcome, Submission, outcome, results, set_outcome


def main(folder: Path, name: str) -> int:
    """Execute the notebook, and return 0 when it published a result, even without some runs; 1 when it failed."""
    submission = Submission.read(folder / "submission.json")
    code = _execute(submission, name)
    try:
        if code == 0:
            site.update(publish=submission.publish)
        ended = [part.values is None or outcome(folder, part.name) for part in submission.parts]
        if submission.sweep and all(ended) and (comparison := _compare(submission, submission.sweep)):
            site.update(publish=submission.publish)
            print(f"comparison of the sweep: {comparison}")
    except (ValueError, OSError) as error:  # the notebook's own outcome stands
        print(f"the pages and the sweep's comparison: {error}", file=sys.stderr)
    return code


def _execute(submission: Submission, name: str) -> int:
    folder = submission.folder
    part = next(part for part in submission.parts if part.name == name)
    (folder / f"{name}.json").unlink(missing_ok=True)  # written by an earlier attempt
    try:
        result = notebooks.execute(
            experiment(submission.experiment),
            part.values or {},
            folder / f"{name}.plan.json",
            log=sys.stdout,
            progress=folder / f"{name}.progress.json",
            publish=submission.publish,
        )
    except (notebooks.NotebookFailed, ValueError, OSError, KeyboardInterrupt) as error:
        cancelled = outcome(folder, name)  # written while it was executed
        reason = cancelled.error if cancelled else str(error) or "out of time; raise the profile's notebook_time"
        set_outcome(folder, name, Outcome(error=reason))
        print(reason, file=sys.stderr)
        return 1
    summary = read_json(result / SUMMARY)
    missing = summary["missing"]
    set_outcome(folder, name, Outcome(str(result), tuple(missing)))
    print(f"result: {result}" + (f"; without {', '.join(missing)}" if missing else ""))
    if submission.publish and (line := not_packed(summary)):
        print(line)
    return 0


def _compare(submission: Submission, points: sweep.Sweep) -> Path | None:
    """Publish the comparison of the sweep, in a folder that is named by the time of the submission."""
    chosen = experiment(submission.experiment)
    comparison = sweep.compare(chosen, points, results(chosen.name, points.points), RunStore())
    return sweep.publish(
        chosen, points, comparison, publish=submission.publish, name=submission.id[: len("YYYYMMDD-HHMMSS")]
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
