"""Execute a run: train it to its end in this process and write its status, provenance and result."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab import paths
from moelab.config import to_json
from moelab.engine.launch import process
from moelab.files import read_json, sweep, write_json
from moelab.lazy import whole_imports
from moelab.runs import sessions
from moelab.runs.branching import starting_point
from moelab.runs.provenance import provenance
from moelab.runs.spec import RunSpec
from moelab.runs.states import Event, Status
from moelab.runs.store import Run
from moelab.terminal import one_line

if TYPE_CHECKING:
    from moelab.data.tokens import TokenData
    from moelab.engine.checkpoint import Checkpoint
    from moelab.training.distill import Teacher
    from moelab.training.loop import Progress

ShouldStop = Callable[[], bool]
"""Says whether the training is to stop, with a checkpoint."""
OnProgress = Callable[["Progress"], None]
"""Called after each metric row."""

_STOP = "stop"
"""What rank 0 publishes for ranks that wait for it while the run starts, in place of what they wait for."""


class StoppedAtStart(KeyboardInterrupt):
    """Report that a run was asked to stop before its training began."""


def execute(
    run: Run,
    *,
    should_stop: ShouldStop = lambda: False,
    on_progress: OnProgress = lambda _: None,
) -> None:
    """Train a run to its end in this process, or find it finished. Waits while another process trains it.

    Writes status, provenance and, last, the result. As a rank of several it joins the others; rank 0 does the writing.

    Several ranks stop together: until the training begins, where every step asks all of them, rank 0 alone looks at
    `should_stop` and tells the others, which would otherwise leave it alone in its first collective.

    Raises:
        ValueError: the run wants another number of ranks than there are.
        whatever training raises, after noting it in the status.
    """
    place, ranks = process.find(), run.spec.parallel.ranks
    if (place.world_size if place else 1) != ranks:
        there = f"this is {place}" if place else "this process is not one of several"
        raise ValueError(f"run {run.spec.id} is for {ranks} ranks, {there}")
    if ranks == 1:
        _lead(run, should_stop, on_progress)
        return

    from moelab.training.loop import TrainingStopped

    if run.spec.parallel.recompute and run.spec.parallel.tensor > 1:
        # NCCL's sums inside NVLink switches (from H100 on) may differ in the last bit between two calls. Then a token
        # may choose another expert when its block is computed again, and shapes differ.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    place = process.join(device=run.spec.train.device, folder=run.path)
    try:
        if place.rank == 0:
            _lead(run, should_stop, on_progress)
        elif _from_first("run") == "train":
            _follow(run, should_stop)
    except (TrainingStopped, StoppedAtStart):  # all ranks at the same step
        process.leave()
        raise
    process.leave()


def _lead(run: Run, should_stop: ShouldStop, on_progress: OnProgress) -> None:
    """Train as the first rank, or the only one, which holds the lock and tells others what is to be done."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(_trainer_of(run, should_stop))
        except StoppedAtStart:
            _tell(run, "run", _STOP)
            raise
        todo = not run.finished
        _tell(run, "run", "train" if todo else "finished")
        if todo:
            _train_and_record(run, should_stop, on_progress)


def _follow(run: Run, should_stop: ShouldStop) -> None:
    """Train as a rank after the first, on the data that rank 0 has prepared."""
    from moelab.data.preparation import prepare

    fingerprint = _from_first("data")
    data = prepare(run.spec.data, paths.home() / "data")
    if data.fingerprint != fingerprint:
        raise ValueError(f"run {run.spec.id}: this rank's data are {data.fingerprint}, rank 0's {fingerprint}")
    _train(run, data, should_stop, lambda _: None)


def _tell(run: Run, key: str, value: str) -> None:
    """Publish a value for the ranks after the first, if there are any."""
    if run.spec.parallel.ranks > 1:
        process.publish(key, value)


def _from_first(key: str) -> str:
    """Return what rank 0 publishes under a key.

    Raises:
        StoppedAtStart: rank 0 was asked to stop.
    """
    if (answer := process.wait_for(key)) == _STOP:
        raise StoppedAtStart("stopped with rank 0 before the training began")
    return answer


@contextlib.contextmanager
def _trainer_of(run: Run, should_stop: ShouldStop) -> Iterator[None]:
    """Hold the run's lock, after waiting for it."""
    lock = run.lock()
    waited = False
    while True:
        try:
            lock.acquire(timeout=1)
            break
        except TimeoutError:
            if not waited:
                print(
                    f"run {run.spec.id}: waits for {_holder(run)}; if it is gone, remove {lock.lock_file}", flush=True
                )
            waited = True
            if should_stop():
                raise StoppedAtStart("stopped while another process trains this run") from None
    try:
        if waited and run.finished:
            print(f"run {run.spec.id}: finished by another process")
        if not run.finished:
            for folder in (run.path, run.path / "logs"):
                sweep(folder, older_s=60)  # few but the holder of the lock write here, and none takes so long
            holder = {"host": socket.gethostname(), "process": os.getpid(), "since": _iso(time.time())}
            with contextlib.suppress(OSError):  # the training reports a full disk
                write_json(run.path / "holder.json", holder)
        yield
    finally:
        lock.release()


