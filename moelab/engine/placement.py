"""Where a rank's piece of a parameter sits in the whole parameter: what checkpoints and norms need to know of a layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Box:
    """A rectangle of a parameter: `size` elements from `at` of the whole parameter are those from `local` of the rank's tensor."""

    at: tuple[int, ...]
    local: tuple[int, ...]
    size: tuple[int, ...]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The box as a view of the rank's tensor."""
        for dim, (start, length) in enumerate(zip(self.local, self.size, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor


@dataclass(frozen=True)
class Placement:
    """One parameter on this rank.

    Attributes:
        shape: of the whole parameter, which no layout changes: names and shapes are those of the model on one rank, experts by
            global id.
        boxes: this rank's piece. Usually one; a tensor-sliced query-key-value weight has three.
        holders: ranks (this one included) that hold exactly this piece. Gradients are summed over them.
        copies: how often a token's contribution appears in that sum: gradients are divided by data ranks * copies.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    holders: tuple[int, ...]
    copies: int

    @classmethod
    def whole(cls, shape: tuple[int, ...], holders: tuple[int, ...] = (0,), copies: int = 1) -> Placement:
        """The parameter as a whole."""
        zero = (0,) * len(shape)
        return cls(tuple(shape), (Box(zero, zero, tuple(shape)),), holders, copies)

    @classmethod
    def part(
        cls,
        shape: tuple[int, ...],
        parts: dict[int, tuple[int, int]],
        holders: tuple[int, ...],
        copies: int,
        repeats: int = 1,
    ) -> Placement:
        """Part `index` of `count` equal ones along each dim of `parts` (dim -> (index, count)).

        With `repeats` n, dim 0 consists of n equal stretches (query, key, value), each cut so.

        Raises:
            ValueError: a dim does not divide evenly.
        """
        stretch = shape[0] // repeats
        at, size = [0] * len(shape), list(shape)
        size[0] = stretch
        for dim, (index, count) in parts.items():
            length = size[dim]
            if length % count:
                raise ValueError(f"placement: {count} parts do not divide dim {dim} of {shape}")
            size[dim] = length // count
            at[dim] = index * size[dim]
        boxes = tuple(
            Box((at[0] + i * stretch, *at[1:]), (i * size[0], *(0,) * (len(shape) - 1)), tuple(size))
            for i in range(repeats)
        )
        return cls(tuple(shape), boxes, holders, copies)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the rank's tensor."""
        first = self.boxes[0].size
        return (first[0] * len(self.boxes), *first[1:]) if first else first
