"""`moelab bench memory`: what training gains where freed memory is kept (`process.keep_freed_memory`).

A twin trains in two processes of its own, as runs do, one of which keeps the memory that a step frees; they take turns
on the same batches. In one process with other models, as in `moelab bench train`, most of the memory stays in use and
neither is seen.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from moelab import terminal
from moelab.bench import apart, harness, inputs
from moelab.bench.harness import Row, Timing
from moelab.bench.train import SEQUENCES, TEACHERS, check, training_loop, twin
from moelab.config import TrainConfig
from moelab.inference.text import DTYPES

KEPT, RETURNED = "kept", "returned"
"""The candidates: freed memory is kept, or returned to the system as the C library does by default."""


def measure(width: int, family: str, dtype: str, *, steps: int, threads: int, timing: Timing) -> list[Row]:
    """Return the rows of both candidates: times are those of a step; faults and peak memory are in the numbers."""
    torch.set_num_threads(threads)
    model, config = twin(family, width), TrainConfig(batch_size=SEQUENCES, dtype=dtype, threads=threads)
    make = functools.partial(training_loop, model, config, inputs.CONTEXT)
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(apart.training(n, make, threads, n == KEPT)) for n in (RETURNED, KEPT)]
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
    cases = [(width, family, dtype) for width in widths for family in families for dtype in dtypes]
    name = lambda one: "freed memory while training {1}, {0} wide, {2}".format(*one)  # noqa: E731
    for one in terminal.announced(cases, name):
        rows = case(*one)
        harness.show(name(one), rows, columns)
        found += rows
    if out is not None:
        harness.write(found, out / "memory.jsonl")
