"""Describe how a student learns from a teacher: `DistillConfig` (Mixture-of-Students, paper section 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from moelab.config._check import check_choices

Schedule = Literal["off", "constant", "stop", "linear", "cosine"]


@dataclass(frozen=True)
class DistillConfig:
    """Describe the distillation term of a training loss: ``weight(t) * temperature^2 * KL(teacher || student)``.

    Attributes:
        temperature: divisor of both models' logits.
        weight: weight of the term while the schedule does not lower it (the released code's beta; the paper's alpha).
        schedule: "off"; "constant" to the end; "stop" at `stop` (the paper's staged distillation); "linear" or "cosine"
            decay from the full weight at `start` to 0 at `stop`.
        unit: unit of `start` and `stop`: optimizer "steps" or training "tokens".
        start, stop: see `schedule`; a step is placed by its beginning. 0 where the schedule does not use them.
        top_k, cache_bytes: above 0 in specs of earlier versions, in which students could learn from the teacher's K
            likeliest tokens, and these be kept on disk; new runs refuse them.
    """

    temperature: float = 1.0
    weight: float = 1.0
    schedule: Schedule = "constant"
    unit: Literal["steps", "tokens"] = "tokens"
    start: int = 0
    stop: int = 0
    top_k: int = 0
    cache_bytes: int = field(default=0, metadata={"identity": False})

    def __post_init__(self) -> None:
        def check(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"distill: {message}")

        check(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
        check(self.weight >= 0, f"weight must not be negative, got {self.weight}")
        check_choices(self, "distill")
        decays = self.schedule in ("linear", "cosine")
        if decays:
            check(0 <= self.start < self.stop, f"start must be before stop, got {self.start} and {self.stop}")
        elif self.schedule == "stop":
            check(self.stop > 0, f"schedule 'stop' needs a stop above 0, got {self.stop}")
        check(decays or not self.start, f"start belongs to 'linear' and 'cosine', schedule is {self.schedule!r}")
        check(
            decays or self.schedule == "stop" or not self.stop,
            f"stop belongs to 'stop', 'linear' and 'cosine', schedule is {self.schedule!r}",
        )

    def weight_at(self, step: int, tokens: int) -> float:
        """Return the term's weight in a step that begins after `step` steps and `tokens` tokens."""
        at = step if self.unit == "steps" else tokens
        if self.schedule == "off":
            return 0.0
        if self.schedule == "constant" or at < self.start:
            return self.weight
        if at >= self.stop:
            return 0.0
        if self.schedule == "stop":
            return self.weight
        left = (self.stop - at) / (self.stop - self.start)
        return self.weight * (left if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))
