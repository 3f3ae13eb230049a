"""Find the newest complete checkpoint and read from it what this rank's layout needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moelab.config.upcycle import UpcycleConfig
from moelab.engine.checkpoint import shards, storage
from moelab.engine.checkpoint.format import CheckpointError, Piece, directories, read_index, read_state, step_of, verify
from moelab.engine.checkpoint.shards import Placements
from moelab.engine.collectives import all_gather_json, broadcast_json
from moelab.engine.groups import Group
from moelab.engine.launch import process
from moelab.engine.placement import Placement
from moelab.files import read_object

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
    why_unusable: Callable[[dict[str, Any]], str | None] = lambda state: None,
    *,
    only_weights: bool = False,
    up_to: int | None = None,
) -> Checkpoint | None:
    """Return the newest checkpoint whose files are complete and unchanged, or None.

    Broken checkpoints are named in a warning and skipped. Every rank calls this and gets the same answer; each checks
    some of the files.

    Args:
        directory: folder of the checkpoints.
        why_unusable: called on rank 0 with the caller's state; returns one line if a complete checkpoint cannot be
            used, which is then skipped.
        only_weights: whether the optimizer's files may be broken.
        up_to: consider only checkpoints of at most so many steps.

    Raises:
        Refused: there are complete checkpoints, and `why_unusable` returned a line for each; has that of the newest.
    """
    world = Group.world()
    listed = directories(directory) if world.index == 0 else []
    names = broadcast_json([path.name for path in listed if up_to is None or step_of(path) <= up_to])
    refused = None
    for name in reversed(names):
        try:
            checkpoint = _verify(directory / name, world, only_weights)
            if why := broadcast_json(why_unusable(checkpoint.state) if world.index == 0 else None):
                raise Refused(f"{checkpoint.path}: {why}")
            if name != names[-1] and world.index == 0:
                log.warning("step %d is used in place of the newest checkpoint: %s", checkpoint.step, checkpoint.path)
            return checkpoint
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

    Of a finished run it is the checkpoint of its last step, which its result belongs to, and never an earlier one.

    Raises:
        ValueError: one line: there are no weights, or not those of the result, and what helps.
    """
    checkpoint = latest(run_dir / "checkpoints", only_weights=True)
    if checkpoint is None:
        raise ValueError(why_no_weights(run_dir))
    if (steps := _last_step(run_dir)) is not None and checkpoint.step != steps:
        raise ValueError(_not_of_the_result(run_dir, steps, "missing or damaged"))
    return checkpoint


def why_no_weights(run_dir: Path) -> str:
    """Return in one line why a run's directory has no checkpoint to use, and what helps."""
    if kept := directories(run_dir / "checkpoints"):
        steps = _last_step(run_dir)
        if steps is not None and steps not in map(step_of, kept):
            return _not_of_the_result(run_dir, steps, "missing")
        return f"{run_dir}: none of its checkpoints is whole; remove it and run its experiment again"
    if (run_dir / "result.json").exists():
        return f"{run_dir}: numbers only, no weights; to train it here: remove it and run its experiment again"
    return f"{run_dir}: no checkpoint yet; train the run first"


def _last_step(run_dir: Path) -> int | None:
    """Return the steps of a run's result; None without a result, or where it does not tell them."""
    return (read_object(run_dir / "result.json") or {}).get("steps")


def _not_of_the_result(run_dir: Path, steps: int, what: str) -> str:
    return (
        f"{run_dir}: the checkpoint of its result, step {steps}, is {what}, and earlier weights are not the result's; "
        "remove its result.json and run its experiment again: it goes on from its newest whole checkpoint"
    )


def load_model(checkpoint: Checkpoint, model: nn.Module, placements: Placements = None) -> None:
    """Fill a model, or this rank's part of it, with a checkpoint's weights, whatever layout wrote it.

    Each rank reads what its part needs, without the other ranks. The parameters' dtype stays.

    Raises:
        CheckpointError: the tensors do not fit the model; nothing was loaded.
    """
    index = read_index(checkpoint.path)
    storage.read(checkpoint.path, index, _model_pieces(checkpoint.path, index, model, placements, {}))


