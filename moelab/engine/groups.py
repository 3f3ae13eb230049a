"""Process groups: `Group`, the ranks that take part in a collective, and `ProcessGroups`, which makes all of them.

Each process group has the time limit of the default one, which `moelab.engine.launch.process.join` sets: without it a
collective would wait half an hour for a rank that is gone. Groups are made together, by every rank in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moelab.engine.launch import process


@dataclass(frozen=True)
class Group:
    """Some ranks that communicate with each other.

    The methods are torch.distributed's collectives; `moelab.engine.collectives` calls them, and `check-cluster`, which
    times them.

    Attributes:
        ranks: the group's global ranks, in the group's order.
        index: this rank's place among them.
        handle: the process group; None for a group of one rank, which never communicates.
    """

    ranks: tuple[int, ...]
    index: int
    handle: Any

    @classmethod
    def alone(cls, rank: int = 0) -> Group:
        """Return the group of one rank."""
        return cls((rank,), 0, None)

    @classmethod
    def world(cls) -> Group:
        """Return the group of all ranks, or of this process alone when there is no process group."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls.alone()
        return cls(tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """This rank's global rank."""
        return self.ranks[self.index]

    @property
    def device_type(self) -> str:
        """The device of the tensors that its collectives take: "cuda" for nccl, else "cpu"."""
        return "cpu" if self.handle is None else _device_type(self.handle)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, receive: list[int] | None, send: list[int] | None
    ) -> None:
        """Send `send[i]` rows to rank i and receive `receive[i]` from it; None: equal parts."""
        dist.all_to_all_single(output, input, receive, send, group=self.handle)

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, asynchronous: bool = False) -> dist.Work | None:
        """Reduce a tensor over the ranks in place; return a handle to wait for if `asynchronous`."""
        return dist.all_reduce(tensor, op, group=self.handle, async_op=asynchronous)

    def all_gather(self, outputs: list[Tensor], tensor: Tensor) -> None:
        """Fill `outputs` with all ranks' tensors, in rank order."""
        dist.all_gather(outputs, tensor, group=self.handle)

    def gather(self, outputs: list[Tensor] | None, tensor: Tensor) -> None:
        """Collect all ranks' tensors on the first rank."""
        dist.gather(tensor, outputs, self.ranks[0], group=self.handle)

    def broadcast(self, tensor: Tensor) -> None:
        """Send the first rank's tensor to all."""
        dist.broadcast(tensor, self.ranks[0], group=self.handle)


class ProcessGroups:
    """Makes process groups over all ranks; equal partitions share their groups."""

    def __init__(self) -> None:
        self.world = Group.world()
        self._made: dict[tuple[tuple[int, ...], ...], Group] = {}

    def make(self, partition: np.ndarray) -> Group:
        """Return this rank's group of a partition of all ranks.

        Every rank calls this, with the same partitions in the same order.

        Args:
            partition: int [groups, ranks of a group], global ranks.
        """
        if len(partition) == 1:
            return self.world
        if partition.shape[1] == 1:
            return Group.alone(self.world.rank)
        rows = tuple(map(tuple, partition.tolist()))
        if rows not in self._made:
            row = next(row for row in rows if self.world.rank in row)
            self._made[rows] = Group(row, row.index(self.world.rank), _subgroup(partition.tolist()))
        return self._made[rows]

    def close(self) -> None:
        """Destroy the groups, each of which holds threads and connections; every rank calls this."""
        for group in self._made.values():
            dist.destroy_process_group(group.handle)
        self._made = {}


def gloo_group() -> Group:
    """Make a group of all ranks that communicates over gloo, whatever the default group uses."""
    world = Group.world()
    if world.size == 1:
        return world
    return replace(world, handle=_connected(dist.new_group(backend="gloo", timeout=time_limit(_world()))))


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None, "the ranks have not joined"
    return world


def time_limit(handle: dist.ProcessGroup) -> timedelta:
    """Return how long a collective of a process group waits before it raises."""
    return handle._get_backend(torch.device(_device_type(handle))).options._timeout


def _device_type(handle: dist.ProcessGroup) -> str:
    return "cuda" if dist.get_backend(handle) == "nccl" else "cpu"


def _subgroup(partition: list[list[int]]) -> dist.ProcessGroup:
    """Make the groups of a partition and return this rank's."""
    limit = time_limit(_world())
    if dist.get_backend() == "nccl" and _world().bound_device_id is not None:
        with process.within(limit):
            own = dist.split_group(split_ranks=partition, timeout=limit)  # makes all groups in one call
        assert own is not None
        return own
    return _connected(dist.new_subgroups_by_enumeration(partition, timeout=limit)[0])


def _connected(handle: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a new group once all of its ranks have their connections.

    On gloo a rank has made its group as soon as its own connections are open. If it destroyed the group then, a slower
    rank that has yet to confirm these connections would fail: "Connection closed by peer". nccl connects ranks later,
    or for all at once.
    """
    if _device_type(handle) == "cpu":
        dist.barrier(group=handle)
    return handle
