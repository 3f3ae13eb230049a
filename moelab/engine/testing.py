"""Run functions on N ranks of this machine, for tests and benchmarks.

Ranks are processes forked from a server that has imported torch once, so that eight of them start in a tenth of a
second, and each runs many functions. The first failure ends all of them and is raised in the caller with the failing
rank's traceback. No rank outlives its time limit or the caller's process.
"""

from __future__ import annotations

import datetime
import gc
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

START_S = 120.0  # to import, fork and rendezvous on a busy machine


class RankError(RuntimeError):
    """A function failed on a rank, a rank died, or time ran out; the message gives the rank and its traceback."""


class Ranks:
    """N processes that form one process group and run functions together.

    They start with the first `run`; after a failure they are killed and the next `run` starts new ones. Use an instance
    as a context, or call `close`.

    >>> with Ranks(4) as ranks:
    ...     sums = ranks.run(sum_of_ranks, 3)  # each rank calls sum_of_ranks(3); the list has one result per rank
    """

    def __init__(self, size: int, backend: str = "gloo", threads: int = 1) -> None:
        """Describe the ranks; none starts before the first `run`.

        Args:
            size: number of ranks.
            backend: "gloo", or "nccl", where rank i takes GPU i.
            threads: CPU threads of each rank.
        """
        self.size, self._backend, self._threads = size, backend, threads
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: Path | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 300.0) -> list[Any]:
        """Call `function(*args)` on every rank at once; return their results in rank order.

        Args:
            function: defined at the top of a module, a test file, or a script that calls this under
                ``if __name__ == "__main__"``. It asks `torch.distributed` which rank it is.
            args: its arguments. They and the result must pickle; tensors arrive as CPU copies.
            timeout_s: all ranks are killed after this time.

        Raises:
            RankError: the first failure, or the ranks that had not answered in time.
            ValueError: the function is a notebook's own, which ranks cannot import.
        """
        if getattr(sys.modules[function.__module__], "__file__", None) is None:
            raise ValueError(f"ranks: {function.__qualname__} is of this notebook; put it into a module")
        deadline = time.monotonic() + timeout_s
        if not self._processes:
            self._start(function.__module__)
            deadline += START_S
        code = sys.modules[function.__module__].__file__
        message = (function.__module__, code, function.__qualname__, pickle.dumps(args))
        try:
            for pipe in self._pipes:
                pipe.send(message)
            return self._collect(function.__qualname__, deadline)
        except BaseException as error:
            self._end(grace_s=0)
            if isinstance(error, BrokenPipeError):
                raise RankError(f"{function.__qualname__}: a rank had died before it could be called") from None
            raise

    def close(self) -> None:
        """End the ranks; idle ones end by themselves, others are killed."""
        self._end(grace_s=5)

    def _end(self, grace_s: float) -> None:
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + grace_s
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0))
            process.kill()
            process.join(5)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes, self._folder = [], [], None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, where: TracebackType | None) -> None:
        self.close()

    def _start(self, module: str) -> None:
        context = multiprocessing.get_context("forkserver")
        # Beside what every rank needs, the first function's module: a test's or a script's is left to the ranks.
        context.set_forkserver_preload(["moelab.engine.preload", *([module] if module.startswith("moelab.") else [])])
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            args = (rank, self.size, self._backend, self._threads, str(self._folder / "rendezvous"), theirs)
            process = context.Process(target=_serve, args=args, daemon=True, name=f"rank {rank}")
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, name: str, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < self.size:
            waiting: dict[Any, int] = {self._pipes[rank]: rank for rank in range(self.size) if rank not in results}
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
            if not ready:
                raise RankError(f"{name}: ranks {sorted(waiting.values())} of {self.size} did not answer in time")
            pipe: Any
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    failure, result = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    raise self._death(name, rank, 5) from None
                if failure:
                    for other in waiting.values():  # a rank that died is the cause of its neighbours' failures
                        self._processes[other].join(0.2)
                        if self._processes[other].exitcode is not None:
                            raise self._death(name, other, 0)
                    raise RankError(f"{name}: rank {rank} of {self.size} failed\n{failure}")
                results[rank] = result
        return [results[rank] for rank in range(self.size)]

    def _death(self, name: str, rank: int, patience_s: float) -> RankError:
        self._processes[rank].join(patience_s)
        return RankError(f"{name}: rank {rank} of {self.size} died with exit code {self._processes[rank].exitcode}")


def identity_experts(rows_RM: Tensor, offsets_E1: Tensor) -> Tensor:
    """Return the rows: experts that compute nothing, to test or measure the exchange around them."""
    return rows_RM


def run_on_ranks(
    size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 300.0, backend: str = "gloo"
) -> list[Any]:
    """Call `function(*args)` once on `size` new ranks; see `Ranks.run`."""
    with Ranks(size, backend) as ranks:
        return ranks.run(function, *args, timeout_s=timeout_s)


def _serve(rank: int, size: int, backend: str, threads: int, rendezvous: str, pipe: Connection) -> None:
    """Run, on a rank, the functions that come through the pipe, until it closes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ready = False
    while True:
        try:
            module, code, name, args = pipe.recv()
        except EOFError:
            return  # without destroying the process group, which could wait for ranks that are gone
        try:
            if not ready:
                if backend == "nccl":
                    torch.cuda.set_device(rank)
                timeout = datetime.timedelta(seconds=START_S)
                dist.init_process_group(
                    backend, init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timeout
                )
                ready = True
            function = _module(module, code)
            for part in name.split("."):
                function = getattr(function, part)
            answer = pickle.dumps((None, function(*pickle.loads(args))))
        except BaseException:
            answer = pickle.dumps((traceback.format_exc(), None))
        # Closed groups hold their threads until the objects around them are gone, and each of gloo's threads wakes
        # 100 times a second.
        gc.collect()
        try:
            pipe.send_bytes(answer)
        except OSError:
            return


def _module(name: str, code: str | None) -> Any:
    """Return the module of a function; test files are in no package, so they are found by path and keep their name."""
    if name not in sys.modules:
        try:
            return importlib.import_module(name)
        except ImportError:
            spec: Any = importlib.util.spec_from_file_location(name, code)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
