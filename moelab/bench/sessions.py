"""Compare the training speed of two models on ranks of this machine, for the experiment top2-vs-residual.

A session is a set of new processes in which the two models train in turns. The rounds of one session share its
processes and their memory, so they are no independent samples; sessions are.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace

from moelab.bench import harness, inputs
from moelab.bench.harness import Timing
from moelab.config import ModelConfig, TrainConfig
from moelab.config.parallel import ParallelConfig
from moelab.engine.mesh import Mesh
from moelab.engine.testing import Ranks
from moelab.training.metrics import Window
from moelab.training.trainer import Trainer

Side = tuple[ModelConfig, TrainConfig]
"""A model and how it is trained."""

_TRAINERS: dict[tuple[Side, int], tuple[Trainer, Iterator[int]]] = {}
"""On a rank: the trainers by model and number of ranks, kept between rounds."""


def _steps(side: Side, ranks: int, steps: int) -> float:
    """On a rank: return the seconds of a step, of some on its part of batches of text, after one that warms up."""
    if (side, ranks) not in _TRAINERS:
        model, config = side
        mesh = Mesh(ParallelConfig(data=ranks), model.experts)
        batches = inputs.TextBatches(config.batch_size, model.context, model.vocab, mesh.data.index, mesh.data.size)
        _TRAINERS[side, ranks] = (Trainer(model, config, batches, model.context, mesh), itertools.count())
    trainer, counter = _TRAINERS[side, ranks]
    window = Window()
    trainer.step(next(counter), window)
    started = time.perf_counter()
    for _ in range(steps):
        trainer.step(next(counter), window)
    return (time.perf_counter() - started) / steps


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
    return max(group.run(_steps, side, ranks, steps, timeout_s=600))
