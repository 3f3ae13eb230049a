"""The training loop: one model, one stream of tokens, one directory.

Resume is bit for bit: the data of a step and every random draw in it are functions of (seed, step), so a checkpoint needs only
weights, optimizer state and the running sums of the metrics. Kill the process at any step, call `train` again with the same
arguments, and the numbers are those of a run that was never killed.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moelab.config import ModelConfig, TrainConfig
from moelab.data import TokenData, TrainBatches, bits_per_byte, overall_loss, validation_batches
from moelab.engine import checkpoint
from moelab.models import GPT, Output, build
from moelab.training.metrics import TRAIN, VALIDATION, Metrics
from moelab.training.schedule import learning_rate


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer a number."""


class TrainingStopped(Exception):
    """Training was told to stop and wrote a checkpoint; call `train` again to go on."""


@dataclass(frozen=True)
class Progress:
    """Where a training is: steps done of all, the last loss in nats, speed of the last steps."""

    step: int
    steps: int
    loss: float
    tokens_per_s: float


@dataclass
class Window:
    """Sums over the steps since the last metric row. Part of a checkpoint, so that a row spans the same steps after a resume."""

    steps: int = 0
    loss: float = 0.0
    routing_loss: float = 0.0
    grad_norm: float = 0.0
    load: dict[str, list[int]] = field(default_factory=dict)  # layer (from 1) -> tokens that chose each expert
    kept: dict[str, int] = field(default_factory=dict)  # layer -> tokens kept

    def add_routing(self, output: Output, config: ModelConfig) -> None:
        layers = [str(i + 1) for i, experts in enumerate(config.experts) if experts]
        for layer, routing in zip(layers, output.routing, strict=True):
            load = routing.load_E.tolist()
            self.load[layer] = [a + b for a, b in zip(self.load.get(layer, [0] * len(load)), load, strict=True)]
            self.kept[layer] = self.kept.get(layer, 0) + int(routing.kept_E.sum())

    def row(self) -> dict[str, Any]:
        n = max(1, self.steps)
        row: dict[str, Any] = {
            "loss": self.loss / n,
            "routing_loss": self.routing_loss / n,
            "grad_norm": self.grad_norm / n,
        }
        if self.load:
            totals = {layer: max(1, sum(load)) for layer, load in self.load.items()}
            row["dropped_share"] = 1 - sum(self.kept.values()) / sum(totals.values())
            row["expert_load"] = {layer: [x / totals[layer] for x in load] for layer, load in self.load.items()}
            row["busiest_expert"] = max(max(load) * len(load) / totals[layer] for layer, load in self.load.items())
        return row


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    data: TokenData,
    context: int,
    run_dir: Path,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train, or go on training, in `run_dir`; returns the result as JSON values.

    Writes `train.jsonl`, `validation.jsonl` (see `moelab.training.metrics`) and `checkpoints/`.

    Args:
        context: tokens a sequence, T.
        on_progress: called at each metric row.
        should_stop: asked after each step; True writes a checkpoint and raises TrainingStopped.

    Raises:
        ValueError: model, data and training do not fit each other, or the checkpoint is of other data.
        TrainingDiverged: the loss or gradient norm is NaN or infinite; names the step and the last good checkpoint.
        TrainingStopped: `should_stop` said so.
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
    batches = TrainBatches(data, config.batch_size, context, config.seed)

    model = build(model_config, config.seed, config.device)
    optimizer = make_optimizer(model, config)
    step, window, seconds = 0, Window(), 0.0
    last = checkpoint.latest(run_dir / "checkpoints")
    if last is not None:
        if last.state["data"] != data.fingerprint:
            raise ValueError(f"train: {last.path} was written with other data; remove {run_dir} to start again")
        checkpoint.load(last, model, optimizer)
        step, window, seconds = last.step, Window(**last.state["window"]), last.state["seconds"]
    metrics = Metrics(run_dir, resume_step=step if last else -1, tensorboard=config.tensorboard)

    def save() -> None:
        state = {"window": asdict(window), "seconds": seconds, "data": data.fingerprint}
        checkpoint.save(run_dir / "checkpoints", step, model, optimizer, state)

    def validate(max_tokens: int) -> dict[str, Any]:
        scores = evaluate(model, data, config, context, max_tokens=max_tokens)
        if not math.isfinite(scores["loss"]):
            raise _diverged("validation loss", scores["loss"], step, run_dir)
        return scores

    try:
        if last is None:
            metrics.write(VALIDATION, {"step": 0, "tokens": 0, "time_s": 0.0, **validate(config.eval_tokens)})
        row_step, row_seconds = step, seconds  # of the last metric row, or of the resume
        while step < steps:
            started = time.perf_counter()
            train_step(model, optimizer, batches, config, step, context, window, run_dir)
            step += 1
            seconds += time.perf_counter() - started
            tokens = step * config.batch_size * context
            if step % config.log_every == 0 or step == steps:
                speed = (step - row_step) * config.batch_size * context / (seconds - row_seconds)
                row = {"step": step, "tokens": tokens, "lr": optimizer.param_groups[0]["lr"], **window.row()}
                metrics.write(TRAIN, {**row, "tokens_per_s": speed, "time_s": seconds})
                on_progress(Progress(step, steps, row["loss"], speed))
                window, row_step, row_seconds = Window(), step, seconds
            if step % config.eval_every == 0 or step == steps:
                scores = validate(config.eval_tokens)
                metrics.write(VALIDATION, {"step": step, "tokens": tokens, "time_s": seconds, **scores})
            stop = should_stop()
            if stop or step == steps or (config.checkpoint_every and step % config.checkpoint_every == 0):
                save()
            if stop and step < steps:
                raise TrainingStopped(
                    f"stopped at step {step} of {steps}; the checkpoint is written, run again to go on"
                )
        final = validate(0)
    finally:
        metrics.close()
    return {
        "steps": steps,
        "tokens": steps * config.batch_size * context,
        "validation_loss": final["loss"],
        "bits_per_byte": final["bits_per_byte"],
        "validation_by_domain": final["by_domain"],
        "validation_tokens": final["validation_tokens"],
        "unigram_loss": data.unigram_loss,
        "parameters": model_config.parameters(),
        "active_parameters": model_config.active_parameters(),
        "flops_per_token": model_config.flops_per_token(context=context),
        "seconds": seconds,
        "data_fingerprint": data.fingerprint,
    }


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only (not biases, norms), as GPT-3's recipe."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith("bias")
        (decayed if matrix else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def train_step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batches: TrainBatches,
    config: TrainConfig,
    step: int,
    context: int,
    window: Window,
    run_dir: Path,
) -> None:
    """One optimizer step on the batch of `step` (counting from 0); adds to `window`."""
    rate = learning_rate(config, (step + 1) * config.batch_size * context)
    for group in optimizer.param_groups:
        group["lr"] = rate
    tokens_BT, targets_BT = (t.to(config.device) for t in batches.batch(step))
    size = config.micro_batch or config.batch_size
    parts = config.batch_size // size
    model.train()
    loss_sum = routing_sum = 0.0
    for part in range(parts):
        torch.manual_seed(draw_seed(config.seed, step, part))
        rows = slice(part * size, (part + 1) * size)
        with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bf16"):
            output = model(tokens_BT[rows])
        loss = output.cross_entropy(targets_BT[rows])
        routing_loss = output.routing_loss(model.config)
        ((loss + routing_loss) / parts).backward()
        loss_sum += float(loss.detach()) / parts
        routing_sum += float(torch.as_tensor(routing_loss).detach()) / parts
        window.add_routing(output, model.config)
    if not math.isfinite(loss_sum + routing_sum):
        raise _diverged("loss", loss_sum + routing_sum, step + 1, run_dir)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf))
    if not math.isfinite(norm):
        raise _diverged("gradient norm", norm, step + 1, run_dir)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    window.steps += 1
    window.loss += loss_sum
    window.routing_loss += routing_sum
    window.grad_norm += norm


