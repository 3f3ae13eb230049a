"""Runs on disk. A run is a directory named by its spec's id; what is in it is the truth about it.

    .moelab/runs/<id>/spec.json          what it is
                      status.json        its state, see `moelab.runs.states`; step, loss, speed, why
                      train.jsonl, validation.jsonl, checkpoints/, log.txt
                      holder.json        host and process that train it, or did last
                      sessions.jsonl     commit and machine of each session, see `moelab.runs.sessions`
                      logs/              what ranks after the first wrote, for a run on several
                      measured/          what was measured with its weights, see `moelab.runs.evaluations`
                      prefix/            of a branch: its trunk, while that is trained again for it
                      result.json        written last: the run is finished
                      provenance.json    commit, versions, hardware, when it started and finished

Exactly one process trains a run, or one group of ranks: it, or rank 0, holds `run.lock` (flock; the kernel lets go of
it when the process dies).
"""

from __future__ import annotations

import contextlib
import difflib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

from filelock import FileLock

from moelab import paths
from moelab.config.parallel import ParallelConfig
from moelab.files import REFUSED, read_json, read_object, write_json
from moelab.lazy import pd
from moelab.runs.spec import RunSpec, closure
from moelab.runs.states import Event, Status
from moelab.terminal import plain


def ended(folder: Path) -> str:
    """Return the reason of a run whose status says "running" while no process holds its lock, and nobody watched it."""
    return f"its process died; run it again to resume{disk_full(folder)}"


def disk_full(folder: Path) -> str:
    """Return the end of a reason that names a full disk, on which no process could write why it failed; else empty."""
    return f"; the disk of {folder} is full, make room" if shutil.disk_usage(folder).free < 1 << 20 else ""


def published_weights() -> list[Path]:
    """Return the folders of the exported models that are published with the results, by name."""
    return sorted(path.parent for path in (paths.results() / "weights").glob("*/config.json"))


_NUMBERS = (
    *("steps", "tokens", "validation_loss", "bits_per_byte", "unigram_loss"),
    *("parameters", "active_parameters", "flops_per_token", "seconds"),
)
"""What a result has at least."""


def check_result(value: Any, where: str) -> None:
    """Check that a result is what `training.loop.train` returns; ValueError, one line, where a number is missing."""
    record = value if isinstance(value, dict) else {}
    for name in _NUMBERS:
        if not isinstance(record.get(name), int | float):
            raise ValueError(
                f"{where}: no result of a training run ({name} must be a number, got {record.get(name)!r})"
            )


