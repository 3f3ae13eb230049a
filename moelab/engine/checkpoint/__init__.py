"""Checkpoints: a directory a step, written by all ranks in the background, whole or not at all, loaded into any layout.

    <run>/checkpoints/step-00000400/…        see `moelab.engine.checkpoint.storage`

Names and shapes in a checkpoint are those of the model on one rank: experts by global id, query, key and value in one weight. So what was saved
at one layout loads at any other, bit for bit, and one process can read a checkpoint of many. Nothing in it is a pickle:
loading executes no code. Every file's SHA-256 is checked before use; a broken checkpoint is named and the one before it used, the
same one by all ranks. All ranks see the same file system.

    with checkpoint.Writer(directory) as checkpoints:          # every rank
        last = checkpoint.latest(directory)                    # every rank
        checkpoint.load(last, model, optimizer, placements)
        …
        checkpoints.save(step, model, optimizer, state, placements)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moelab.engine.checkpoint import storage
from moelab.engine.checkpoint.storage import CheckpointError, Piece
from moelab.engine.placement import Placement

__all__ = ["Checkpoint", "CheckpointError", "Writer", "latest", "load", "load_model"]

log = logging.getLogger(__name__)
T = TypeVar("T")
Placements = dict[str, Placement] | None
"""Parameter name -> where this rank's tensor sits; None: every rank holds everything. DTensors know it themselves."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its directory, the steps done when it was written, the caller's state."""

    path: Path
    step: int
    state: dict[str, Any]


class Writer:
    """Writes the checkpoints of one directory, one at a time, in a thread.

    The thread talks to the other ranks' through a gloo group of its own, so that it meets none of the training's messages; making it is collective.
    DCP has an `async_save`, but it copies all a rank holds before it knows what the rank will write.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        """
        Args:
            keep: how many checkpoints stay; older ones are removed when a new one is complete.
        """
        self.directory, self.keep = directory, keep
        self._group = dist.new_group(backend="gloo") if _ranks() > 1 else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        placements: Placements = None,
    ) -> None:
        """Copy this rank's share to host memory and return; a thread writes it to `step-<step>`. Every rank calls this.

        A piece that several ranks hold is copied and written by one of them; they take turns.

        Args:
            state: JSON values; rank 0's are kept.

        Raises:
            OSError: the write before this one failed (a full disk, say), on every rank; older checkpoints are as they were.
            CheckpointError: the write before failed for another reason.
        """
        self.wait()
        turns = _Turns()
        pieces = [
            replace(piece, tensor=torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype).copy_(piece.tensor))
            for name, tensor, placement in _tensors(model, optimizer, placements)
            if turns.mine(tensor, placement)
            for piece in _pieces(name, tensor, placement)
        ]
        path = self.directory / f"step-{step:08d}"
        self._thread = threading.Thread(target=self._write, args=(path, step, state, pieces), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the last `save` is on disk; raises what it raised (see `save`)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, path: Path, step: int, state: dict[str, Any], pieces: list[Piece]) -> None:
        try:
            storage.write(path, step, state, pieces, self.keep, self._group)
        except Exception as error:
            self._error = error

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the last write. When the block raised, that error goes first and a failed write is only logged."""
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            log.error("checkpoint not written: %s", failed)
        finally:
            if self._group is not None:
                dist.destroy_process_group(self._group)  # it holds threads and connections


def latest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are whole, or None. Broken ones are named in a warning and skipped.

    Every rank calls this and gets the same answer; each checks a share of the files.
    """
    for path in reversed(_from_first(lambda: storage.directories(directory))):
        try:
            return _verify(path)
        except CheckpointError as error:
            if _rank() == 0:
                log.warning("checkpoint skipped: %s", error)
    return None


def load_model(checkpoint: Checkpoint, model: nn.Module, placements: Placements = None) -> None:
    """Fill a model, or this rank's part of it, with a checkpoint's weights, whatever layout wrote it.

    Reads what the part needs, and asks no other rank. The parameters' dtype stays.

    Raises:
        CheckpointError: the tensors do not fit the model; nothing was loaded.
    """
    index = storage.read_index(checkpoint.path)
    storage.read(checkpoint.path, index, _model_pieces(checkpoint.path, index, model, placements))


