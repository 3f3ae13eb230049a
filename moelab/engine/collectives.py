"""The engine's collectives, and observers of them.

Each collective of the engine is a call of one of these functions, so that `observe` sees all of them: `Traffic` counts
messages and bytes, and benchmarks measure time. The collectives of FSDP2 are torch's own and are not observed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moelab.engine.groups import Group

KINDS = {
    "counts": "numbers of rows that will follow",
    "dispatch": "rows to the ranks of their experts",
    "slices": "rows and partial sums between the slices of an expert",
    "combine": "experts' outputs back to the ranks of their tokens",
    "tensor": "rows among tensor-parallel ranks, which hold the same tokens (the coordinated exchange)",
    "check": "comparison of the routing of ranks that should have routed alike (the coordinated exchange)",
    "capacity": "the baseline's agreement on one capacity",
    "activations": "partial results of tensor-sliced layers, and their inputs' gradients",
    "router": "routing statistics over the whole batch",
    "gradients": "sums of gradients over replicas",
    "norm": "the global gradient norm",
    "metrics": "losses and counts of a step",
    "control": "small messages that steer a program: flags, sizes, JSON",
}
"""What a collective is for."""


@dataclass(frozen=True)
class Collective:
    """One call of a collective on this rank.

    Attributes:
        operation: "all_to_all", "all_reduce", "all_gather", "gather", "broadcast", or "wait" for the end of an
            asynchronous one.
        kind: what it is for, one of `KINDS`.
        group: the ranks that take part.
        sizes: bytes that this rank sends to each rank of the group, in the group's order; its own part is included.
        messages: messages to each rank that is sent anything.
        backward: whether a backward pass makes the call.
    """

    operation: str
    kind: str
    group: Group
    sizes: tuple[int, ...]
    messages: int = 1
    backward: bool = False


Observer = Callable[[Collective], AbstractContextManager | None]
"""Is called before each collective; a context manager that it returns is open during the call."""

_observers: list[Observer] = []


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Call an observer for each of this process's collectives while the context lasts."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers[:] = [o for o in _observers if o is not observer]


def all_to_all(
    rows: Tensor,
    group: Group,
    kind: str,
    *,
    send: Sequence[int] | None = None,
    receive: Sequence[int] | None = None,
    backward: bool = False,
) -> Tensor:
    """Send `send[i]` rows, in order, to rank i of the group; return `receive[i]` rows from each, in the order of ranks.

    Without sizes every rank gets an equal number of rows.
    """
    rows = rows.contiguous()
    output = torch.empty_like(rows) if receive is None else rows.new_empty(sum(receive), *rows.shape[1:])
    row = rows.element_size() * rows.shape[1:].numel()
    sizes = [n * row for n in send] if send is not None else [rows.nbytes // group.size] * group.size
    with _observed("all_to_all", kind, group, sizes, backward=backward):
        group.all_to_all_single(
            output, rows, None if receive is None else list(receive), None if send is None else list(send)
        )
    return output


def all_reduce(
    tensor: Tensor,
    group: Group,
    kind: str,
    *,
    op: Any = dist.ReduceOp.SUM,
    asynchronous: bool = False,
    backward: bool = False,
) -> Pending | None:
    """Add a tensor up (or reduce it by `op`) over the group, in place; return a `Pending` for `asynchronous` calls.

    It counts as a ring that sends pieces of 1 / n: 2 (n - 1) messages to the next rank.
    """
    if group.size == 1:
        return None
    messages, sizes = 2 * (group.size - 1), [0] * group.size
    sizes[(group.index + 1) % group.size] = messages * tensor.nbytes // group.size
    with _observed("all_reduce", kind, group, sizes, messages=messages, backward=backward):
        work = group.all_reduce(tensor, op, asynchronous)
    return Pending(work, kind, group) if work is not None and asynchronous else None


@dataclass(frozen=True)
class Pending:
    """An asynchronous collective that has begun."""

    work: dist.Work
    kind: str
    group: Group

    def wait(self) -> None:
        """Wait until the collective is done (on a GPU: until it is queued before what follows)."""
        with _observed("wait", self.kind, self.group, [0] * self.group.size):
            self.work.wait()


def all_gather(tensor: Tensor, group: Group, kind: str) -> list[Tensor]:
    """Return every rank's tensor, in the order of the group; all of one shape."""
    if group.size == 1:
        return [tensor]
    outputs = [torch.empty_like(tensor) for _ in group.ranks]
    with _observed("all_gather", kind, group, [tensor.nbytes] * group.size):
        group.all_gather(outputs, tensor)
    return outputs