def load(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    placements: Placements = None,
    *,
    upcycle: UpcycleConfig | None = None,
    seed: int = 0,
    scores: str = "softmax",
) -> None:
    """Fill a model as `load_model` does, and the optimizer's state with it.

    Moments that were stored in their parameter's dtype get that of the model's parameter.

    Args:
        upcycle: how experts are copied where the checkpoint has a dense layer or fewer experts than the model; the
            layer's parameters that are not in the checkpoint as they are begin without optimizer state. None refuses
            such a checkpoint.
        seed: of the copies' noise.
        scores: `RoutingConfig.scores` of the model, on which the copies of a balance bias depend.
    """
    path, index = checkpoint.path, read_index(checkpoint.path)
    parameters = shards.parameters(model, placements)
    copied: dict[str, str | None] = {}
    if upcycle is not None:
        from moelab.engine.checkpoint import upcycling

        shapes = {name: shards.placement_of(name, p, placements).shape for name, p in parameters.items()}
        copied = upcycling.sources(_stored(index), shapes)
    pieces = _model_pieces(path, index, model, placements, copied)
    fused = bool(optimizer.defaults.get("fused"))
    optimizer.state.clear()
    for name, entry in index.items():
        kind, _, rest = name.partition("/")
        key, _, owner = rest.partition("/")
        if kind != "optimizer" or owner in copied.values():
            continue
        if owner not in parameters:
            raise CheckpointError(f"{path}: {name} is of no parameter of this model")
        parameter, dtype = parameters[owner], getattr(torch, entry["dtype"])
        if entry["shape"]:
            if entry["dtype"] == index[f"model/{owner}"]["dtype"]:
                dtype = parameter.dtype  # a fused update cannot mix dtypes
            value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            placement = shards.placement_of(owner, parameter, placements)
        else:  # the step counter, which every rank holds as a whole
            value = torch.zeros((), dtype=dtype, device=parameter.device if fused else "cpu")
            placement = Placement.whole(())
        optimizer.state[parameter][key] = value
        pieces += shards.pieces(name, value, placement)
    storage.read(path, index, pieces)
    for name, source in copied.items():
        if source is None or upcycle is None:
            continue
        entry, parameter = index[f"model/{source}"], parameters[name]
        shape = tuple(entry["shape"])
        stored = torch.empty(shape, dtype=getattr(torch, entry["dtype"]))
        storage.read(path, index, [Piece(f"model/{source}", shape, (0,) * len(shape), stored)])
        placement = shards.placement_of(name, parameter, placements)
        try:
            copies = upcycling.Copies(stored, source, name, placement.shape, upcycle, seed, scores)
        except ValueError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from None
        for piece in shards.pieces(name, parameter, placement):
            at = zip(piece.offset, piece.tensor.shape, strict=True)
            piece.tensor.copy_(copies.part(tuple(slice(start, start + size) for start, size in at)))


def _stored(index: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the model's tensors in a checkpoint."""
    return {name.partition("/")[2]: tuple(entry["shape"]) for name, entry in index.items() if name.startswith("model/")}


def _model_pieces(
    path: Path, index: dict[str, Any], model: nn.Module, placements: Placements, copied: Mapping[str, str | None]
) -> list[Piece]:
    """Return the pieces to read of all parameters but those that are filled in another way.

    Raises:
        CheckpointError: other names or shapes are stored.
    """
    wanted = {
        name: (p, shards.placement_of(name, p, placements))
        for name, p in shards.parameters(model, placements).items()
        if name not in copied
    }
    stored = {name: shape for name, shape in _stored(index).items() if name not in copied.values()}
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
    manifest: dict[str, Any] = {}
    files = sorted(f for f in record["sha256"].items() if not (only_weights and f[0].startswith("optimizer-")))
    for file, expected in files[world.index :: world.size]:
        manifest = manifest or _or_error(verify, path, file, expected) or {}
        process.beat(first=False)
    for answer in all_gather_json(manifest):
        if "error" in answer:
            raise CheckpointError(answer["error"])
    return Checkpoint(path, record["step"], record["state"])


def _or_error(check: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a check as a JSON value, or the message of its CheckpointError."""
    try:
        return check(*args)
    except CheckpointError as error:
        return {"error": str(error)}