@torch.no_grad()
def evaluate(model: GPT, data: TokenData, config: TrainConfig, context: int, *, max_tokens: int = 0) -> dict[str, Any]:
    """Validation loss in nats a token and in bits per byte of text, over all and by domain.

    Args:
        context: tokens a sequence, T.
        max_tokens: bound on the tokens of each domain; 0 is all of them.
    """
    model.eval()
    nats: dict[str, float] = {}
    counts: dict[str, int] = {}
    for domain, tokens_BT, targets_BT in validation_batches(data, config.batch_size, context, max_tokens):
        with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bf16"):
            output = model(tokens_BT.to(config.device))
        total = output.cross_entropy(targets_BT.to(config.device), reduction="sum")
        nats[domain] = nats.get(domain, 0.0) + float(total)
        counts[domain] = counts.get(domain, 0) + targets_BT.numel()
    model.train()
    losses = {domain: nats[domain] / counts[domain] for domain in nats}
    overall = overall_loss(data, losses)
    return {
        "loss": overall.nats_per_token,
        "bits_per_byte": overall.bits_per_byte,
        "by_domain": {
            domain: {"loss": loss, "bits_per_byte": bits_per_byte(data, loss, domain)}
            for domain, loss in losses.items()
        },
        "validation_tokens": sum(counts.values()),
    }


def draw_seed(seed: int, step: int, part: int, rank: int = 0) -> int:
    """Seed of every random draw in one forward pass: a function of where it stands, so that resume needs no generator state."""
    key = hashlib.sha256(f"{seed}/{step}/{part}/{rank}".encode()).digest()
    return int.from_bytes(key[:8], "big") >> 1


def _diverged(what: str, value: float, step: int, run_dir: Path) -> TrainingDiverged:
    last = checkpoint.latest(run_dir / "checkpoints")
    where = f"the last good checkpoint is {last.path}" if last else "no checkpoint was written before"
    return TrainingDiverged(f"{what} is {value} at step {step}; {where}")
