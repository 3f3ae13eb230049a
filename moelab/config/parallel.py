"""Who computes what: `ParallelConfig`, and the index arithmetic that turns it into groups of ranks (paper sections 4.1.3, 5.2, 5.3).

Pure arithmetic: no torch, no processes. The engine makes process groups of it, the simulator counts messages with it, and tests ask
it about 2,048 ranks.

P ranks are numbered node by node (rank = node * G + GPU). Everything outside the experts sees them as a grid of

    (data D, tensor L)                       rank = data * L + tensor, so a tensor group is L consecutive ranks of one node,

and each MoE layer sees the same ranks as its own grid, which depends on its number of experts:

    (replica R, slice W, expert X)           rank = (replica * W + slice) * X + expert

X ranks share the layer's E experts, E / X each (expert parallelism); each expert is cut into W slices (expert slicing: the slices of an
expert sit on ranks i and i + X, as in the paper's Fig 7); and there are R copies of all that (expert-data parallelism). So a PR-MoE's 32- and
64-expert layers on 64 ranks get X = 32, R = 2 and X = 64, R = 1. The expert coordinate itself is cut for the exchanges into

    (node N, local, share c)                 expert = (node * local_size + local) * c + share

where the c = min(L, X) ranks of one `share` group hold the same tokens, because a tensor-sliced operator came before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from moelab.config._check import check_choices

if TYPE_CHECKING:
    import numpy as np

Exchange = Literal["flat", "hierarchical", "coordinated", "coordinated-hierarchical"]
EXCHANGES: tuple[str, ...] = get_args(Exchange)


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is spread over ranks (one rank = one GPU, or one process on CPU).

    Attributes:
        tensor: L, ranks that share attention and dense feed-forwards by tensor slicing; L consecutive ranks of one node.
        data: D, copies of that; P = tensor * data ranks in all.
        expert: X, ranks that share a layer's experts; 0 is as many as the layer has experts for. A layer with fewer experts takes its own
            number of experts instead, so one setting serves a pyramid.
        expert_slicing: W, ranks that share one expert.
        gpus_per_node: G, ranks of a node; matters to `hierarchical`, to counts and to the tensor groups. Fewer ranks than G are one node.
        exchange: how tokens travel: `flat`, one all-to-all, in which each tensor rank sends all its tokens (the paper's baseline);
            `hierarchical`, inside nodes, then between them; `coordinated`, tensor ranks share the work, then all-gather (PCC);
            `coordinated-hierarchical`, both.
        shard: shard non-expert weights, gradients and optimizer state over the data ranks (FSDP2); needs tensor = 1.
        recompute: keep only the layers' inputs in forward, recompute the rest in backward (activation checkpointing).
        overlap: reduce gradients while the backward pass still runs.
    """

    tensor: int = 1
    data: int = 1
    expert: int = 0
    expert_slicing: int = 1
    gpus_per_node: int = 8
    exchange: Exchange = "flat"
    shard: bool = False
    recompute: bool = False
    overlap: bool = True

    def __post_init__(self) -> None:
        for what in ("tensor", "data", "expert_slicing", "gpus_per_node"):
            value = getattr(self, what)
            _check(value >= 1, f"{what} must be at least 1, got {value}")
        _check(self.expert >= 0, f"expert must be 0 (as many as there are experts for) or more, got {self.expert}")
        check_choices(self, "parallel")
        G = self.ranks_per_node
        _check(
            self.ranks % G == 0,
            f"{self.ranks} ranks (tensor {self.tensor} x data {self.data}) do not fill nodes of {G}; "
            f"choose a multiple of gpus_per_node",
        )
        _check(
            G % self.tensor == 0,
            f"tensor {self.tensor} does not divide the {G} ranks of a node, so a tensor group would leave its node; "
            f"allowed: {_divisors(G)}",
        )
        _check(
            self.ranks % self.expert_slicing == 0,
            f"expert_slicing {self.expert_slicing} does not divide {self.ranks} ranks; allowed: {_divisors(self.ranks)}",
        )
        _check(
            not self.shard or self.tensor == 1,
            f"shard needs tensor = 1, got tensor {self.tensor}: sliced weights are not sharded further",
        )

    @property
    def ranks(self) -> int:
        """P, all ranks."""
        return self.tensor * self.data

    @property
    def ranks_per_node(self) -> int:
        """G, or P when all ranks fit one node."""
        return min(self.gpus_per_node, self.ranks)

    @property
    def nodes(self) -> int:
        return self.ranks // self.ranks_per_node

    @property
    def coordinated(self) -> bool:
        return self.exchange.startswith("coordinated")

    @property
    def hierarchical(self) -> bool:
        return self.exchange.endswith("hierarchical")

    def dense_grid(self) -> np.ndarray:
        """Ranks as (data D, tensor L)."""
        import numpy as np  # not at the top: the command line's help loads this module

        return np.arange(self.ranks).reshape(self.data, self.tensor)

    def experts(self, experts: int) -> ExpertLayout:
        """How a layer of `experts` experts is spread.

        Raises:
            ValueError: it cannot be; one line naming the constraint and what is allowed.
        """
        return ExpertLayout.of(self, experts)

    def check(self, experts: tuple[int, ...], *, heads: int, ffn: int) -> None:
        """ValueError, one line, if a model of these layers cannot be spread so. Asked before any process is started.

        Args:
            experts: experts a layer, 0 for dense layers.
            heads, ffn: attention heads H, feed-forward size F.
        """
        _check(
            heads % self.tensor == 0,
            f"tensor {self.tensor} does not divide the model's {heads} attention heads; allowed: {_divisors(heads)}",
        )
        _check(ffn % self.tensor == 0, f"tensor {self.tensor} does not divide the feed-forward size {ffn}")
        _check(
            ffn % self.expert_slicing == 0,
            f"expert_slicing {self.expert_slicing} does not divide the feed-forward size {ffn}",
        )
        for layer, count in enumerate(experts):
            if count:
                try:
                    self.experts(count)
                except ValueError as error:
                    raise ValueError(f"{error} (layer {layer + 1})") from None


