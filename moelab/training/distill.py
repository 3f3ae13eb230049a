"""Distil a finished run, the teacher, into another one, the student (Mixture-of-Students, paper section 4.2).

    loss = cross-entropy + routing losses + weight(t) * T^2 * KL(teacher || student)

The KL divergence is computed at temperature T, summed over the vocabulary and averaged over tokens, as in the released
code (`moelab.paper.training_settings`: kd_beta, kd_temperature). While the weight is above zero, the teacher runs on
the student's micro-batches, in evaluation mode and without gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from moelab.config import ModelConfig, TrainConfig
from moelab.config.distill import DistillConfig
from moelab.data.tokens import TokenData
from moelab.engine import checkpoint
from moelab.engine import parallel as engine
from moelab.engine.mesh import Mesh
from moelab.kernels.head import SoftTargets
from moelab.training.precision import autocast


@dataclass(frozen=True)
class Teacher:
    """Describe the teacher and the distillation for `train`.

    Attributes:
        model: the teacher's architecture; it must have the student's vocabulary.
        run_dir: the teacher's finished run; the checkpoint of its last step is loaded.
        distill: temperature, weight, schedule.
    """

    model: ModelConfig
    run_dir: Path
    distill: DistillConfig


class Distiller:
    """Run a teacher on one rank: it gives each micro-batch soft targets."""

    def __init__(self, model: nn.Module, distill: DistillConfig, config: TrainConfig, context: int) -> None:
        """Take a teacher, which is frozen, and the student's training and context."""
        self.model, self.distill = model.eval().requires_grad_(False), distill
        self.config, self.context = config, context

    @classmethod
    def load(cls, teacher: Teacher, config: TrainConfig, data: TokenData, context: int, mesh: Mesh) -> Self:
        """Return the distiller of a finished run.

        Args:
            config, data: the student's training and corpus.
            mesh: the student's ranks; the teacher is distributed by the same layout.

        Raises:
            ValueError: the teacher has no checkpoint of its last step, or was trained on other text (another part of it
                is allowed); or the distillation has settings of earlier versions.
        """
        if teacher.distill.top_k or teacher.distill.cache_bytes:
            raise ValueError("distill: top_k and cache_bytes are settings of earlier versions; leave them out")
        last = checkpoint.weights_of(teacher.run_dir)
        if not data.shares_text(last.state["data"]):
            raise ValueError(f"distill: the teacher of {teacher.run_dir} was trained on other text than the student's")
        own = Mesh(mesh.config, teacher.model.experts, config.device, mesh.groups)
        built = engine.build(teacher.model, None, own)
        checkpoint.load_model(last, built.module, built.placements)
        return cls(built.module, teacher.distill, config, context)

    def targets(self, tokens_BT: Tensor, step: int) -> SoftTargets | None:
        """Return what the teacher says of a micro-batch, weighted for a step; None while the weight is 0.

        `step` is the number of steps before this one.
        """
        weight = self.distill.weight_at(step, step * self.config.batch_size * self.context)
        if weight == 0.0:
            return None
        t = self.distill.temperature
        with torch.no_grad(), autocast(self.config):
            return SoftTargets(self.model(tokens_BT).logits_BTV.flatten(0, 1), t, weight * t**2)
