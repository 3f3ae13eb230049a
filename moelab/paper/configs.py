"""Turn the settings of the paper's training scripts into configurations.

What differs from the scripts: bf16 instead of fp16 with loss scaling; the dense models' batch does not ramp up; FSDP
instead of tensor slicing for the dense 1.3B and 6.7B (one degree less; it computes the same); 64 GPUs for the 1.3B
student, too, whose script has 128.
"""

from __future__ import annotations

from typing import Any

from moelab.config import ModelConfig, ParallelConfig, RoutingConfig, TrainConfig
from moelab.paper._table import unknown
from moelab.paper.training import TrainingSettings, all_training_settings, training_settings

GPUS = 64
"""GPUs of the paper's training scripts, but for that of the 1.3B student."""


def settings_for(name: str, run: str | None = None) -> TrainingSettings:
    """Return the training settings that apply to a model.

    Args:
        name: of the model, such as ``350M+MoE-128``, whose case and spaces do not matter, or of a run.
        run: whose settings apply; by default the model's own, or those of 350M+MoE-128 on its base if it has none.

    Raises:
        ValueError: one line: there are no settings of the run, or none on the model's base.
    """
    known = [row.run for row in all_training_settings()]
    name = name if name in known else str(ModelConfig.parse(name))  # +KD and +MoS are runs, not models
    base = name.split("+")[0]
    used = name if name in known else f"{base}+MoE-128" if "MoE" in name else base
    if not run and used not in known:
        raise unknown("training settings of", name, known)
    return training_settings(run or used)


def published_configs(name: str, run: str | None = None) -> tuple[ModelConfig, TrainConfig, ParallelConfig]:
    """Return model, training and layout of a model at its own size, with the settings of the paper's scripts.

    `name` and `run`: see `settings_for`.
    """
    name = str(ModelConfig.parse(name))
    s, base = settings_for(name, run), name.split("+")[0]
    gate: dict[str, Any] = {}
    if s.capacity_factor_train is not None:  # an MoE's, whose settings of the gate are all there
        gate = {
            "capacity_factor": s.capacity_factor_train,
            "capacity_factor_eval": s.capacity_factor_eval,
            "min_capacity": s.min_capacity,
            "drop_tokens": s.drop_tokens,
            "random_token_selection": s.random_token_selection,
            "aux_loss": s.aux_coefficient,
            "choice_noise": "gumbel_second" if "Top2" in name else "none",
        }
    model = ModelConfig.parse(name, init_std=s.init_std, dropout=s.dropout, routing=RoutingConfig(**gate))
    step = s.batch_seqs * s.seq_len
    train = TrainConfig(
        tokens=s.train_tokens,
        batch_size=s.batch_seqs,
        micro_batch=s.micro_batch_seqs,
        lr=s.lr,
        min_lr=s.min_lr,
        warmup_tokens=s.warmup_tokens,
        decay_tokens=s.decay_tokens,
        betas=(s.adam_beta1, s.adam_beta2),
        weight_decay=s.weight_decay,
        clip=s.grad_clip,
        dtype="bf16",
        device="cuda",
        eval_every=max(1, 1_000_000_000 // step),
        eval_tokens=1_000_000,
        checkpoint_every=2_000,
        log_every=200,
    )
    layout = ParallelConfig(data=GPUS, shard=not model.is_moe and base != "350M", recompute=s.activation_checkpointing)
    return model, train, layout
