"""Runs on disk. A run is a directory named by its spec's id; what is in it is the truth about it.

    .moelab/runs/<id>/spec.json          what it is
                      status.json        state now: running, finished, failed, stopped; step, loss, speed, why
                      train.jsonl, validation.jsonl, checkpoints/, log.txt
                      logs/                what ranks after the first wrote, for a run on several
                      result.json        written last: the run is finished
                      provenance.json    commit, versions, hardware, durations

Exactly one process trains a run, or one group of ranks: it, or rank 0, holds `run.lock` (flock; the kernel lets go of it when the
process dies).
"""

from __future__ import annotations

import contextlib
import difflib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from moelab import paths
from moelab.config import to_json
from moelab.engine.launch import process
from moelab.files import read_json, write_json
from moelab.runs.spec import RunSpec

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Status:
    """Last known state of a run.

    Attributes:
        state: "new", "running", "stopped" (a checkpoint waits), "failed", "finished".
        step, steps: done, of all.
        loss: training loss in nats at `step`; None before the first metric row.
        tokens_per_s: speed over the last metric row.
        reason: one line, when failed or stopped.
    """

    state: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Run:
    """A spec and its directory; reads, never trains."""

    spec: RunSpec
    path: Path

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        """What `moelab.training.train` returned. RuntimeError, one line, when the run is not finished."""
        value = read_json(self.path / "result.json")
        if value is None:
            status = self.status
            raise RuntimeError(
                f"run {self.spec.id} has no result: {status.state}{': ' if status.reason else ''}{status.reason}"
            )
        return value

    @property
    def provenance(self) -> dict[str, Any]:
        return read_json(self.path / "provenance.json") or {}

    @property
    def status(self) -> Status:
        """Its state; a run whose process died without a word counts as stopped."""
        record = read_json(self.path / "status.json")
        if self.finished:
            return Status(**{**(record or {}), "state": "finished"})
        if record is None:
            return Status("new")
        status = Status(**record)
        if status.state == "running" and not self.locked:
            return Status(
                **{**record, "state": "stopped", "reason": "its process ended without a word; it will resume"}
            )
        return status

    @property
    def locked(self) -> bool:
        """Whether a process trains it now."""
        lock = self.lock()
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            return True
        lock.release()
        return False

    def lock(self) -> FileLock:
        self.path.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path / "run.lock", is_singleton=False)

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of its log, or an empty text."""
        path = self.path / "log.txt"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def set_status(self, status: Status) -> None:
        write_json(self.path / "status.json", status.__dict__)

    def rows(self, file: str) -> pd.DataFrame:
        """`train.jsonl` or `validation.jsonl` as a frame, nested values left as they are."""
        import pandas as pd

        from moelab.training.metrics import read_rows

        return pd.DataFrame(read_rows(self.path / file))


class RunStore:
    """All runs below one folder."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or paths.home() / "runs"

    def run(self, spec: RunSpec) -> Run:
        """The run of a spec, its directory made and its spec written."""
        run = Run(spec, self.root / spec.id)
        stored = read_json(run.path / "spec.json")
        if (
            stored is None or stored.get("parallel", {}) != spec.to_json()["parallel"]
        ):  # the last asked-for layout counts
            write_json(run.path / "spec.json", spec.to_json())
        return run

    def find(self, name: str) -> Path:
        """The directory of a run: its id, the beginning of one, or a directory itself (of a run or of an exported model).

        Raises:
            ValueError: there is none, or several begin so; names those that are close.
        """
        if (path := Path(name).expanduser()).is_dir():
            return path
        known = [path.parent.name for path in sorted(self.root.glob("*/spec.json"))]
        found = [name] if name in known else [run for run in known if name and run.startswith(name)]
        if len(found) == 1:
            return self.root / found[0]
        if found:
            raise ValueError(f"run {name!r}: {len(found)} runs begin so: {', '.join(found[:5])}")
        starts = {run[: len(name)]: run for run in known}
        close = [starts[start] for start in difflib.get_close_matches(name, starts, n=3)]
        raise ValueError(
            f"run {name!r}: no such run or directory; "
            + (f"did you mean {', '.join(close)}?" if close else f"runs are in {self.root}, {len(known)} there")
        )

    def at(self, name: str) -> Run:
        """The run in the directory of that name."""
        path = self.root / name / "spec.json"
        return Run(RunSpec.from_json(read_json(path), where=str(path)), path.parent)

    def __iter__(self):
        for path in sorted(self.root.glob("*/spec.json")):
            yield self.at(path.parent.name)


