"""Show runs in TensorBoard: write event files from the metrics that every run stores."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moelab.runs.store import RunStore
from moelab.training.metrics import TRAIN, VALIDATION, read_rows, scalars

FOLLOW_S = 5.0
"""Seconds between two reads of the runs' metrics."""


def select(names: Sequence[str]) -> list[Path]:
    """Return the directories of the runs whose ids begin with one of `names`; of all runs without names.

    Raises:
        ValueError: one line: no run fits a name, or there are none.
    """
    store = RunStore()
    if not (runs := store.select(names)):
        raise ValueError(f"no runs in {store.root} yet; `moelab run` makes some")
    return [store.root / run for run in runs]


class Events:
    """Writes event files of runs, one folder per run; `update` adds the rows written since the last call."""

    def __init__(self, runs: Sequence[Path], folder: Path) -> None:
        """Empty the folder.

        Raises:
            ValueError: TensorBoard is not installed.
        """
        if find_spec("tensorboard") is None:
            raise ValueError("tensorboard is not installed; pip install 'moelab[tensorboard]'")
        shutil.rmtree(folder, ignore_errors=True)
        self.folder = folder
        self._runs = list(runs)
        self._writers: dict[Path, Any] = {}
        self._seen: dict[tuple[Path, str], int] = {}
        self._states: dict[Path, tuple[int, int]] = {}

    def update(self) -> int:
        """Write the new rows; return their number."""
        new = 0
        for run in self._runs:
            new += sum(self._rows(run, file) for file in (TRAIN, VALIDATION) if self._has_changed(run / file))
            if run in self._writers and (run / "result.json").exists():  # a store has more runs than files may be open
                self._writers.pop(run).close()
        return new

    def close(self) -> None:
        """Close the event files."""
        for writer in self._writers.values():
            writer.close()

    def _has_changed(self, file: Path) -> bool:
        """Return whether a file has changed since the last call: reading all rows of a store takes long."""
        before, state = self._states.get(file), file.stat() if file.exists() else None
        self._states[file] = (state.st_size, state.st_mtime_ns) if state else (0, 0)
        return self._states[file] != before

    def _rows(self, run: Path, file: str) -> int:
        # A run that resumes drops rows and writes the same ones again, so rows of steps already shown are skipped.
        last = self._seen.get((run, file), -1)
        fresh = [row for row in read_rows(run / file) if row["step"] > last]
        if not fresh:
            return 0
        if run not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[run] = SummaryWriter(str(self.folder / run.name))
        started = (run / "spec.json").stat().st_mtime
        for row in fresh:
            for name, value in scalars(file, row):
                self._writers[run].add_scalar(name, value, row["step"], walltime=started + row.get("time_s", 0.0))
        self._writers[run].flush()
        self._seen[run, file] = fresh[-1]["step"]
        return len(fresh)


def serve(runs: Sequence[Path], port: int) -> int:
    """Run TensorBoard on 127.0.0.1 until Ctrl-C and follow runs that are training; return its exit code."""
    with (
        tempfile.TemporaryDirectory(prefix="moelab-tensorboard-") as folder,  # its own: several may be served at once
        contextlib.closing(Events(runs, Path(folder))) as events,
    ):
        print(f"{len(runs)} runs, {events.update()} rows; Ctrl-C ends", flush=True)
        arguments = ("--logdir", folder, "--host", "127.0.0.1", "--port", str(port))
        process = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *arguments])
        try:
            while True:
                try:
                    return process.wait(timeout=FOLLOW_S)
                except subprocess.TimeoutExpired:
                    events.update()
        except KeyboardInterrupt:
            process.terminate()
            return process.wait()
        finally:
            if process.poll() is None:  # the metrics of a run cannot be read
                process.terminate()
                process.wait()
