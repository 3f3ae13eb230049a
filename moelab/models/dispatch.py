"""Dispatch tokens into expert order, and combine the experts' outputs, weighted, in token order.

    rows_RM, offsets_E1, state = dispatcher.dispatch(x_SM, routing)
    y_SM = dispatcher.combine(experts(rows_RM, offsets_E1), state)

A `Dispatch` holds settings, never a call's data: `state` passes the data that combine needs. All dispatches give the
same results and gradients. This module has those within one process, `moelab.engine` those among ranks.

Each of them gives the paper's PyTorch form of itself, for inference in baseline mode (`Dispatch.baseline`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from moelab import kernels
from moelab.models.routing import Routing

State = TypeVar("State")


class Dispatched(NamedTuple, Generic[State]):
    """Hold tokens in expert order and the data that combine needs."""

    rows_RM: Tensor
    """[R, M] in the tokens' dtype: a row per kept (token, expert) pair, in expert order; rows may be empty (zeros)."""
    offsets_E1: Tensor
    """int32 [E + 1]: expert e's rows are `offsets_E1[e]` to `offsets_E1[e + 1]`; E counts this process's experts."""
    state: State
    """The data of this call that `combine` needs."""


class Dispatch(ABC, Generic[State]):
    """Copy tokens to their experts, and combine the experts' outputs."""

    @abstractmethod
    def dispatch(self, x_SM: Tensor, routing: Routing) -> Dispatched[State]:
        """Return the tokens in expert order; S may be 0."""

    @abstractmethod
    def combine(self, rows_RM: Tensor, state: State) -> Tensor:
        """Return each token's weighted sum of its experts' outputs, [S, M]; zeros if no expert kept the token."""

    def __call__(self, x_SM: Tensor, routing: Routing, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Dispatch, run the experts, combine; `experts` maps rows and offsets to rows of the same shape."""
        rows_RM, offsets_E1, state = self.dispatch(x_SM, routing)
        rows_RM = experts(rows_RM, offsets_E1)
        return self.combine(rows_RM, state)

    def baseline(self, static_tokens: int = 0) -> Dispatch[Tensor]:
        """Return the paper's PyTorch form of this dispatch, for the same experts; arguments as of `EinsumDispatch`."""
        raise NotImplementedError

    def reads_device(self, tokens: int) -> bool:
        """Return whether a call with `tokens` tokens waits for the device, so that a CUDA graph cannot capture it."""
        return False


class ByTable(NamedTuple):
    """Hold the state of `LocalDispatch`."""

    table: kernels.RowTable
    weight_SK: Tensor


class LocalDispatch(Dispatch[ByTable]):
    """Copy rows by a table, in each direction at most S * K * M numbers."""

    def dispatch(self, x_SM: Tensor, routing: Routing) -> Dispatched[ByTable]:
        """Return the tokens in expert order."""
        table = kernels.row_table(routing)
        rows_RM = kernels.dispatch(x_SM, table)
        return Dispatched(rows_RM, table.offsets_E1, ByTable(table, routing.weight_SK))

    def combine(self, rows_RM: Tensor, state: ByTable) -> Tensor:
        """Return each token's weighted sum of its experts' outputs, [S, M]."""
        return kernels.combine(rows_RM, state.table, state.weight_SK)

    def baseline(self, static_tokens: int = 0) -> EinsumDispatch:
        """Return the dispatch by masks."""
        return EinsumDispatch(static_tokens)


class EinsumDispatch(Dispatch[Tensor]):
    """Multiply by one-hot masks [S, E, C], as the paper's PyTorch baseline (`moelab.models.baseline`).

    The state is the combine mask. C, the number of slots of each expert, is the busiest expert's load, which the host
    reads from the device.

    Args:
        static_tokens: calls with at most this many tokens S use C = S instead (no expert keeps more), and read nothing
            from the device.
    """

    def __init__(self, static_tokens: int = 0) -> None:
        self.static_tokens = static_tokens

    def dispatch(self, x_SM: Tensor, routing: Routing) -> Dispatched[Tensor]:
        """Return the tokens in their experts' slots, C rows per expert."""
        from moelab.models.baseline import einsum_dispatch, one_hot_masks

        E = len(routing.kept_E)
        C = max(int(routing.kept_E.max()) if self.reads_device(len(x_SM)) else len(x_SM), 1)
        dispatch_SEC, combine_SEC = one_hot_masks(routing, C, x_SM.dtype)
        offsets_E1 = torch.arange(E + 1, dtype=torch.int32, device=x_SM.device) * C
        return Dispatched(einsum_dispatch(x_SM, dispatch_SEC).flatten(0, 1), offsets_E1, combine_SEC)

    def combine(self, rows_RM: Tensor, state: Tensor) -> Tensor:
        """Return each token's weighted sum of its experts' outputs, [S, M]."""
        from moelab.models.baseline import einsum_combine

        return einsum_combine(rows_RM.view(*state.shape[1:], -1), state)

    def reads_device(self, tokens: int) -> bool:
        """Return whether the call reads the busiest expert's load: with more than `static_tokens` tokens."""
        return tokens > self.static_tokens
