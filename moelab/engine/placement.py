"""Which shards of a parameter a rank holds: all that gradients, norms and checkpoints need to know of a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Index = tuple[slice, ...]


def overlap(
    start: Sequence[int], size: Sequence[int], other_start: Sequence[int], other_size: Sequence[int]
) -> tuple[Index, Index] | None:
    """Return what two rectangular parts of a tensor have in common, as an index into each; None if they have nothing.

    Args:
        start, size: the first element of a part in the whole tensor, and the part's shape.
        other_start, other_size: those of the other part.
    """
    one, other = [], []
    for a, n, b, m in zip(start, size, other_start, other_size, strict=True):
        first, end = max(a, b), min(a + n, b + m)
        if first >= end:
            return None
        one.append(slice(first - a, end - a))
        other.append(slice(first - b, end - b))
    return tuple(one), tuple(other)


@dataclass(frozen=True)
class Shard:
    """A rectangular part of a parameter.

    The `size` elements from `offset` of the whole parameter are those from `local_offset` of the rank's tensor.
    """

    offset: tuple[int, ...]
    local_offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def region(self) -> Index:
        """Index of the shard in the whole parameter."""
        return tuple(slice(start, start + length) for start, length in zip(self.offset, self.size, strict=True))

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the shard as a view of the rank's tensor."""
        for dim, (start, length) in enumerate(zip(self.local_offset, self.size, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor


@dataclass(frozen=True)
class Placement:
    """The place of one parameter on this rank.

    Attributes:
        shape: the whole parameter's shape, which no layout changes: names and shapes are those of the model on one
            rank, with experts by global id.
        shards: the shards that this rank holds; usually one, but three of a tensor-sliced query-key-value weight, and
            two of a tensor-sliced `up` with a gate.
        replicas: ranks (this one included) that hold exactly these shards. Gradients are summed over them.
        token_replicas: how often a token contributes to that sum: gradients are divided by data ranks * token_replicas.
    """

    shape: tuple[int, ...]
    shards: tuple[Shard, ...]
    replicas: tuple[int, ...]
    token_replicas: int

    @classmethod
    def whole(cls, shape: tuple[int, ...], replicas: tuple[int, ...] = (0,), token_replicas: int = 1) -> Placement:
        """Return the placement of a parameter that this rank holds as a whole."""
        zero = (0,) * len(shape)
        return cls(tuple(shape), (Shard(zero, zero, tuple(shape)),), replicas, token_replicas)

    @classmethod
    def part(
        cls,
        shape: tuple[int, ...],
        parts: dict[int, tuple[int, int]],
        replicas: tuple[int, ...],
        token_replicas: int,
        stretches: tuple[int, ...] = (),
    ) -> Placement:
        """Return the placement of part `index` of `count` equal ones along each dim of `parts`, dim -> (index, count).

        With `stretches`, dim 0 consists of stretches of these lengths (query, key, value; or gate and up), each of
        which is cut this way.

        Raises:
            ValueError: a dim does not divide evenly.
        """
        shards: list[Shard] = []
        start = local = 0
        for stretch in stretches or shape[:1]:
            offset, size = [0] * len(shape), [stretch, *shape[1:]]
            for dim, (index, count) in parts.items():
                length = size[dim]
                if length % count:
                    raise ValueError(f"placement: {count} parts do not divide dim {dim} of {shape}")
                size[dim] = length // count
                offset[dim] = index * size[dim]
            offset[0] += start
            shards.append(Shard(tuple(offset), (local, *(0,) * (len(shape) - 1)), tuple(size)))
            start, local = start + stretch, local + size[0]
        return cls(tuple(shape), tuple(shards), replicas, token_replicas)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the rank's tensor."""
        first = self.shards[0].size
        return (sum(shard.size[0] for shard in self.shards), *first[1:]) if first else first
