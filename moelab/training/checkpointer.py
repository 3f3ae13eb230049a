"""Find, restore and write the checkpoints of one run.

A checkpoint holds weights, optimizer state, the running sums of the metrics and the lengths and SHA-256 of the metric
files; `moelab.engine.checkpoint` describes its files.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from moelab.data.tokens import TokenData
from moelab.engine import checkpoint
from moelab.engine.launch import process
from moelab.training.metrics import Window, missing_rows
from moelab.training.trainer import Trainer


class Checkpointer:
    """Hold the checkpoints of the run in one directory, for the trainer of one rank; every rank has one.

    It is a context manager, which waits for the last write.

    Attributes:
        last: the newest complete checkpoint when the training starts; None without one.
    """

    def __init__(self, run_dir: Path, trainer: Trainer, data: TokenData) -> None:
        """Look for the newest checkpoint.

        Raises:
            ValueError: the metrics before every checkpoint are damaged.
        """
        config, context = trainer.config, trainer.context
        self.run_dir, self.trainer, self.fingerprint = run_dir, trainer, data.fingerprint
        self._folder, self._every = run_dir / "checkpoints", config.checkpoint_every
        self._always = {config.step_at(tokens, context, "train: keep_at") for tokens in config.keep_at}
        self._writer = checkpoint.Writer(self._folder, always=self._always)
        try:
            self.last = checkpoint.latest(self._folder, lambda state: missing_rows(run_dir, state.get("metrics")))
        except checkpoint.Refused as error:
            raise ValueError(
                f"train: no checkpoint with whole metrics: {error}; remove {run_dir} to train again"
            ) from None

    def restore(self, start: checkpoint.Checkpoint | None = None) -> tuple[int, Window, float]:
        """Load the newest checkpoint, or without one `start`; return its steps, running sums and seconds of training.

        Args:
            start: another run's checkpoint. Where the model has more experts, they are copies (`Branch.upcycle`).

        Raises:
            ValueError: the checkpoint belongs to other data.
        """
        if (source := self.last or start) is None:
            return 0, Window(), 0.0
        if source.state["data"] != self.fingerprint:
            remedy = f"; remove {self.run_dir} to start again" if self.last else ""
            raise ValueError(f"train: {source.path} was written with other data{remedy}")
        trainer, model = self.trainer, self.trainer.model
        checkpoint.load(
            source,
            model.module,
            trainer.optimizer,
            model.placements,
            upcycle=None if self.last else trainer.branch.upcycle,
            seed=trainer.config.seed,
            scores=trainer.model_config.routing.scores,
        )
        window = Window(**source.state["window"])
        if self.last is None and not window.fits(trainer.model_config, source.step % trainer.config.log_every):
            window = Window()
        return source.step, window, source.state["seconds"]

    def due(self, step: int) -> bool:
        """Return whether the configuration asks for a checkpoint after this step."""
        return step in self._always or bool(self._every and step % self._every == 0)

    def finite(self) -> bool:
        """Return whether all weights and moments are finite; the loss does not show an expert without tokens."""
        return checkpoint.finite(self.trainer.model.module, self.trainer.optimizer)

    def save(self, step: int, window: Window, seconds: float, metrics: dict[str, dict[str, Any]] | None) -> None:
        """Write a checkpoint in the background (`moelab.engine.checkpoint.Writer.save`).

        Args:
            seconds: of training until now.
            metrics: `Metrics.state`, whose rows are on the disk; None on other ranks than the first.
        """
        state = {"window": asdict(window), "seconds": seconds, "data": self.fingerprint, "metrics": metrics}
        model = self.trainer.model
        self._writer.save(step, model.module, self.trainer.optimizer, state, model.placements)

    def wait(self) -> None:
        """Wait until the checkpoint is on the disk; OSError where it could not be written."""
        self._writer.wait()

    def newest(self) -> checkpoint.Checkpoint | None:
        """Wait for the write under way, and return the newest complete checkpoint."""
        self.wait()
        with process.unwatched():  # it reads whole checkpoints
            return checkpoint.latest(self._folder)

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)
