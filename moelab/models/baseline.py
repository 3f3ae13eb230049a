"""Compute the paper's PyTorch baseline: a gate by one-hot masks, dispatch and combine by einsums (as in GShard).

The functions compute what `moelab.kernels` computes, by the operations of the released code (DeepSpeed up to 0.19).
`EinsumDispatch`, inference in baseline mode, the exchange with padded slots among ranks (`moelab.engine.padded`) and
the benchmarks use them. Letters as in `moelab.config`; a mask [S, E, C] has an entry for each token, expert and slot,
nearly all of them zero.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moelab import kernels
from moelab.kernels import Gate

mask_gate = functools.partial(kernels.gate, backend="reference")
"""The gate by one-hot masks [S, E]: the kernels' reference, on any device."""


def _one_hot(index_S: Tensor, count: int) -> Tensor:
    """Return bool [S, count], all False for a negative index; unlike torch's one_hot it never waits for the device."""
    return index_S[:, None] == torch.arange(count, dtype=index_S.dtype, device=index_S.device)


def one_hot_masks(routing: Gate, capacity: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (dispatch_SEC, combine_SEC), the masks of the slots that tokens occupy.

    dispatch_SEC is bool, True where a token occupies an expert's slot; combine_SEC is the weight of the slot's result,
    in `dtype`. As in the released code, a slot with weight exactly 0 counts as empty; neither results nor gradients
    depend on it.

    Args:
        capacity: C, at least the busiest expert's kept entries; entries with a higher slot are lost.
    """
    combine_SEC = torch.zeros(())
    for k in range(routing.expert_SK.shape[1]):
        expert_SE = _one_hot(routing.expert_SK[:, k], len(routing.kept_E))
        slot_SC = _one_hot(routing.slot_SK[:, k], capacity).to(dtype)
        choice_SEC = torch.einsum("se,sc->sec", routing.weight_SK[:, k, None].to(dtype) * expert_SE, slot_SC)
        combine_SEC = combine_SEC + choice_SEC if k else choice_SEC
    return combine_SEC.bool(), combine_SEC


def einsum_dispatch(x_SM: Tensor, dispatch_SEC: Tensor) -> Tensor:
    """Return the tokens in their experts' slots, [E, C, M], by S * E * C * M multiply-adds, nearly all with zeros."""
    return torch.einsum("sec,sm->ecm", dispatch_SEC.to(x_SM.dtype), x_SM)


def einsum_combine(rows_ECM: Tensor, combine_SEC: Tensor) -> Tensor:
    """Return each token's weighted sum of its slots' results, [S, M], by S * E * C * M multiply-adds."""
    return torch.einsum("sec,ecm->sm", combine_SEC, rows_ECM)
