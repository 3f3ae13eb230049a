"""Ranks as threads of one process, to test the exchange among hundreds of ranks and to count what it sends.

    world = World(ParallelConfig(data=256, exchange="hierarchical"), experts=256)
    results = world.run(function)      # function(rank, groups) on every rank, at once

The code that runs is `moelab.engine.exchange`; only the collectives underneath it are replaced, by copies between
threads. Times measured here say nothing about real ranks.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ReduceOp

from moelab import kernels
from moelab.config.parallel import ParallelConfig
from moelab.engine.collectives import Collective, Traffic, observe
from moelab.engine.exchange import Exchange
from moelab.engine.groups import Group
from moelab.engine.mesh import ExpertGroups
from moelab.engine.testing import identity_experts
from moelab.models.routing import Routing

Result = TypeVar("Result")
WAIT_S = 60.0  # for the slowest thread at one collective


class Meeting:
    """A place where some threads hand each other tensors."""

    def __init__(self, size: int) -> None:
        self._slots: list[Any] = [None] * size
        self._barrier = threading.Barrier(size)

    def swap(self, index: int, item: Any) -> list[Any]:
        """Return everyone's items; they may be read until the next call of `done`."""
        self._slots[index] = item
        self._barrier.wait(WAIT_S)
        return list(self._slots)

    def done(self) -> None:
        """Wait until all threads have read the items."""
        self._barrier.wait(WAIT_S)

    def abort(self) -> None:
        """Make all threads that wait, now or later, raise `BrokenBarrierError`."""
        self._barrier.abort()


@dataclass(frozen=True)
class ThreadGroup(Group):
    """A `Group` of threads; `handle` is their `Meeting`."""

    def all_to_all_single(
        self, output: Tensor, input: Tensor, receive: list[int] | None, send: list[int] | None
    ) -> None:
        """Copy rows between threads; see `Group.all_to_all_single`."""
        pieces = input.split(send) if send is not None else input.chunk(self.size)
        theirs = [pieces_of[self.index] for pieces_of in self.handle.swap(self.index, pieces)]
        if receive is not None and [len(t) for t in theirs] != receive:
            raise ValueError(f"all-to-all: expected {receive} rows, was sent {[len(t) for t in theirs]}")
        output.copy_(torch.cat(theirs))
        self.handle.done()

    def all_reduce(self, tensor: Tensor, op: Any = None, asynchronous: bool = False) -> None:
        """Add up the threads' tensors, or take their maximum; see `Group.all_reduce`."""
        theirs = torch.stack(self.handle.swap(self.index, tensor))
        self.handle.done()
        tensor.copy_(theirs.amax(0) if op == ReduceOp.MAX else theirs.sum(0))


class World:
    """All ranks' groups of one MoE layer of `experts` experts."""

    def __init__(self, config: ParallelConfig, experts: int) -> None:
        self.config = config
        self._meetings: dict[tuple[int, ...], Meeting] = {}
        layout = config.experts(experts)
        self.groups = [
            ExpertGroups.make(config, layout, rank, functools.partial(self._group, rank))
            for rank in range(config.ranks)
        ]

    def _group(self, rank: int, partition: np.ndarray) -> Group:
        ranks = tuple(partition[(partition == rank).any(axis=1)][0].tolist())
        if len(ranks) == 1:
            return Group.alone(rank)
        return ThreadGroup(ranks, ranks.index(rank), self._meetings.setdefault(ranks, Meeting(len(ranks))))

    def run(self, function: Callable[[int, ExpertGroups], Result]) -> list[Result]:
        """Call `function(rank, groups)` on every rank at once; return results in rank order.

        The first failure frees the waiting threads and is raised here.
        """
        failures: list[BaseException] = []

        def guarded(rank: int, groups: ExpertGroups) -> Any:
            try:
                return function(rank, groups)
            except BaseException as error:
                failures.append(error)
                for meeting in self._meetings.values():
                    meeting.abort()

        with ThreadPoolExecutor(self.config.ranks) as pool:
            results = list(pool.map(guarded, range(self.config.ranks), self.groups))
        if failures:
            raise failures[0]
        return results

    def count(self, function: Callable[[int, ExpertGroups], Result]) -> tuple[list[Result], list[Traffic]]:
        """Do what `run` does; also return what each rank sent."""
        traffic = [Traffic(self.config.ranks_per_node) for _ in self.groups]

        def count(call: Collective) -> None:
            traffic[call.group.rank](call)

        with observe(count):
            return self.run(function), traffic


def traffic(config: ParallelConfig, experts: int, width: int = 1) -> list[Traffic]:
    """Count what each rank sends in one layer's forward pass.

    Each tensor group has one token, of `width` fp32 numbers, for every expert.
    """
    x_SM = torch.ones(experts, width)
    logits_SE = 50 * torch.eye(experts)

    @torch.no_grad()
    def forward(rank: int, groups: ExpertGroups) -> None:
        Exchange(groups, config)(x_SM, Routing(*kernels.gate(logits_SE, 1)), identity_experts)

    return World(config, experts).count(forward)[1]
