"""Messages and rows that a rank sends in the exchanges (paper section 5.3), stage by stage, and the time they take.

Counts follow from the layout. They are per rank and per MoE layer, for one direction, without what stays on the rank.
With slots (padded exchanges) they are exact; without, they are the mean under even routing. If a group of X ranks lies
across nodes unevenly, the counts are those of its worst placed rank.

    flat             one all-to-all among X ranks: X - 1 messages
    hierarchical     all-to-all in the node, then between nodes: (G - 1) + (X / G - 1) messages, nearly twice the rows
    coordinated      all-to-all among the X / c ranks of equal share: X / c - 1 messages with a c-th of the rows; on the
                     way back an all-gather over the c ranks that hold the same tokens
    coordinated-hierarchical    both

With expert slicing, an all-gather of rows over the W slices comes before the experts and a reduce-scatter after them
(section 5.2, Fig 7).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from moelab.simulate.constants import Constants
from moelab.simulate.hardware import Cluster
from moelab.simulate.layouts import Array, Columns, Layouts


@dataclass(frozen=True)
class Stage:
    """One collective, as one rank sees it; arrays of n layouts.

    Attributes:
        near_messages, far_messages: messages that it sends inside its node and to other nodes.
        near_rows, far_rows: rows of M numbers in them.
    """

    near_messages: Array
    far_messages: Array
    near_rows: Array
    far_rows: Array

    @property
    def happens(self) -> Array:
        """Whether it sends anything, bool [n]."""
        return (self.near_messages + self.far_messages) > 0

    def microseconds(self, row_bytes: float, cluster: Cluster, constants: Constants) -> Array:
        """Return start + messages x latency + bytes / bandwidth (alpha-beta), in microseconds; 0 if nothing is sent.

        The links in the node and between nodes take turns, or with `Constants.links_overlap` work at the same time.
        """
        near = self.near_messages * constants.near_us + transfer_us(
            self.near_rows * row_bytes, cluster.near_gb_s * constants.near_share
        )
        far = self.far_messages * constants.far_us + transfer_us(
            self.far_rows * row_bytes, cluster.far_gb_s * constants.far_share
        )
        links = np.maximum(near, far) if constants.links_overlap else near + far
        return self.happens * (constants.collective_us + constants.exchange_us + links)


Size = TypeVar("Size", Array, float, Array | float)


def transfer_us(size: Size, gb_s: float) -> Size:
    """Return the microseconds for `size` bytes at `gb_s` 1e9 bytes per second."""
    return size / (gb_s * 1e3)


def rows_to_send(expert: Columns, tokens: Array, top_k: int, slots: int) -> Array:
    """Return the rows that a rank sends to all experts, its own included.

    Args:
        tokens: S, tokens of a tensor group.
        slots: C, rows for every expert whether used or not; 0: as many as there are (token, expert) pairs.
    """
    return (slots * expert.experts if slots else tokens * top_k) / expert.senders


def all_to_all(layouts: Layouts, expert: Columns, rows: Array, gpus_per_node: int) -> list[Stage]:
    """Return the stages of one all-to-all of `rows` rows per rank towards the experts; the way back reverses them.

    The second one, between nodes, sends nothing unless the exchange is hierarchical.
    """
    X, c = expert.parallel, expert.senders
    in_node = np.gcd(X, np.minimum(gpus_per_node, layouts.ranks)) // c  # group members in a node
    group = X // c
    nodes = group // in_node
    staged = layouts.hierarchical
    none = np.zeros_like(rows)

    near_peers, far_peers = in_node - 1, np.where(staged, nodes - 1, group - in_node)
    first = Stage(
        near_messages=near_peers,
        far_messages=np.where(staged, 0, far_peers),
        near_rows=rows * near_peers / np.where(staged, in_node, group),
        far_rows=np.where(staged, 0, rows * far_peers / group),
    )
    second = Stage(
        near_messages=none,
        far_messages=np.where(staged, far_peers, 0),
        near_rows=none,
        far_rows=np.where(staged, rows * far_peers / nodes, 0),
    )
    return [first, second]


def share_gather(expert: Columns, rows: Array) -> Stage:
    """Return the all-gather in which the c ranks of a share group exchange the results of their parts of the tokens.

    Only the coordinated exchange has it.
    """
    peers = expert.senders - 1
    none = np.zeros_like(rows)
    return Stage(peers, none, rows * peers, none)


def slice_exchange(layouts: Layouts, expert: Columns, rows: Array, gpus_per_node: int) -> Stage:
    """Return the all-gather of `rows` received rows over the W slices, or the equal reduce-scatter after experts."""
    W, X = expert.slices, expert.parallel
    in_node = np.maximum(np.gcd(X * W, np.minimum(gpus_per_node, layouts.ranks)) // X, 1)
    near, far = in_node - 1, W - in_node
    return Stage(near, far, rows * near, rows * far)


def all_reduce_us(
    ranks: Array | int, size: Array | float, cluster: Cluster, constants: Constants, *, stride: Array | int = 1
) -> Array:
    """Return the microseconds of an all-reduce of `size` bytes over `ranks` ranks that lie `stride` apart.

    It is a ring inside nodes and a tree between them. The ring sends 2 (g - 1) messages, and 2 (g - 1) / g of the
    bytes, per rank. The tree over N nodes is 2 log2 N messages deep; each of the g ranks of a node sends its g-th of
    the bytes up and down once.
    """
    g = np.clip(cluster.gpus_per_node // np.asarray(stride), 1, ranks)
    nodes = np.maximum(np.asarray(ranks) // g, 1)
    near = 2 * (g - 1) * (constants.near_us + transfer_us(size / g, cluster.near_gb_s * constants.near_share))
    far = 2 * np.log2(nodes) * constants.hop_us + 2 * (nodes > 1) * transfer_us(
        size / g, cluster.far_gb_s * constants.far_share
    )
    return (np.asarray(ranks) > 1) * (constants.collective_us + near + far)


def collective_us(operation: str, ranks: int, in_node: int, size: int, cluster: Cluster, constants: Constants) -> float:
    """Return the microseconds of one "all-reduce" or "all-to-all" among ranks, `in_node` of which share a node.

    Args:
        size: bytes of a rank's tensor.
    """
    if operation == "all-reduce":
        return float(all_reduce_us(ranks, size, replace(cluster, gpus_per_node=in_node), constants))
    near, far = in_node - 1, ranks - in_node
    counts = (np.array(n) for n in (near, far, near / ranks, far / ranks))
    return float(Stage(*counts).microseconds(size, cluster, constants))
