"""How torch's distributed checkpoints (DCP) plan and store pieces of tensors here: safetensors files and one JSON index.

DCP plans who writes what, checks that the pieces cover every tensor, coordinates the ranks and works out which stored pieces a
rank needs when the layout has changed. Its planners and storage are replaceable, and two of its own do not fit: the default
storage keeps its metadata as a pickle, and its safetensors storage (`hf_storage`) keeps one piece of a tensor in a file, where a rank of a
tensor-sliced model has three of each query-key-value weight; that one also opens every file of the checkpoint on every rank to
find out what is where. Hence a small storage of our own, and planners that take boxes instead of tensor classes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from moelab.engine.checkpoint.format import (
    INDEX,
    STATE,
    CheckpointError,
    Piece,
    directories,
    file_sha256,
    regular_file,
    sync,
    write_state,
)
from moelab.files import write_text


def write(
    path: Path, step: int, state: dict[str, Any], pieces: Iterable[Piece], keep: int, group: dist.ProcessGroup | None
) -> None:
    """Write a checkpoint directory, together with the ranks of `group` (None: alone); the coordinator then removes all but `keep`.

    Raises:
        OSError: a rank could not write its files. On every rank; nothing is left at `path`, older checkpoints are as they were.
        CheckpointError: the pieces of all ranks do not make up whole tensors, or a rank has gone.
    """
    _quiet()
    writer = _Writer(path, step, state, keep)
    try:
        dcp.save({}, storage_writer=writer, planner=_SavePlanner(pieces), process_group=group, no_dist=group is None)
    except (CheckpointException, RuntimeError) as error:
        if group is None or dist.get_rank(group) == 0:
            shutil.rmtree(writer.temporary, ignore_errors=True)
        raise _one_line(error, path, "not written", ranks=group is not None) from None


def read(path: Path, index: dict[str, Any], pieces: Iterable[Piece]) -> None:
    """Fill pieces with a checkpoint's values, reading no more than they cover. Each rank reads for itself, without the others.

    Args:
        index: from `format.read_index`.

    Raises:
        CheckpointError: unreadable, or it does not have all of a piece.
    """
    _quiet()
    try:
        dcp.load({}, storage_reader=_Reader(path, index), planner=_LoadPlanner(pieces), no_dist=True)
    except CheckpointException as error:
        raise _one_line(error, path, "unreadable", ranks=False) from None


class _SavePlanner(DefaultSavePlanner):
    """Plans this rank's pieces; merging and checking the ranks' plans is DCP's."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {_index(piece): piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    _index(piece),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        _chunk(piece), TensorProperties.create_from_tensor(piece.tensor), torch.Size(piece.shape)
                    ),
                )
                for piece in self.pieces.values()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index].tensor


