"""Gradients over ranks: the sum over each parameter's replicas, during the backward pass, and the global norm.

A parameter's gradient is the mean over data ranks of the contributions of each rank's tokens. Its `Placement` says
over which ranks to sum: all ranks for a non-expert weight, or the data ranks with the same slice if tensor slicing cuts
it; the expert-data group for an expert (which has already received the tokens of the other ranks). The sum is divided
by the number of data ranks times the number of replicas of each token in it. FSDP2 reduces the gradients of its own
parameters (DTensors).
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor, nn

from moelab.engine.collectives import Pending, all_reduce
from moelab.engine.groups import Group
from moelab.engine.parallel import ParallelModel
from moelab.engine.sharded import is_sharded

BUCKET_BYTES = 8 << 20
"""Gradients are summed in buckets of about this size: large enough to be worth a message, small enough to start early.
"""


class _Bucket:
    """Parameters of the same replicas and dtype, whose gradients are summed together."""

    def __init__(self, group: Group, scale: float) -> None:
        self.group, self.scale = group, scale
        self.parameters: list[nn.Parameter] = []
        self.bytes = 0
        self.waiting = 0
        self.flat: Tensor | None = None
        self.pending: Pending | None = None

    def add(self, parameter: nn.Parameter) -> None:
        self.parameters.append(parameter)
        self.bytes += parameter.numel() * parameter.element_size()

    def start(self) -> None:
        """Begin the sum; a parameter without a gradient on this rank contributes zeros."""
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.group.size == 1:
            return
        grads = self._grads()
        if len(grads) == 1 and grads[0].is_contiguous():
            self.flat = grads[0].view(-1)
        else:  # the gradients become parts of the message, so that there is one copy of them
            self.flat = torch.cat([g.reshape(-1) for g in grads])
            for p, part in zip(self.parameters, self.flat.split([g.numel() for g in grads]), strict=True):
                p.grad = part.view_as(p)
        self.pending = all_reduce(self.flat, self.group, "gradients", asynchronous=True)

    def finish(self) -> None:
        """Wait for the sum and scale it."""
        if self.pending is not None:
            self.pending.wait()
        if self.scale != 1.0:
            for part in self._grads() if self.flat is None else [self.flat]:
                part.mul_(self.scale)
        self.flat = self.pending = None

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]


class GradientSync:
    """Sums the gradients of a `ParallelModel` over ranks.

    Call `arm()` before the last backward pass of a step and `finish()` after it. With `ParallelConfig.overlap` the sum
    of each bucket starts as soon as its last gradient exists, while the backward pass continues; without `arm()` all
    start in `finish()`. Buckets start in the same order on every rank.
    """

    def __init__(self, model: ParallelModel) -> None:
        self.mesh = model.mesh
        self._armed = False
        self._next = 0
        self.buckets = _buckets(model) if model.mesh.world.size > 1 else []
        self._bucket_of = {id(p): bucket for bucket in self.buckets for p in bucket.parameters}
        if model.mesh.config.overlap:
            # A weak reference: the garbage collector cannot follow hooks, which would keep the model alive for ever.
            arrived = weakref.WeakMethod(self._arrived)
            for bucket in self.buckets:
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(lambda p: (call := arrived()) and call(p))

    def arm(self) -> None:
        """Announce that the next backward pass is the step's last, so that the gradients it completes may be summed."""
        self._armed, self._next = True, 0
        for bucket in self.buckets:
            bucket.waiting = len(bucket.parameters)

    def finish(self) -> None:
        """Start the sums that have not started and wait for all.

        Afterwards every `grad` is the step's gradient, equal on all replicas.
        """
        for bucket in self.buckets[self._next :]:
            bucket.start()
        self._armed, self._next = False, 0  # the next call sums all of a step that was not announced
        for bucket in self.buckets:
            bucket.finish()

    def _arrived(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        self._bucket_of[id(parameter)].waiting -= 1
        while self._next < len(self.buckets) and self.buckets[self._next].waiting == 0:
            self.buckets[self._next].start()
            self._next += 1


def _buckets(model: ParallelModel) -> list[_Bucket]:
    """Return buckets in the order in which the backward pass completes them, roughly: the last layers first."""
    mesh = model.mesh
    layers = [mesh.experts(experts) for experts in {e for e in model.module.config.experts if e}]
    candidates = [mesh.world, mesh.data, *(g for layer in layers for g in (layer.replicas, layer.same_experts))]
    groups = {group.ranks: group for group in candidates}
    buckets: list[_Bucket] = []
    open_buckets: dict[tuple, _Bucket] = {}
    for name, parameter in reversed(list(model.module.named_parameters())):
        if is_sharded(parameter) or not parameter.requires_grad:
            continue
        placement = model.placements[name]
        scale = 1 / (mesh.config.data * placement.token_replicas)
        key = (placement.replicas, scale, parameter.dtype)
        bucket = open_buckets.get(key)
        if bucket is None:
            bucket = open_buckets[key] = _Bucket(groups[placement.replicas], scale)
            buckets.append(bucket)
        bucket.add(parameter)
        if bucket.bytes >= BUCKET_BYTES:
            del open_buckets[key]
    return buckets


def clip(model: ParallelModel, largest: float) -> float:
    """Scale the gradients, in place, to a global norm of at most `largest`; return the norm before.

    The norm is that of the whole model's gradient and the same number on every rank: each contributes the squares of
    its shards, divided by the number of ranks that hold the same shard, which is exact under any layout.
    """
    parameters = list(model.module.parameters())
    grads = [p.grad for p in parameters if p.grad is not None]
    if model.mesh.world.size == 1:
        own = nn.utils.get_total_norm(grads)
        if not largest / (own + 1e-6) >= 1:  # else all would be multiplied by 1, or also by NaN where it is NaN
            nn.utils.clip_grads_with_norm_(parameters, largest, own)
        return float(own)
    total = torch.zeros((), dtype=torch.float64, device=model.mesh.device)
    for name, parameter in model.module.named_parameters():
        grad = parameter.grad
        if is_sharded(grad):
            total += grad.to_local().square().sum(dtype=torch.float64)
        elif grad is not None:
            total += grad.square().sum(dtype=torch.float64) / len(model.placements[name].replicas)
    all_reduce(total, model.mesh.world, "norm")
    norm = math.sqrt(float(total)) if math.isfinite(float(total)) else float(total)
    scale = min(1.0, largest / (norm + 1e-6))
    if scale < 1.0:
        for grad in grads:
            grad.mul_(scale)
    return norm
