"""What the checks of `moelab check-cluster` share: a row of the table, and the ranks by node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["ok", "slow", "wrong", "note"]
"""`note` is a number with nothing to compare it with."""
LIMIT_S = 120.0
"""Of each collective: a cluster that is broken should say so soon."""
SLOW_SHARE = 0.7
"""Times the expected bandwidth, or the median of equals: what is less is slow."""
CLOCK_S = 0.5
"""Clocks that differ by more make time stamps of files and logs misleading."""
VISIBLE_S = 5.0
"""A file should be seen on all nodes after that long."""


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        check: what was checked, and among whom.
        measured, expected: in words, with units.
        verdict: see `Verdict`.
        remedy: what to do, for "slow" and "wrong".
    """

    check: str
    measured: str
    expected: str = ""
    verdict: Verdict = "note"
    remedy: str = ""


@dataclass(frozen=True)
class Nodes:
    """The ranks by node.

    Attributes:
        hosts: host of each rank.
        ranks: int [nodes, ranks of a node]; empty where nodes have unequal numbers of ranks.
    """

    hosts: tuple[str, ...]
    ranks: np.ndarray

    @classmethod
    def of(cls, hosts: Sequence[str]) -> Nodes:
        """Return the nodes of ranks on these hosts."""
        by_host = {host: [rank for rank, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)}
        equal = len({len(ranks) for ranks in by_host.values()}) == 1
        return cls(tuple(hosts), np.array(list(by_host.values()) if equal else [], dtype=int))

    @property
    def count(self) -> int:
        """Return the number of nodes."""
        return len(set(self.hosts))


def size_text(size: int) -> str:
    """Return a number of bytes as text: "64 MiB", "0.5 KiB"."""
    return f"{size / (1 << 20):g} MiB" if size >= 1 << 20 else f"{size / 1024:.3g} KiB"
