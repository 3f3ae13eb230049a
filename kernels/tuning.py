"""Override the tile sizes that the Triton kernels choose from a launch's sizes, for tests and for compiling them all.

Each kernel's own sizes are in its file: `_experts_triton.py`, `_gating_triton.py`, `_permute_triton.py` and
`_residual_triton.py`. The grouped products also have the setting `programs_per_sm`: 0 starts a program for each tile; a
larger number is that of programs for each multiprocessor, each of which goes through several tiles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

GROUPED = ("product0", "product1", "product0t", "product2t", "weight")
"""The ops of grouped products (`_experts_triton.py`)."""

Tile = dict[str, int]

_trial: dict[str, Tile] = {}


def tile(op: str, default: Tile) -> Tile:
    """Return the tile of a launch: `default`, with what `trial` says for the op while its context lasts."""
    return default | _trial.get(op, {})


@contextlib.contextmanager
def trial(op: str, changes: Tile) -> Iterator[None]:
    """Let every launch of an op take these sizes while the context lasts."""
    before = dict(_trial)
    _trial[op] = changes
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)


@contextlib.contextmanager
def persistent(programs_per_sm: int) -> Iterator[None]:
    """Let all grouped products start this number of programs for each multiprocessor while the context lasts."""
    with contextlib.ExitStack() as trials:
        for op in GROUPED:
            trials.enter_context(trial(op, {"programs_per_sm": programs_per_sm}))
        yield
