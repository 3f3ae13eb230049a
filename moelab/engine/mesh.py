"""All groups of a rank: data and tensor parallel ones outside the experts, and those of each MoE layer.

`moelab.config.parallel` computes which ranks form which group; this module makes their process groups, together, by
every rank in the same order, before the model is built. A single rank needs no process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from torch.distributed.device_mesh import DeviceMesh

from moelab.config.parallel import ExpertLayout, ParallelConfig, Position
from moelab.engine.groups import Group, ProcessGroups


@dataclass(frozen=True)
class ExpertGroups:
    """The groups of one MoE layer on this rank; the axes have the names of `moelab.config.parallel`.

    Attributes:
        layout, position: the layer's grid, and this rank's coordinates in it.
        expert: the expert-parallel ranks, which hold different experts, in the order of the experts.
        expert_coordinated: those among them with this rank's tensor coordinate, between which the coordinated exchange
            sends rows.
        intra_node, inter_node: the hierarchical exchange's groups, inside a node and between nodes: together they span
            `expert`, or `expert_coordinated` when the exchange is coordinated.
        tensor: the ranks of `expert` that hold the same tokens, because they are one tensor-parallel group.
        slices: the ranks that hold the slices of the same experts.
        replicas: the expert-data-parallel ranks, which hold the same experts (or the same slices of them).
        same_experts: the ranks that hold the same experts, or any slice of them: `replicas` and `slices` together.
    """

    layout: ExpertLayout
    position: Position
    expert: Group
    expert_coordinated: Group
    intra_node: Group
    inter_node: Group
    tensor: Group
    slices: Group
    replicas: Group
    same_experts: Group

    @classmethod
    def make(
        cls, config: ParallelConfig, layout: ExpertLayout, rank: int, make_group: Callable[[np.ndarray], Group]
    ) -> ExpertGroups:
        """Assemble a layer's groups.

        Args:
            make_group: returns this rank's group of a partition of all ranks (int [groups, ranks of a group]).
        """

        def group(*axes: str) -> Group:
            return make_group(layout.partition(*axes))

        return cls(
            layout,
            layout.position(rank),
            expert=group("node", "local", "tensor"),
            expert_coordinated=group("node", "local"),
            intra_node=group("local") if config.coordinated else group("local", "tensor"),
            inter_node=group("node"),
            tensor=group("tensor"),
            slices=group("slice"),
            replicas=group("replica"),
            same_experts=group("replica", "slice"),
        )


class Mesh:
    """All groups of one rank; with more than one rank, call `dist.init_process_group` first.

    Attributes:
        config: the layout.
        rank: this rank.
        device: "cpu" or "cuda".
        groups: what makes them.
        world, data, tensor: all ranks; the data-parallel ranks, which have this rank's tensor coordinate; the
            tensor-parallel ranks.
        fsdp: the data-parallel ranks as a DeviceMesh, where FSDP2 shards over them; else None.
    """

    def __init__(
        self,
        config: ParallelConfig,
        expert_counts: Iterable[int] = (),
        device: str = "cpu",
        groups: ProcessGroups | None = None,
    ) -> None:
        """Make the groups of a layout; every rank calls this.

        Args:
            expert_counts: the model's experts per layer (0 = dense); layers of equal number share their groups.
            groups: those of another model's mesh, to share them: on NCCL each holds memory of the GPU.

        Raises:
            ValueError: the layout is impossible for a layer, or is for another number of ranks than there are.
        """
        layouts = {e: config.experts(e) for e in sorted({e for e in expert_counts if e})}
        self.groups = groups or ProcessGroups()
        self.world = self.groups.world
        if self.world.size != config.ranks:
            raise ValueError(
                f"parallel: the layout is for {config.ranks} ranks (tensor {config.tensor} x data {config.data}), "
                f"there are {self.world.size}"
            )
        self.config, self.device, self.rank = config, device, self.world.rank
        grid, make = config.dense_grid(), self.groups.make
        self.data, self.tensor = make(grid.T), make(grid)
        self._experts = {e: ExpertGroups.make(config, layout, self.rank, make) for e, layout in layouts.items()}
        sharded = config.shard and self.data.size > 1
        self.fsdp = DeviceMesh.from_group(self.data.handle, device, mesh_dim_names=("data",)) if sharded else None

    def experts(self, count: int) -> ExpertGroups:
        """Return the groups of a layer of `count` experts; ValueError where the mesh was not made for such layers."""
        if count not in self._experts:
            raise ValueError(f"parallel: no groups for layers of {count} experts; give Mesh the model's experts")
        return self._experts[count]

    def close(self) -> None:
        """Destroy the groups, each of which holds threads and connections; every rank calls this.

        Only processes that make many meshes need it.
        """
        self.groups.close()