def _holder(run: Run) -> str:
    """Return a phrase that names the process that trains a run."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        holder = read_json(run.path / "holder.json")
        return f"process {holder['process']} on {holder['host']}, which trains it since {holder['since']}"
    return "another process"


def _train_and_record(run: Run, should_stop: ShouldStop, on_progress: OnProgress) -> None:
    """Prepare the data, train, and write status, provenance and result; the caller holds the lock."""
    with whole_imports():
        import moelab.training.loop  # noqa: F401
        from moelab.data.preparation import prepare

    spec = run.spec
    started, record = time.time(), provenance()  # of the code that trains; files may change until the end
    if spec.train.device == "cpu":
        record["hardware"].pop("gpus", None)  # those of the machine have no part in it
    trainer = _Trainer(run, run.move("start", steps=spec.train.steps(spec.data.context)), on_progress)
    with trainer.failure_recorded():
        sessions.begin(run.path, record)
        asked = should_stop if spec.parallel.ranks > 1 else (lambda: False)  # one rank is stopped by its training
        _stop_early(run, asked)
        data = prepare(spec.data, paths.home() / "data", lambda _: _stop_early(run, should_stop))
        _stop_early(run, asked)
        _tell(run, "data", data.fingerprint)
        result = _train(run, data, should_stop, trainer.progress)
    if len(several := sessions.contributing(run.path)) > 1:
        record["sessions"] = several
    record["data"] = {"fingerprint": data.fingerprint, "corpus": spec.data.corpus, "tokenizer": spec.data.tokenizer}
    record["started"], record["finished"] = _iso(started), _iso(time.time())
    if spec.parallel.ranks > 1:
        record["parallel"] = to_json(spec.parallel)
    if spec.start is not None:
        record["start"] = {"run": spec.start.run.id, "tokens": spec.start.tokens}
        record["start"]["trained_again"] = (run.path / "prefix").exists()
    write_json(run.path / "provenance.json", record, durable=True)  # never written again once there is a result
    write_json(run.path / "result.json", result, durable=True)
    shutil.rmtree(run.path / "prefix", ignore_errors=True)  # of a trunk that was trained again
    trainer.move("finish", step=trainer.status.steps)


@dataclass
class _Trainer:
    """Moves the run whose lock this process holds; what it knows of the state counts, not what a file says.

    Attributes:
        status: the last one that was written.
    """

    run: Run
    status: Status
    on_progress: OnProgress

    def move(self, event: Event, reason: str = "", **progress: Any) -> None:
        self.status = self.run.move(event, reason, before=self.status, **progress)

    def progress(self, p: Progress) -> None:
        self.move("step", step=p.step, steps=p.steps, loss=p.loss, tokens_per_s=p.tokens_per_s)
        self.on_progress(p)

    @contextlib.contextmanager
    def failure_recorded(self) -> Iterator[None]:
        """Record that and why the training stopped or failed."""
        from moelab.training.loop import TrainingStopped

        try:
            yield
        except (TrainingStopped, KeyboardInterrupt) as stop:
            self.move("stop", str(stop) or "interrupted")
            raise
        except OSError as error:
            reason = f"{error.strerror or error}: {error.filename or self.run.path}"
            if error.errno in (None, errno.ENOSPC, errno.EDQUOT):  # None: safetensors' error of a full disk
                reason += " (earlier checkpoints are kept; make room and run again)"
            with contextlib.suppress(OSError):  # the status is on the full disk, too; the log has the error
                self.move("fail", reason)
            raise
        except BaseException as error:
            self.move("fail", one_line(error))
            raise


def _stop_early(run: Run, should_stop: ShouldStop) -> None:
    """Stop before the training, with the ranks that wait for the data: preparing a large text takes long."""
    if should_stop():
        _tell(run, "data", _STOP)
        raise StoppedAtStart("stopped before the training began")


def _train(run: Run, data: TokenData, should_stop: ShouldStop, on_progress: OnProgress) -> dict[str, Any]:
    """Train on this rank, first the trunk that the run branches off where that is needed; return the result."""
    import torch

    from moelab.training.loop import Branch, train

    spec, runs = run.spec, run.path.parent
    steps = spec.train.steps(spec.data.context)

    def train_spec(spec: RunSpec, folder: Path, start: Checkpoint | None, **options: Any) -> dict[str, Any]:
        branch = Branch(spec.start.tokens, spec.start.warmup_tokens, spec.start.upcycle) if spec.start else None
        options |= {"parallel": spec.parallel, "teacher": _teacher(spec, runs), "branch": branch}
        options |= {"start": start, "should_stop": should_stop}
        return train(spec.model, spec.train, data, spec.data.context, folder, **options)

    def train_trunk(trunk: RunSpec, folder: Path, start: Checkpoint | None, step: int) -> None:
        train_spec(trunk, folder, start, until=step, on_progress=lambda p: on_progress(replace(p, steps=steps)))
        gc.collect()  # recomputation and FSDP2 make cycles, which would keep the trunk on the GPU during the branch

    def say(line: str) -> None:
        if (place := process.find()) is None or place.rank == 0:
            print(f"run {spec.id}: {line}", flush=True)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(spec.train.threads)
        with torch.random.fork_rng(devices=[]):  # the steps seed the generator that a notebook draws from, too
            start = starting_point(spec, run.path, runs, train_trunk, say)
            return train_spec(spec, run.path, start, on_progress=on_progress)
    finally:
        torch.set_num_threads(threads)


def _teacher(spec: RunSpec, runs: Path) -> Teacher | None:
    """Return the finished run that a spec distils, from the folder of all runs; ValueError where it has no weights."""
    if spec.teacher is None or spec.distill is None:
        return None
    from moelab.training.distill import Teacher

    source = Run(spec.teacher, runs / spec.teacher.id)
    if not source.finished:
        raise ValueError(f"its teacher {spec.teacher.id} has no result: {source.status.state}")
    source.require_weights()
    return Teacher(spec.teacher.model, source.path, spec.distill)


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
