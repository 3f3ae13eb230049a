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
import torch.nn.functional as F
from torch import Tensor, nn

from moelab.config import ModelConfig, TrainConfig
from moelab.config.distill import DistillConfig
from moelab.data import TokenData
from moelab.engine import checkpoint
from moelab.engine import parallel as engine
from moelab.engine.mesh import Mesh
from moelab.models.loss import LogitsLoss


def divergence(teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) at a temperature, summed over vocabulary and tokens, and its gradient [N, V].

    Nats, fp32, without the factor T^2. The temperature divides both models' logits; the gradient is in the student's.
    """
    log_p_NV = F.log_softmax(_cooled(teacher_NV, temperature), -1)
    log_q_NV = F.log_softmax(_cooled(student_NV, temperature), -1)
    difference_NV = log_p_NV - log_q_NV
    p_NV, q_NV = log_p_NV.exp_(), log_q_NV.exp_()
    total = torch.dot(p_NV.flatten(), difference_NV.flatten())
    gradient_NV = q_NV.sub_(p_NV)
    return total, gradient_NV if temperature == 1.0 else gradient_NV.div_(temperature)


def _cooled(logits_NV: Tensor, temperature: float) -> Tensor:
    logits_NV = logits_NV.float()
    return logits_NV if temperature == 1.0 else logits_NV / temperature


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
    """Run a teacher on one rank, and compute the loss that it adds to each micro-batch."""

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
        built = engine.build(teacher.model, config.seed, own)
        checkpoint.load_model(last, built.module, built.placements)
        return cls(built.module, teacher.distill, config, context)

    def loss(self, tokens_BT: Tensor, step: int) -> LogitsLoss | None:
        """Return what computes a micro-batch's distillation loss, weight * T^2 * KL in nats, from the student's logits.

        None while the weight is 0. `step` is the number of steps before this one.
        """
        weight = self.distill.weight_at(step, step * self.config.batch_size * self.context)
        if weight == 0.0:
            return None
        t = self.distill.temperature
        with torch.no_grad(), torch.autocast(self.config.device, torch.bfloat16, enabled=self.config.dtype == "bf16"):
            teacher_NV = self.model(tokens_BT).logits_BTV.flatten(0, 1)

        def logits_loss(student_NV: Tensor, first: int, past: int) -> tuple[Tensor, Tensor]:
            kl, gradient_NV = divergence(teacher_NV[first:past], student_NV, t)
            scale = weight * t**2
            return kl * scale, gradient_NV if scale == 1.0 else gradient_NV.mul_(scale)

        return logits_loss
