"""Describe how an MoE layer's gate sends tokens to experts: `RoutingConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal

from moelab.config._check import check as _check
from moelab.config._check import check_choices


@dataclass(frozen=True)
class RoutingConfig:
    """Describe how an MoE layer's gate sends tokens to experts (paper section 4).

    The defaults are those of the released training scripts.

    Attributes:
        capacity_factor: factor of an expert's capacity in training, ``ceil(S * K / E * capacity_factor)`` tokens of a
            micro-batch.
        capacity_factor_eval: the same in evaluation.
        min_capacity: lower bound of the capacity.
        drop_tokens: False means drop-free routing: the capacity is the load of the busiest expert.
        random_token_selection: an expert over its capacity keeps random tokens instead of the earliest ones.
        input_jitter: in training, multiply the gate's input by U(1 - x, 1 + x); the paper's policy 'Jitter' uses 0.01.
        choice_noise: in training, add noise to the logits that choose the experts (not to those of the weights):
            "gumbel" to all of them ('RSample'), "gumbel_second" to all but the largest (the released top-2 gate samples
            its second expert in this way; needs K > 1).
        scores: function from logits to scores, from which the weights of the choices are taken: "softmax" over the
            experts (the paper), or "sigmoid" of each logit (DeepSeek-V3).
        normalize_weights: divide the weights of a token's kept choices by their sum; None means only if K > 1.
        balance_rate: step of the loss-free balancing (Wang et al. 2024, arXiv 2408.15664). Above 0, each expert has a
            bias that is added to its score for the choice only. After each training step, it grows by this much if the
            step's load, over all data ranks, is below the mean, and falls by as much if it is above. 0 means no bias.
        aux_loss: weight of the load-balancing loss, summed over MoE layers.
        aux_choices: the choices whose shares the load-balancing loss counts: the "first" one of each token (the paper,
            GShard), or "all" K (Switch and later models).
        aux_scope: the tokens over which the statistics of the load-balancing loss are taken: those of a "micro_batch"
            (the paper), of all micro-batches of a "step", which needs each on its own data rank, or of each "sequence",
            whose losses are then averaged (DeepSeek-V2).
        z_loss: weight of the mean squared logsumexp of the gate's logits (ST-MoE; not in the paper).
        precision: "bf16" rounds the gate's input, weights and logits to bf16 before everything else, which stays fp32
            (Switch found that it must be "fp32").
    """

    capacity_factor: float = 1.0
    capacity_factor_eval: float = 1.0
    min_capacity: int = 4
    drop_tokens: bool = True
    random_token_selection: bool = True
    input_jitter: float = 0.0
    choice_noise: Literal["none", "gumbel", "gumbel_second"] = "none"
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize_weights: bool | None = None
    balance_rate: float = 0.0
    aux_loss: float = 0.01
    aux_choices: Literal["first", "all"] = "first"
    aux_scope: Literal["micro_batch", "step", "sequence"] = "micro_batch"
    z_loss: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        _check(
            all(0 < factor < math.inf for factor in (self.capacity_factor, self.capacity_factor_eval)),
            "routing: capacity factors must be positive and finite (drop_tokens=False sets no limit), got "
            f"{self.capacity_factor} and {self.capacity_factor_eval}",
        )
        _check(self.min_capacity >= 1, f"routing: min_capacity must be at least 1, got {self.min_capacity}")
        _check(0 <= self.input_jitter < 1, f"routing: input_jitter must be in [0, 1), got {self.input_jitter}")
        _check(0 <= self.balance_rate < 1, f"routing: balance_rate must be in [0, 1), got {self.balance_rate}")
        for what in (field.name for field in fields(self) if field.name.endswith("_loss")):
            value = getattr(self, what)
            _check(0 <= value < math.inf, f"routing: {what} must be 0 or more and finite, got {value}")
        _check(
            not self.balance_rate or self.choice_noise == "none",
            f"routing: choice_noise {self.choice_noise!r} is added to logits, the bias of balance_rate to scores; "
            "use one of them",
        )
        check_choices(self, "routing")

    def normalizes(self, top_k: int) -> bool:
        """Return whether the weights of a token's kept choices are divided by their sum."""
        return top_k > 1 if self.normalize_weights is None else self.normalize_weights

    def capacity(self, tokens: int, experts: int, top_k: int, training: bool) -> int | None:
        """Return the slots per expert for `tokens` tokens of one micro-batch, or None when routing is drop-free."""
        if not self.drop_tokens:
            return None
        # Exact arithmetic on the factor's decimal digits: in floating point, 400 / 4 * 1.1 is above 110.
        factor = Fraction(str(self.capacity_factor if training else self.capacity_factor_eval))
        return max(math.ceil(factor * tokens * top_k / experts), self.min_capacity)
