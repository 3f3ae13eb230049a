"""Triton kernels of moelab, imported as ``moelab.kernels``; every op stands beside its PyTorch reference.

One function per op. On CUDA tensors it runs Triton kernels, on CPU tensors tuned torch; ``backend="reference"`` is
the plain text of the operation. A MoE layer is

    g = gate(logits_SE, top_k, capacity, seed=step)             # which experts, which slot, which weight, both losses
    table = row_table(g)                                        # which row holds which token
    rows = dispatch(x_SM, table)                                # tokens in expert order
    rows = expert_ffn(rows, table.offsets_E1, w1, b1, w2, b2)
    y_SM = combine(rows, table, g.weight_SK)
    y_SM = residual_mix(y_SM, mlp_SM, x_SM, w_2M, b_2)          # PR-MoE
"""

from ._hash import priorities
from .gating import Gate, gate
from .grouped_mm import expert_ffn, grouped_mm
from .permute import RowTable, combine, dispatch, row_table
from .residual import residual_mix

__all__ = [
    "Gate",
    "RowTable",
    "combine",
    "dispatch",
    "expert_ffn",
    "gate",
    "grouped_mm",
    "priorities",
    "residual_mix",
    "row_table",
]
