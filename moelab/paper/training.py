"""How the paper's models were trained, and how fast."""

from __future__ import annotations

from dataclasses import dataclass

from moelab.paper._table import Provenance, Table, load


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Provenance):
    """The hyper-parameters of one training run.

    run: the model's name, plus `+KD` (distilled throughout) or `+MoS` (staged) for a distilled student. model: the
    architecture. assumed: True when nobody published this run's settings and the row is the recipe of `assumed_from`
    with the architecture, or the distillation, changed; False for the settings of the released scripts.

    Units: batch_seqs and rampup_samples count sequences of seq_len tokens (all GPUs), rampup_start_seqs and
    rampup_step_seqs too, micro_batch_seqs is per GPU, *_tokens are tokens, kd_stop_steps are optimizer steps; steps is
    train_tokens / (batch_seqs * seq_len), the batch taken as constant (see `steps_with_rampup`). The schedule warms up
    linearly, then follows a cosine from lr to min_lr that ends at decay_tokens. aux_coefficient multiplies the sum, not
    the mean, of the layers' load-balancing losses; capacity factors are relative to tokens / experts. kd: `none`,
    `full` or `staged`; the loss then adds kd_beta * kd_temperature^2 * KL(teacher || student). kd_stop_steps is `None`
    where distillation never stops or the step is not published. corpus: `internal` is a blend of 15 sets like that of
    MT-NLG; the scripts' public stand-in is the Pile. What makes no sense for a dense model is `None`.
    """

    run: str
    model: str
    assumed: bool
    assumed_from: str
    batch_seqs: int
    seq_len: int
    micro_batch_seqs: int
    rampup_start_seqs: int | None
    rampup_step_seqs: int | None
    rampup_samples: int | None
    lr: float
    min_lr: float
    warmup_tokens: int
    decay_tokens: int
    train_tokens: int
    steps: int
    aux_coefficient: float | None
    capacity_factor_train: float | None
    capacity_factor_eval: float | None
    min_capacity: int | None
    drop_tokens: bool | None
    random_token_selection: bool | None
    weight_decay: float
    grad_clip: float
    adam_beta1: float
    adam_beta2: float
    init_std: float
    dropout: float
    precision: str
    zero_stage: int
    activation_checkpointing: bool
    corpus: str
    script_gpus: int | None
    script_tp: int
    script_ep: int | None
    kd: str
    kd_beta: float | None
    kd_temperature: float | None
    kd_stop_steps: int | None
    teacher: str

    @property
    def steps_with_rampup(self) -> int:
        """Optimizer steps when the batch ramps up, with equal samples at every size below the full batch."""
        if self.rampup_start_seqs is None or self.rampup_step_seqs is None or self.rampup_samples is None:
            return self.steps
        sizes = range(self.rampup_start_seqs, self.batch_seqs, self.rampup_step_seqs)
        during = sum(self.rampup_samples / len(sizes) / size for size in sizes)
        return round(during + (self.train_tokens / self.seq_len - self.rampup_samples) / self.batch_seqs)


def all_training_settings() -> Table[TrainingSettings]:
    """Return the settings of every run, published first in file order, then the assumed ones."""
    return load("training.csv", TrainingSettings)


def training_settings(run: str) -> TrainingSettings:
    """Return the settings of one run, such as `350M+PR-MoE-32/64+L21+MoS`; ValueError names close matches.

    Ablations without published settings come back as well, with `assumed=True` and `assumed_from` naming the recipe.
    """
    return all_training_settings().where(run=run)[0]


@dataclass(frozen=True, kw_only=True)
class TrainingThroughput(Provenance):
    """Training speed: samples (sequences of 2048 tokens) per second as printed, the rest derived.

    tflops_per_gpu: 1e12 floating-point operations per second and GPU at 6 x active parameters per token, no
    recomputation.
    """

    model: str
    gpu: str
    gpus: int
    samples_per_s: float
    tokens_per_s: float
    tflops_per_gpu: float


def training_throughput() -> Table[TrainingThroughput]:
    """Table 3: samples per second of the two models of equal quality."""
    return load("training_throughput.csv", TrainingThroughput)
