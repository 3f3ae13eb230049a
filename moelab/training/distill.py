"""Distil a finished run, the teacher, into another one, the student (Mixture-of-Students, paper section 4.2).

    loss = cross-entropy + routing losses + weight(t) * T^2 * KL(teacher || student)

The KL divergence is computed at temperature T, summed over the vocabulary and averaged over tokens, as in the released
code (`moelab.paper.training_settings`: kd_beta, kd_temperature). While the weight is above zero, the teacher runs on
the student's micro-batches, in evaluation mode and without gradients.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from moelab.config import ModelConfig, TrainConfig, digest
from moelab.config.distill import DistillConfig
from moelab.data import TokenData
from moelab.engine import checkpoint
from moelab.engine import parallel as engine
from moelab.engine.mesh import Mesh
from moelab.files import write_bytes

log = logging.getLogger(__name__)


class Likeliest(NamedTuple):
    """Hold a teacher's K likeliest next tokens.

    Attributes:
        log_p_BTK: log probabilities at the distillation's temperature, fp32.
        token_BTK: token ids, int32.
    """

    log_p_BTK: Tensor
    token_BTK: Tensor


def divergence(teacher_BTV: Tensor, student_BTV: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) in nats at a temperature, fp32, without the factor T^2.

    It is summed over the vocabulary and averaged over tokens. The temperature divides both models' logits.
    """
    teacher = F.log_softmax(teacher_BTV.float() / temperature, dim=-1).flatten(0, 1)
    student = F.log_softmax(student_BTV.float() / temperature, dim=-1).flatten(0, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def likeliest(teacher_BTV: Tensor, k: int, temperature: float) -> Likeliest:
    """Return the teacher's `k` likeliest tokens, or all if the vocabulary is smaller."""
    logs_BTV = F.log_softmax(teacher_BTV.float() / temperature, dim=-1)
    top = logs_BTV.topk(min(k, logs_BTV.shape[-1]), dim=-1)
    return Likeliest(top.values, top.indices.int())


def divergence_of_likeliest(teacher: Likeliest, student_BTV: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence over K + 1 outcomes: the teacher's K likeliest tokens and "any other token".

    It is at most `divergence`, and equal to it if K is the size of the vocabulary. Nats, fp32, averaged over tokens.
    """
    log_q_BTV = F.log_softmax(student_BTV.float() / temperature, dim=-1)
    log_q_BTK = log_q_BTV.gather(-1, teacher.token_BTK.long())
    p_BTK = teacher.log_p_BTK.exp()
    named_BT = (p_BTK * (teacher.log_p_BTK - log_q_BTK)).sum(-1)
    # The rest is 1 minus a sum near 1: values below 1e-6 are rounding errors.
    p_rest_BT = (1 - p_BTK.sum(-1)).clamp(min=1e-6)
    q_rest_BT = (1 - log_q_BTK.exp().sum(-1)).clamp(min=1e-6)
    return (named_BT + p_rest_BT * (p_rest_BT.log() - q_rest_BT.log())).mean()


@dataclass(frozen=True)
class Teacher:
    """Describe the teacher and the distillation for `train`.

    Attributes:
        model: the teacher's architecture; it must have the student's vocabulary.
        run_dir: the teacher's finished run, whose last checkpoint is loaded.
        distill: temperature, weight, schedule, cache.
    """

    model: ModelConfig
    run_dir: Path
    distill: DistillConfig


class Distiller:
    """Run a teacher on one rank, and compute the loss that it adds to each micro-batch."""

    def __init__(self, teacher: Teacher, config: TrainConfig, data: TokenData, context: int, mesh: Mesh) -> None:
        """Load the teacher.

        Args:
            config, data: the student's training and corpus.
            mesh: the student's ranks; the teacher is distributed by the same layout.

        Raises:
            ValueError: the teacher has no checkpoint, or was trained on other text (another part of it is allowed).
        """
        last = checkpoint.weights_of(teacher.run_dir)
        if not data.shares_text(last.state["data"]):
            raise ValueError(f"distill: the teacher of {teacher.run_dir} was trained on other text than the student's")
        self.config, self.distill, self.context = config, teacher.distill, context
        own = Mesh(mesh.config, teacher.model.experts, config.device)
        built = engine.build(teacher.model, config.seed, own)
        checkpoint.load_model(last, built.module, built.placements)
        self.model = built.module.eval().requires_grad_(False)
        self.cache = None
        # Only on one rank: a rank that read its logits from disk would be missing in the others' exchange of tokens.
        if teacher.distill.cache_bytes and mesh.world.size == 1:
            batches = (data.fingerprint, config.seed, config.batch_size, config.micro_batch, context)
            key = digest((*batches, teacher.distill.top_k, teacher.distill.temperature, config.dtype))
            self.cache = LogitCache(teacher.run_dir / "logits" / key, teacher.distill.cache_bytes)

    def weight(self, step: int) -> float:
        """Return the schedule's weight of the KL divergence in the step after `step` steps."""
        return self.distill.weight_at(step, step * self.config.batch_size * self.context)

    def loss(self, tokens_BT: Tensor, student_BTV: Tensor, step: int, part: int) -> Tensor | float:
        """Return the distillation loss of a micro-batch, weight * T^2 * KL in nats; 0.0 while the weight is 0.

        Args:
            student_BTV: the student's logits.
            step: number of steps before this one.
            part: number of the micro-batch in the step, over all ranks.
        """
        weight = self.weight(step)
        if weight == 0.0:
            return 0.0
        t = self.distill.temperature
        if self.distill.top_k:
            kl = divergence_of_likeliest(self._likeliest(tokens_BT, step, part), student_BTV, t)
        else:
            kl = divergence(self._forward(tokens_BT), student_BTV, t)
        return weight * t**2 * kl

    def _likeliest(self, tokens_BT: Tensor, step: int, part: int) -> Likeliest:
        name = f"step-{step:08d}-{part}"
        found = self.cache.get(name, tokens_BT) if self.cache else None
        if found is None:
            found = likeliest(self._forward(tokens_BT), self.distill.top_k, self.distill.temperature)
            if self.cache:
                self.cache.put(name, found)
        return found

    @torch.no_grad()
    def _forward(self, tokens_BT: Tensor) -> Tensor:
        with torch.autocast(self.config.device, torch.bfloat16, enabled=self.config.dtype == "bf16"):
            return self.model(tokens_BT).logits_BTV


class LogitCache:
    """Store `Likeliest` in a folder, one safetensors file per micro-batch, up to `limit` bytes.

    Several processes may share a folder.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder.is_dir() else 0

    def get(self, name: str, like: Tensor) -> Likeliest | None:
        """Return the value stored under `name`, on the device of `like` [B, T].

        Return None if there is no readable file, or if its shape differs from that of `like`.
        """
        path = self.folder / f"{name}.safetensors"
        try:
            kept = Likeliest(**load_tensors(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (SafetensorError, TypeError) as error:
            log.warning("%s is unreadable (%s); computed again", path, error)
            return None
        if kept.token_BTK.shape[:2] != like.shape:
            return None
        return Likeliest(*(t.to(like.device) for t in kept))

    def put(self, name: str, value: Likeliest) -> None:
        """Store a value under `name`, unless it would exceed the limit."""
        content = save_tensors({key: t.cpu().contiguous() for key, t in value._asdict().items()})
        if self.size + len(content) <= self.limit:
            write_bytes(self.folder / f"{name}.safetensors", content)
            self.size += len(content)
