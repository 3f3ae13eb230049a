"""Train one model on one stream of tokens, with its files in one directory.

A run that is resumed with the same code on the same kind of CPU equals an uninterrupted one bit for bit: data and
random draws of a step are functions of the seed and the position (step, micro-batch), so that a checkpoint only holds
weights, optimizer state and the running sums of the metrics. To resume, call `train` again with the same arguments.

On several ranks, every rank calls `train` with the same arguments. A step's micro-batches are distributed over the data
ranks. Routing, its losses and its random draws belong to a micro-batch, so that results do not depend on the layout
(except for the order of sums), and a run may resume with another layout. Rank 0 writes the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelab.config import ModelConfig, TrainConfig, UpcycleConfig
from moelab.config.parallel import ParallelConfig
from moelab.data import TokenData
from moelab.data.batches import TrainBatches
from moelab.engine import checkpoint, gradients
from moelab.engine import parallel as engine
from moelab.engine.collectives import all_reduce
from moelab.engine.launch import process
from moelab.engine.mesh import Mesh
from moelab.models.attention import uses_kernel
from moelab.models.moe import MoE
from moelab.models.products import fastest_products
from moelab.training.distill import Distiller, Teacher
from moelab.training.metrics import TRAIN, VALIDATION, Metrics, Window, objection
from moelab.training.optimizer import make_optimizer
from moelab.training.precision import autocast
from moelab.training.schedule import rewarmed
from moelab.training.validation import evaluate

_LAST_VALIDATION = 100_000_000
"""Tokens of each domain that the last validation reads at most; of 1 % of a Pile it would take hours on 64 GPUs."""


class TrainingDiverged(RuntimeError):
    """Report that the loss, the gradient norm or a weight is NaN or infinite."""


class TrainingStopped(Exception):
    """Report that training stopped on request after writing a checkpoint; call `train` again to continue."""


@dataclass(frozen=True)
class Progress:
    """Hold a training's progress: steps done, all steps, and the last metric row's loss (nats) and speed."""

    step: int
    steps: int
    loss: float
    tokens_per_s: float


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


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    data: TokenData,
    context: int,
    run_dir: Path,
    *,
    parallel: ParallelConfig | None = None,
    teacher: Teacher | None = None,
    start: checkpoint.Checkpoint | None = None,
    branch: Branch | None = None,
    until: int | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Start or resume the training in `run_dir`, and return the result as JSON values.

    Writes `train.jsonl`, `validation.jsonl` (see `moelab.training.metrics`) and `checkpoints/`.

    Args:
        context: tokens per sequence, T.
        parallel: how the model is distributed over ranks, all of which call this function in one process group. None
            means this process alone.
        teacher: a finished run to distil, see `moelab.training.distill`.
        start: another run's checkpoint, used while `run_dir` has none: weights, optimizer state and the count of steps
            continue from there, and metrics begin there. Where the model has more experts, they are copies.
        branch: how the run begins at `start`; given on resume, too.
        until: end after so many steps, with a checkpoint, no last validation and an empty result.
        on_progress: called with each metric row, on rank 0.
        should_stop: called once per step on every rank; if any rank returns True, all write a checkpoint and raise
            TrainingStopped.

    Raises:
        ValueError: model, data, training and layout do not fit each other, the checkpoint belongs to other data, or the
            metrics before every checkpoint are damaged.
        TrainingDiverged: the loss, the gradient norm or, where a checkpoint is due, a weight or moment is NaN or
            infinite; names the step and the last good checkpoint.
        TrainingStopped: `should_stop` returned True before the last step.
    """
    if data.vocab_size > model_config.vocab:
        raise ValueError(
            f"train: tokenizer has {data.vocab_size} entries, the model's embedding only {model_config.vocab}"
        )
    if context > model_config.context:
        raise ValueError(
            f"train: sequences of {context} tokens are longer than the model's context of {model_config.context}"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train: device is cuda, but no CUDA device is available; allowed here: cpu")
    steps = config.steps(context)
    if config.device == "cpu":
        process.keep_freed_memory()
    with process.unwatched():
        mesh = Mesh(parallel or ParallelConfig(), model_config.experts, config.device)
        leads = mesh.rank == 0
        batches = TrainBatches(data, config.batch_size, context, config.seed, mesh.data.index, mesh.data.size)
        distiller = Distiller.load(teacher, config, data, context, mesh) if teacher else None
        branch = branch or Branch()
        trainer = Trainer(model_config, config, batches, context, mesh, distiller, branch)
        step, window, seconds = 0, Window(), 0.0
        end = min(until or steps, steps)
        keep = {config.step_at(tokens, context, "train: keep_at") for tokens in config.keep_at}
        checkpoints = checkpoint.Writer(run_dir / "checkpoints", always=keep)
        try:
            last = checkpoint.latest(run_dir / "checkpoints", lambda state: objection(run_dir, state.get("metrics")))
        except checkpoint.Refused as error:
            raise ValueError(
                f"train: no checkpoint with whole metrics: {error}; remove {run_dir} to train again"
            ) from None
        if (source := last or start) is not None:
            if source.state["data"] != data.fingerprint:
                remedy = f"; remove {run_dir} to start again" if last else ""
                raise ValueError(f"train: {source.path} was written with other data{remedy}")
            trainer.load(source, branch.upcycle if last is None else None)
            step, window, seconds = source.step, Window(**source.state["window"]), source.state["seconds"]
            if last is None and not window.fits(model_config, step % config.log_every):
                window = Window()
    metrics = None
    if leads:
        recorded = last.state.get("metrics") if last else None  # a trunk's metrics are not this run's
        metrics = Metrics(run_dir, step if last else -1, config.tensorboard, recorded)

    def write(file: str, row: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.write(file, row)

    def diverged(what: str, value: float, at: int) -> TrainingDiverged:
        checkpoints.wait()
        with process.unwatched():  # it reads whole checkpoints
            good = checkpoint.latest(run_dir / "checkpoints")
        where = f"the last good checkpoint is {good.path}" if good else "no checkpoint was written before"
        return TrainingDiverged(f"{what} is {value} at step {at}; {where}")

    def validate(max_tokens: int) -> dict[str, Any]:
        scores = evaluate(trainer.model.module, data, config, context, max_tokens=max_tokens, mesh=mesh)
        if not math.isfinite(scores["loss"]):
            raise diverged("validation loss", scores["loss"], step)
        return scores

    with checkpoints, contextlib.closing(metrics) if metrics else contextlib.nullcontext():
        if last is None:
            began = {"step": step, "tokens": step * config.batch_size * context, "time_s": seconds}
            write(VALIDATION, {**began, **validate(config.eval_tokens)})
        row_step, row_seconds = step, seconds  # at the last metric row, or at the resume
        while step < end:
            started = time.perf_counter()
            done = trainer.step(step, window, should_stop)
            if not done.applied:
                what = "gradient norm" if math.isfinite(done.loss) else "loss"
                raise diverged(what, done.grad_norm if math.isfinite(done.loss) else done.loss, step + 1)
            process.beat()
            step += 1
            seconds += time.perf_counter() - started
            tokens = step * config.batch_size * context
            if step % config.log_every == 0 or step == steps:
                speed = (step - row_step) * config.batch_size * context / (seconds - row_seconds)
                row = {"step": step, "tokens": tokens, "lr": done.lr, **window.row(trainer.expert_ranks)}
                row |= done.router_entropy
                write(TRAIN, {**row, "tokens_per_s": speed, "time_s": seconds})
                if leads:
                    on_progress(Progress(step, steps, row["loss"], speed))
                window, row_step, row_seconds = Window(), step, seconds
            if step % config.eval_every == 0 or step == steps:
                scores = validate(config.eval_tokens)
                write(VALIDATION, {"step": step, "tokens": tokens, "time_s": seconds, **scores})
            due = config.checkpoint_every and step % config.checkpoint_every == 0
            if done.stop or step == end or step in keep or due:
                if not checkpoint.finite(
                    trainer.model.module, trainer.optimizer
                ):  # the loss does not tell of an expert without tokens
                    raise diverged("a weight or moment", math.nan, step)
                state = {"window": asdict(window), "seconds": seconds, "data": data.fingerprint}
                state["metrics"] = metrics.state() if metrics else None  # on disk before the checkpoint
                trainer.save(checkpoints, step, state)
            if done.stop and step < end:
                checkpoints.wait()  # raises an OSError before the message says that the checkpoint is written
                raise TrainingStopped(
                    f"stopped at step {step} of {steps}; the checkpoint is written, run again to go on"
                )
        if until is not None:
            return {}
        final = validate(_LAST_VALIDATION)
    return {
        "steps": steps,
        "tokens": steps * config.batch_size * context,
        "validation_loss": final["loss"],
        "bits_per_byte": final["bits_per_byte"],
        "validation_by_domain": final["by_domain"],
        "validation_by_pair": final["by_pair"],
        "validation_tokens": final["validation_tokens"],
        "unigram_loss": data.unigram_loss,
        "parameters": model_config.parameters(),
        "active_parameters": model_config.active_parameters(),
        "flops_per_token": model_config.flops_per_token(context=context),
        "seconds": seconds,
        "data_fingerprint": data.fingerprint,
    }


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
        rate = rewarmed(config, seen, self.branch.tokens, self.branch.warmup_tokens)
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
            torch.manual_seed(draw_seed(config.seed, step, number))
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

    def save(self, checkpoints: checkpoint.Writer, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint of `step` steps in the background; see `moelab.engine.checkpoint.Writer.save`."""
        checkpoints.save(step, self.model.module, self.optimizer, state, self.model.placements)

    def load(self, saved: checkpoint.Checkpoint, upcycle: UpcycleConfig | None = None) -> None:
        """Load a checkpoint's weights and optimizer state; see `moelab.engine.checkpoint.load`."""
        model, placements, scores = self.model.module, self.model.placements, self.model_config.routing.scores
        seed = self.config.seed
        checkpoint.load(saved, model, self.optimizer, placements, upcycle=upcycle, seed=seed, scores=scores)


def draw_seed(seed: int, step: int, part: int) -> int:
    """Return the seed of all random draws in one micro-batch.

    It is a function of the micro-batch's position, so that a resume needs no generator state.

    Args:
        part: the micro-batch's number in the step, over all ranks.
    """
    key = hashlib.sha256(f"{seed}/{step}/{part}/0".encode()).digest()
    return int.from_bytes(key[:8], "big") >> 1
