"""Look up the tile sizes that were measured on a card (`moelab kernels tune`); where nothing was, keep the op's own.

A table is a JSON file `<card>.json` such as `h100.json`: "tiles" maps a *shape class* to tile sizes, warps, stages and,
for the grouped products, persistent programs that took less time there. A shape class is the op, the dtype and its
sizes, each rounded up to a power of two:

    "product1 bf16 BM128 N1024 K2048": {"BN": 256, "num_stages": 4, "programs_per_sm": 1}

Tables come from `FOLDERS`, a later folder's entries before an earlier one's. The first is part of this package.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ._common import next_power_of_2

FOLDERS: list[Path] = [Path(__file__).parent / "tuned"]
"""Folders of tables. To add one, append it before the first kernel is launched."""

GROUPED = ("product0", "product1", "product0t", "product2t", "weight")
"""The ops of grouped products (`_experts_triton.py`), which have the setting `programs_per_sm`."""

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Tile = dict[str, int]

_tables: dict[int | None, dict[str, Tile]] = {}
_trial: dict[str, Tile] = {}


def tile(op: str, default: Tile, like: torch.Tensor, **sizes: int) -> Tile:
    """Return the tile of a launch: `default` with what the table of `like`'s card has for this shape class.

    Args:
        op: the kernel or group of kernels, see `moelab.kernels.tools.tune`.
        like: a tensor of the launch; its device and dtype count.
        sizes: what the best tile depends on.
    """
    if op in _trial:
        return default | _trial[op]
    if not like.is_cuda:
        return default
    index = like.device.index
    if index not in _tables:
        _tables[index] = load(card(torch.cuda.get_device_name(index)))
    table = _tables[index]
    return default | table.get(shape_class(op, like.dtype, sizes), {}) if table else default


def shape_class(op: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str:
    """Return the key of a table's entry."""
    rounded = [f"{name}{next_power_of_2(size)}" for name, size in sizes.items()]
    return " ".join([op, DTYPES.get(dtype, str(dtype)), *rounded])


def card(name: str) -> str:
    """Return the name of a card's tables: "h100" of "NVIDIA H100 80GB HBM3", "a100" of "NVIDIA A100-SXM4-40GB".

    Cards without such a type in their name keep all of it, as "nvidia-geforce-rtx-4090".
    """
    words = re.split(r"[^A-Za-z0-9]+", name)
    kind = next((word for word in words if re.fullmatch(r"[A-Za-z]{1,3}\d{2,4}[A-Za-z]?", word)), None)
    return (kind or "-".join(word for word in words if word)).lower()


def load(card: str) -> dict[str, Tile]:
    """Return shape class -> tile of a card, from all folders; empty where nothing was measured.

    Raises:
        ValueError: one line, for a file that is no table.
    """
    by_class: dict[str, Tile] = {}
    for folder in FOLDERS:
        path = folder / f"{card}.json"
        if not path.is_file():
            continue
        try:
            tiles = json.loads(path.read_text(encoding="utf-8"))["tiles"]
            by_class |= {key: {name: int(size) for name, size in entry.items()} for key, entry in tiles.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no table of tile sizes ({error!r}); remove it") from None
    return by_class


@contextlib.contextmanager
def trial(op: str, changes: Tile) -> Iterator[None]:
    """Let every launch of an op take these sizes while the context lasts, on any device."""
    before = dict(_trial)
    _trial[op] = changes
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)


@contextlib.contextmanager
def persistent(programs_per_sm: int) -> Iterator[None]:
    """Let all grouped products run in so many programs for each multiprocessor while the context lasts."""
    with contextlib.ExitStack() as trials:
        for op in GROUPED:
            trials.enter_context(trial(op, {"programs_per_sm": programs_per_sm}))
        yield
