"""Ranks as threads of one process: the real exchange in worlds of hundreds of ranks, to test it and to count what it sends.

    world = World(ParallelConfig(data=256, exchange="hierarchical"), experts=256)
    traffic = world.run(function)      # function(rank, groups) on every rank, at once

The code that runs is `moelab.engine.exchange`; only the two collectives underneath it are replaced, by copies between threads, while `run`
lasts. Nothing here says anything about time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moelab import kernels
from moelab.config.parallel import ParallelConfig
from moelab.engine.collectives import Traffic
from moelab.engine.exchange import Exchange
from moelab.engine.mesh import ExpertGroups, Group

Result = TypeVar("Result")
WAIT_S = 60.0  # for the slowest thread at one collective


class Meeting:
    """Some threads that hand each other tensors."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self._barrier = threading.Barrier(size)

    def swap(self, index: int, item: Any) -> list[Any]:
        """Everyone's items; they may be read until the next call of `done`."""
        self.slots[index] = item
        self._barrier.wait(WAIT_S)
        return list(self.slots)

    def done(self) -> None:
        self._barrier.wait(WAIT_S)

    def abort(self) -> None:
        self._barrier.abort()


def _all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: Any = None,
) -> None:
    meeting, index = group
    pieces = input.split(input_split_sizes) if input_split_sizes is not None else input.chunk(len(meeting.slots))
    theirs = [pieces_of[index] for pieces_of in meeting.swap(index, pieces)]
    if output_split_sizes is not None and [len(t) for t in theirs] != list(output_split_sizes):
        raise ValueError(f"all-to-all: expected {list(output_split_sizes)} rows, was sent {[len(t) for t in theirs]}")
    output.copy_(torch.cat(theirs))
    meeting.done()


def _all_reduce(tensor: Tensor, group: Any = None) -> None:
    meeting, index = group
    total = torch.stack(meeting.swap(index, tensor)).sum(0)
    meeting.done()
    tensor.copy_(total)


@contextlib.contextmanager
def _between_threads() -> Iterator[None]:
    replaced = {"all_to_all_single": _all_to_all_single, "all_reduce": _all_reduce}
    originals = {name: getattr(dist, name) for name in replaced}
    for name, call in replaced.items():
        setattr(dist, name, call)
    try:
        yield
    finally:
        for name, call in originals.items():
            setattr(dist, name, call)


class World:
    """All ranks' groups of one MoE layer of `experts` experts."""

    def __init__(self, config: ParallelConfig, experts: int) -> None:
        self.config, self.experts = config, experts
        self.layout = config.experts(experts)
        self._grid = self.layout.grid()  # replica, slice, node, local, share
        self._meetings: dict[tuple[int, ...], Meeting] = {}
        self.groups = [self._groups(rank) for rank in range(config.ranks)]

    def _group(self, rank: int, *axes: int) -> Group:
        position = (self._grid == rank).nonzero()
        at = tuple(slice(None) if axis in axes else int(position[axis][0]) for axis in range(5))
        ranks = tuple(self._grid[at].ravel().tolist())
        if len(ranks) == 1:
            return Group(ranks, 0, None)
        meeting = self._meetings.setdefault(ranks, Meeting(len(ranks)))
        return Group(ranks, ranks.index(rank), (meeting, ranks.index(rank)))

    def _groups(self, rank: int) -> ExpertGroups:
        near = (3,) if self.config.coordinated else (3, 4)
        return ExpertGroups(
            self.layout,
            self.layout.position(rank),
            expert=self._group(rank, 2, 3, 4),
            spread=self._group(rank, 2, 3),
            near=self._group(rank, *near),
            far=self._group(rank, 2),
            share=self._group(rank, 4),
            slices=self._group(rank, 1),
            replicas=self._group(rank, 0),
            alike=self._group(rank, 0, 1),
        )

    def run(self, function: Callable[[int, ExpertGroups], Result]) -> list[Result]:
        """`function(rank, groups)` on every rank at once; results in rank order. The first failure frees the waiting and is raised here."""
        failures: list[BaseException] = []

        def guarded(rank: int, groups: ExpertGroups) -> Any:
            try:
                return function(rank, groups)
            except BaseException as error:
                failures.append(error)
                for meeting in self._meetings.values():
                    meeting.abort()

        with _between_threads(), ThreadPoolExecutor(self.config.ranks) as pool:
            results = list(pool.map(guarded, range(self.config.ranks), self.groups))
        if failures:
            raise failures[0]
        return results


class Passed(nn.Module):
    """Experts that return their rows."""

    def forward(self, rows_RM: Tensor, offsets_E1: Tensor) -> Tensor:
        return rows_RM


def traffic(config: ParallelConfig, experts: int, width: int = 1) -> list[Traffic]:
    """What each rank sends in one layer's forward pass when each tensor group has one token, `width` fp32 numbers, for every expert."""
    x_SM = torch.ones(experts, width)
    logits_SE = 50 * torch.eye(experts)

    @torch.no_grad()
    def count(rank: int, groups: ExpertGroups) -> Traffic:
        found = Traffic(config.ranks_per_node)
        Exchange(groups, config, found)(x_SM, kernels.gate(logits_SE, 1), Passed())
        return found

    return World(config, experts).run(count)
