"""The files of a checkpoint: their names, the index, and SHA-256 of everything.

    {model,optimizer}-<rank>.safetensors   a tensor "name" when the piece is whole, else "name@<offsets>"
    index.json                             name -> dtype, shape, pieces (at, size, file)
    state.json                             step, the caller's state, SHA-256 of every other file and of itself

A piece is a shard of a tensor, as it is stored.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelab.config import from_json
from moelab.files import read_object, sha256_of, write_text

INDEX, STATE = "index.json", "state.json"


class CheckpointError(Exception):
    """A checkpoint cannot be used or written; the message is one line with the reason."""


@dataclass(frozen=True)
class Piece:
    """A shard of a named tensor.

    Attributes:
        name: the whole tensor's name, "model/..." or "optimizer/...".
        shape: the whole tensor's shape.
        offset: the index of the shard's first element in the whole tensor.
        tensor: the shard's values; loading writes into it.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


def directories(directory: Path) -> list[Path]:
    """Return the checkpoints in a directory by step, complete or not; not what a user has put beside them."""
    named = [p for p in directory.glob("step-*") if re.fullmatch("step-[0-9]{8,}", p.name) and p.is_dir()]
    return sorted(named, key=step_of)


def step_of(path: Path) -> int:
    """Return the steps done in a checkpoint, from the name of its directory."""
    return int(path.name.removeprefix("step-"))


def regular_file(path: Path, name: str) -> Path:
    """Return the path of one of a checkpoint's files.

    Raises:
        CheckpointError: it is not a regular file in the checkpoint's own directory. Reading a device or a FIFO might
            never end.
        OSError: there is no such file.
    """
    file = path / name
    if Path(name).name != name or not stat.S_ISREG(file.stat().st_mode):
        raise CheckpointError(f"{path}: {name} is not a regular file of the checkpoint")
    return file


def read_index(path: Path) -> dict[str, Any]:
    """Return name -> {"dtype", "shape", "pieces"} of every tensor in a checkpoint.

    Raises:
        CheckpointError: the index is missing or unreadable.
    """
    index = _read(path, INDEX)
    for name, entry in index.items():
        if not _is_entry(entry):
            raise CheckpointError(f"{path}: unreadable ({INDEX}: {name} is no tensor)")
    return index


def _is_entry(entry: Any) -> bool:
    """Return whether an entry of the index has what `read_index` says; checked by hand, because there are many."""

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

    if not isinstance(entry, dict) or not isinstance(getattr(torch, str(entry.get("dtype")), None), torch.dtype):
        return False
    rank, pieces = entry.get("shape"), entry.get("pieces")
    return (
        isinstance(rank, list)
        and sizes(rank)
        and isinstance(pieces, list)
        and all(
            isinstance(piece, dict)
            and isinstance(piece.get("file"), str)
            and all(sizes(piece.get(name)) and len(piece[name]) == len(rank) for name in ("at", "size"))
            for piece in pieces
        )
    )


def read_state(path: Path) -> dict[str, Any]:
    """Return the content of state.json: "step", "state" and "sha256" (file -> digest).

    Raises:
        CheckpointError: it is missing, unreadable, or not what was written.
    """
    record = _read(path, STATE)
    if record.pop("check", None) != _digest(record):
        raise CheckpointError(f"{path}/{STATE}: content does not match its SHA-256")
    try:
        from_json(_State, record)
    except ValueError as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from None
    return record


@dataclass(frozen=True)
class _State:
    """The types of state.json's content."""

    step: int
    state: dict[str, Any]
    sha256: dict[str, str]


def write_state(path: Path, step: int, state: dict[str, Any], sha256: dict[str, str]) -> None:
    """Write state.json; `sha256` holds the digests of all other files."""
    record = json.loads(json.dumps({"step": step, "sha256": sha256, "state": state}))
    write_text(path / STATE, json.dumps(record | {"check": _digest(record)}, indent=2) + "\n")


def verify(path: Path, file: str, expected: str) -> None:
    """Check that a file's SHA-256 is the expected one; raise CheckpointError otherwise."""
    try:
        actual = sha256_of(regular_file(path, file))
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from None
    if actual != expected:
        raise CheckpointError(f"{path}/{file}: content does not match its SHA-256")


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        if (record := read_object(regular_file(path, name))) is not None:
            return record
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from None
    raise CheckpointError(f"{path}: no {name}")


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
