"""What a rank sends in the exchanges of today's programs, as stages; `moelab.simulate.exchange` gives their time.

Rows are means under even routing. A token's nodes and GPUs are drawn with replacement, as each holds many experts. What
stays on a rank is not sent. With R ranks in nodes of G:

    even      an equal part for every rank (NCCL's all-to-all)
    pairs     a row for each (token, expert) pair (low-latency kernels); `by_card`: also within the node by network card
    grouped   a row for each node that a token goes to, over the network to the GPU of equal place, and from there a row
              for each GPU, over NVLink (DeepEP's normal kernels, README; their bytes: tests/test_internode.py). A
              token's experts lie in at most `groups` nodes (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)
"""

from __future__ import annotations

import numpy as np

from moelab.simulate.decoding import distinct_experts
from moelab.simulate.exchange import Stage


def even(ranks: int, in_node: int, rows: float) -> Stage:
    """Return the exchange of `rows` rows in equal parts among `ranks` ranks, `in_node` of them in a node."""
    near, far = in_node - 1, ranks - in_node
    return _stage(near, far, rows * near / ranks, rows * far / ranks)


def pairs(ranks: int, in_node: int, tokens: float, top_k: int, *, by_card: bool = False) -> Stage:
    """Return the exchange of a row for each of a rank's tokens and choices."""
    return even(ranks, 1 if by_card else in_node, tokens * top_k)


def grouped(ranks: int, in_node: int, tokens: float, top_k: int, groups: int) -> tuple[Stage, float, float]:
    """Return the exchange of a row for each node and then each GPU, and the rows with those that stay.

    Returns:
        The stage; rows to distinct nodes; rows to distinct GPUs. DeepEP's tests count the latter two.
    """
    nodes = ranks // in_node
    to_nodes = tokens * (float(distinct_experts(groups, top_k)) if groups > 1 else 1.0)
    to_gpus = tokens * float(distinct_experts(groups * in_node, top_k)) if groups * in_node > 1 else tokens
    stage = _stage(in_node - 1, nodes - 1, to_gpus * (in_node - 1) / in_node, to_nodes * (nodes - 1) / nodes)
    return stage, to_nodes, to_gpus


def _stage(*numbers: float) -> Stage:
    return Stage(*(np.array([number], dtype=float) for number in numbers))
