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
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moelab.config import ModelConfig, TrainConfig
from moelab.config.parallel import ParallelConfig
from moelab.data.batches import TrainBatches
from moelab.data.tokens import TokenData
from moelab.engine.launch import process
from moelab.engine.mesh import Mesh
from moelab.training.checkpointer import Checkpointer
from moelab.training.metrics import TRAIN, VALIDATION, Metrics, Window
from moelab.training.trainer import Branch, StepDone, Trainer
from moelab.training.validation import evaluate

if TYPE_CHECKING:
    from moelab.engine.checkpoint import Checkpoint
    from moelab.training.distill import Teacher

__all__ = ["Branch", "Progress", "TrainingDiverged", "TrainingStopped", "train"]

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


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    data: TokenData,
    context: int,
    run_dir: Path,
    *,
    parallel: ParallelConfig | None = None,
    teacher: Teacher | None = None,
    start: Checkpoint | None = None,
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
        until: the step after which to end, with a checkpoint, no last validation and an empty result.
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
    _check(model_config, config, data, context)
    if config.device == "cpu":
        process.keep_freed_memory()
    with process.unwatched():
        mesh = Mesh(parallel or ParallelConfig(), model_config.experts, config.device)
        batches = TrainBatches(data, config.batch_size, context, config.seed, mesh.data.index, mesh.data.size)
        distiller = None
        if teacher:
            from moelab.training.distill import Distiller

            distiller = Distiller.load(teacher, config, data, context, mesh)
        trainer = Trainer(model_config, config, batches, context, mesh, distiller, branch)
        training = Training(trainer, data, run_dir, start, on_progress)
    with training:
        training.run(until, should_stop)
        return {} if until is not None else training.result()


def _check(model_config: ModelConfig, config: TrainConfig, data: TokenData, context: int) -> None:
    """Raise ValueError, one line, where model, data, training and this machine do not fit each other."""
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


class Training:
    """Go through the steps of one run with a trainer, its checkpoints and its metrics, on one rank.

    It is a context manager, which closes the files.

    Attributes:
        step, seconds: steps done, and the seconds that they took, in all sessions.
        window: the running sums since the last metric row.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: TokenData,
        run_dir: Path,
        start: Checkpoint | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        """Restore the newest checkpoint; arguments and errors as for `train`."""
        self.trainer, self.config, self.context = trainer, trainer.config, trainer.context
        self.data, self.on_progress = data, on_progress
        self.checkpoints = Checkpointer(run_dir, trainer, data)
        self.step, self.window, self.seconds = self.checkpoints.restore(start)
        self._row_step, self._row_seconds = self.step, self.seconds  # at the last metric row, or at the resume
        self.metrics = None
        if trainer.mesh.rank == 0:
            last = self.checkpoints.last  # a trunk's metrics are not this run's
            recorded = last.state.get("metrics") if last else None
            self.metrics = Metrics(run_dir, self.step if last else -1, self.config.tensorboard, recorded)
        self._held = contextlib.ExitStack()

    @property
    def tokens(self) -> int:
        """Return the tokens seen until now, over all ranks."""
        return self.step * self.config.batch_size * self.context

    def run(self, until: int | None = None, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Train to the last step or to `until`, with metric rows, validations and checkpoints where they are due."""
        steps, config = self.trainer.steps, self.config
        end = min(until or steps, steps)
        if self.checkpoints.last is None:
            self._write_validation()
        while self.step < end:
            done = self._run_step(should_stop)
            last = self.step == steps
            if self.step % config.log_every == 0 or last:
                self._write_row(done)
            if self.step % config.eval_every == 0 or last:
                self._write_validation()
            if done.stop or self.step == end or self.checkpoints.due(self.step):
                self._save()
            if done.stop and self.step < end:
                self.checkpoints.wait()  # raises an OSError before the message says that the checkpoint is written
                raise TrainingStopped(
                    f"stopped at step {self.step} of {steps}; the checkpoint is written, run again to go on"
                )

    def _run_step(self, should_stop: Callable[[], bool]) -> StepDone:
        """Run one optimizer step."""
        started = time.perf_counter()
        done = self.trainer.step(self.step, self.window, should_stop)
        if not done.applied:
            what, value = ("gradient norm", done.grad_norm) if math.isfinite(done.loss) else ("loss", done.loss)
            raise self._diverged(what, value, self.step + 1)
        process.beat()
        self.step += 1
        self.seconds += time.perf_counter() - started
        return done

    def _write_row(self, done: StepDone) -> None:
        """Write the metric row of the steps since the last one."""
        tokens = (self.step - self._row_step) * self.config.batch_size * self.context
        speed = tokens / (self.seconds - self._row_seconds)
        if self.metrics is not None:
            row = {"step": self.step, "tokens": self.tokens, "lr": done.lr}
            row |= self.window.row(self.trainer.expert_ranks) | done.router_entropy
            self.metrics.write(TRAIN, {**row, "tokens_per_s": speed, "time_s": self.seconds})
            self.on_progress(Progress(self.step, self.trainer.steps, row["loss"], speed))
        self.window, self._row_step, self._row_seconds = Window(), self.step, self.seconds

    def _write_validation(self) -> None:
        """Write the row of a validation on as many tokens as the configuration says."""
        scores = self._validate(self.config.eval_tokens)
        if self.metrics is not None:
            row = {"step": self.step, "tokens": self.tokens, "time_s": self.seconds, **scores}
            self.metrics.write(VALIDATION, row)

    def _validate(self, max_tokens: int) -> dict[str, Any]:
        """Return `evaluate`'s scores, on at most `max_tokens` tokens of each domain."""
        trainer = self.trainer
        scores = evaluate(
            trainer.model.module, self.data, self.config, self.context, max_tokens=max_tokens, mesh=trainer.mesh
        )
        if not math.isfinite(scores["loss"]):
            raise self._diverged("validation loss", scores["loss"], self.step)
        return scores

    def _save(self) -> None:
        """Write a checkpoint of this step."""
        if not self.checkpoints.finite():
            raise self._diverged("a weight or moment", math.nan, self.step)
        metrics = self.metrics.state() if self.metrics else None  # on disk before the checkpoint
        self.checkpoints.save(self.step, self.window, self.seconds, metrics)

    def _diverged(self, what: str, value: float, step: int) -> TrainingDiverged:
        """Return the error that names what is not finite, the step, and the last good checkpoint."""
        good = self.checkpoints.newest()
        where = f"the last good checkpoint is {good.path}" if good else "no checkpoint was written before"
        return TrainingDiverged(f"{what} is {value} at step {step}; {where}")

    def result(self) -> dict[str, Any]:
        """Return the result of the finished training as JSON values, after the last validation."""
        final, model = self._validate(_LAST_VALIDATION), self.trainer.model_config
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "validation_loss": final["loss"],
            "bits_per_byte": final["bits_per_byte"],
            "validation_by_domain": final["by_domain"],
            "validation_by_pair": final["by_pair"],
            "validation_tokens": final["validation_tokens"],
            "unigram_loss": self.data.unigram_loss,
            "parameters": model.parameters(),
            "active_parameters": model.active_parameters(),
            "flops_per_token": model.flops_per_token(context=self.context),
            "seconds": self.seconds,
            "data_fingerprint": self.data.fingerprint,
        }

    def __enter__(self) -> Training:
        self._held.enter_context(self.checkpoints)
        if self.metrics is not None:
            self._held.enter_context(contextlib.closing(self.metrics))
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)
