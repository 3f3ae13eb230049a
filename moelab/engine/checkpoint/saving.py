"""`Writer`: copies this rank's shards of a step's state to host memory and writes them in a thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moelab.engine.checkpoint import shards, storage
from moelab.engine.checkpoint.format import Piece
from moelab.engine.checkpoint.shards import Placements
from moelab.engine.groups import Group, gloo_group
from moelab.engine.launch import process
from moelab.engine.placement import Placement
from moelab.engine.sharded import is_sharded

log = logging.getLogger(__name__)


class Writer:
    """Writes the checkpoints of one directory, one at a time, in a thread.

    Where no thread can be started, training waits for the write. The thread communicates with the other ranks' threads
    through a gloo group of its own, apart from the training's collectives.
    """

    def __init__(self, directory: Path, keep: int = 2, always: Collection[int] = ()) -> None:
        """Make the writer's gloo group; every rank calls this.

        Args:
            directory: the folder of the checkpoints.
            keep: how many checkpoints are kept; older ones are removed when a new one is complete.
            always: steps whose checkpoints are never removed.

        Raises:
            ValueError: `keep` is less than 1.
        """
        if keep < 1:
            raise ValueError(f"checkpoint: keep must be at least 1, got {keep}")
        self.directory, self.keep, self.always = directory, keep, frozenset(always)
        self._group = gloo_group()
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
        """Copy this rank's shards to host memory and return; a thread writes them to `step-<step>`.

        Every rank calls this. A shard that several ranks hold is copied and written by one of them; they take turns.

        Args:
            state: JSON values; rank 0's are kept.

        Raises:
            OSError: the previous write failed (on a full disk, for example), on every rank; older checkpoints are
                unchanged.
            CheckpointError: the previous write failed for another reason.
        """
        self.wait()
        turns = _Turns()
        pieces = [
            replace(piece, tensor=torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype).copy_(piece.tensor))
            for name, tensor, placement in shards.tensors(model, optimizer, placements)
            if turns.mine(tensor, placement)
            for piece in shards.pieces(name, tensor, placement)
        ]
        path = self.directory / f"step-{step:08d}"
        thread = threading.Thread(target=self._write, args=(path, step, state, pieces), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # a busy machine, or a limit on processes
            log.warning("checkpoint of step %d: %s; training waits until it is written", step, error)
            with process.unwatched():
                self._write(path, step, state, pieces)
        else:
            self._thread = thread

    def wait(self) -> None:
        """Wait until the last `save` is on disk; raise what it raised (see `save`).

        Gives signs of life meanwhile: a large checkpoint on a slow disk takes longer than a rank may be silent.
        """
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(1.0)
                process.beat(first=False)
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, path: Path, step: int, state: dict[str, Any], pieces: list[Piece]) -> None:
        try:
            storage.write(path, step, state, pieces, self.keep, self._group, self.always)
        except Exception as error:
            self._error = error

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last write.

        When the block raised, that error has precedence and a failed write is only logged.
        """
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            log.error("checkpoint not written: %s", failed)
        finally:
            if self._group.handle is not None and dist.is_initialized():  # the block may have left the ranks
                dist.destroy_process_group(self._group.handle)  # frees its threads and connections


class _Turns:
    """Decides which of a shard's replicas writes it: the one with the fewest bytes to write so far.

    Every replica decides the same.
    """

    def __init__(self) -> None:
        self.bytes: dict[tuple[int, ...], list[int]] = {}

    def mine(self, tensor: Tensor, placement: Placement) -> bool:
        if is_sharded(tensor):
            return True  # sharded over the data ranks: no other rank has this shard
        loads = self.bytes.setdefault(placement.replicas, [0] * len(placement.replicas))
        turn = loads.index(min(loads))
        loads[turn] += tensor.nbytes
        return placement.replicas[turn] == Group.world().rank
