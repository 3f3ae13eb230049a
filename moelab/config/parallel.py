"""Describe a parallel layout, `ParallelConfig`, and compute its groups of ranks (paper sections 4.1.3, 5.2, 5.3).

This module is index arithmetic without torch and without processes. The engine makes process groups from it, and the
simulator counts messages with it.

P ranks are numbered node by node (rank = node * G + GPU). For everything outside the experts they form a grid of
data-parallel (dp) and tensor-parallel (tp) coordinates,

    (data dp, tensor tp)                     rank = data * tp + tensor: a tensor-parallel group is tp consecutive ranks,

and for each MoE layer they form a grid of its own, which depends on its number of experts:

    (replica, slice, expert ep)              rank = (replica * slices + slice) * ep + expert

ep ranks hold the layer's E experts, E / ep each (expert parallelism). Each expert is cut into slices (expert slicing:
the slices of an expert are on ranks i, i + ep, ..., as in the paper's Fig 7), and the group of ep * slices ranks is
replicated (expert-data parallelism). So a PR-MoE's 32- and 64-expert layers on 64 ranks get ep = 32 with 2 replicas and
ep = 64 with 1. For the exchanges, the expert coordinate itself is a grid,

    (node, local, tensor)                    expert = (node * local size + local) * tensor size + tensor

in which the min(tp, ep) ranks along `tensor` hold the same tokens, because they belong to one tensor-parallel group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from moelab.config._check import check_choices

if TYPE_CHECKING:
    import numpy as np

Exchange = Literal["flat", "hierarchical", "coordinated", "coordinated-hierarchical"]
EXCHANGES: tuple[Exchange, ...] = get_args(Exchange)

MAX_RANKS = 1 << 20
"""No layout has more: a number that is larger comes from a damaged file or a slip."""


@dataclass(frozen=True)
class ParallelConfig:
    """Describe how a model is distributed over ranks (one rank = one GPU, or one process on CPU).

    Attributes:
        tensor: tensor-parallel degree tp: consecutive ranks of one node, each of which computes a slice of attention
            and dense feed-forwards.
        data: data-parallel degree dp: replicas of the tensor-parallel group; P = tensor * data ranks in all.
        expert: expert-parallel degree ep: ranks over which a layer's experts are distributed; 0 means
            P / expert_slicing ranks. A layer with fewer experts than this uses its number of experts instead, so that
            one setting fits all layers of a pyramid.
        expert_slicing: ranks over which one expert is sliced.
        gpus_per_node: G, ranks of a node; it affects `hierarchical`, message counts and the tensor-parallel groups. If
            there are fewer ranks than G, they form one node.
        exchange: how tokens are sent to experts: `flat`, one all-to-all, in which each tensor rank sends all its tokens
            (the paper's baseline); `hierarchical`, inside nodes, then between them; `coordinated`, each tensor rank
            sends its part of them, then all-gather (PCC); `coordinated-hierarchical`, both.
        shard: shard non-expert weights, gradients and optimizer state over the data ranks (FSDP2); needs tensor = 1.
        recompute: keep only the layers' inputs in the forward pass and recompute the rest in the backward pass
            (activation checkpointing). With tensor > 1 on NCCL, set NCCL_NVLS_ENABLE=0, as runs do: sums inside
            NVLink switches may differ between the two passes, and tokens then choose other experts.
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
            _check(1 <= value <= MAX_RANKS, f"{what} must be 1 to {MAX_RANKS:,}, got {value:,}")
        _check(self.expert >= 0, f"expert must be 0 (as many as there are experts for) or more, got {self.expert}")
        check_choices(self, "parallel")
        _check(self.ranks <= MAX_RANKS, f"{self.ranks:,} ranks (tensor x data) are more than {MAX_RANKS:,}")
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
            f"expert_slicing {self.expert_slicing} does not divide {self.ranks} ranks; "
            f"allowed: {_divisors(self.ranks)}",
        )
        _check(
            not self.shard or self.tensor == 1,
            f"shard needs tensor = 1, got tensor {self.tensor}: sliced weights are not sharded further",
        )

    @property
    def ranks(self) -> int:
        """Return P, the number of ranks."""
        return self.tensor * self.data

    @property
    def ranks_per_node(self) -> int:
        """Return G, or P when all ranks fit on one node."""
        return min(self.gpus_per_node, self.ranks)

    @property
    def nodes(self) -> int:
        """Return the number of nodes."""
        return self.ranks // self.ranks_per_node

    @property
    def coordinated(self) -> bool:
        """Return whether each tensor rank sends only its part of the tokens (see `exchange`)."""
        return self.exchange.startswith("coordinated")

    @property
    def hierarchical(self) -> bool:
        """Return whether tokens are exchanged inside nodes first, then between them (see `exchange`)."""
        return self.exchange.endswith("hierarchical")

    def dense_grid(self) -> np.ndarray:
        """Return the ranks as a grid (data, tensor)."""
        import numpy as np  # not at the top: the command line's help loads this module

        return np.arange(self.ranks).reshape(self.data, self.tensor)

    def experts(self, experts: int) -> ExpertLayout:
        """Return how a layer of `experts` experts is distributed.

        Raises:
            ValueError: it cannot be distributed; one line naming the constraint and what is allowed.
        """
        found = self.spread(experts)
        P, G, slices, tp, ep = self.ranks, self.ranks_per_node, self.expert_slicing, self.tensor, found.parallel
        allowed = [x for x in _divisors(P // slices) if experts % x == 0]
        _check(
            experts % ep == 0,
            f"{experts} experts do not spread evenly over {ep} ranks; allowed for expert: {allowed}",
        )
        _check(
            P % (ep * slices) == 0,
            f"{experts} experts over {ep} ranks"
            + (f", each in {slices} slices," if slices > 1 else "")
            + f" need a multiple of {ep * slices} ranks, got {P}; allowed for expert: {allowed}",
        )
        _check(
            tp % ep == 0 or ep % tp == 0,
            f"expert parallelism {ep} and tensor slicing {tp} must divide one another, for {experts} experts on "
            f"{P} ranks",
        )
        _check(
            not self.hierarchical or _whole_nodes(ep, G),
            f"hierarchical exchange among {ep} ranks needs whole nodes of {G}, or a whole number of groups in a node; "
            f"allowed for expert: {[x for x in allowed if _whole_nodes(x, G)]}",
        )
        return found

    def spread(self, experts: int) -> ExpertLayout:
        """Return the same unchecked: what is published of other programs' layouts need not divide evenly."""
        P, G, slices, tp = self.ranks, self.ranks_per_node, self.expert_slicing, self.tensor
        ep = min(self.expert or P // slices, experts)
        tensor = min(tp, ep)
        senders = tensor if self.coordinated else 1
        nodes = ep // G if _whole_nodes(ep, G) and ep > G else 1
        return ExpertLayout(
            experts=experts,
            replicas=P // (ep * slices),
            slices=slices,
            parallel=ep,
            nodes=nodes,
            local=ep // nodes // tensor,
            tensor=tensor,
            senders=senders,
            token_replicas=tp // senders,
        )

    def check(
        self, experts: tuple[int, ...], *, heads: int, ffn: int, expert_ffn: int = 0, kind: str = "attention"
    ) -> None:
        """Check that a model can be distributed in this layout; called before any process is started.

        Args:
            experts: number of experts of each layer, 0 for dense layers.
            heads: heads that the tensor ranks share out, of this kind: attention or key-value.
            ffn: feed-forward size F of dense layers and fixed branches, which tensor slicing cuts; 0 without any.
            expert_ffn: that of an expert, which expert slicing cuts.

        Raises:
            ValueError: it cannot be distributed; one line.
        """
        _check(
            heads % self.tensor == 0,
            f"tensor {self.tensor} does not divide the model's {heads} {kind} heads; allowed: {_divisors(heads)}",
        )
        _check(ffn % self.tensor == 0, f"tensor {self.tensor} does not divide the feed-forward size {ffn}")
        _check(
            expert_ffn % self.expert_slicing == 0,
            f"expert_slicing {self.expert_slicing} does not divide the experts' feed-forward size {expert_ffn}",
        )
        for count in dict.fromkeys(experts):
            if count:
                try:
                    self.experts(count)
                except ValueError as error:
                    raise ValueError(f"{error} (layer {experts.index(count) + 1})") from None


AXES = ("replica", "slice", "node", "local", "tensor")
"""Axes of an MoE layer's grid, see the module's docstring."""


@dataclass(frozen=True)
class ExpertLayout:
    """Record how the experts of one layer are distributed over P ranks; see the module's docstring.

    Attributes:
        experts: E.
        replicas, slices, parallel: sizes of the layer's grid; `parallel` is the expert-parallel degree ep.
        nodes, local, tensor: sizes of the expert coordinate's grid; nodes * local * tensor = parallel.
        senders: ranks that send a part each of the tokens that all of them hold (`coordinated`), else 1.
        token_replicas: how often each token is sent to its expert, over all replicas: once by each tensor rank
            (`flat`), or once by all tensor ranks of an expert-parallel group together (`coordinated`). Expert gradients
            are divided by it.
    """

    experts: int
    replicas: int
    slices: int
    parallel: int
    nodes: int
    local: int
    tensor: int
    senders: int
    token_replicas: int

    @property
    def experts_per_rank(self) -> int:
        """Return E / ep."""
        return self.experts // self.parallel

    def grid(self) -> np.ndarray:
        """Return the ranks as a grid with the axes `AXES`."""
        import numpy as np

        P = self.replicas * self.slices * self.parallel
        return np.arange(P).reshape(self.replicas, self.slices, self.nodes, self.local, self.tensor)

    def partition(self, *axes: str) -> np.ndarray:
        """Return the groups of ranks that differ only along the given `AXES`, one group per row, in order of rank."""
        import numpy as np

        at = [AXES.index(axis) for axis in axes]
        grid = np.moveaxis(self.grid(), at, range(-len(at), 0))
        return grid.reshape(-1, math.prod(grid.shape[-len(at) :]))

    def position(self, rank: int) -> Position:
        """Return a rank's coordinates in the grid."""
        expert = rank % self.parallel
        slice_ = rank // self.parallel % self.slices
        replica = rank // (self.parallel * self.slices)
        tensor = expert % self.tensor
        local = expert // self.tensor % self.local
        node = expert // (self.tensor * self.local)
        return Position(replica, slice_, expert, node, local, tensor)

    def local_experts(self, rank: int) -> range:
        """Return the global ids of the experts (or slices of experts) that a rank holds."""
        first = rank % self.parallel * self.experts_per_rank
        return range(first, first + self.experts_per_rank)


@dataclass(frozen=True)
class Position:
    """Hold a rank's coordinates in an `ExpertLayout`'s grid; `expert` combines node, local and tensor."""

    replica: int
    slice: int
    expert: int
    node: int
    local: int
    tensor: int


def _whole_nodes(ranks: int, per_node: int) -> bool:
    return ranks % per_node == 0 or per_node % ranks == 0


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"parallel: {message}")
