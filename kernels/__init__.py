"""Provide the operations of an MoE layer, imported as ``moelab.kernels``; imports nothing else of moelab.

One function per op. On CUDA tensors it runs Triton kernels, on CPU tensors C++, compiled where it is first used;
``backend="reference"`` runs the op in plain PyTorch. An op's file (``gating.py``) holds the public function and its
reference, the files beside it (``_gating_triton.py``, ``_cpp/gating.cpp``) the implementations. An MoE layer is

    g = gate(logits_SE, top_k, capacity, seed=step)             # which experts, which slot, which weight, both losses
    table = row_table(g)                                        # which row holds which token
    rows = dispatch(x_SM, table)                                # tokens in expert order
    rows = expert_ffn(rows, table.offsets_E1, w1, b1, w2, b2)
    y_SM = combine(rows, table, g.weight_SK)
    y_SM = residual_mix(y_SM, mlp_SM, x_SM, w_2M, b_2)          # PR-MoE
"""

from ._common import Backend
from ._cpp import available as cpp_available
from ._cpp import instructions, version, why_not, why_not_loaded
from ._hash import priorities
from .activations import ACTIVATIONS, Activation, activate
from .attention import attention
from .experts import expert_ffn
from .gating import Gate, gate
from .packed import pack
from .permute import RowTable, combine, dispatch, row_table
from .residual import residual_mix

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Backend",
    "Gate",
    "RowTable",
    "activate",
    "attention",
    "combine",
    "cpp_available",
    "dispatch",
    "expert_ffn",
    "gate",
    "instructions",
    "pack",
    "priorities",
    "residual_mix",
    "row_table",
    "version",
    "why_not",
    "why_not_loaded",
]
