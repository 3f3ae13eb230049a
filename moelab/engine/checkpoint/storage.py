"""Write a checkpoint together with the other ranks, and read parts of one without them.

Each rank writes its pieces into files of its own and tells rank 0, which checks that the pieces of all ranks make up
whole tensors and writes the index. Reading copies the overlaps of the stored pieces with the wanted ones, so that any
layout reads what any other wrote.

torch's distributed checkpoints (DCP) can plan this too, but their ranks exchange pickled plans, their default storage
keeps its metadata as a pickle, and their safetensors storage keeps one piece of a tensor in a file, where a rank of a
tensor-sliced model has three of each query-key-value weight.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moelab.engine.checkpoint.format import (
    INDEX,
    STATE,
    CheckpointError,
    Piece,
    directories,
    regular_file,
    step_of,
    write_state,
)
from moelab.engine.collectives import broadcast_json, gather_json
from moelab.engine.groups import Group
from moelab.engine.placement import Index, overlap
from moelab.files import sha256_of, sync, write_text

Entry = dict[str, Any]
"""What the index says of a tensor: "dtype", "shape" and "pieces", of which each has "at", "size" and "file"."""


def write(
    path: Path,
    step: int,
    state: dict[str, Any],
    pieces: Iterable[Piece],
    keep: int,
    group: Group,
    always: Collection[int] = (),
) -> None:
    """Write a checkpoint directory, together with the ranks of `group`.

    The group's first rank then removes all but the newest `keep` checkpoints and those of the steps `always`.

    Raises:
        OSError: a rank could not write its files. Every rank raises it; nothing is left at `path`, older checkpoints
            are unchanged.
        CheckpointError: the pieces of all ranks do not make up whole tensors, or a rank is gone.
    """
    temporary = path.parent / f".{path.name}.partial"
    first = group.index == 0
    try:
        _together(group, path, lambda: _prepare(temporary) if first else None)
        written = _together(group, path, lambda: _write_pieces(temporary, group.index, pieces))
        _together(group, path, lambda: _finish(path, temporary, step, state, written, keep, always) if first else None)
    except Exception:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def read(path: Path, index: dict[str, Entry], pieces: Iterable[Piece]) -> None:
    """Fill pieces with a checkpoint's values; read no more of the files than the pieces cover.

    Each rank reads for itself, without the others.

    Args:
        index: from `format.read_index`.

    Raises:
        CheckpointError: the checkpoint is unreadable, or does not have all of a piece.
    """
    files: dict[str, list[tuple[str, Index, Tensor]]] = {}
    for piece in pieces:
        missing = piece.tensor.numel()
        for stored in index[piece.name]["pieces"]:
            if common := overlap(stored["at"], stored["size"], piece.offset, piece.tensor.shape):
                source, target = common
                missing -= math.prod(s.stop - s.start for s in target)
                key = _key(piece.name, stored, piece.shape)
                files.setdefault(stored["file"], []).append((key, source, piece.tensor[target]))
        if missing:
            raise CheckpointError(f"{path}: unreadable ({piece.name} has gaps)")
    for file, parts in files.items():
        try:
            with safe_open(regular_file(path, file), framework="pt") as opened:
                for key, part, tensor in parts:
                    tensor.copy_(_read_part(opened, key, part))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: unreadable ({error})") from None


def _read_part(opened: Any, key: str, part: Index) -> Tensor:
    return opened.get_slice(key)[part] if part else opened.get_tensor(key)


def _prepare(temporary: Path) -> None:
    for left in temporary.parent.glob(".step-*.partial"):  # left by a process that was killed while writing
        shutil.rmtree(left)
    temporary.mkdir(parents=True)


def _write_pieces(temporary: Path, rank: int, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Write this rank's pieces, in one file for the model and one for the optimizer.

    Returns:
        The index entries of the pieces, and the files' SHA-256.
    """
    index: dict[str, Entry] = {}
    files: dict[str, dict[str, Tensor]] = {}
    for piece in pieces:
        file = f"{piece.name.partition('/')[0]}-{rank:05d}.safetensors"
        stored = {"at": list(piece.offset), "size": list(piece.tensor.shape), "file": file}
        files.setdefault(file, {})[_key(piece.name, stored, piece.shape)] = piece.tensor
        dtype = str(piece.tensor.dtype).removeprefix("torch.")
        entry = index.setdefault(piece.name, {"dtype": dtype, "shape": list(piece.shape), "pieces": []})
        entry["pieces"].append(stored)
    for file, tensors in files.items():
        try:
            save_file(tensors, temporary / file)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        sync(temporary / file)
    return {"index": index, "sha256": {file: sha256_of(temporary / file) for file in files}}