def execute(run: Run, *, should_stop=lambda: False, on_progress=lambda _: None, cache: Path | None = None) -> None:
    """Train a run to its end in this process, or find it finished. Waits while another process trains it.

    Writes status, provenance and, last, the result. As a rank of several it joins the others; rank 0 does the writing.

    Raises:
        ValueError: the run wants another number of ranks than there are.
        whatever training raises, after noting it in the status.
    """
    place, ranks = process.find(), run.spec.parallel.ranks
    if (place.world if place else 1) != ranks:
        there = f"this is {place}" if place else "this process is not one of several"
        raise ValueError(f"run {run.spec.id} is for {ranks} ranks, {there}")
    cache = cache or paths.home() / "data"
    if ranks == 1:
        with _trainer_of(run, should_stop):
            if not run.finished:
                _train(run, should_stop, on_progress, cache)
        return

    from moelab.training import TrainingStopped

    place = process.join(device=run.spec.train.device)
    try:
        if place.rank == 0:
            with _trainer_of(run, should_stop):
                todo = not run.finished
                process.tell("run", "train" if todo else "finished")
                if todo:
                    _train(run, should_stop, on_progress, cache)
        elif process.hear("run", should_stop) == "train":
            _train_along(run, should_stop, cache)
    except TrainingStopped:  # all ranks at the same step
        process.leave()
        raise
    process.leave()


@contextlib.contextmanager
def _trainer_of(run: Run, should_stop) -> Iterator[None]:
    """The run's lock, waited for."""
    lock = run.lock()
    waited = False
    while True:
        try:
            lock.acquire(timeout=1)
            break
        except TimeoutError:
            waited = True
            if should_stop():
                raise KeyboardInterrupt("stopped while another process trains this run") from None
    try:
        if waited and run.finished:
            print(f"run {run.spec.id}: finished by another process")
        yield
    finally:
        lock.release()


def _train(run: Run, should_stop, on_progress, cache: Path) -> None:
    """Train and write all about it; the caller holds the lock."""
    from moelab.data import prepare
    from moelab.runs.provenance import provenance
    from moelab.training import TrainingStopped

    spec = run.spec
    state = {"step": run.status.step, "steps": spec.train.steps(spec.data.context)}

    def progress(p) -> None:
        state.update(step=p.step, steps=p.steps, loss=p.loss, tokens_per_s=p.tokens_per_s)
        run.set_status(Status("running", **state))
        on_progress(p)

    started = time.time()
    run.set_status(Status("running", **state))
    try:
        data = prepare(spec.data, cache)
        if spec.parallel.ranks > 1:
            process.tell("data", data.fingerprint)
        result = _call_train(run, data, should_stop, progress)
    except (TrainingStopped, KeyboardInterrupt) as stop:
        run.set_status(Status("stopped", **state, reason=str(stop) or "interrupted"))
        raise
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or run.path} (earlier checkpoints are kept; make room and run again)"
        _try_status(run, Status("failed", **state, reason=reason))
        raise
    except BaseException as error:
        run.set_status(Status("failed", **state, reason=(str(error).splitlines() or [type(error).__name__])[0]))
        raise
    record = provenance()
    record["data"] = {"fingerprint": data.fingerprint, "corpus": spec.data.corpus, "tokenizer": spec.data.tokenizer}
    record["started"], record["finished"] = _iso(started), _iso(time.time())
    record["host"], record["process"] = socket.gethostname(), os.getpid()
    if spec.parallel.ranks > 1:
        record["parallel"] = to_json(spec.parallel)
    write_json(run.path / "provenance.json", record)
    write_json(run.path / "result.json", result, durable=True)
    run.set_status(Status("finished", **{**state, "step": state["steps"]}))


def _train_along(run: Run, should_stop, cache: Path) -> None:
    """A rank after the first: reads the data that rank 0 has prepared, and trains."""
    from moelab.data import prepare

    fingerprint = process.hear("data", should_stop)
    data = prepare(run.spec.data, cache)
    if data.fingerprint != fingerprint:
        raise ValueError(f"run {run.spec.id}: this rank's data are {data.fingerprint}, rank 0's {fingerprint}")
    _call_train(run, data, should_stop, lambda _: None)


def _call_train(run: Run, data, should_stop, on_progress) -> dict[str, Any]:
    import torch

    from moelab.training import Teacher, train

    spec = run.spec
    teacher = None
    if spec.teacher is not None and spec.distill is not None:
        source = Run(spec.teacher, run.path.parent / spec.teacher.id)
        if not source.finished:
            raise ValueError(f"its teacher {spec.teacher.id} has no result: {source.status.state}")
        if not (source.path / "checkpoints").is_dir():
            raise ValueError(f"its teacher was taken over without weights; remove {source.path} to train it here")
        teacher = Teacher(spec.teacher.model, source.path, spec.distill)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(spec.train.threads)
        return train(
            spec.model,
            spec.train,
            data,
            spec.data.context,
            run.path,
            parallel=spec.parallel,
            teacher=teacher,
            on_progress=on_progress,
            should_stop=should_stop,
        )
    finally:
        torch.set_num_threads(threads)


def _try_status(run: Run, status: Status) -> None:
    with contextlib.suppress(OSError):  # the disk that is full is the one the status lives on; the log says it
        run.set_status(status)


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
