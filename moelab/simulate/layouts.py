"""Many layouts at once: what `moelab.config.parallel` says of each of them, as arrays.

A sweep of 10,000 layouts then costs as many numpy operations as one layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moelab.config.parallel import ParallelConfig

Array = np.ndarray


class Columns:
    """The attributes of n objects of one class, numbers and truth values: `columns.x` is the array of each one's `x`.

    Attributes:
        rows: the objects.
    """

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getattr__(self, name: str) -> Array:
        """Return an attribute of all rows, int64 [n], which is kept."""
        column = np.array([getattr(row, name) for row in self.rows], dtype=np.int64)
        setattr(self, name, column)
        return column


class Layouts(Columns):
    """n layouts, each a `ParallelConfig`."""

    rows: tuple[ParallelConfig, ...]

    def __init__(self, rows: Sequence[ParallelConfig]) -> None:
        super().__init__(rows)
        self._experts: dict[int, Columns] = {}

    def experts(self, count: int) -> Columns:
        """Return how a layer of `count` experts is distributed in each layout, n `ExpertLayout`s, unchecked."""
        if count not in self._experts:
            self._experts[count] = Columns([row.spread(count) for row in self.rows])
        return self._experts[count]