def _finish(
    path: Path,
    temporary: Path,
    step: int,
    state: dict[str, Any],
    written: Sequence[dict[str, Any]],
    keep: int,
    always: Collection[int],
) -> None:
    """Write the index and the state, give the directory its final name, and remove older checkpoints."""
    index: dict[str, Entry] = {}
    for part in written:
        for name, entry in part["index"].items():
            whole = index.setdefault(name, {**entry, "pieces": []})
            if (whole["dtype"], whole["shape"]) != (entry["dtype"], entry["shape"]):
                raise CheckpointError(f"{path}: not written (ranks differ in dtype or shape of {name})")
            whole["pieces"] += entry["pieces"]
    for name, entry in index.items():
        if not _is_whole(entry):
            raise CheckpointError(f"{path}: not written (the pieces of {name} overlap or leave gaps)")
    write_text(temporary / INDEX, json.dumps(index))
    hashes = {file: digest for part in written for file, digest in sorted(part["sha256"].items())}
    write_state(temporary, step, state, {INDEX: sha256_of(temporary / INDEX), **hashes})
    for file in (INDEX, STATE):
        sync(temporary / file)
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)
    sync(path.parent)
    # A newer checkpoint was skipped as broken, so it does not count among the kept ones.
    for old in [p for p in directories(path.parent) if step_of(p) <= step][:-keep]:
        if step_of(old) not in always:
            shutil.rmtree(old, ignore_errors=True)


def _is_whole(entry: Entry) -> bool:
    """Return whether the pieces cover the tensor.

    They do if they lie inside it, do not overlap, and have its number of elements in all.
    """
    start = np.array([piece["at"] for piece in entry["pieces"]]).reshape(len(entry["pieces"]), -1)
    stop = start + np.array([piece["size"] for piece in entry["pieces"]]).reshape(start.shape)
    inside = bool((start >= 0).all() and (stop <= np.array(entry["shape"])).all())
    overlaps = ((start[:, None] < stop) & (start < stop[:, None])).all(-1)
    return inside and int((stop - start).prod(-1).sum()) == math.prod(entry["shape"]) and overlaps.sum() <= len(start)


def _key(name: str, stored: dict[str, Any], shape: Sequence[int]) -> str:
    """Return a piece's name in its file."""
    inner = name.partition("/")[2]
    return inner if list(stored["size"]) == list(shape) else f"{inner}@{','.join(map(str, stored['at']))}"


def _together(group: Group, path: Path, work: Callable[[], Any]) -> list[Any]:
    """Call `work` on every rank and return the results on the first rank.

    If one call fails, its error is raised on every rank.
    """
    try:
        answer: dict[str, Any] = {"result": work()}
    except OSError as error:
        answer = {"os_error": [error.errno, error.strerror or str(error), error.filename and str(error.filename)]}
    except Exception as error:
        from moelab.terminal import one_line

        text = one_line(error)
        answer = {"error": text if isinstance(error, CheckpointError) else f"{path}: not written ({text})"}
    try:
        answers = gather_json(answer, group)
        failures = ({"rank": rank, **answer} for rank, answer in enumerate(answers) if "result" not in answer)
        failed = broadcast_json(next(failures, None), group)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: not written ({str(error).splitlines()[0]})") from None
    if failed is None:
        return [a["result"] for a in answers]
    where = f"rank {failed['rank']}: " if group.size > 1 else ""
    if "error" in failed:
        raise CheckpointError(failed["error"])
    number, text, file = failed["os_error"]
    raise OSError(f"{where}{text}") if number is None else OSError(number, f"{where}{text}", file or str(path))
