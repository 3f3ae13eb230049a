"""A run's spec: everything that decides its numbers, frozen, with an id that is a hash of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Self

from moelab.config import DataConfig, ModelConfig, TrainConfig, digest, from_json, to_json
from moelab.config.distill import DistillConfig
from moelab.config.parallel import ParallelConfig

# Raised when the same spec would give other numbers than before (a changed initialisation, say): all ids change.
GENERATION = 1


@dataclass(frozen=True)
class RunSpec:
    """One training. Two equal specs are one run.

    Attributes:
        model, train, data: the three configurations.
        parallel: the ranks it runs on. Not part of the identity: every layout gives the same numbers up to the order of
            sums, and a run may go on with another one. Provenance says which it was.
        teacher: a training whose final model teaches this one; `Lab.run` trains it first.
        distill: how it teaches; given exactly when there is a teacher.
        label: how figures and tables call this arm; not part of the identity.
    """

    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default=ParallelConfig(), compare=False, metadata={"identity": False})
    teacher: RunSpec | None = None
    distill: DistillConfig | None = None
    label: str = field(default="", compare=False, metadata={"identity": False})

    def __post_init__(self) -> None:
        self.train.steps(self.data.context)  # at least one, or ValueError
        if self.data.context > self.model.context:
            raise ValueError(
                f"spec: sequences of {self.data.context} tokens are longer than the context of {self.model} "
                f"({self.model.context})"
            )
        self._check_parallel()
        self._check_teacher()

    def _check_parallel(self) -> None:
        parallel, train = self.parallel, self.train
        parallel.check(self.model.experts, heads=self.model.heads, ffn=self.model.ffn)
        micro_batches = train.batch_size // (train.micro_batch or train.batch_size)
        if micro_batches % parallel.data:
            raise ValueError(
                f"spec: {micro_batches} micro-batches a step (batch_size {train.batch_size}, micro_batch "
                f"{train.micro_batch or train.batch_size}) do not spread over {parallel.data} data ranks; "
                f"choose a micro_batch that divides {train.batch_size // math.gcd(train.batch_size, parallel.data)}"
            )
        if parallel.tensor > 1 and self.model.dropout:
            raise ValueError("spec: dropout with tensor slicing is not supported, its masks would depend on the layout")
        if self.model.routing.aux_scope == "step" and micro_batches != parallel.data:
            raise ValueError(
                f"spec: aux_scope 'step' needs one micro-batch per data rank, got {micro_batches} on "
                f"{parallel.data} data ranks"
            )

    def _check_teacher(self) -> None:
        if (self.teacher is None) != (self.distill is None):
            there, missing = ("teacher", "distill") if self.teacher else ("distill", "teacher")
            raise ValueError(f"spec: {there} is given without {missing}; a student needs both")
        if self.teacher is None:
            return
        for what in ("corpus", "tokenizer", "max_bytes", "max_documents", "text_field"):
            ours, theirs = getattr(self.data, what), getattr(self.teacher.data, what)
            if ours != theirs:
                raise ValueError(f"spec: student and teacher must share their text, {what} is {ours!r} and {theirs!r}")
        if self.model.vocab != self.teacher.model.vocab:
            raise ValueError(
                f"spec: student and teacher must share their vocabulary, it has {self.model.vocab} and "
                f"{self.teacher.model.vocab} entries"
            )
        if self.data.context > self.teacher.model.context:
            raise ValueError(
                f"spec: sequences of {self.data.context} tokens are longer than the teacher's context of "
                f"{self.teacher.model.context}"
            )

    def requires(self) -> list[RunSpec]:
        """Return the runs that must be finished before this one starts, in order: teachers of the teacher, teacher."""
        return [*self.teacher.requires(), self.teacher] if self.teacher else []

    @property
    def id(self) -> str:
        """Directory-safe name: the model's name and the seed for people, the hash for truth."""
        slug = re.sub(r"[^a-z0-9.]+", "-", str(self.model.name or "gpt").lower()).strip("-")
        return f"{slug}-s{self.train.seed}-{digest((GENERATION, self))}"

    @property
    def title(self) -> str:
        """The label, else the model's name."""
        return self.label or str(self.model)

    @property
    def cost(self) -> float:
        """Training FLOPs, with the forward passes of a student's teacher, for estimates of the time left."""
        context = self.data.context
        a_token = self.model.flops_per_token(context=context)
        if self.teacher is not None and self.distill is not None and self.distill.schedule != "off":
            a_token += self.teacher.model.flops_per_token(training=False, context=context)
        return a_token * self.train.tokens

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: Any, where: str = "spec") -> Self:
        """Return the spec that `to_json` wrote; a one-line ValueError for unknown fields or wrong types."""
        return from_json(cls, data, where)
