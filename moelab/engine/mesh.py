"""The ranks as DeviceMeshes: one grid (data, tensor) for everything outside the experts, and one per number of experts.

`moelab.config.parallel` says who is who; here its grids become process groups. Groups are made together, by every rank in the same
order, before the model is built. A mesh of one rank needs no process group at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moelab.config.parallel import ExpertLayout, ParallelConfig, Position


@dataclass(frozen=True)
class Group:
    """Some ranks that talk to each other.

    Attributes:
        ranks: their global ranks, in the group's order.
        index: this rank's place among them.
        handle: the process group; None for a group of one, which never communicates.
    """

    ranks: tuple[int, ...]
    index: int
    handle: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class ExpertGroups:
    """The groups of one MoE layer on this rank; names as in `moelab.config.parallel`.

    Attributes:
        layout, position: the layer's grid, and where this rank stands in it.
        expert: the X ranks that share the experts, in the order of the experts.
        spread: the X / c among them with equal `share`, for the coordinated exchange.
        near, far: hierarchical, inside a node and between nodes (ranks of equal place): together they span `expert`, or `spread` when
            the exchange is coordinated.
        share: the c ranks that hold the same tokens.
        slices: the W ranks that hold the slices of the same experts.
        replicas: the R ranks that hold copies of the same experts (or slices).
        alike: the R * W ranks of equal place among the experts.
    """

    layout: ExpertLayout
    position: Position
    expert: Group
    spread: Group
    near: Group
    far: Group
    share: Group
    slices: Group
    replicas: Group
    alike: Group

    @property
    def local_experts(self) -> range:
        """Global ids of the experts that live on this rank."""
        first = self.position.expert * self.layout.experts_per_rank
        return range(first, first + self.layout.experts_per_rank)


class Mesh:
    """All groups of one rank. `dist.init_process_group` comes first when there is more than one rank.

    Attributes:
        config: the layout.
        rank: this rank.
        device: "cpu" or "cuda".
        world, data, tensor: all ranks; those with equal tensor rank; those of this tensor group.
        dense: the DeviceMesh (data, tensor), without axes of one; None for one rank.
    """

    def __init__(self, config: ParallelConfig, expert_counts: Iterable[int] = (), device: str = "cpu") -> None:
        """
        Args:
            expert_counts: the model's experts a layer (0 = dense); layers of equal number share their groups.

        Raises:
            ValueError: the layout is impossible for a layer, or is for another number of ranks than there are.
        """
        counts = sorted({e for e in expert_counts if e})
        layouts = {e: config.experts(e) for e in counts}
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks != config.ranks:
            raise ValueError(
                f"parallel: the layout is for {config.ranks} ranks (tensor {config.tensor} x data {config.data}), there are {ranks}"
            )
        self.config, self.device = config, device
        self._made: list[dist.ProcessGroup] = []
        self.rank = dist.get_rank() if ranks > 1 else 0
        self.dense: DeviceMesh | None = None
        alone = Group((0,), 0, None)
        self.world = self.data = self.tensor = alone
        if ranks > 1:
            self.world = Group(tuple(range(ranks)), self.rank, dist.group.WORLD)
            self.dense = self._mesh(config.dense_grid(), ("data", "tensor"))
            self.data, self.tensor = self._group(self.dense, "data"), self._group(self.dense, "tensor")
        self._experts = {e: self._expert_groups(layout, alone) for e, layout in layouts.items()}

    def experts(self, count: int) -> ExpertGroups:
        """The groups of a layer of `count` experts, one of the counts this mesh was made for (KeyError)."""
        return self._experts[count]

    def _expert_groups(self, layout: ExpertLayout, alone: Group) -> ExpertGroups:
        position = layout.position(self.rank)
        if self.dense is None:
            return ExpertGroups(layout, position, *[alone] * 8)
        names = ("replica", "slice", "node", "local", "share")
        mesh = self._mesh(layout.grid(), names)
        near = ("local",) if self.config.coordinated else ("local", "share")
        return ExpertGroups(
            layout,
            position,
            expert=self._group(mesh, "node", "local", "share"),
            spread=self._group(mesh, "node", "local"),
            near=self._group(mesh, *near),
            far=self._group(mesh, "node"),
            share=self._group(mesh, "share"),
            slices=self._group(mesh, "slice"),
            replicas=self._group(mesh, "replica"),
            alike=self._group(mesh, "replica", "slice"),
        )

    def close(self) -> None:
        """Let go of the groups, of which each holds threads and connections; every rank calls this. For processes that make many meshes."""
        for handle in self._made:
            dist.destroy_process_group(handle)
        self._made = []

    def _mesh(self, grid: np.ndarray, names: tuple[str, ...]) -> DeviceMesh:
        """Only of the axes longer than one: each axis costs a process group."""
        kept = [i for i, size in enumerate(grid.shape) if size > 1]
        shape = [grid.shape[i] for i in kept]
        made = DeviceMesh(
            self.device, torch.from_numpy(grid.reshape(shape)), mesh_dim_names=tuple(names[i] for i in kept)
        )
        for handle in made.get_all_groups():
            self._keep(handle)
        return made

    def _keep(self, handle: dist.ProcessGroup) -> None:
        if handle is not dist.group.WORLD and handle not in self._made:
            self._made.append(handle)

    def _group(self, mesh: DeviceMesh, *axes: str) -> Group:
        axes = tuple(axis for axis in axes if axis in mesh.mesh_dim_names)
        if not axes:
            return Group((self.rank,), 0, None)
        if len(axes) == mesh.ndim:
            return self.world
        part = mesh[axes[0]] if len(axes) == 1 else mesh[axes]._flatten("-".join(axes))
        handle = part.get_group()
        self._keep(handle)
        ranks = tuple(dist.get_process_group_ranks(handle))
        return Group(ranks, ranks.index(self.rank), handle if len(ranks) > 1 else None)
