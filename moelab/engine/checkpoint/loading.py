"""Find the newest complete checkpoint and read from it what this rank's layout needs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moelab.engine.checkpoint import shards, storage
from moelab.engine.checkpoint.format import CheckpointError, Piece, directories, read_index, read_state, verify
from moelab.engine.checkpoint.shards import Placements
from moelab.engine.collectives import all_gather_json, broadcast_json
from moelab.engine.groups import Group
from moelab.engine.placement import Placement

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its directory, the number of steps done when it was written, and the caller's state."""

    path: Path
    step: int
    state: dict[str, Any]


class Refused(CheckpointError):
    """Report that no complete checkpoint suits the caller."""


def latest(
    directory: Path,
    objection: Callable[[dict[str, Any]], str | None] = lambda state: None,
    *,
    only_weights: bool = False,
) -> Checkpoint | None:
    """Return the newest checkpoint whose files are complete and unchanged, or None.

    Broken checkpoints are named in a warning and skipped. Every rank calls this and gets the same answer; each checks
    some of the files.

    Args:
        directory: folder of the checkpoints.
        objection: called on rank 0 with the caller's state; returns one line if a complete checkpoint cannot be used,
            which is then skipped.
        only_weights: whether the optimizer's files may be broken.

    Raises:
        Refused: there are complete checkpoints, and `objection` returned a line for each; has that of the newest.
    """
    world = Group.world()
    names = broadcast_json([path.name for path in directories(directory)] if world.index == 0 else None)
    refused = None
    for name in reversed(names):
        try:
            found = _verify(directory / name, world, only_weights)
            if why := broadcast_json(objection(found.state) if world.index == 0 else None):
                raise Refused(f"{found.path}: {why}")
            if name != names[-1] and world.index == 0:
                log.warning("step %d is used in place of the newest checkpoint: %s", found.step, found.path)
            return found
        except CheckpointError as error:
            if isinstance(error, Refused):
                refused = refused or error
            if world.index == 0:
                log.warning("checkpoint skipped: %s", error)
    if refused is not None:
        raise refused
    return None


def weights_of(run_dir: Path) -> Checkpoint:
    """Return a run's newest checkpoint whose weights are complete, for all uses but training; called on every rank.

    Raises:
        ValueError: one line: there are no weights, and what helps.
    """
    found = latest(run_dir / "checkpoints", only_weights=True)
    if found is None:
        raise ValueError(why_no_weights(run_dir))
    return found


def why_no_weights(run_dir: Path) -> str:
    """Return in one line why a run's directory has no checkpoint to use, and what helps."""
    if directories(run_dir / "checkpoints"):
        return f"{run_dir}: none of its checkpoints is whole; remove it and run its experiment again"
    if (run_dir / "result.json").exists():
        return f"{run_dir}: numbers only, no weights; to train it here: remove it and run its experiment again"
    return f"{run_dir}: no checkpoint yet; train the run first"


def load_model(checkpoint: Checkpoint, model: nn.Module, placements: Placements = None) -> None:
    """Fill a model, or this rank's part of it, with a checkpoint's weights, whatever layout wrote it.

    Each rank reads what its part needs, without the other ranks. The parameters' dtype stays.

    Raises:
        CheckpointError: the tensors do not fit the model; nothing was loaded.
    """
    index = read_index(checkpoint.path)
    storage.read(checkpoint.path, index, _model_pieces(checkpoint.path, index, model, placements))


def load(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, placements: Placements = None
) -> None:
    """Fill a model as `load_model` does, and the optimizer's state as well."""
    index = read_index(checkpoint.path)
    pieces = _model_pieces(checkpoint.path, index, model, placements)
    parameters = shards.parameters(model)
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
            placement = shards.placement_of(owner, parameter, placements)
        else:  # the step counter, which every rank holds as a whole
            value = torch.zeros((), dtype=dtype, device=parameter.device if fused else "cpu")
            placement = Placement.whole(())
        optimizer.state[parameter][key] = value
        pieces += shards.pieces(name, value, placement)
    storage.read(checkpoint.path, index, pieces)


def _model_pieces(path: Path, index: dict[str, Any], model: nn.Module, placements: Placements) -> list[Piece]:
    stored = {
        name.partition("/")[2]: tuple(entry["shape"]) for name, entry in index.items() if name.startswith("model/")
    }
    wanted = {name: (p, shards.placement_of(name, p, placements)) for name, p in shards.parameters(model).items()}
    if stored.keys() != wanted.keys():
        odd = sorted(stored.keys() ^ wanted.keys())[:3]
        raise CheckpointError(f"{path}: not a checkpoint of this model; differing parameters: {', '.join(odd)}")
    for name, (_, placement) in wanted.items():
        if stored[name] != placement.shape:
            raise CheckpointError(f"{path}: {name} is {stored[name]}, the model has {placement.shape}")
    return [piece for name, (p, placement) in wanted.items() for piece in shards.pieces(f"model/{name}", p, placement)]


def _verify(path: Path, world: Group, only_weights: bool) -> Checkpoint:
    """Check that the files of a checkpoint, or those that the weights need, are as written.

    Raises:
        CheckpointError: they are not; every rank raises the same error.
    """
    record = broadcast_json(_or_error(read_state, path) if world.index == 0 else None)
    if "error" in record:
        raise CheckpointError(record["error"])
    found: dict[str, Any] = {}
    files = sorted(f for f in record["sha256"].items() if not (only_weights and f[0].startswith("optimizer-")))
    for file, expected in files[world.index :: world.size]:
        found = found or _or_error(verify, path, file, expected) or {}
    for answer in all_gather_json(found):
        if "error" in answer:
            raise CheckpointError(answer["error"])
    return Checkpoint(path, record["step"], record["state"])


def _or_error(check: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a check as a JSON value, or the message of its CheckpointError."""
    try:
        return check(*args)
    except CheckpointError as error:
        return {"error": str(error)}