@dataclass(frozen=True)
class Run:
    """A spec and its directory; reads, never trains."""

    spec: RunSpec
    path: Path

    @classmethod
    def at(cls, path: Path, *, known: bool = False) -> Self:
        """Return the run in a directory; ValueError, one line, where its spec is missing or cannot be read.

        Args:
            known: leave out fields of the spec that this version does not know, to show the run and not to train it.
        """
        file = path / "spec.json"
        if (record := read_json(file)) is None:
            raise ValueError(f"{path}: no spec.json there; was the run removed, or copied in part?")
        return cls(RunSpec.from_json(record, where=str(file), known=known), path)

    @classmethod
    def files(cls, path: Path) -> Self:
        """Return a run without its spec, of which only the files count: reading 2,000 specs takes seconds."""
        return cls(cast(RunSpec, None), path)

    @property
    def finished(self) -> bool:
        """Whether the run has a result."""
        return (self.path / "result.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        """What `moelab.training.loop.train` returned.

        Raises:
            RuntimeError: one line: the run is not finished.
            ValueError: one line: the file is damaged, and what helps.
        """
        try:
            value = read_json(self.path / "result.json")
            if value is not None:
                check_result(value, str(self.path / "result.json"))
        except ValueError as error:
            raise ValueError(
                f"run {self.spec.id}: {error}; remove the file and ask for the run again: it goes on from its last "
                "checkpoint, or starts anew without one"
            ) from None
        if value is None:
            status = self.status
            raise RuntimeError(
                f"run {self.spec.id} has no result: {status.state}{': ' if status.reason else ''}{status.reason}"
            )
        return value

    @property
    def provenance(self) -> dict[str, Any]:
        """Code, versions, hardware and times of the run; empty before it is finished.

        They are those of its last session. Where several commits or machines have trained it, "sessions" has all. The
        names of hosts, which earlier versions wrote, are left out: they are published with the run.
        """
        record = read_object(self.path / "provenance.json") or {}
        return {name: value for name, value in record.items() if name not in ("host", "process")}

    @property
    def recorded(self) -> Status:
        """What its files say of its state, whether or not a process trains it."""
        status = Status.read(self.path) or Status("new")
        if self.finished:
            return replace(status, state="finished", reason="")
        return status.moved("reopen") if status.state == "finished" else status

    @property
    def status(self) -> Status:
        """Its state; a run whose process died counts as stopped."""
        status = self.recorded
        return status.moved("die", ended(self.path)) if status.state == "running" and not self.locked else status

    @property
    def last_write(self) -> tuple[int, Status]:
        """What differs after the status has been written: its time, in nanoseconds since the epoch, and its content."""
        try:
            return (self.path / "status.json").stat().st_mtime_ns, self.recorded
        except OSError:
            return 0, self.recorded

    def move(self, event: Event, reason: str = "", *, before: Status | None = None, **progress: Any) -> Status:
        """Write the state to which an event leads, and return the new status.

        Args:
            reason: one line, for a state that needs one.
            before: what the caller knows of the run; by default what is recorded.
            progress: further fields of the status that change.

        Raises:
            ValueError: one line: `moelab.runs.states.TABLE` does not allow the event in the run's state.
            OSError: the status could not be written.
        """
        try:
            status = (before or self.recorded).moved(event, reason, **progress)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        self.set_status(status)
        return status

    @property
    def locked(self) -> bool:
        """Whether a process trains it now. Writes nothing: the store may be read-only."""
        import fcntl

        try:
            with open(self.path / "run.lock", "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
                except OSError:  # without flock, the lock is the file with the holder's name, while it is there
                    return bool(file.read(1))
        except OSError:  # never trained, or not to be read
            pass
        return False

    def lock(self) -> FileLock:
        """Return the lock that whoever trains the run holds."""
        self.path.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path / "run.lock", is_singleton=False)

    def laid_out(self, parallel: ParallelConfig) -> Self:
        """Return the run in a layout, which its spec on disk gets too, as its ranks read it; a finished run stays."""
        if self.spec.parallel == parallel or self.finished:
            return self
        run = replace(self, spec=replace(self.spec, parallel=parallel))
        write_json(self.path / "spec.json", run.spec.to_json())
        return run

    def log_tail(self, lines: int = 15) -> str:
        """Return the last lines of the log, or an empty text."""
        path = self.path / "log.txt"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def why_missing(self) -> str:
        """Return in one line why the run has no result: its status's reason, else its log's last line, or its state."""
        status = self.status
        return status.reason or plain(self.log_tail(1).strip()) or status.state

    @property
    def has_weights(self) -> bool:
        """Whether the run has a checkpoint; a finished one, that of its last step."""
        return self.has_checkpoint(self.result.get("steps") if self.finished else None)

    def has_checkpoint(self, steps: int | None = None) -> bool:
        """Return whether the run has a checkpoint, of so many steps where that is given."""
        return any((self.path / "checkpoints").glob("step-*" if steps is None else f"step-{steps:08d}"))

    @property
    def trains_trunk_again(self) -> bool:
        """Whether it is a branch, not begun, whose finished trunk has no checkpoint of the branch point (any more)."""
        if self.spec.start is None or self.finished or self.has_checkpoint():
            return False
        trunk = Run(self.spec.start.run, self.path.with_name(self.spec.start.run.id))
        return trunk.finished and not trunk.has_checkpoint(self.spec.first_step)

    def require_weights(self) -> None:
        """Check that the run has weights, see `has_weights`; ValueError, one line, where it has none."""
        if not self.has_weights:
            from moelab.engine import checkpoint

            raise ValueError(checkpoint.why_no_weights(self.path))

    def set_status(self, status: Status) -> None:
        """Write a status as it is; all but tests call `move`, which checks it."""
        write_json(self.path / "status.json", status.__dict__)

    @property
    def own_seconds(self) -> float:
        """Seconds of its own training: those of its result without those of its trunk before it begins."""
        from moelab.training.metrics import read_rows

        first = read_rows(self.path / "validation.jsonl")[:1] if self.spec.start else []
        return self.result["seconds"] - sum(row.get("time_s", 0.0) for row in first)

    def rows(self, file: str) -> pd.DataFrame:
        """`train.jsonl` or `validation.jsonl` as a frame, nested values left as they are."""
        from moelab.training.metrics import read_rows

        return pd.DataFrame(read_rows(self.path / file))


def _keep_at(stored: dict[str, Any]) -> list[int]:
    """Return the tokens of the checkpoints that a stored spec, perhaps another version's, asks to be kept."""
    train = stored.get("train")
    kept = train.get("keep_at") if isinstance(train, dict) else None
    return [tokens for tokens in kept if type(tokens) is int] if isinstance(kept, list) else []


class RunStore:
    """All runs below one folder."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or paths.home() / "runs"

    def run(self, spec: RunSpec, *, write: bool = True) -> Run:
        """Return the run of a spec; make its directory and write its spec where they are missing.

        Args:
            write: whether to write; False for who reads only.
        """
        path = self.root / spec.id
        try:
            stored = read_object(path / "spec.json") or {}
        except ValueError:  # cut short by a crash of the machine; its content is known
            stored = {}
        # Of what does not name the run (layout, checkpoints, label) the last wish counts, and all checkpoints that were
        # ever asked to be kept; a finished run stays as it is.
        spec = spec.with_checkpoints(_keep_at(stored))
        if write and stored and stored != spec.to_json() and Run(spec, path).locked:
            # Its processes were started for the layout that it has; they are started again for the same one.
            with contextlib.suppress(ValueError):  # by another version: the lock's holder tells
                own = RunSpec.from_json(stored)
                spec = replace(own.with_checkpoints(spec.train.keep_at), label=spec.label)
        if write and stored != spec.to_json() and not (stored and Run(spec, path).finished):
            try:
                write_json(path / "spec.json", spec.to_json())
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                # a read-only store is read; who trains in it is told then
        return Run(spec, path)

    def keep(self, spec: RunSpec) -> None:
        """Let a run that waits for its turn keep the checkpoints that a spec wants; its layout and label stay."""
        try:
            run = self.at(spec.id)
        except ValueError:  # removed or cut short
            self.run(spec)
            return
        own = run.spec.with_checkpoints(spec.train.keep_at)
        if own.train.keep_at != run.spec.train.keep_at and not run.finished:
            write_json(run.path / "spec.json", own.to_json())

    def needed(self, specs: Sequence[RunSpec]) -> dict[str, RunSpec]:
        """Return `closure(specs)` without the unfinished runs that only finished ones require.

        A teacher or trunk that was removed, or not taken over, is not trained again for runs that are done.
        """
        every = closure(specs)
        finished = {id for id in every if (self.root / id / "result.json").exists()}
        wanted, asked = set(finished), [spec.id for spec in specs]
        while asked:
            wanted.add(id := asked.pop())
            if id in finished:
                continue
            run = Run(every[id], self.root / id)
            direct = [run.spec.teacher, run.spec.start.run if run.spec.start else None]
            # A trunk that is trained again needs its own teacher, too.
            asked += [spec.id for spec in (run.spec.requires() if run.trains_trunk_again else direct) if spec]
        return {id: spec for id, spec in every.items() if id in wanted}

    def ids(self, *, file: str = "spec.json") -> list[str]:
        """Return the sorted ids of the runs that have `file`: "spec.json" for all, "result.json" for finished ones."""
        return sorted(path.parent.name for path in self.root.glob(f"*/{file}"))

    def select(self, names: Sequence[str] = (), *, file: str = "spec.json") -> list[str]:
        """Return the ids of the runs that have `file` and begin with one of `names`; all of them without names.

        Raises:
            ValueError: one line: no run begins with one of the names.
        """
        known = self.ids(file=file)
        for name in names:
            if not name or not any(run.startswith(name) for run in known):
                kind = "finished run" if file == "result.json" else "run"
                raise ValueError(f"run {name!r}: no id of a {kind} starts with it; {len(known)} are in {self.root}")
        return [run for run in known if not names or run.startswith(tuple(names))]

    def find(self, name: str) -> Path:
        """Return the directory of a run or of exported weights.

        Args:
            name: a run's id or the beginning of one, the name of published weights (a folder of `results/weights`), or
                a path.

        Raises:
            ValueError: there is none, or several begin so; names those that are close.
        """
        with contextlib.suppress(RuntimeError):  # ~ and the name of no user
            if name and (path := Path(name).expanduser()).is_dir():
                return path
        known = {path.name: path for path in published_weights()} | {run: self.root / run for run in self.ids()}
        matches = [name] if name in known else [run for run in known if name and run.startswith(name)]
        if len(matches) == 1:
            return known[matches[0]]
        if matches:
            raise ValueError(f"run {name!r}: {len(matches)} runs start with it: {', '.join(matches[:5])}")
        starts = {run[: len(name)]: run for run in known}
        close = [starts[start] for start in difflib.get_close_matches(name, starts, n=3) if name]
        raise ValueError(
            f"run {name!r}: no such run or directory; "
            + (f"did you mean {', '.join(close)}?" if close else f"runs are in {self.root}, {len(self.ids())} there")
        )

    def at(self, name: str) -> Run:
        """Return the run in the directory of that name."""
        return Run.at(self.root / name)
