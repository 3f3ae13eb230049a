"""Compare the flat, the hierarchical and the coordinated all-to-all (paper section 5.3).

Every rank has one expert, and one row for every rank. The messages and rows that a rank sends come from the paper's
formulas and from the simulator's stages; times are the simulator's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moelab.config.parallel import ParallelConfig
from moelab.lazy import pd
from moelab.simulate import hardware
from moelab.simulate.constants import fitted
from moelab.simulate.exchange import Stage, all_to_all, rows_to_send, share_gather
from moelab.simulate.layouts import Layouts

NODE = 8
"""The paper's G, GPUs of a node, and L, the tensor slicing of the coordinated way."""


def layouts(ranks: int) -> dict[str, ParallelConfig]:
    """Return the layout of each way, with one expert per rank."""
    tensor = min(NODE, ranks)
    return {
        "flat": ParallelConfig(data=ranks, gpus_per_node=NODE),
        "hierarchical": ParallelConfig(data=ranks, gpus_per_node=NODE, exchange="hierarchical"),
        "coordinated": ParallelConfig(tensor=tensor, data=ranks // tensor, gpus_per_node=NODE, exchange="coordinated"),
    }


def formula(way: str, ranks: int) -> tuple[int, int, int]:
    """Return (messages, rows, rows gathered after the way back) that a rank sends in one all-to-all, after section 5.3.

    Each rank has one row for every rank.

    flat: p - 1 messages of a row.
    hierarchical: G - 1 messages of p / G rows, then p / G - 1 of G rows.
    coordinated: p / L - 1 messages of a row; later each of the L tensor ranks gives the others its p / L results.
    """
    G = min(NODE, ranks)
    nodes = ranks // G
    if way == "flat":
        return ranks - 1, ranks - 1, 0
    if way == "hierarchical":
        return G - 1 + nodes - 1, (G - 1) * nodes + (nodes - 1) * G, 0
    return nodes - 1, nodes - 1, (G - 1) * nodes


def kept(way: str, ranks: int) -> int:
    """Return the rows that a rank keeps for itself: one of the p.

    The hierarchical way keeps p / G at the first hop and G at the second.
    """
    G = min(NODE, ranks)
    return {"flat": 1, "hierarchical": ranks // G + (G if ranks > G else 0), "coordinated": 1}[way]


def _stages(config: ParallelConfig, ranks: int) -> tuple[list[Stage], Stage]:
    """Return the stages of one direction, and the gather after the way back."""
    of = Layouts([config])
    experts = of.experts(ranks)
    rows = rows_to_send(experts, np.array([ranks]), 1, 0)
    return all_to_all(of, experts, rows, config.ranks_per_node), share_gather(experts, rows)


def counts(config: ParallelConfig, ranks: int) -> tuple[int, int, int]:
    """Return messages, rows and gathered rows as the simulator counts them."""
    stages, gather = _stages(config, ranks)

    def total(parts: Sequence[Stage], *names: str) -> int:
        return round(sum(float(getattr(part, name)[0]) for part in parts for name in names))

    return (
        total(stages, "near_messages", "far_messages"),
        total(stages, "near_rows", "far_rows"),
        total([gather], "near_rows", "far_rows"),
    )


def times(
    worlds: Iterable[int] = (8, 16, 32, 64, 128, 256),
    sizes: Iterable[int] = (1 << 14, 1 << 18, 1 << 22),
    cluster: str = "a100-40gb",
) -> pd.DataFrame:
    """Return the microseconds of dispatch, combine and the gather after it on the simulated cluster.

    Args:
        sizes: bytes of tokens that each rank holds, an equal part of them for every rank.

    Returns:
        Columns ranks, bytes, way, us, ratio (over flat).
    """
    machine, constants = hardware.cluster(cluster), fitted()
    found = []
    for ranks in worlds:
        for size in sizes:
            flat = 0.0
            for way, config in layouts(ranks).items():
                stages, gather = _stages(config, ranks)
                each = [float(s.microseconds(size / ranks, machine, constants)[0]) for s in (*stages, *stages, gather)]
                flat = sum(each) if way == "flat" else flat
                found.append({"ranks": ranks, "bytes": size, "way": way, "us": sum(each), "ratio": sum(each) / flat})
    return pd.DataFrame(found)
