"""A run's spec: everything that decides its numbers, frozen, with an id that is a hash of it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from moelab.config import DataConfig, ModelConfig, TrainConfig, UpcycleConfig, digest, from_json, to_json
from moelab.config.distill import DistillConfig
from moelab.config.parallel import ParallelConfig

# Raised when the same spec would give other numbers than before (a changed initialisation, say): all ids change.
GENERATION = 1


@dataclass(frozen=True)
class Start:
    """Where a run starts that goes on from another one, its *trunk*, instead of from initial weights.

    Attributes:
        run: the trunk. Weights and optimizer state are those of its checkpoint.
        tokens: of the trunk's training, after which the branch begins; whole steps.
        warmup_tokens: the branch's learning rate rises linearly from zero to its schedule's over so many tokens of its
            own. 0 means that it is its schedule's from the first step on.
        upcycle: how experts that the trunk does not have begin as copies.
    """

    run: RunSpec
    tokens: int
    warmup_tokens: int = 0
    upcycle: UpcycleConfig = field(default=UpcycleConfig())


@dataclass(frozen=True)
class RunSpec:
    """One training. Two equal specs are one run.

    Attributes:
        model, train, data: the three configurations.
        parallel: the ranks it runs on. Not part of the identity: every layout gives the same numbers up to the order of
            sums, and a run may go on with another one. Provenance says which it was.
        teacher: a training whose final model teaches this one; `Lab.run` trains it first.
        distill: how it teaches; given exactly when there is a teacher.
        start: the run, and the point of it, from which this one goes on with its own schedule, model or teacher. Steps
            and tokens are counted from the trunk's first, so `train.tokens` includes the trunk's.
        label: how figures and tables call this arm; not part of the identity.
    """

    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default=ParallelConfig(), compare=False, metadata={"identity": False})
    teacher: RunSpec | None = None
    distill: DistillConfig | None = None
    start: Start | None = None
    label: str = field(default="", compare=False, metadata={"identity": False})

    def __post_init__(self) -> None:
        self.train.steps(self.data.context)  # at least one, or ValueError
        if self.data.context > self.model.context:
            raise ValueError(
                f"spec: sequences of {self.data.context} tokens are longer than the context of {self.model} "
                f"({self.model.context}); set data.context and model.context together"
            )
        if self.train.eval_tokens < self.data.context:
            raise ValueError(
                f"spec: train.eval_tokens {self.train.eval_tokens} must be at least data.context, {self.data.context}"
            )
        for tokens in self.train.keep_at:
            self.train.step_at(tokens, self.data.context, "spec: train.keep_at")
        self.train.check_layout(self.model, self.parallel)
        self._check_teacher()
        if self.start is not None:
            self._check_start(self.start.run, self.start.tokens)
            self._check_copies(self.start)

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
        try:
            self.teacher.model.check_layout(self.parallel)
        except ValueError as error:
            raise ValueError(
                f"spec: the teacher runs in the student's layout, which does not fit it: {error}"
            ) from None
        learned = self.teacher.model.decoder.positions == "learned"  # those behind the training's are random
        longest = self.teacher.data.context if learned else self.teacher.model.context
        if self.data.context > longest:
            raise ValueError(
                f"spec: sequences of {self.data.context} tokens are longer than the teacher's context of {longest}"
            )

    def _check_start(self, trunk: RunSpec, tokens: int) -> None:
        if trunk.data != self.data:
            raise ValueError("spec: a branch goes on with the trunk's data, but data differ")
        for what in ("batch_size", "micro_batch", "seed"):
            self._check_same(what, trunk, "its steps go on with the trunk's batches and draws")
        for what in ("threads", "dtype", "device", "compile"):
            self._check_same(what, trunk, "its numbers before the start are the trunk's")
        self.train.step_at(tokens, self.data.context, "spec: start.tokens")
        first = trunk.start.tokens if trunk.start else 0
        last = trunk.train.steps(trunk.data.context) * trunk.train.batch_size * trunk.data.context
        if not first < tokens <= last:
            raise ValueError(
                f"spec: start.tokens must be above {first} and at most {last}, the tokens of {trunk.id}, got {tokens}"
            )
        if self.first_step >= self.train.steps(self.data.context):
            raise ValueError(f"spec: start.tokens {tokens} leave nothing of {self.train.tokens} tokens to train")
        theirs = trunk.train
        decays = theirs.tokens - theirs.cooldown_tokens if theirs.cooldown_tokens else theirs.warmup_tokens
        if tokens > decays and self._schedule != trunk._schedule:
            raise ValueError(
                f"spec: start.tokens {tokens} are in the decay of {trunk.id}, which begins at {decays}; a branch "
                "with another schedule starts before (with train.cooldown_tokens the rate stays until the last tokens)"
            )

    def _check_copies(self, start: Start) -> None:
        own = self.own_tokens
        if not 0 <= start.warmup_tokens <= own:
            raise ValueError(
                f"spec: start.warmup_tokens must be between 0 and the branch's own {own} tokens, "
                f"got {start.warmup_tokens}"
            )
        pairs = list(zip(start.run.model.experts, self.model.experts, strict=False))
        if start.upcycle != UpcycleConfig() and not any(more > few for few, more in pairs):
            raise ValueError(
                f"spec: start.upcycle describes copies of experts, but no layer has more of them than in {start.run.id}"
            )
        for few, more in pairs:
            if 0 < few < more and (more % few or not start.upcycle.noise):
                raise ValueError(
                    f"spec: a layer grows from {few} to {more} experts; allowed are multiples of {few}, with "
                    "start.upcycle.noise above 0, because a router never chooses the second of two equal experts"
                )

    def _check_same(self, what: str, trunk: RunSpec, why: str) -> None:
        ours, theirs = getattr(self.train, what), getattr(trunk.train, what)
        if ours != theirs:
            raise ValueError(f"spec: train.{what} of a branch must be the trunk's, got {ours!r} and {theirs!r}: {why}")

    @property
    def _schedule(self) -> tuple[float, ...]:
        """All that the learning rate depends on."""
        t = self.train
        end = t.tokens if t.cooldown_tokens else t.decay_tokens or t.tokens
        return (t.lr, t.min_lr, t.warmup_tokens, t.cooldown_tokens, end)

    @property
    def first_step(self) -> int:
        """Steps done before this run's own first one: 0, or the trunk's where it starts."""
        return self.start.tokens // (self.train.batch_size * self.data.context) if self.start else 0

    @property
    def own_tokens(self) -> int:
        """Tokens that this run itself trains on."""
        return self.train.tokens - (self.start.tokens if self.start else 0)

    def requires(self) -> list[RunSpec]:
        """Return the runs that must be finished before this one starts, each after those that it requires itself.

        They are the teacher, and the trunk with the checkpoint to be kept.
        """
        needed = [self.teacher] if self.teacher else []
        if self.start is not None:
            needed.append(self.start.run.with_checkpoints((self.start.tokens,)))
        return list(closure(needed).values())

    @property
    def depth(self) -> int:
        """0 for a run that requires no other, else one more than the greatest depth of those that it requires."""
        return 1 + max((spec.depth for spec in self.requires()), default=-1)

    def with_checkpoints(self, tokens: Iterable[int]) -> RunSpec:
        """Return the same run, which also keeps its checkpoints after these numbers of tokens."""
        keep = tuple(sorted({*self.train.keep_at, *tokens}))
        return self if keep == self.train.keep_at else replace(self, train=replace(self.train, keep_at=keep))

    @functools.cached_property
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
        """Training FLOPs of its own tokens, with a teacher's forward passes, for estimates of the time left."""
        return self._cost_of(self.train.tokens - self.own_tokens, self.train.tokens)

    @property
    def total_cost(self) -> float:
        """Training FLOPs of all its tokens: its own, and those of its trunk before it begins."""
        return self._cost_until(self.train.tokens)

    def _cost_until(self, tokens: int) -> float:
        begin, before = (self.start.tokens, self.start.run._cost_until(self.start.tokens)) if self.start else (0, 0.0)
        return before + self._cost_of(begin, tokens)

    def _cost_of(self, begin: int, end: int) -> float:
        context, distill = self.data.context, self.distill
        cost = self.model.flops_per_token(context=context) * (end - begin)
        if self.teacher is not None and distill is not None and distill.schedule != "off":
            unit = self.train.batch_size * context if distill.unit == "steps" else 1
            taught = end if distill.schedule == "constant" else min(end, distill.stop * unit)
            cost += self.teacher.model.flops_per_token(training=False, context=context) * max(0, taught - begin)
        return cost

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: Any, where: str = "spec", *, known: bool = False) -> Self:
        """Return the spec that `to_json` wrote; `known` and the ValueError are those of `moelab.config.from_json`."""
        return from_json(cls, data, where, known=known)


def closure(specs: Sequence[RunSpec]) -> dict[str, RunSpec]:
    """Return run id -> spec of these runs and all that they require, required ones first.

    Where a run is asked for and required by another, layout and label are those of the one asked for, first. It keeps
    all checkpoints that any of them needs.

    Raises:
        ValueError: one line: what was given is no list of specs.
    """
    odd: list[Any] = (
        [spec for spec in specs if not isinstance(spec, RunSpec)] if isinstance(specs, Sequence) else [specs]
    )
    if odd:
        raise ValueError(f"runs: expected a list of specs, got {type(odd[0]).__name__}")
    asked = {spec.id: spec for spec in reversed(specs)}
    runs: dict[str, RunSpec] = {}
    for needed in (run for spec in specs for run in (*spec.requires(), spec)):
        before = runs.get(needed.id, needed)
        runs[needed.id] = asked.get(needed.id, before).with_checkpoints((*before.train.keep_at, *needed.train.keep_at))
    return runs
