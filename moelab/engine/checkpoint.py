"""Checkpoints of one process: safetensors and JSON in a directory a step, written whole or not at all, checked when read.

    <run>/checkpoints/step-00000400/{model,optimizer}.safetensors, state.json

Nothing here is a pickle: loading executes no code. `state.json` carries the SHA-256 of the tensor files, so a corrupt checkpoint
is noticed and the one before it is used, loudly.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from moelab.files import new_directory, read_json, write_json

log = logging.getLogger(__name__)
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one line with the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its directory, the steps done when it was written, the caller's state."""

    path: Path
    step: int
    state: dict[str, Any]


def save(
    directory: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int = 2
) -> Path:
    """Write a checkpoint and remove all but the `keep` newest. OSError (a full disk, say) leaves the older ones as they were."""
    path = directory / f"step-{step:08d}"
    with new_directory(path) as new:
        try:
            save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, new / _MODEL)
            save_file(_optimizer_tensors(model, optimizer), new / _OPTIMIZER)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        hashes = {name: _sha256(new / name) for name in (_MODEL, _OPTIMIZER)}
        write_json(new / _STATE, {"step": step, "sha256": hashes, "state": state})
    for old in _directories(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def latest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are whole, or None. Broken ones are named in a warning and skipped."""
    for path in reversed(_directories(directory)):
        try:
            return _verify(path)
        except CheckpointError as error:
            log.warning("checkpoint skipped: %s", error)
    return None


def load(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Fill a model, and its optimizer, with a checkpoint's values, bit for bit.

    Raises:
        CheckpointError: the tensors do not fit the model.
    """
    tensors = load_file(checkpoint.path / _MODEL)
    parameters = dict(model.named_parameters())
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())[:3]
        raise CheckpointError(
            f"{checkpoint.path}: not a checkpoint of this model; differing parameters: {', '.join(odd)}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise CheckpointError(
                    f"{checkpoint.path}: {name} is {tuple(tensors[name].shape)}, the model has {tuple(parameter.shape)}"
                )
            parameter.copy_(tensors[name])
    if optimizer is not None:
        _load_optimizer(load_file(checkpoint.path / _OPTIMIZER), parameters, optimizer)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{key}/{name}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(
    tensors: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    for composed, value in tensors.items():
        key, _, name = composed.partition("/")
        parameter = parameters[name]
        on_device = key != "step" or bool(optimizer.defaults.get("fused"))
        optimizer.state[parameter][key] = value.to(parameter.device) if on_device else value


def _directories(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob("step-*") if p.is_dir()) if directory.is_dir() else []


def _verify(path: Path) -> Checkpoint:
    try:
        record = read_json(path / _STATE)
        if record is None:
            raise CheckpointError(f"{path}: no {_STATE}")
        for name, expected in record["sha256"].items():
            if _sha256(path / name) != expected:
                raise CheckpointError(f"{path}/{name}: content does not match its SHA-256")
        return Checkpoint(path, int(record["step"]), record["state"])
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
