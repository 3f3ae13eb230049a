"""`moelab bench memory`: what training gains where freed memory is kept (`moelab.machine.keep_freed_memory`).

A twin trains in two processes of its own, as runs do, one of which keeps the memory that a step frees; they take turns
on the same batches. In one process with other models, as in `moelab bench train`, most of the memory stays in use and
neither is seen.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

from moelab import machine
from moelab.bench import harness, inputs
from moelab.bench.harness import Row, Timing
from moelab.bench.train import SEQUENCES, TEACHERS, check, training_loop, twin
from moelab.config import TrainConfig
from moelab.inference.text import DTYPES

KEPT, RETURNED = "kept", "returned"
"""The candidates: freed memory is kept, or returned to the system as the C library does by default."""


class Turn(NamedTuple):
    """Hold what a process measured in its turn, for each step."""

    seconds: float
    faults: float
    """Pages that the system had to provide."""
    peak_bytes: int
    """Largest memory of the process so far, in all."""


@dataclass(frozen=True)
class Training:
    """Hold a process that trains a twin when asked."""

    name: str
    process: BaseProcess
    link: Connection

    def turn(self, numbers: range) -> Turn:
        """Train the steps of those numbers and return what was measured; raise ValueError if the process has died."""
        try:
            self.link.send(numbers)
            return self.link.recv()
        except (EOFError, OSError):
            self.process.join(5)
            raise ValueError(
                f"bench memory: the process with memory {self.name} died (exit code {self.process.exitcode})"
            ) from None


def _train(link: Connection, width: int, family: str, config: TrainConfig, keeps: bool) -> None:
    """Train in this process, the steps that are asked for, until None is."""
    if keeps:
        machine.keep_freed_memory()
    torch.set_num_threads(config.threads)
    step = training_loop(twin(family, width), config, inputs.CONTEXT)
    while (numbers := link.recv()) is not None:
        faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        for number in numbers:
            step(number)
        seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        link.send(Turn(seconds / len(numbers), (used.ru_minflt - faults) / len(numbers), used.ru_maxrss << 10))


@contextlib.contextmanager
def _training(name: str, *arguments: object) -> Iterator[Training]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_train, args=(theirs, *arguments, name == KEPT), daemon=True)
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


def measure(width: int, family: str, dtype: str, *, steps: int, threads: int, timing: Timing) -> list[Row]:
    """Return the rows of both candidates: times are those of a step; faults and peak memory are in the numbers."""
    torch.set_num_threads(threads)
    model, config = twin(family, width), TrainConfig(batch_size=SEQUENCES, dtype=dtype, threads=threads)
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(_training(name, width, family, config)) for name in (RETURNED, KEPT)]
        turns = harness.in_turns(
            {training.name: training.turn for training in both},
            lambda i: range(i * steps, (i + 1) * steps),
            timing,
            sample=lambda turn, numbers: turn(numbers),
        )
    tokens = SEQUENCES * inputs.CONTEXT
    rate = harness.product_rate(DTYPES[dtype], timing)
    return harness.rows(
        {"width": width, "family": family, "dtype": dtype, "sequences": SEQUENCES, "steps": steps, "threads": threads},
        {name: [turn.seconds for turn in rounds] for name, rounds in turns.items()},
        against=RETURNED,
        floor_s=tokens * model.flops_per_token() / rate,
        timing=timing,
        inputs=f"{SEQUENCES} x {inputs.CONTEXT} tokens of {inputs.TEXT}",
        numbers={
            name: {
                "faults_per_step": statistics.median(turn.faults for turn in rounds),
                "peak_bytes": max(turn.peak_bytes for turn in rounds),
            }
            for name, rounds in turns.items()
        },
    )


def main(
    *,
    widths: Sequence[int],
    families: Sequence[str],
    dtypes: Sequence[str],
    steps: int,
    threads: int,
    timing: Timing,
    out: Path | None,
) -> None:
    """Measure, print and, with `out` (a folder), write `memory.jsonl`.

    Raises:
        ValueError: a family, dtype or width that there is not, no steps, or a process died.
    """
    check("bench memory", widths, families, dtypes, steps)
    if taught := [name for name in families if name in TEACHERS]:
        raise ValueError(f"bench memory: {taught[0]!r} has a teacher, which it does not measure")
    found: list[Row] = []
    columns = {
        "page faults / step": lambda row: f"{row.numbers['faults_per_step']:,.0f}",
        "peak memory": lambda row: f"{row.numbers['peak_bytes'] / 2**20:,.0f} MiB",
    }
    case = functools.partial(measure, steps=steps, threads=threads, timing=timing)
    for width in widths:
        for family in families:
            for dtype in dtypes:
                rows = case(width, family, dtype)
                harness.show(f"freed memory while training {family}, {width} wide, {dtype}", rows, columns)
                found += rows
    if out is not None:
        harness.write(found, out / "memory.jsonl")
