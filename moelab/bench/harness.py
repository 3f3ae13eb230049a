"""Time candidates against each other: what all benchmarks share.

A benchmark declares its candidates, the inputs of a round and the floor. `in_turns` gives every candidate the same
inputs in a round, new inputs in the next one, and begins each round with another candidate, so that other load of the
machine meets all of them alike. A *row* (`Row`) is one candidate of one case: the median over rounds with the least
and the greatest, the ratio to one candidate, taken round by round, and the ratio to the *floor*, the least time that
the counted work (FLOPs, bytes, messages) takes at the rates measured in the same run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from moelab import machine, terminal
from moelab.files import write_text
from moelab.models.products import fastest_products

LONG_S = 10.0
"""Rounds that take longer are announced."""

X = TypeVar("X")
"""The inputs of a round."""
Name = TypeVar("Name")
"""What one turn measures."""


@dataclass(frozen=True)
class Timing:
    """How candidates are timed.

    Attributes:
        rounds: times that every candidate has its turn.
        device: "cpu" or "cuda"; a time ends when the device is done.
        clock: "wall", or "cpu" for the processor time of this process, which other programs' load disturbs less. It
            adds up the time of all threads, so it needs one thread.
        warm_up: rounds that are not counted.
        budget_s: no new round begins after that long, once three are counted.
        longest_s: a candidate whose turn takes longer than that, and over ten times the first candidate's, while
            warming up is left out, with a line that says so; None keeps all of them.
        rough: measure the machine's rates of copying, reading and products on small arrays, which the caches hold: for
            a run that shows only that everything runs.
    """

    rounds: int = 7
    device: str = "cpu"
    clock: Literal["wall", "cpu"] = "wall"
    warm_up: int = 2
    budget_s: float = 60.0
    longest_s: float | None = None
    rough: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"bench: rounds must be at least 1, got {self.rounds}")
        if self.clock == "cpu" and self.device != "cpu":
            raise ValueError(f"bench: processor time does not measure {self.device}; use wall-clock time")

    def check_threads(self, threads: int) -> None:
        """Raise ValueError if the clock cannot time that many threads."""
        if threads < 1:
            raise ValueError(f"bench: threads must be at least 1, got {threads}")
        if self.clock == "cpu" and threads > 1:
            raise ValueError(f"bench: processor time needs 1 thread, got {threads}")

    def seconds(self, call: Callable[[X], Any], inputs: X, calls: int = 1) -> float:
        """Return the time of a call, the mean of `calls` in a row."""
        read = time.process_time if self.clock == "cpu" else time.perf_counter
        _synchronise(self.device)
        started = read()
        for _ in range(calls):
            call(inputs)
        _synchronise(self.device)
        return (read() - started) / calls


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(
    candidates: Mapping[Name, Callable[[X], Any]],
    inputs: Callable[[int], X],
    timing: Timing,
    sample: Callable[[Callable[[X], Any], X], Any] | None = None,
    may_fail: Collection[Name] = (),
) -> dict[Name, list[Any]]:
    """Return what each candidate's turns measured, one value a round; without those that are left out.

    Args:
        candidates: called with the round's inputs.
        inputs: makes the inputs of a round (0, 1, ...; the first ones warm up), outside the measured time.
        sample: measures one call of a candidate, as a number or in numbers; None is `timing.seconds`.
        may_fail: candidates that are left out, with a line that says so, if they raise while warming up: other
            libraries', which may not run in these versions, on this device or at this size.
    """
    take, round_s = sample or timing.seconds, 0.0
    names = list(candidates)
    turns: dict[Name, list[Any]] = {name: [] for name in names}
    started, first_s = time.monotonic(), 0.0

    def leave_out(name: Name, reason: str) -> None:
        left_out(f"{name} {reason}")
        names.remove(name)
        del turns[name]

    for i in range(timing.warm_up + timing.rounds):
        counted = i - timing.warm_up
        if counted == 0:
            started = time.monotonic()
            _announce(len(names), timing, round_s)
        if counted >= 3 and time.monotonic() - started > timing.budget_s:
            break
        given, round_began = inputs(i), time.monotonic()
        first = i % len(names)
        for name in names[first:] + names[:first]:
            began = time.monotonic()
            try:
                measured = take(candidates[name], given)
            except Exception as error:
                if counted >= 0 or name not in may_fail:
                    raise
                leave_out(name, f"raises {type(error).__name__}: {terminal.one_line(error)}")
                continue
            took_s = time.monotonic() - began
            if i == 0 and name == names[0]:
                first_s = took_s
            if counted >= 0:
                turns[name].append(measured)
            elif timing.longest_s is not None and took_s > max(timing.longest_s, 10 * first_s):
                leave_out(name, f"takes {took_s:.2g} s a turn, {names[0]} {first_s:.2g} s")
        round_s = time.monotonic() - round_began
    return turns


def left_out(text: str) -> None:
    """Print which candidate is left out, and why."""
    terminal.console().print(f"left out: {text}", markup=False)


def _announce(candidates: int, timing: Timing, round_s: float) -> None:
    """Print how long the rounds will take, by the last one of the warm-up, if that is long; on ranks the first does."""
    expected_s = min(round_s * timing.rounds, max(timing.budget_s, 3 * round_s))
    if expected_s >= LONG_S and not (dist.is_initialized() and dist.get_rank()):
        about = terminal.duration(expected_s)
        terminal.say(f"  {candidates} candidates in turns, up to {timing.rounds} rounds: about {about}")


@dataclass(frozen=True)
class Row:
    """One candidate in one case. Times are in milliseconds; `min` and `max` are the least and the greatest over rounds.

    Attributes:
        case: sizes, dtype, threads and whatever else tells the case from others.
        candidate: its name.
        rounds_ms: the time of each round.
        against: the candidate that `ratio` compares with, round by round.
        floor_ms, floor_ratio: the least time that the counted work takes, and the median over it.
        clock: see `Timing`.
        inputs: where the inputs come from.
        device: the processor with its threads, or the GPU.
        numbers: what this benchmark measures beside the time.
    """

    case: dict[str, Any]
    candidate: str
    median_ms: float
    min_ms: float
    max_ms: float
    rounds: int
    rounds_ms: tuple[float, ...]
    against: str
    ratio: float
    ratio_min: float
    ratio_max: float
    floor_ms: float
    floor_ratio: float
    clock: str
    inputs: str
    device: str
    numbers: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Return one flat JSON object: the case, the times, the numbers."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("case", "numbers")}
        return {**self.case, **own, "rounds_ms": list(self.rounds_ms), **self.numbers}


def rows(
    case: Mapping[str, Any],
    seconds: Mapping[str, Sequence[float]],
    *,
    against: str,
    floor_s: float | Mapping[str, float],
    timing: Timing,
    inputs: str,
    device: str = "",
    numbers: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Row]:
    """Return a row for each candidate of a case.

    Args:
        seconds: candidate -> time of each round.
        against: the candidate that the others are compared with.
        floor_s: of all candidates, or by candidate.
        device: empty is this machine's.
        numbers: candidate -> `Row.numbers`.
    """
    measured = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[against], strict=True)]
        median, floor = statistics.median(times), floor_s[name] if isinstance(floor_s, Mapping) else floor_s
        measured.append(
            Row(
                case=dict(case),
                candidate=name,
                median_ms=median * 1e3,
                min_ms=min(times) * 1e3,
                max_ms=max(times) * 1e3,
                rounds=len(times),
                rounds_ms=tuple(t * 1e3 for t in times),
                against=against,
                ratio=statistics.median(ratios),
                ratio_min=min(ratios),
                ratio_max=max(ratios),
                floor_ms=floor * 1e3,
                floor_ratio=median / max(floor, 1e-12),
                clock=timing.clock,
                inputs=inputs,
                device=device or device_name(timing.device),
                numbers=dict((numbers or {}).get(name, {})),
            )
        )
    return measured


def show(title: str, rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]] | None = None) -> None:
    """Print the rows of a case, their inputs below.

    Args:
        columns: heading -> text of a row, for what a benchmark shows beside the times; empty columns are left out.
    """
    first = rows[0]
    extra = {heading: text for heading, text in (columns or {}).items() if any(map(text, rows))}
    ms = "processor ms" if first.clock == "cpu" else "ms"
    heads = ("candidate", f"median {ms}", "min to max", f"time / {first.against}", "min to max", "time / floor")
    view = terminal.table(*heads, *extra, title=title)
    for row in rows:
        view.add_row(
            row.candidate,
            f"{row.median_ms:.3g}",
            f"{row.min_ms:.3g} to {row.max_ms:.3g}",
            f"{row.ratio:.2f}",
            f"{row.ratio_min:.2f} to {row.ratio_max:.2f}",
            f"{row.floor_ratio:.2f}",
            *(text(row) for text in extra.values()),
        )
    console = terminal.console()
    console.print(view)
    console.print(f"{first.rounds} rounds; inputs: {first.inputs}; {first.device}\n", highlight=False)


def write(rows: Sequence[Row], path: Path) -> list[dict[str, Any]]:
    """Write rows as JSON lines, replacing the file in one step; return them as they are in the file."""
    objects = [row.json() for row in rows]
    write_text(path, "".join(json.dumps(value) + "\n" for value in objects))
    terminal.say(f"{len(objects)} rows in {path}")
    return objects


def span(rows: Sequence[Mapping[str, Any]], candidate: str) -> str:
    """Return the least and the greatest median ratio of a candidate over all cases, as "1.0 to 2.4".

    Args:
        rows: as read from a file.
    """
    ratios = [row["ratio"] for row in rows if row["candidate"] == candidate]
    return f"{min(ratios):.1f} to {max(ratios):.1f}"


# -- the machine -----------------------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    """Return the GPU's name, or the processor's with the threads of this process."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    threads = torch.get_num_threads()
    return f"{machine.cpu()}, {threads} thread{'s' if threads > 1 else ''}"


