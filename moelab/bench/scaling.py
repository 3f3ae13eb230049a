"""`moelab bench scaling`: weak scaling of training over gloo ranks of this machine, and where the time goes.

Every rank keeps the same number of tokens; P ranks do P times the work. Three ways take turns: one rank alone; P
independent ranks at once, which share the machine's memory and caches but no tokens (what the hardware allows); and P
ranks training one model. "together" over "alone" is the inverse of the usual efficiency, over "independent" it is what
the engine itself costs. Time inside communication calls is counted by kind on rank 0: it includes waiting for slower
ranks. The floor is the rank alone.

`speed_ratios` compares the training speed of two models on ranks in sessions: sets of new processes, in which the two
train in turns. The rounds of one session share its processes and their memory, so they are no independent samples;
sessions are.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from moelab import machine, terminal
from moelab.bench import harness, inputs
from moelab.bench.harness import Row, Timing
from moelab.config import ModelConfig, RoutingConfig, TrainConfig
from moelab.config.parallel import ParallelConfig
from moelab.engine.collectives import Collective, observe
from moelab.engine.mesh import Mesh
from moelab.engine.testing import Ranks
from moelab.training.metrics import Window
from moelab.training.trainer import Trainer

KINDS = ("computation", "exchange", "gradients", "agreement")
Step = tuple[float, dict[str, float]]
"""Seconds a step, and seconds of it in communication by kind."""


@contextlib.contextmanager
def _clock_calls() -> Iterator[dict[str, float]]:
    """Yield the seconds that this rank spends in collectives, by kind, while the context lasts."""
    seconds = {"exchange": 0.0, "gradients": 0.0, "agreement": 0.0}
    kinds = {"gradients": "gradients", "norm": "agreement", "metrics": "agreement"}

    @contextlib.contextmanager
    def clock(call: Collective) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds[kinds.get(call.kind, "exchange")] += time.perf_counter() - started

    with observe(clock):
        yield seconds


Side = tuple[ModelConfig, TrainConfig]
"""A model and how it is trained."""

_TRAINERS: dict[tuple[Side, int], tuple[Trainer, Iterator[int]]] = {}
"""On a rank: the trainers by model and number of ranks, kept between rounds."""


def _steps(side: Side, ranks: int, steps: int) -> Step:
    """On a rank: train some steps on its part of batches of text, after one that warms up."""
    if (side, ranks) not in _TRAINERS:
        model, config = side
        mesh = Mesh(ParallelConfig(data=ranks), model.experts)
        batches = inputs.TextBatches(config.batch_size, model.context, model.vocab, mesh.data.index, mesh.data.size)
        _TRAINERS[side, ranks] = (Trainer(model, config, batches, model.context, mesh), itertools.count())
    trainer, counter = _TRAINERS[side, ranks]
    window = Window()
    trainer.step(next(counter), window)
    with _clock_calls() as seconds:
        started = time.perf_counter()
        for _ in range(steps):
            trainer.step(next(counter), window)
        total = time.perf_counter() - started
    return total / steps, {kind: value / steps for kind, value in seconds.items()}


def measure(*, models: list[str], ranks: int, per_rank: int, steps: int, rounds: int) -> list[Row]:
    """Return three rows a model, one for each way: times are those of a step, the slowest rank's.

    Args:
        models: names that `ModelConfig.parse` understands.
        ranks: P.
        per_rank: sequences a rank and step.
        steps, rounds: measured steps of each way in a round; rounds.
    """
    inputs.text()  # once, before the ranks ask for it
    timing = Timing(rounds, warm_up=1, budget_s=math.inf)
    with contextlib.ExitStack() as stack:
        joint = stack.enter_context(Ranks(ranks))
        singles = [stack.enter_context(Ranks(1)) for _ in range(ranks)]
        pool = stack.enter_context(ThreadPoolExecutor(ranks))

        def run(on: Ranks, model: str, data: int) -> list[Step]:
            config = TrainConfig(batch_size=per_rank * data, micro_batch=per_rank)
            side = (ModelConfig.parse(model, routing=RoutingConfig(drop_tokens=False)), config)
            return on.run(_steps, side, data, steps, timeout_s=600)

        ways: dict[str, Callable[[str], list[Step]]] = {
            "alone": lambda model: run(singles[0], model, 1),
            "independent": lambda model: [
                f for measured in pool.map(lambda on: run(on, model, 1), singles) for f in measured
            ],
            "together": lambda model: run(joint, model, ranks),
        }
        rows = []
        for model in terminal.announced(models, lambda model: f"training {model} on 1 and {ranks} ranks"):

            def same(_: int, model: str = model) -> str:
                return model

            turns = harness.in_turns(ways, same, timing, lambda way, given: way(given))
            rows += _rows(model, turns, {"ranks": ranks, "sequences_per_rank": per_rank, "steps": steps}, timing)
    return rows


def speed_ratios(first: Side, second: Side, ranks: int, count: int, steps: int, rounds: int) -> list[list[float]]:
    """Return the training speed of `first` over `second` in each round, by session, on ranks of this machine.

    The ranks share a step's batch and spread its experts.

    Args:
        ranks: a divisor of the batch and of the experts.
        count: sessions.
        steps, rounds: measured steps of a side in a round; rounds of a session.
    """
    inputs.text()  # once, before the ranks ask for it
    sides = {
        name: (model, replace(config, micro_batch=config.batch_size // ranks))
        for name, (model, config) in (("first", first), ("second", second))
    }
    timing, measured = Timing(rounds, warm_up=1, budget_s=math.inf), []
    for _ in range(count):
        with Ranks(ranks) as group:
            calls = {name: functools.partial(_slowest, group, side, ranks, steps) for name, side in sides.items()}
            turns = harness.in_turns(calls, lambda i: None, timing, lambda call, given: call(given))
        measured.append([b / a for a, b in zip(turns["first"], turns["second"], strict=True)])
    return measured


def _slowest(group: Ranks, side: Side, ranks: int, steps: int, _: None) -> float:
    return max(seconds for seconds, _ in group.run(_steps, side, ranks, steps, timeout_s=600))


def _rows(model: str, turns: dict[str, list[list[Step]]], case: dict[str, int], timing: Timing) -> list[Row]:
    times = {way: [max(seconds for seconds, _ in measured) for measured in rounds] for way, rounds in turns.items()}
    first = [measured[0] for measured in turns["together"]]
    kinds = {kind: statistics.median(spent[kind] for _, spent in first) for kind in first[0][1]}
    kinds["computation"] = statistics.median(seconds for seconds, _ in first) - sum(kinds.values())
    over = [a / b for a, b in zip(times["independent"], times["together"], strict=True)]
    together = {"seconds_by_kind": kinds, "of_independent": statistics.median(over)}
    together |= {"of_independent_min": min(over), "of_independent_max": max(over)}
    return harness.rows(
        {"model": model, **case},
        times,
        against="alone",
        floor_s=statistics.median(times["alone"]),
        timing=timing,
        inputs=inputs.described("batches of State of the Union text, new each step"),
        device=f"{machine.cpu()}, 1 thread a rank",
        numbers={"together": together},
    )


def main(*, models: list[str], ranks: int, per_rank: int, steps: int, rounds: int, out: Path | None) -> None:
    """Measure, print, and write `scaling.jsonl` into `out` if given."""
    for what, value, least in (("ranks", ranks, 2), ("sequences", per_rank, 1), ("steps", steps, 1)):
        if value < least:
            raise ValueError(f"bench scaling: --{what} must be at least {least}, got {value}")
    for name in models:
        model = ModelConfig.parse(name)
        model.check_layout(ParallelConfig(data=ranks))
    measured = measure(models=models, ranks=ranks, per_rank=per_rank, steps=steps, rounds=rounds)

    def share(row: Row, kind: str) -> str:
        by_kind = row.numbers.get("seconds_by_kind")
        return f"{by_kind[kind] / sum(by_kind.values()):.0%}" if by_kind else ""

    columns = {
        "efficiency": lambda row: f"{1 / row.ratio:.0%}",
        "of independent": lambda row: f"{row.numbers['of_independent']:.0%}" if row.numbers else "",
    }
    columns |= {kind: functools.partial(share, kind=kind) for kind in KINDS}
    for name in models:
        title = f"weak scaling 1 -> {ranks} ranks: {name}, {per_rank} sequences a rank, {steps} steps a round"
        harness.show(title, [row for row in measured if row.case["model"] == name], columns)
    if out is not None:
        harness.write(measured, out / "scaling.jsonl")
