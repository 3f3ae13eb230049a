"""Which shards of which tensors of a model and its optimizer a rank has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moelab.engine.checkpoint.format import Piece
from moelab.engine.collectives import all_reduce
from moelab.engine.groups import Group
from moelab.engine.placement import Placement
from moelab.engine.sharded import is_gathering, is_part, is_sharded

Placements = dict[str, Placement] | None
"""Parameter name -> its placement on this rank; None: every rank holds everything. DTensors know theirs themselves."""


def tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, placements: Placements
) -> Iterator[tuple[str, Tensor, Placement]]:
    """Iterate over the name, tensor and placement of all that a checkpoint holds, in the same order on every rank."""
    own = parameters(model, placements)
    for name, parameter in own.items():
        yield f"model/{name}", parameter, placement_of(name, parameter, placements)
    for name, parameter in own.items():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(f"checkpoint: {key} of {name} has another shape than it; such state is not saved")
            step_counter = Placement.whole((), Group.world().ranks)
            placement = placement_of(name, parameter, placements) if value.ndim else step_counter
            yield f"optimizer/{key}/{name}", value, placement


@torch.no_grad()
def finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether all weights and moments of all ranks are finite; every rank calls this."""
    moments = (value for state in optimizer.state.values() for value in state.values() if value.ndim)
    local = (t.to_local() if is_sharded(t) else t for t in (*parameters(model, {}).values(), *moments))
    bad = torch.stack([t.isfinite().all().logical_not() for t in local]).sum().double()
    all_reduce(bad, Group.world(), "control")
    return not bad


def parameters(model: nn.Module, placements: Placements) -> dict[str, nn.Parameter]:
    """Return a model's parameters by name; sharded ones appear as their shards.

    Raises:
        ValueError: a rank's part of a model without placements, which would be taken for all of it.
    """
    for module in model.modules():
        if placements is None and is_part(module):
            raise ValueError("checkpoint: the model is a rank's part of one; give its placements, too")
        # After a forward pass without a backward pass, FSDP2 leaves gathered weights in place of the parameters.
        if is_gathering(module):
            module.reshard()
    return dict(model.named_parameters())


def placement_of(name: str, parameter: Tensor, placements: Placements) -> Placement:
    """Return a parameter's placement.

    Raises:
        ValueError: the placement does not fit the tensor.
    """
    if placements is None:
        return Placement.whole(tuple(parameter.shape), Group.world().ranks)
    placement = placements[name]
    shape = placement.shape if is_sharded(parameter) else placement.local_shape
    if shape != tuple(parameter.shape):
        raise ValueError(f"checkpoint: {name} is placed as {shape}, but is {tuple(parameter.shape)}")
    return placement


def pieces(name: str, tensor: Tensor, placement: Placement) -> Iterator[Piece]:
    """Iterate over the shards of a tensor that are on this rank, as views."""
    tensor = tensor.detach()
    if is_sharded(tensor):
        local = tensor.to_local()
        if local.numel():
            (chunk,) = tensor.__create_chunk_list__()
            yield Piece(name, placement.shape, tuple(chunk.offsets), local)
        return
    for shard in placement.shards:
        yield Piece(name, placement.shape, shard.offset, shard.of(tensor))