@dataclass(frozen=True)
class ExpertLayout:
    """How the experts of one layer are spread over P ranks; see the module's text.

    Attributes:
        experts: E.
        replicas, slices, parallel: R, W, X of the layer's grid.
        nodes, local, share: N, local size and c of the expert coordinate; nodes * local * share = parallel.
        copies: how often each token reaches its expert, over all replicas: once per tensor rank (`flat`), or once per `share` group
            (`coordinated`). Expert gradients are divided by it.
    """

    experts: int
    replicas: int
    slices: int
    parallel: int
    nodes: int
    local: int
    share: int
    copies: int

    @classmethod
    def of(cls, config: ParallelConfig, experts: int) -> ExpertLayout:
        P, W, L, G = config.ranks, config.expert_slicing, config.tensor, config.ranks_per_node
        X = min(config.expert or P // W, experts)
        _check(
            experts % X == 0,
            f"{experts} experts do not spread evenly over {X} ranks; allowed for expert: "
            f"{[x for x in _divisors(P // W) if experts % x == 0]}",
        )
        _check(
            P % (X * W) == 0,
            f"{experts} experts over {X} ranks"
            + (f", each in {W} slices," if W > 1 else "")
            + f" need a multiple of {X * W} ranks, got {P}; allowed for expert: "
            f"{[x for x in _divisors(P // W) if experts % x == 0]}",
        )
        _check(
            L % X == 0 or X % L == 0,
            f"expert parallelism {X} and tensor slicing {L} must divide one another, for {experts} experts on {P} ranks",
        )
        share = min(L, X)
        _check(
            not config.hierarchical or _whole_nodes(X, G),
            f"hierarchical exchange among {X} ranks needs whole nodes of {G}, or a whole number of groups in a node; allowed "
            f"for expert: {[x for x in _divisors(P // W) if experts % x == 0 and _whole_nodes(x, G)]}",
        )
        nodes = X // G if _whole_nodes(X, G) and X > G else 1
        return cls(
            experts=experts,
            replicas=P // (X * W),
            slices=W,
            parallel=X,
            nodes=nodes,
            local=X // nodes // share,
            share=share,
            copies=L // share if config.coordinated else L,
        )

    @property
    def experts_per_rank(self) -> int:
        """E / X."""
        return self.experts // self.parallel

    def grid(self) -> np.ndarray:
        """Ranks as (replica R, slice W, node N, local, share c)."""
        import numpy as np

        P = self.replicas * self.slices * self.parallel
        return np.arange(P).reshape(self.replicas, self.slices, self.nodes, self.local, self.share)

    def position(self, rank: int) -> Position:
        """Where a rank stands in the grid."""
        expert = rank % self.parallel
        slice_ = rank // self.parallel % self.slices
        replica = rank // (self.parallel * self.slices)
        share = expert % self.share
        local = expert // self.share % self.local
        node = expert // (self.share * self.local)
        return Position(replica, slice_, expert, node, local, share)

    def local_experts(self, rank: int) -> range:
        """Global ids of the experts (or slices of experts) that live on a rank."""
        first = rank % self.parallel * self.experts_per_rank
        return range(first, first + self.experts_per_rank)


@dataclass(frozen=True)
class Position:
    """A rank's coordinates in an `ExpertLayout`'s grid; `expert` joins node, local and share."""

    replica: int
    slice: int
    expert: int
    node: int
    local: int
    share: int


def _whole_nodes(ranks: int, per_node: int) -> bool:
    return ranks % per_node == 0 or per_node % ranks == 0


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"parallel: {message}")