def broadcast(tensor: Tensor, group: Group, kind: str) -> None:
    """Overwrite a tensor with that of the group's first rank."""
    if group.size > 1:
        with _observed("broadcast", kind, group, [tensor.nbytes if group.index == 0 else 0] * group.size):
            group.broadcast(tensor)


def all_gather_json(value: Any, group: Group | None = None) -> list[Any]:
    """Return the JSON value of every rank of the group (by default of all ranks).

    Values are not pickled, so that received data cannot run code.
    """
    return broadcast_json(gather_json(value, group), group)


def gather_json(value: Any, group: Group | None = None) -> list[Any]:
    """Return every rank's JSON value on the group's first rank, and an empty list on the others.

    The group is by default that of all ranks.
    """
    group = group or Group.world()
    if group.size == 1:
        return [value]
    data = _to_bytes(value, group)
    lengths = [int(n) for n in all_gather(torch.tensor([len(data)], device=data.device), group, "control")]
    padded = data.new_zeros(max(lengths))
    padded[: len(data)] = data
    outputs = [torch.empty_like(padded) for _ in group.ranks] if group.index == 0 else None
    with _observed("gather", "control", group, [len(padded)] + [0] * (group.size - 1)):
        group.gather(outputs, padded)
    return [_from_bytes(d[:n]) for d, n in zip(outputs or [], lengths, strict=False)]


def broadcast_json(value: Any, group: Group | None = None) -> Any:
    """Return the JSON value of the group's first rank (by default rank 0) on every rank; others' values are ignored."""
    group = group or Group.world()
    if group.size == 1:
        return value
    data = _to_bytes(value, group)
    length = torch.tensor([len(data)], device=data.device)
    broadcast(length, group, "control")
    if group.index:
        data = data.new_empty(int(length))
    broadcast(data, group, "control")
    return _from_bytes(data)


def _to_bytes(value: Any, group: Group) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(group.device_type)


def _from_bytes(data: Tensor) -> Any:
    return json.loads(bytes(data.cpu().numpy()))


def _observed(
    operation: str, kind: str, group: Group, sizes: Sequence[int], *, messages: int = 1, backward: bool = False
) -> AbstractContextManager:
    if not _observers:
        return contextlib.nullcontext()
    call, stack = Collective(operation, kind, group, tuple(sizes), messages, backward), contextlib.ExitStack()
    for observer in _observers:
        if (around := observer(call)) is not None:
            stack.enter_context(around)
    return stack


@dataclass
class Sent:
    """What one rank sent: messages and bytes, inside its node and to other nodes."""

    intra_node_messages: int = 0
    intra_node_bytes: int = 0
    inter_node_messages: int = 0
    inter_node_bytes: int = 0

    @property
    def messages(self) -> int:
        """Messages in all."""
        return self.intra_node_messages + self.inter_node_messages

    @property
    def bytes(self) -> int:
        """Bytes in all."""
        return self.intra_node_bytes + self.inter_node_bytes


@dataclass
class Traffic:
    """Counts what this rank sends; an observer, used as `with observe(traffic): ...`.

    A message is counted for each other rank to which this rank sends something: in an uneven all-to-all for each that
    gets at least one row, in an all-gather for each of the others; for an all-reduce see `all_reduce`.

    Attributes:
        ranks_per_node: G; ranks a and b share a node if a // G == b // G.
        sent: (kind, "forward" or "backward") -> counts.
    """

    ranks_per_node: int
    sent: dict[tuple[str, str], Sent] = field(default_factory=dict)

    def __call__(self, call: Collective) -> None:
        """Count one collective."""
        entry = self.sent.setdefault((call.kind, "backward" if call.backward else "forward"), Sent())
        node = call.group.rank // self.ranks_per_node
        for rank, size in zip(call.group.ranks, call.sizes, strict=True):
            if rank == call.group.rank or not size:
                continue
            where = "intra_node" if rank // self.ranks_per_node == node else "inter_node"
            for what, count in (("messages", call.messages), ("bytes", size)):
                name = f"{where}_{what}"
                setattr(entry, name, getattr(entry, name) + count)

    def total(self, *kinds: str) -> Sent:
        """Return the sum over both directions of the given kinds, or of all kinds if none is given."""
        chosen = [s for (kind, _), s in self.sent.items() if not kinds or kind in kinds]
        return Sent(*(sum(getattr(s, name) for s in chosen) for name in Sent.__dataclass_fields__))
