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
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from moelab.config import ModelConfig, TrainConfig, digest
from moelab.config.distill import DistillConfig
from moelab.data import TokenData
from moelab.engine import checkpoint
from moelab.engine import parallel as engine
from moelab.engine.mesh import Mesh
from moelab.files import write_bytes
from moelab.models.loss import LogitsLoss

log = logging.getLogger(__name__)


class Likeliest(NamedTuple):
    """Hold a teacher's K likeliest next tokens.

    Attributes:
        log_p_BTK: log probabilities at the distillation's temperature, fp32.
        token_BTK: token ids, int32.
    """

    log_p_BTK: Tensor
    token_BTK: Tensor


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


def likeliest(teacher_BTV: Tensor, k: int, temperature: float) -> Likeliest:
    """Return the teacher's `k` likeliest tokens, or all if the vocabulary is smaller."""
    logs_BTV = F.log_softmax(teacher_BTV.float() / temperature, dim=-1)
    top = logs_BTV.topk(min(k, logs_BTV.shape[-1]), dim=-1)
    return Likeliest(top.values, top.indices.int())


def divergence_of_likeliest(
    log_p_NK: Tensor, token_NK: Tensor, student_NV: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the KL divergence over K + 1 outcomes: the teacher's K likeliest tokens and "any other token".

    It is at most `divergence`, whose form it has, and equal to it if K is the size of the vocabulary.
    """
    with torch.enable_grad():
        student_NV = student_NV.detach().requires_grad_()
        log_q_NV = F.log_softmax(_cooled(student_NV, temperature), -1)
        log_q_NK = log_q_NV.gather(-1, token_NK.long())
        p_NK = log_p_NK.exp()
        named_N = (p_NK * (log_p_NK - log_q_NK)).sum(-1)
        # The rest is 1 minus a sum near 1: values below 1e-6 are rounding errors.
        p_rest_N = (1 - p_NK.sum(-1)).clamp(min=1e-6)
        q_rest_N = (1 - log_q_NK.exp().sum(-1)).clamp(min=1e-6)
        total = (named_N + p_rest_N * (p_rest_N.log() - q_rest_N.log())).sum()
        (gradient_NV,) = torch.autograd.grad(total, student_NV)
    return total.detach(), gradient_NV


@dataclass(frozen=True)
class Teacher:
    """Describe the teacher and the distillation for `train`.

    Attributes:
        model: the teacher's architecture; it must have the student's vocabulary.
        run_dir: the teacher's finished run; the checkpoint of its last step is loaded.
        distill: temperature, weight, schedule, cache.
    """

    model: ModelConfig
    run_dir: Path
    distill: DistillConfig


class Distiller:
    """Run a teacher on one rank, and compute the loss that it adds to each micro-batch."""

    def __init__(
        self,
        model: nn.Module,
        distill: DistillConfig,
        config: TrainConfig,
        context: int,
        cache: LogitCache | None = None,
    ) -> None:
        """Take a teacher.

        Args:
            model: the teacher; it is frozen.
            config: the student's training.
            cache: where its logits are kept.
        """
        self.model, self.distill = model.eval().requires_grad_(False), distill
        self.config, self.context, self.cache = config, context, cache

    @classmethod
    def load(cls, teacher: Teacher, config: TrainConfig, data: TokenData, context: int, mesh: Mesh) -> Self:
        """Return the distiller of a finished run.

        Args:
            config, data: the student's training and corpus.
            mesh: the student's ranks; the teacher is distributed by the same layout.

        Raises:
            ValueError: the teacher has no checkpoint of its last step, or was trained on other text (another part of it
                is allowed).
        """
        last = checkpoint.weights_of(teacher.run_dir)
        if not data.shares_text(last.state["data"]):
            raise ValueError(f"distill: the teacher of {teacher.run_dir} was trained on other text than the student's")
        own = Mesh(mesh.config, teacher.model.experts, config.device, mesh.groups)
        built = engine.build(teacher.model, config.seed, own)
        checkpoint.load_model(last, built.module, built.placements)
        cache = None
        # Only on one rank: a rank that read its logits from disk would be missing in the others' exchange of tokens.
        if teacher.distill.cache_bytes and mesh.world.size == 1:
            batches = (data.fingerprint, config.seed, config.batch_size, config.micro_batch, context)
            key = digest((*batches, teacher.distill.top_k, teacher.distill.temperature, config.dtype))
            cache = LogitCache(teacher.run_dir / "logits" / key, teacher.distill.cache_bytes)
        return cls(built.module, teacher.distill, config, context, cache)

    def loss(self, tokens_BT: Tensor, step: int, part: int) -> LogitsLoss | None:
        """Return what computes a micro-batch's distillation loss, weight * T^2 * KL in nats, from the student's logits.

        None while the weight is 0.

        Args:
            step: number of steps before this one.
            part: number of the micro-batch in the step, over all ranks.
        """
        weight = self.distill.weight_at(step, step * self.config.batch_size * self.context)
        if weight == 0.0:
            return None
        t = self.distill.temperature
        if self.distill.top_k:
            log_p_NK, token_NK = (x.flatten(0, 1) for x in self._likeliest(tokens_BT, step, part))
        else:
            teacher_NV = self._forward(tokens_BT).flatten(0, 1)

        def logits_loss(student_NV: Tensor, first: int, past: int) -> tuple[Tensor, Tensor]:
            if self.distill.top_k:
                kl, gradient_NV = divergence_of_likeliest(log_p_NK[first:past], token_NK[first:past], student_NV, t)
            else:
                kl, gradient_NV = divergence(teacher_NV[first:past], student_NV, t)
            scale = weight * t**2
            return kl * scale, gradient_NV if scale == 1.0 else gradient_NV.mul_(scale)

        return logits_loss

    def _likeliest(self, tokens_BT: Tensor, step: int, part: int) -> Likeliest:
        name = f"step-{step:08d}-{part}"
        stored = self.cache.get(name, tokens_BT) if self.cache else None
        if stored is None:
            stored = likeliest(self._forward(tokens_BT), self.distill.top_k, self.distill.temperature)
            if self.cache:
                self.cache.put(name, stored)
        return stored

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
            try:
                write_bytes(self.folder / f"{name}.safetensors", content)
                self.size += len(content)
            except OSError as error:  # a full disk does not end the training
                log.warning("%s: logits are kept no longer (%s)", self.folder, error)
                self.limit = 0