def load(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, placements: Placements = None
) -> None:
    """`load_model`, and the optimizer's state with it."""
    index = storage.read_index(checkpoint.path)
    pieces = _model_pieces(checkpoint.path, index, model, placements)
    parameters = _parameters(model)
    fused = bool(optimizer.defaults.get("fused"))
    optimizer.state.clear()
    for name, entry in index.items():
        kind, _, rest = name.partition("/")
        if kind != "optimizer":
            continue
        key, _, owner = rest.partition("/")
        parameter, dtype = parameters[owner], getattr(torch, entry["dtype"])
        if entry["shape"]:
            value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            placement = _placement(owner, parameter, placements)
        else:  # the step counter: whole everywhere
            value = torch.zeros((), dtype=dtype, device=parameter.device if fused else "cpu")
            placement = Placement.whole(())
        optimizer.state[parameter][key] = value
        pieces += _pieces(name, value, placement)
    storage.read(checkpoint.path, index, pieces)


def _model_pieces(path: Path, index: dict[str, Any], model: nn.Module, placements: Placements) -> list[Piece]:
    stored = {
        name.partition("/")[2]: tuple(entry["shape"]) for name, entry in index.items() if name.startswith("model/")
    }
    wanted = {name: (p, _placement(name, p, placements)) for name, p in _parameters(model).items()}
    if stored.keys() != wanted.keys():
        odd = sorted(stored.keys() ^ wanted.keys())[:3]
        raise CheckpointError(f"{path}: not a checkpoint of this model; differing parameters: {', '.join(odd)}")
    for name, (_, placement) in wanted.items():
        if stored[name] != placement.shape:
            raise CheckpointError(f"{path}: {name} is {stored[name]}, the model has {placement.shape}")
    return [piece for name, (p, placement) in wanted.items() for piece in _pieces(f"model/{name}", p, placement)]


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, placements: Placements
) -> Iterator[tuple[str, Tensor, Placement]]:
    """All that a checkpoint holds, in an order that is the same on every rank."""
    parameters = _parameters(model)
    for name, parameter in parameters.items():
        yield f"model/{name}", parameter, _placement(name, parameter, placements)
    for name, parameter in parameters.items():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            counter = value.ndim == 0
            placement = Placement.whole((), _everyone()) if counter else _placement(name, parameter, placements)
            yield f"optimizer/{key}/{name}", value, placement


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    for module in model.modules():
        # A forward without a backward leaves gathered weights in the parameters' place.
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def _placement(name: str, parameter: Tensor, placements: Placements) -> Placement:
    if placements is None:
        return Placement.whole(tuple(parameter.shape), _everyone())
    placement = placements[name]
    shape = placement.shape if isinstance(parameter, DTensor) else placement.local_shape
    if shape != tuple(parameter.shape):
        raise ValueError(f"checkpoint: {name} is placed as {shape}, but is {tuple(parameter.shape)}")
    return placement


def _pieces(name: str, tensor: Tensor, placement: Placement) -> Iterator[Piece]:
    """The pieces of the whole that are on this rank, as views."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        if local.numel():
            (chunk,) = tensor.__create_chunk_list__()
            yield Piece(name, placement.shape, tuple(chunk.offsets), local)
        return
    for box in placement.boxes:
        yield Piece(name, placement.shape, box.at, box.of(tensor))


class _Turns:
    """Which of a piece's holders writes it: the one that has the fewest bytes to write so far. Every holder comes to the same answer."""

    def __init__(self) -> None:
        self.bytes: dict[tuple[int, ...], list[int]] = {}

    def mine(self, tensor: Tensor, placement: Placement) -> bool:
        if isinstance(tensor, DTensor):
            return True  # sharded; were it replicated besides, DCP's plan would choose
        loads = self.bytes.setdefault(placement.holders, [0] * len(placement.holders))
        turn = loads.index(min(loads))
        loads[turn] += tensor.nbytes
        return placement.holders[turn] == _rank()


def _verify(path: Path) -> Checkpoint:
    """CheckpointError, the same on every rank, unless all files are as written."""

    def read() -> dict[str, Any] | CheckpointError:
        try:
            return storage.read_state(path)
        except CheckpointError as error:
            return error

    record = _from_first(read)
    if isinstance(record, CheckpointError):
        raise record
    error = None
    try:
        for file, expected in sorted(record["sha256"].items())[_rank() :: _ranks()]:
            storage.verify(path, file, expected)
    except CheckpointError as broken:
        error = broken
    errors = [error]
    if _ranks() > 1:
        errors = [None] * _ranks()
        dist.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            raise found
    return Checkpoint(path, record["step"], record["state"])


def _from_first(make: Callable[[], T]) -> T:
    """Rank 0's value, on every rank."""
    value = [make() if _rank() == 0 else None]
    if _ranks() > 1:
        dist.broadcast_object_list(value, src=0)
    return value[0]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _everyone() -> tuple[int, ...]:
    return tuple(range(_ranks()))
