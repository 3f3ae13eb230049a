"""Run training steps on one rank: the model, its optimizer, the batch of a step, and the learning rate.

Routing, its losses and its random draws belong to a micro-batch and its position (step, number in the step), so that
results do not depend on the layout, except for the order of sums, and a resume needs no state of a generator.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moelab.config import ModelConfig, TrainConfig, UpcycleConfig
from moelab.config.parallel import ParallelConfig
from moelab.data.batches import TrainBatches
from moelab.engine import gradients
from moelab.engine import parallel as engine
from moelab.engine.collectives import all_reduce
from moelab.engine.launch import process
from moelab.engine.mesh import Mesh
from moelab.models.attention import uses_kernel
from moelab.models.moe import MoE
from moelab.models.products import fastest_products
from moelab.training.metrics import Window
from moelab.training.optimizer import make_optimizer
from moelab.training.precision import autocast
from moelab.training.schedule import branch_learning_rate

if TYPE_CHECKING:
    from moelab.training.distill import Distiller


@dataclass(frozen=True)
class Branch:
    """Describe how a run that goes on from another one's checkpoint begins.

    Attributes:
        tokens: of the other run's training, after which this one begins.
        warmup_tokens: over which the learning rate rises from zero to the schedule's.
        upcycle: how experts that the checkpoint has not are copied.
    """

    tokens: int = 0
    warmup_tokens: int = 0
    upcycle: UpcycleConfig = field(default=UpcycleConfig())


@dataclass(frozen=True)
class StepDone:
    """Hold the results of a step, which are the same on every rank.

    Attributes:
        loss: training loss in nats per token, mean over the batch.
        grad_norm: gradient norm before clipping.
        lr: learning rate.
        applied: False if loss or norm is not finite; the weights are then unchanged.
        stop: whether any rank requested to stop.
        router_entropy: part of the metric row, see `moelab.training.balance`; empty unless a row follows the step.
    """

    loss: float
    grad_norm: float
    lr: float
    applied: bool
    stop: bool
    router_entropy: dict[str, float]


class Trainer:
    """Hold a model, its optimizer and its data on one rank, and run training steps."""

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        batches: TrainBatches,
        context: int,
        mesh: Mesh | None = None,
        distiller: Distiller | None = None,
        branch: Branch | None = None,
    ) -> None:
        """Build the model with initial weights, and its optimizer.

        Args:
            batches: this data rank's part of every step's batch.
            context: tokens per sequence, T.
            mesh: the ranks; None means this process alone.
            distiller: the teacher, if there is one.
            branch: how a run that goes on from another one begins, for its learning rate.

        Raises:
            ValueError: the layout does not fit the model or its training (`TrainConfig.check_layout`).
        """
        if config.compile:
            raise ValueError("train: compile is a setting of earlier versions; leave it out")
        self.model_config, self.config, self.batches, self.context = model_config, config, batches, context
        self.mesh = mesh or Mesh(ParallelConfig(), model_config.experts, config.device)
        self.distiller, self.branch = distiller, branch or Branch()
        self.micro_batch = config.micro_batch or config.batch_size
        config.check_layout(model_config, self.mesh.config)
        self.model = engine.build(model_config, config.seed, self.mesh)
        self.sync = gradients.GradientSync(self.model)
        self.optimizer = make_optimizer(self.model.module, config)
        self.routers = {
            str(i + 1): block.ffn.router
            for i, block in enumerate(self.model.module.blocks)
            if isinstance(block.ffn, MoE)
        }
        self.expert_ranks = {k: self.mesh.experts(router.experts).layout.parallel for k, router in self.routers.items()}
        self.steps = config.steps(context)

    def step(self, step: int, window: Window, should_stop: Callable[[], bool] = lambda: False) -> StepDone:
        """Run one optimizer step on the batch of `step` (counting from 0), and add its metrics to `window`."""
        with fastest_products(self.config.device == "cpu" and uses_kernel(self.model_config, self.context)):
            return self._step(step, window, should_stop)

    def _step(self, step: int, window: Window, should_stop: Callable[[], bool]) -> StepDone:
        config, module = self.config, self.model.module
        seen = (step + 1) * config.batch_size * self.context
        rate = branch_learning_rate(config, seen, self.branch.tokens, self.branch.warmup_tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens_BT, targets_BT = (t.to(config.device) for t in self.batches.batch(step))
        parts = len(tokens_BT) // self.micro_batch
        measures = (step + 1) % config.log_every == 0 or step + 1 == self.steps
        if measures:
            for router in self.routers.values():
                router.entropies = []
        module.train()
        sums = torch.zeros(3, dtype=torch.float64, device=config.device)  # read once a step: a GPU need not wait before
        counts: list[list[tuple[Tensor, Tensor]]] = []
        for part in range(parts):
            number = self.mesh.data.index * parts + part  # of the micro-batch, over all ranks
            seed = draw_seed(config.seed, step, number)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed keeps a traceback for each GPU type unused
            if config.device == "cuda":
                torch.cuda.manual_seed_all(seed)
            rows = slice(part * self.micro_batch, (part + 1) * self.micro_batch)
            soft = self.distiller.targets(tokens_BT[rows], step) if self.distiller else None
            with autocast(config):
                output = module(tokens_BT[rows], targets_BT=targets_BT[rows], soft=soft)
            routing_loss = output.routing_loss()
            if part == parts - 1:
                self.sync.arm()
            ((output.loss + routing_loss) / parts).backward()
            with torch.no_grad():
                routed, other = torch.as_tensor(routing_loss, device=sums.device), output.soft_loss
                sums += torch.stack([x.double() for x in (output.loss - other, routed, other)]) / parts
            counts.append([(routing.load_E, routing.kept_E) for routing in output.routing])
            del output  # a routing loss that is weighted by 0 holds its graph, and recomputed blocks' inputs with it
            process.beat()
        self.sync.finish()
        norm = gradients.clip(self.model, config.clip or math.inf)
        if measures and self.routers:
            entropies = torch.stack([x for r in self.routers.values() for x in r.entropies or ()])
            sums = torch.cat([sums, entropies.mean()[None]])
            for router in self.routers.values():
                router.entropies = None  # not in evaluation
        losses, load, kept, stop = self._agree(sums, counts, should_stop())
        losses, entropy = losses[:3], losses[3:]
        applied = math.isfinite(sum(losses)) and math.isfinite(norm)
        if applied:
            self.optimizer.step()
            if self.model_config.routing.balance_rate:
                for layer, router in self.routers.items():
                    router.balance(torch.tensor(load[layer]))
            window.add(losses[0], losses[1], losses[2], load, kept)
            window.grad_norm += norm
        self.optimizer.zero_grad(set_to_none=True)
        others = sum(losses[1:])
        loss = losses[0] + (0.0 if math.isfinite(others) else others)
        return StepDone(loss, norm, rate, applied, stop, {"router_entropy": entropy[0]} if entropy else {})

    def _agree(
        self, losses: Tensor, counts: list[list[tuple[Tensor, Tensor]]], stop: bool
    ) -> tuple[list[float], dict[str, list[int]], dict[str, int], bool]:
        """Combine a step's metrics over all ranks: means of losses, load and kept tokens by layer, whether to stop."""
        layers = list(self.routers)
        load = [torch.stack([part[i][0] for part in counts]).sum(0) for i in range(len(layers))]
        kept = [torch.stack([part[i][1] for part in counts]).sum()[None] for i in range(len(layers))]
        numbers = [losses, losses.new_tensor([float(stop)]), *load, *kept]
        flat = torch.cat([x.double() for x in numbers])
        all_reduce(flat, self.mesh.world, "metrics")
        n, ranks, same = len(losses), self.mesh.world.size, self.mesh.tensor.size
        values, (stopping, *whole) = flat[:n].tolist(), flat[n:].tolist()
        tokens = [round(x / same) for x in whole]  # tensor ranks have counted the same ones
        ends = list(itertools.accumulate((len(x) for x in load), initial=0))
        found = {layer: tokens[first:end] for layer, (first, end) in zip(layers, itertools.pairwise(ends), strict=True)}
        return [x / ranks for x in values], found, dict(zip(layers, tokens[ends[-1] :], strict=True)), stopping > 0


def draw_seed(seed: int, step: int, part: int) -> int:
    """Return the seed of all random draws in one micro-batch.

    It is a function of the micro-batch's position, so that a resume needs no generator state.

    Args:
        part: the micro-batch's number in the step, over all ranks.
    """
    key = hashlib.sha256(f"{seed}/{step}/{part}/0".encode()).digest()
    return int.from_bytes(key[:8], "big") >> 1
