"""Read the safetensors files of a model's directory, a tensor at a time and a rank's part of each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moelab.config import ModelConfig
from moelab.engine.checkpoint import shards
from moelab.engine.checkpoint.format import Piece
from moelab.engine.checkpoint.hf_formats import Format, Part
from moelab.engine.placement import Placement, overlap
from moelab.files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def _files_of_index(path: Path) -> list[str]:
    """Return the names of the files in which an index places tensors; none without an index."""
    index = read_json(path)
    if index is None:
        return []
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed or any(not isinstance(file, str) for file in placed.values()):
        raise ValueError(f"{path}: weight_map must be an object of tensor names and their files")
    return sorted(set(placed.values()))


class Files(contextlib.ExitStack):
    """The safetensors files of a directory, one or several with an index; open until the context ends."""

    def __init__(self, directory: Path, kind: Format) -> None:
        super().__init__()
        self.directory, self.kind = directory, kind
        files = _files_of_index(directory / INDEX) or [WEIGHTS]
        self.names: dict[str, Any] = {}
        for file in files:
            path = directory / Path(file).name
            if path.exists() and not path.is_file():  # reading a FIFO or a device might never end
                raise ValueError(f"{path}: not a regular file")
            try:
                opened = self.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: unreadable ({error})") from None
            self.names.update(dict.fromkeys(opened.keys(), opened))
        if not self.names:
            raise ValueError(f"{directory}: no tensor in {', '.join(files)}")
        self.prefix = kind.prefix if any(name.startswith(kind.prefix) for name in self.names) else ""

    def shape(self, name: str, transposed: bool) -> tuple[int, ...]:
        """Return the shape of a tensor, a transposed matrix's as it is in our model."""
        shape = tuple(self.names[name].get_slice(name).get_shape())
        return shape[::-1] if transposed and len(shape) == 2 else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor; ValueError, one line, for one that we do not read."""
        stored = self.names[name].get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise ValueError(f"{self.directory}: tensor {name} is {stored}; allowed: {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self.names[name].get_tensor(name)

    def whole(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> Tensor:
        """Return one of our parameters."""
        first = next(iter(self.kind.parts(name, shape, config)))
        parameter = torch.empty(shape, dtype=self.dtype(self.prefix + first.name))
        self.fill(shards.pieces(name, parameter, Placement.whole(shape)), config)
        return parameter

    def fill(self, pieces: Iterable[Piece], config: ModelConfig) -> None:
        """Fill a rank's pieces of one of our parameters; read only the tensors that have something of them."""
        pieces = list(pieces)
        for part in self.kind.parts(pieces[0].name, pieces[0].shape, config) if pieces else ():
            box = _box(part, pieces[0].shape)
            found = [(piece.tensor, overlap(*box, piece.offset, piece.tensor.shape)) for piece in pieces]
            if any(common for _, common in found):
                tensor = self._part(part)
                for local, common in found:
                    if common:
                        source, target = common
                        local[target].copy_(tensor[source])

    def _part(self, part: Part) -> Tensor:
        """Return a tensor of the format as the part of our parameter that it is, with all of its dims."""
        tensor = self.read(self.prefix + part.name)
        tensor = tensor.T if part.transposed and tensor.ndim == 2 else tensor
        for dim in sorted(part.single()):
            tensor = tensor.unsqueeze(dim)
        return tensor


def expected_shape(part: Part, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a part of a parameter has in the format, a transposed matrix's as it is in our model."""
    _, size = _box(part, shape)
    return tuple(n for dim, n in enumerate(size) if dim not in part.single())


def _box(part: Part, shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Return the first element of a part in a parameter, and the part's size, along each dim of the parameter."""
    start, size = [0] * len(shape), list(shape)
    for dim, index in enumerate(part.at):
        first, end, _ = (index, index + 1, 1) if isinstance(index, int) else index.indices(shape[dim])
        start[dim], size[dim] = first, end - first
    return start, size
