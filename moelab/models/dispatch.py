"""Dispatch: tokens into expert order, and the experts' outputs back, weighted, into token order.

    rows_RM, offsets_E1, state = dispatcher.dispatch(x_SM, routing)
    y_SM = dispatcher.combine(experts(rows_RM, offsets_E1), state)

A `Dispatch` holds settings, never a call's data: what combine needs travels in `state`. All of them give the same
results, gradients included; here are those of one process, `moelab.engine` has those among ranks.

To add one: write the class here, enter it in `DISPATCH`, and add its name to `ModelConfig.dispatch`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from moelab import kernels
from moelab.models.baseline import einsum_combine, einsum_dispatch, one_hot_masks
from moelab.models.routing import Routing

State = TypeVar("State")


class Dispatched(NamedTuple, Generic[State]):
    """Tokens in expert order, and what brings them back."""

    rows_RM: Tensor
    """A row for each token that an expert keeps, by expert, in the tokens' dtype; some may be empty (zeros)."""
    offsets_E1: Tensor
    """int32 [E + 1]: expert e's rows are `offsets_E1[e]` to `offsets_E1[e + 1]`; E counts this process's."""
    state: State
    """What `combine` needs to know of this call."""


class Dispatch(ABC, Generic[State]):
    """A way to the experts and back."""

    @abstractmethod
    def dispatch(self, x_SM: Tensor, routing: Routing) -> Dispatched[State]:
        """Bring tokens into expert order. S may be 0."""

    @abstractmethod
    def combine(self, rows_RM: Tensor, state: State) -> Tensor:
        """Return the weighted sums of the experts' outputs by token, [S, M]; zeros where no expert kept one."""

    def __call__(self, x_SM: Tensor, routing: Routing, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Dispatch, run the experts, combine. `experts` takes rows and offsets and returns rows of the same shape."""
        rows_RM, offsets_E1, state = self.dispatch(x_SM, routing)
        rows_RM = experts(rows_RM, offsets_E1)
        return self.combine(rows_RM, state)

    def reads_device(self, tokens: int) -> bool:
        """Whether a call with so many tokens waits for a number from the device; a CUDA graph cannot capture it."""
        return False


class ByTable(NamedTuple):
    """The state of `LocalDispatch`."""

    table: kernels.RowTable
    weight_SK: Tensor


class LocalDispatch(Dispatch[ByTable]):
    """Copy rows by a table: every kept token once there and once back, S * K * M numbers each."""

    def dispatch(self, x_SM: Tensor, routing: Routing) -> Dispatched[ByTable]:
        table = kernels.row_table(routing)
        return Dispatched(kernels.dispatch(x_SM, table), table.offsets_E1, ByTable(table, routing.weight_SK))

    def combine(self, rows_RM: Tensor, state: ByTable) -> Tensor:
        return kernels.combine(rows_RM, state.table, state.weight_SK)


class EinsumDispatch(Dispatch[Tensor]):
    """Multiply by one-hot masks [S, E, C], the paper's PyTorch baseline (`moelab.models.baseline`); the state is the
    combine mask.

    C, the slots of each expert, is the busiest expert's load, which the host reads from the device.

    Args:
        static_tokens: calls with at most so many tokens S take C = S instead (no expert keeps more), and read nothing
            from the device.
    """

    def __init__(self, static_tokens: int = 0) -> None:
        self.static_tokens = static_tokens

    def dispatch(self, x_SM: Tensor, routing: Routing) -> Dispatched[Tensor]:
        E = len(routing.kept_E)
        C = max(int(routing.kept_E.max()) if self.reads_device(len(x_SM)) else len(x_SM), 1)
        dispatch_SEC, combine_SEC = one_hot_masks(routing, C, x_SM.dtype)
        offsets_E1 = torch.arange(E + 1, dtype=torch.int32, device=x_SM.device) * C
        return Dispatched(einsum_dispatch(x_SM, dispatch_SEC).flatten(0, 1), offsets_E1, combine_SEC)

    def combine(self, rows_RM: Tensor, state: Tensor) -> Tensor:
        return einsum_combine(rows_RM.view(*state.shape[1:], -1), state)

    def reads_device(self, tokens: int) -> bool:
        return tokens > self.static_tokens


class DispatchFactory(Protocol):
    """Makes one layer's dispatch from a name that `ModelConfig.dispatch` knows; the engine has one for its ranks."""

    def __call__(self, name: str, static_tokens: int = 0) -> Dispatch:
        """`static_tokens` is for the baseline alone, see `EinsumDispatch`."""
        ...


DISPATCH: dict[str, Callable[[int], Dispatch]] = {
    "local": lambda static_tokens: LocalDispatch(),
    "einsum": EinsumDispatch,
}
"""`ModelConfig.dispatch` -> makes a dispatch, from `static_tokens`, to experts that are all in this process."""


def make_dispatch(name: str, static_tokens: int = 0) -> Dispatch:
    """The `DispatchFactory` of one process."""
    return DISPATCH[name](static_tokens)
