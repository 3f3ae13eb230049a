"""Compare the training speed of two models in sessions: sets of new processes, in which the two train in turns.

The rounds of one session share its processes and their memory, so they are no independent samples; sessions are.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from moelab.bench import inputs
from moelab.bench.inputs import TextBatches
from moelab.config import ModelConfig, ParallelConfig, TrainConfig
from moelab.engine.mesh import Mesh
from moelab.engine.testing import Ranks
from moelab.training.loop import Trainer, Window

Side = tuple[ModelConfig, TrainConfig]
"""A model and how it is trained."""

_TRAINERS: dict[int, tuple[Trainer, Iterator[int]]] = {}
"""On a rank: the trainers of the two sides, kept between the rounds of a session."""


def _seconds(number: int, side: Side, ranks: int, steps: int) -> float:
    """On a rank: return the seconds of some training steps of a side, after one step to warm up."""
    model, train = side
    if number not in _TRAINERS:
        torch.set_num_threads(1)
        mesh = Mesh(ParallelConfig(data=ranks), model.experts)
        batches = TextBatches(train.batch_size, model.context, model.vocab, mesh.data.index, mesh.data.size)
        _TRAINERS[number] = (Trainer(model, train, batches, model.context, mesh), itertools.count())
    trainer, numbers = _TRAINERS[number]
    window = Window()
    trainer.step(next(numbers), window)
    started = time.perf_counter()
    for _ in range(steps):
        trainer.step(next(numbers), window)
    return time.perf_counter() - started


def speed_ratios(first: Side, second: Side, ranks: int, count: int, steps: int, rounds: int) -> list[list[float]]:
    """Measure the training speed of `first` over `second` on ranks of this machine.

    The ranks share a step's batch and spread its experts.

    Args:
        first, second: the two sides; they take turns in who begins a round.
        ranks: a divisor of the batch and of the experts.
        count: sessions.
        steps, rounds: measured steps of a side in a round; rounds of a session.

    Returns:
        The ratio of speeds of each round, by session.
    """
    inputs.text()  # once, before the ranks ask for it
    sides = [(model, replace(train, micro_batch=train.batch_size // ranks)) for model, train in (first, second)]
    found = []
    for _ in range(count):
        ratios = []
        with Ranks(ranks) as group:
            for number in range(rounds + 1):
                spent = {}
                for i in (0, 1) if number % 2 else (1, 0):
                    spent[i] = max(group.run(_seconds, i, sides[i], ranks, steps, timeout_s=600))
                if number:  # the first round warms up
                    ratios.append(spent[1] / spent[0])
        found.append(ratios)
    return found
