"""Processes of their own for the candidates of a training benchmark, as runs have them.

In one process, models share the allocator's memory and `torch.compile`'s limits. A `Training` builds its candidate in a
process that trains the steps that it is asked for, one candidate at a time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch

from moelab.engine.launch import process as ranks


class Turn(NamedTuple):
    """Hold what a process measured in its turn, for each step."""

    seconds: float
    faults: float
    """Pages that the system had to provide."""
    peak_bytes: int
    """Largest memory of the process so far, in all."""


@dataclass(frozen=True)
class Training:
    """Hold a process that trains when asked."""

    name: str
    process: BaseProcess
    link: Connection

    def turn(self, numbers: Iterable[int]) -> Turn:
        """Train the steps of those numbers and return what was measured; raise ValueError if the process has died."""
        try:
            self.link.send(list(numbers))
            return self.link.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            raise ValueError(f"bench: the process of {self.name!r} died (exit code {code})") from None

    def step(self, number: int) -> None:
        """Train the step of that number; raise ValueError if the process has died."""
        self.turn([number])


def _train(link: Connection, make: Callable[[], Callable[[int], None]], threads: int, keeps_memory: bool) -> None:
    """Train in this process, the steps that are asked for, until None is."""
    if keeps_memory:
        ranks.keep_freed_memory()
    torch.set_num_threads(threads)
    step = make()
    while (numbers := link.recv()) is not None:
        faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        for number in numbers:
            step(number)
        seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        link.send(Turn(seconds / len(numbers), (used.ru_minflt - faults) / len(numbers), used.ru_maxrss << 10))


@contextlib.contextmanager
def training(
    name: str, make: Callable[[], Callable[[int], None]], threads: int, keeps_memory: bool = True
) -> Iterator[Training]:
    """Start a process for the candidate `name`; it ends with the context.

    Args:
        make: returns the candidate's step, in that process; must be picklable.
        keeps_memory: call `moelab.engine.launch.process.keep_freed_memory` there, as runs do.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_train, args=(theirs, make, threads, keeps_memory), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Training(name, process, ours)
    finally:
        with contextlib.suppress(OSError):
            ours.send(None)
        process.join(5)
        process.terminate()
        process.join()