class _LoadPlanner(DefaultLoadPlanner):
    """Plans the reads that fill this rank's pieces."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {_index(piece): piece for piece in pieces}

    def create_local_plan(self) -> LoadPlan:
        reads: list[ReadItem] = []
        for piece in self.pieces.values():
            stored = self.metadata.state_dict_metadata[piece.name]
            parts = create_read_items_for_chunk_list(piece.name, stored, [_chunk(piece)])
            if sum(math.prod(part.lengths) for part in parts) != piece.tensor.numel():
                raise CheckpointError(f"{piece.name} has gaps")
            reads += parts
        return LoadPlan(reads)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index].tensor


class _Writer(StorageWriter):
    """Writes one file per rank and kind of tensor, in a directory that gets its name when all ranks are done."""

    def __init__(self, path: Path, step: int, state: dict[str, Any], keep: int) -> None:
        self.path, self.step, self.state, self.keep = path, step, state, keep
        self.temporary = path.parent / f".{path.name}.partial"

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        for left in self.path.parent.glob(".step-*"):  # left by a process that was killed while it wrote
            shutil.rmtree(left)
        self.temporary.mkdir(parents=True)
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: _SavePlanner) -> Future[list[WriteResult]]:
        files: dict[str, dict[str, WriteItem]] = {}
        for item in plan.items:
            kind = item.index.fqn.partition("/")[0]
            key = _key(item.index.fqn, item.tensor_data.chunk, item.tensor_data.size)
            files.setdefault(f"{kind}-{plan.storage_data:05d}.safetensors", {})[key] = item
        results: list[WriteResult] = []
        for file, items in files.items():
            path = self.temporary / file
            try:
                save_file({key: planner.resolve_data(item) for key, item in items.items()}, path)
            except SafetensorError as error:  # how safetensors reports a full disk
                raise OSError(str(error)) from error
            sync(path)
            stored = (file, file_sha256(path))
            results += [WriteResult(item.index, item.tensor_storage_size(), stored) for item in items.values()]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored = {result.index: result.storage_data for rank in results for result in rank}
        index = {
            name: {
                "dtype": str(tensor.properties.dtype).removeprefix("torch."),
                "shape": list(tensor.size),
                "pieces": [
                    {"at": list(c.offsets), "size": list(c.sizes), "file": stored[MetadataIndex(name, c.offsets)][0]}
                    for c in tensor.chunks
                ],
            }
            for name, tensor in metadata.state_dict_metadata.items()
        }
        write_text(self.temporary / INDEX, json.dumps(index))
        hashes = {INDEX: file_sha256(self.temporary / INDEX), **dict(sorted(stored.values()))}
        write_state(self.temporary, self.step, self.state, hashes)
        for file in (INDEX, STATE):
            sync(self.temporary / file)
        if self.path.exists():
            shutil.rmtree(self.path)
        os.replace(self.temporary, self.path)
        sync(self.path.parent)
        # A newer one was skipped as broken: it does not count among the kept ones.
        for old in [p for p in directories(self.path.parent) if p <= self.path][: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class _Reader(StorageReader):
    """Reads slices of the files that the index names."""

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path, self.index = path, index
        self.stored: dict[MetadataIndex, tuple[str, str]] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None: ...

    def read_metadata(self, *args: Any) -> Metadata:
        tensors: dict[str, TensorStorageMetadata] = {}
        for name, entry in self.index.items():
            shape = torch.Size(entry["shape"])
            chunks = [ChunkStorageMetadata(torch.Size(p["at"]), torch.Size(p["size"])) for p in entry["pieces"]]
            tensors[name] = TensorStorageMetadata(TensorProperties(getattr(torch, entry["dtype"])), shape, chunks)
            for chunk, piece in zip(chunks, entry["pieces"], strict=True):
                self.stored[MetadataIndex(name, chunk.offsets)] = piece["file"], _key(name, chunk, shape)
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: _LoadPlanner) -> Future[None]:
        files: dict[str, list[tuple[str, ReadItem]]] = {}
        for item in plan.items:
            file, key = self.stored[item.storage_index]
            files.setdefault(file, []).append((key, item))
        for file, items in files.items():
            with safe_open(regular_file(self.path, file), framework="pt") as f:
                for key, item in items:
                    window = tuple(slice(a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))
                    values = f.get_slice(key)[window] if window else f.get_tensor(key)
                    planner.resolve_tensor(item).copy_(values)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def _index(piece: Piece) -> MetadataIndex:
    return MetadataIndex(piece.name, piece.offset)


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offset), piece.tensor.shape)


def _key(name: str, chunk: ChunkStorageMetadata, shape: torch.Size) -> str:
    """Return a piece's name in its file."""
    inner = name.partition("/")[2]
    return inner if chunk.sizes == shape else f"{inner}@{','.join(map(str, chunk.offsets))}"


def _one_line(error: BaseException, path: Path, what: str, *, ranks: bool) -> Exception:
    """Return DCP's error, which carries every rank's traceback, as the first failing rank's reason."""
    rank, cause = None, error
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
    where = f"rank {rank}: " if ranks and rank is not None else ""
    if isinstance(cause, OSError):
        if cause.errno is not None:
            return OSError(cause.errno, f"{where}{cause.strerror}", cause.filename or str(path))
        return OSError(f"{where}{cause}")
    reason = (str(cause).splitlines() or [""])[0] or type(cause).__name__
    return CheckpointError(f"{path}: {what} ({where}{reason})")


def _quiet() -> None:
    """Silence DCP's warning that it works for one process: that is intended."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
