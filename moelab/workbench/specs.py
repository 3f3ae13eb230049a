"""A run's spec: everything that decides its numbers, frozen, with an id that is a hash of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Self

from moelab.config import DataConfig, ModelConfig, TrainConfig, digest, from_json, to_json

# Raised when the same spec would give other numbers than before (a changed initialisation, say): all ids change.
GENERATION = 1


@dataclass(frozen=True)
class RunSpec:
    """One training. Two equal specs are one run.

    Attributes:
        model, train, data: the three configurations.
        label: how figures and tables call this arm; not part of the identity.
    """

    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    label: str = field(default="", compare=False, metadata={"identity": False})

    def __post_init__(self) -> None:
        self.train.steps(self.data.context)  # at least one, or ValueError
        if self.data.context > self.model.context:
            raise ValueError(
                f"spec: sequences of {self.data.context} tokens are longer than the context of {self.model} ({self.model.context})"
            )

    @property
    def id(self) -> str:
        """Directory-safe name: the model's name and the seed for people, the hash for truth."""
        slug = re.sub(r"[^a-z0-9.]+", "-", str(self.model.name or "gpt").lower()).strip("-")
        return f"{slug}-s{self.train.seed}-{digest((GENERATION, self))}"

    @property
    def title(self) -> str:
        return self.label or str(self.model)

    @property
    def cost(self) -> float:
        """Training FLOPs, for estimates of the time left."""
        return self.model.flops_per_token(context=self.data.context) * self.train.tokens

    def to_json(self) -> dict[str, Any]:
        return to_json(self)

    @classmethod
    def from_json(cls, data: Any, where: str = "spec") -> Self:
        """Raises a one-line ValueError for unknown fields or wrong types."""
        return from_json(cls, data, where)
