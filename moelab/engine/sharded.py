"""Ask what is spread over ranks, without importing FSDP2 and the engine where nothing is.

The import of torch.distributed.tensor and fsdp takes 0.9 s, a third of the start of a training on one process. What
is not imported has no instances.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Return whether this rank holds a shard of the tensor, as a DTensor."""
    return (module := sys.modules.get("torch.distributed.tensor")) is not None and isinstance(tensor, module.DTensor)


def is_gathering(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Return whether FSDP2 gathers the module's parameters for each pass."""
    return (fsdp := sys.modules.get("torch.distributed.fsdp")) is not None and isinstance(module, fsdp.FSDPModule)


def is_part(module: nn.Module) -> bool:
    """Return whether the module has only this rank's part of a layer's parameters (`moelab.engine.parallel`)."""
    places = (("moelab.engine.parallel", "SlicedExperts"), ("moelab.engine.tensor_slicing", "ColumnLinear"))
    kinds = [getattr(sys.modules[name], kind) for name, kind in places if name in sys.modules]
    return isinstance(module, tuple(kinds))
