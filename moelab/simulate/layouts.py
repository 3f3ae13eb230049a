"""Many layouts at once: `ParallelConfig` and `ExpertLayout` as arrays, one entry per layout.

The rules and formulas are those of `moelab.config.parallel` (tests compare them, layout by layout); here a sweep of
10,000 layouts costs as many numpy operations as one layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelab.config import ModelConfig
from moelab.config.parallel import EXCHANGES, ParallelConfig

Array = np.ndarray


@dataclass(frozen=True)
class Layouts:
    """n layouts: every field is an array of n, named as in `ParallelConfig`.

    `exchange` holds indices into `EXCHANGES`.
    """

    tensor: Array
    data: Array
    expert: Array
    expert_slicing: Array
    gpus_per_node: Array
    exchange: Array

    @classmethod
    def of(cls, configs: Sequence[ParallelConfig]) -> Layouts:
        """Return the arrays of these configurations."""

        def column(name: str) -> Array:
            return np.array([getattr(c, name) for c in configs], dtype=np.int64)

        numbers = {n: column(n) for n in ("tensor", "data", "expert", "expert_slicing", "gpus_per_node")}
        return cls(**numbers, exchange=np.array([EXCHANGES.index(c.exchange) for c in configs]))

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: Array | slice) -> Layouts:
        return Layouts(*(getattr(self, f)[index] for f in self.__dataclass_fields__))

    def config(self, i: int) -> ParallelConfig:
        """Return the i-th layout as a `ParallelConfig`, which checks it."""
        return ParallelConfig(
            tensor=int(self.tensor[i]),
            data=int(self.data[i]),
            expert=int(self.expert[i]),
            expert_slicing=int(self.expert_slicing[i]),
            gpus_per_node=int(self.gpus_per_node[i]),
            exchange=EXCHANGES[self.exchange[i]],
        )

    @property
    def ranks(self) -> Array:
        """Number of ranks."""
        return self.tensor * self.data

    @property
    def ranks_per_node(self) -> Array:
        """G, ranks of a node."""
        return np.minimum(self.gpus_per_node, self.ranks)

    @property
    def coordinated(self) -> Array:
        """Whether the exchange is coordinated."""
        return self.exchange >= 2

    @property
    def hierarchical(self) -> Array:
        """Whether the exchange is hierarchical."""
        return self.exchange % 2 == 1

    def valid(self, model: ModelConfig) -> Array:
        """Return which of them `ParallelConfig` and `ModelConfig.check_layout` accept for this model, bool [n]."""
        P, G, L, W = self.ranks, self.ranks_per_node, self.tensor, self.expert_slicing
        good = (P % G == 0) & (G % L == 0) & (P % W == 0)
        good &= model.kv_heads % L == 0
        for ffn in model.ffn_sizes:
            good &= (ffn % L == 0) & (ffn % W == 0)
        for count in {e for e in model.experts if e}:
            good &= ExpertLayouts.of(self, count).valid
        return good


@dataclass(frozen=True)
class ExpertLayouts:
    """How a layer of `experts` experts is spread in each of n layouts; fields as in `ExpertLayout`, arrays of n.

    Attributes:
        valid: whether the layer can be spread so; where it cannot, the other fields mean nothing.
        senders: c of the exchange: ranks that divide one set of tokens among them, 1 unless coordinated.
    """

    experts: int
    replicas: Array
    slices: Array
    parallel: Array
    nodes: Array
    local: Array
    tensor: Array
    token_replicas: Array
    senders: Array
    valid: Array

    @classmethod
    def of(cls, layouts: Layouts, experts: int) -> ExpertLayouts:
        """Return how a layer of `experts` experts is spread in each of the layouts."""
        P, W, L, G = layouts.ranks, layouts.expert_slicing, layouts.tensor, layouts.ranks_per_node
        X = np.maximum(np.minimum(np.where(layouts.expert > 0, layouts.expert, P // W), experts), 1)
        whole = (X % G == 0) | (G % X == 0)
        valid = (experts % X == 0) & (P % (X * W) == 0) & ((L % X == 0) | (X % L == 0))
        valid &= ~layouts.hierarchical | whole
        tensor = np.minimum(L, X)
        nodes = np.where(whole & (X > G), X // G, 1)
        return cls(
            experts=experts,
            replicas=P // (X * W),
            slices=W,
            parallel=X,
            nodes=nodes,
            local=X // nodes // tensor,
            tensor=tensor,
            token_replicas=np.where(layouts.coordinated, L // tensor, L),
            senders=np.where(layouts.coordinated, tensor, 1),
            valid=valid,
        )