def product_rate(dtype: torch.dtype, timing: Timing, largest: int | None = None) -> float:
    """Return FLOP/s of an n x n x n matrix product, best of five, by the fastest library (`fastest_products`).

    n is `largest` (by default 2048, on a GPU 8192: a shorter product would be timed with its launch), or less where
    that would take long (bf16 on a processor that has no instructions for it).
    """
    largest = largest or (256 if timing.rough else 8192 if timing.device == "cuda" else 2048)
    n = min(256, largest)
    with fastest_products():
        while True:
            a, b = (torch.randn(n, n, device=timing.device).to(dtype) for _ in range(2))
            a @ b
            if n == largest or _best(functools.partial(torch.matmul, a, b), timing, 1) > 0.1:
                break
            n = min(2 * n, largest)
        return 2 * n**3 / _best(lambda: a @ b, timing, 5)


def copy_rate(timing: Timing, size: int | None = None) -> float:
    """Return bytes/s, read plus written, of copying memory larger than the caches, best of five."""
    size = size or _large(timing)
    a = torch.empty(size, dtype=torch.uint8, device=timing.device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * size / _best(lambda: b.copy_(a), timing, 5)


def _large(timing: Timing) -> int:
    """Return the bytes of memory larger than the caches, whose reading takes much longer than a launch on a GPU."""
    if timing.rough:
        return 1 << 22
    return 1 << 30 if timing.device == "cuda" else 1 << 28


def reader(timing: Timing, size: int | None = None) -> Callable[[], float]:
    """Return a function that measures bytes/s of reading memory, the best of seven times three operations.

    Which operation reads fastest depends on the machine: a sum, or a matrix times a vector by rows or by columns, as
    the products of one row of a decoding step do. On a shared machine the rate changes from minute to minute.
    """
    size = size or _large(timing)
    x = torch.ones(size // 4, device=timing.device)
    wide, tall = x.view(-1, 2048), x.view(2048, -1)
    one = torch.ones(2048, device=timing.device)
    calls = (x.sum, lambda: torch.mv(wide, one), lambda: torch.mv(tall.t(), one))
    read: float = size
    return lambda: read / min(_best(call, timing, 7) for call in calls)


def _best(call: Callable[[], Any], timing: Timing, times: int) -> float:
    return min(timing.seconds(lambda _: call(), None) for _ in range(times))


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of torch's CPU threads while the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows_of_ranks(
    experiment: str, file: str | None, bench: Literal["decode", "exchange"], by: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the rows that `srun moelab bench` wrote to a file, of one run or several joined, fewest ranks first.

    Args:
        by: what tells the rows of a candidate apart, such as ranks.

    Raises:
        ValueError: one line: there is no such file or row, or there are two that `by` does not tell apart.
    """
    mark = {"decode": "empty_collective_ms", "exchange": "alpha_ms"}[bench]
    if not file:
        raise ValueError(
            f"{experiment}: scale paper needs -p measured_file=FILE, the {bench}.jsonl of `srun moelab bench {bench}`"
        )
    try:
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON lines"
        raise ValueError(f"{experiment}: {file}: {reason}") from None
    rows = [row for row in rows if isinstance(row, dict) and mark in row]
    if not rows:
        raise ValueError(f"{experiment}: {file}: no rows of ranks in it")
    seen = set[tuple[Any, ...]]()
    for row in rows:
        if (key := (*(row.get(column) for column in by), row.get("candidate"))) in seen:
            of = ", ".join(f"{column} {value}" for column, value in zip(by, key, strict=False))
            raise ValueError(f"{experiment}: {file}: two rows of {key[-1]} at {of}; keep the one that is to be shown")
        seen.add(key)
    return [{"name": row.get("model", ""), **row} for row in sorted(rows, key=lambda row: row["ranks"])]
