"""Describe a model: `ModelConfig`, the paper's names for models, and their scaled-down twins (paper sections 3 and 4).

`ModelConfig.parse` understands the names that the paper uses (``350M+PR-MoE-32/64``). `ModelConfig.shrink` returns the
twin of a paper model: the same shape rule with smaller numbers. Methods compute sizes, FLOPs and bytes without building
the model; tests compare them with the built model and with `moelab.paper`.

Layer numbers in names and messages count from 1, as in the paper; tuples are indexed from 0.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, Self

from moelab.config._check import check as _check
from moelab.config._check import check_choices

# The paper's dense bases: layers L, hidden M, heads H. Heads of 2.4B, 8B, 24B and 47B are not stated; size 128 is our
# assumption (1.3B has head size 128 in its training script, 6.7B and 175B too). Sources: `moelab.paper`, data file
# models.csv.
BASES: dict[str, tuple[int, int, int]] = {
    "125M": (12, 768, 12),
    "350M": (24, 1024, 16),
    "1.3B": (24, 2048, 16),
    "2.4B": (16, 3584, 28),
    "6.7B": (32, 4096, 32),
    "8B": (40, 4096, 32),
    "24B": (30, 8192, 64),
    "47B": (58, 8192, 64),
    "175B": (96, 12288, 96),
}

_NAME = re.compile(
    r"""(?P<base>[\d.]+[MB])
        (\+(?P<half>FirstHalf-|SecondHalf-)?
           (Top(?P<top_k>\d+)-)?
           (?P<kind>Residual-|Pyramid-|PR-)?
           MoE-(?P<experts>\d+)(/(?P<last>\d+))?)?
        (\+L(?P<layers>\d+))?
        (?P<twin>twin)?""",
    re.IGNORECASE | re.VERBOSE,
)
_GRAMMAR = (
    "BASE[+[FirstHalf-|SecondHalf-][TopK-][Residual-|Pyramid-|PR-]MoE-N[/2N]][+L<layers>][ twin], "
    "for example 350M, 1.3B+MoE-128, 350M+PR-MoE-32/64, 350M+PR-MoE-32/64+L21"
)
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class RoutingConfig:
    """Describe how a MoE layer's gate sends tokens to experts (paper section 4).

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
            its second expert in this way).
        normalize_weights: divide the weights of a token's kept choices by their sum; None means only if K > 1.
        aux_loss: weight of the load-balancing loss, summed over MoE layers.
        aux_scope: the tokens over which the statistics of the load-balancing loss are taken: those of a "micro_batch"
            (the paper), or of all micro-batches of a "step", which needs each on its own data rank.
        z_loss: weight of the mean squared logsumexp of the gate's logits (ST-MoE; not in the paper).
    """

    capacity_factor: float = 1.0
    capacity_factor_eval: float = 1.0
    min_capacity: int = 4
    drop_tokens: bool = True
    random_token_selection: bool = True
    input_jitter: float = 0.0
    choice_noise: Literal["none", "gumbel", "gumbel_second"] = "none"
    normalize_weights: bool | None = None
    aux_loss: float = 0.01
    aux_scope: Literal["micro_batch", "step"] = "micro_batch"
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        _check(
            self.capacity_factor > 0 and self.capacity_factor_eval > 0,
            f"routing: capacity factors must be positive, got {self.capacity_factor} and {self.capacity_factor_eval}",
        )
        _check(self.min_capacity >= 1, f"routing: min_capacity must be at least 1, got {self.min_capacity}")
        _check(0 <= self.input_jitter < 1, f"routing: input_jitter must be in [0, 1), got {self.input_jitter}")
        check_choices(self, "routing")

    def capacity(self, tokens: int, experts: int, top_k: int, training: bool) -> int | None:
        """Return the slots per expert for `tokens` tokens of one micro-batch, or None when routing is drop-free."""
        if not self.drop_tokens:
            return None
        # Exact arithmetic on the factor's decimal digits: in floating point, 400 / 4 * 1.1 is above 110.
        factor = Fraction(str(self.capacity_factor if training else self.capacity_factor_eval))
        return max(math.ceil(factor * tokens * top_k / experts), self.min_capacity)


@dataclass(frozen=True)
class ModelConfig:
    """Describe a GPT-3-like decoder, dense or with mixture-of-experts (MoE) layers (paper sections 3 and 4).

    Dense, standard, half, pyramid, residual, PR-MoE and student models are this one class, told apart by `experts` and
    `residual`.

    Attributes:
        layers, hidden, heads: L, M, H.
        experts: per layer the number of experts, 0 for a dense feed-forward; an empty tuple means all dense.
        residual: each MoE layer has a fixed MLP beside the routed experts (Residual-MoE).
        residual_mix: how the two branches are combined: "learned" per-token convex mix (released code) or plain "sum"
            (paper's text).
        top_k: experts per token, K.
        vocab: rows of the embedding, V; 50304 is GPT-2's 50257 padded to a multiple of 128.
        context: longest sequence in tokens, T.
        init_std: standard deviation of the initial weights.
        dropout: applied to embeddings, attention and the two residual branches.
        routing: the gate's behaviour.
        dispatch: how tokens are copied to their experts: "local" by a table, or "einsum", the paper's PyTorch baseline.
            The results are the same.
        name: text that ``str`` returns; not part of the configuration's identity.
    """

    layers: int
    hidden: int
    heads: int
    experts: tuple[int, ...] = ()
    residual: bool = False
    residual_mix: Literal["learned", "sum"] = "learned"
    top_k: int = 1
    vocab: int = 50304
    context: int = 2048
    init_std: float = 0.014
    dropout: float = 0.0
    routing: RoutingConfig = RoutingConfig()
    dispatch: Literal["local", "einsum"] = "local"
    name: str = field(default="", compare=False, metadata={"identity": False})

    def __post_init__(self) -> None:
        where = f"model {self.name}" if self.name else "model"
        for what in ("layers", "hidden", "heads", "vocab", "context"):
            value = getattr(self, what)
            _check(value >= 1, f"{where}: {what} must be at least 1, got {value}")
        _check(
            self.hidden % self.heads == 0,
            f"{where}: {self.heads} heads do not divide hidden size {self.hidden}; allowed up to 16 a head: "
            f"{[h for h in range(1, self.hidden // 16 + 1) if self.hidden % h == 0]}",
        )
        if not any(self.experts):
            object.__setattr__(self, "experts", (0,) * (len(self.experts) or self.layers))
        _check(
            len(self.experts) == self.layers,
            f"{where}: experts lists {len(self.experts)} layers, the model has {self.layers}; "
            "give one number a layer (0 = dense)",
        )
        _check(
            all(e == 0 or e >= 2 for e in self.experts),
            f"{where}: an MoE layer needs at least 2 experts (0 = dense), got {self.experts}",
        )
        fewest = min((e for e in self.experts if e), default=0)
        _check(
            self.top_k >= 1 and (not fewest or self.top_k <= fewest),
            f"{where}: top_k must be between 1 and the fewest experts of a layer ({fewest}), got {self.top_k}",
        )
        _check(
            not self.residual or self.is_moe,
            f"{where}: residual needs MoE layers, but every layer is dense (experts all 0)",
        )
        _check(0 <= self.dropout < 1, f"{where}: dropout must be in [0, 1), got {self.dropout}")
        check_choices(self, where)

    # -- names -------------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, name: str, **overrides: Any) -> Self:
        """Return the model that a paper name stands for, such as ``"350M+PR-MoE-32/64"``.

        Case and spaces do not matter. `overrides` replace fields (``vocab=4096``). The last two MoE layers of Pyramid
        and PR models have the second number of experts (paper section 4.1). A trailing ``twin`` applies `shrink`.

        Raises:
            ValueError: one line naming what is wrong and what is allowed.
        """
        _check(isinstance(name, str), f"model name must be a text such as 350M+MoE-128, got {name!r}")
        match = _NAME.fullmatch("".join(name.split()))
        if match is None:
            hint = difflib.get_close_matches(name, _PAPER_NAMES, n=1)
            raise ValueError(
                f"model name {name!r} is not understood; allowed: {_GRAMMAR}"
                + (f" (did you mean {hint[0]}?)" if hint else "")
            )
        bases = {b.upper(): b for b in BASES}
        base = bases.get(match["base"].upper())
        _check(base is not None, f"model name {name!r}: unknown base {match['base']}; allowed: {', '.join(BASES)}")
        base_layers, hidden, heads = BASES[base]
        layers = int(match["layers"] or base_layers)
        _check(
            1 <= layers <= base_layers,
            f"model name {name!r}: L{layers} must be between L1 and the base's L{base_layers}",
        )

        experts, residual, top_k, canonical = (0,) * layers, False, 1, base
        if match["experts"]:
            kind = (match["kind"] or "").rstrip("-").lower()
            half = (match["half"] or "").rstrip("-").lower()
            top_k = int(match["top_k"] or 1)
            residual = kind in ("residual", "pr")
            pyramid = kind in ("pyramid", "pr")
            _check(
                pyramid == bool(match["last"]),
                f"model name {name!r}: "
                + (
                    "Pyramid and PR models need two expert counts, such as 32/64 "
                    "(the last two MoE layers take the second)"
                    if pyramid
                    else "two expert counts need Pyramid-MoE or PR-MoE"
                ),
            )
            first, last = int(match["experts"]), int(match["last"] or match["experts"])
            _check(first >= 2, f"model name {name!r}: an MoE layer needs at least 2 experts")
            _check(
                last >= first,
                f"model name {name!r}: a pyramid has no fewer experts late than early, got {first}/{last}",
            )
            positions = list(range(1, layers, 2))  # layers 2, 4, ... counting from 1
            if half:
                positions = [i for i in positions if (i < layers // 2) == (half == "firsthalf")]
            counts = dict.fromkeys(positions, first) | dict.fromkeys(positions[-2:], last)
            experts = tuple(counts.get(i, 0) for i in range(layers))
            canonical += "+" + {"firsthalf": "FirstHalf-", "secondhalf": "SecondHalf-", "": ""}[half]
            canonical += f"Top{top_k}-" if top_k > 1 else ""
            canonical += {"residual": "Residual-", "pyramid": "Pyramid-", "pr": "PR-", "": ""}[kind]
            canonical += f"MoE-{first}" + (f"/{last}" if pyramid else "")
        if layers != base_layers:
            canonical += f"+L{layers}"
        config = cls(
            layers=layers, hidden=hidden, heads=heads, experts=experts, residual=residual, top_k=top_k, name=canonical
        )
        if match["twin"]:
            config = config.shrink()
        return replace(config, **overrides)

    def __str__(self) -> str:
        if self.name:
            return self.name
        moe = f" experts={self.experts}" if self.is_moe else ""
        residual = " residual" if self.residual else ""
        return f"GPT(layers={self.layers} hidden={self.hidden} heads={self.heads}{moe}{residual})"

    def shrink(
        self,
        *,
        hidden: int = 16,
        depth: int = 3,
        experts: int = 8,
        vocab: int = 4096,
        context: int = 256,
        head_size: int = 64,
    ) -> Self:
        """Return the twin: this model's shape rule at a laptop's size.

        Hidden size, depth and experts are divided by the given numbers (24 -> 8 layers, 21 -> 7: a student keeps its
        cut of 12.5 %). Twin layer i represents the source's layers ``((i - 1) L/L', i L/L']``, with L' the twin's
        layers. Every second twin layer has the largest number of experts in its own and the preceding range, divided
        by `experts`; so first and second half stay apart, and a pyramid keeps its larger last layers. `init_std` grows
        as 1 / sqrt(hidden), so that products start at the source's magnitude (LOG.md has the effect). Heads are about
        `head_size` wide (the 350M model's own width; narrower ones are slower on a CPU, see LOG.md).
        """
        layers = max(1, round(self.layers / depth))
        ratio = self.layers / layers
        twin_experts = [0] * layers
        for i in range(2, layers + 1, 2):
            window = self.experts[math.floor((i - 2) * ratio + 1e-9) : math.floor(i * ratio + 1e-9)]
            count = max(window, default=0)
            twin_experts[i - 1] = max(2, round(count / experts)) if count else 0
        width = max(16, round(self.hidden / hidden / 16) * 16)
        heads = max(1, round(width / head_size))
        while width % heads:
            heads += 1
        return replace(
            self,
            layers=layers,
            hidden=width,
            heads=heads,
            experts=tuple(twin_experts),
            residual=self.residual and any(twin_experts),
            top_k=min(self.top_k, min((e for e in twin_experts if e), default=self.top_k)),
            vocab=vocab,
            context=context,
            init_std=round(self.init_std * math.sqrt(self.hidden / width), 6),
            name=f"{self} twin",
        )

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def is_moe(self) -> bool:
        """Return whether any layer has experts."""
        return any(self.experts)

    @property
    def moe_layers(self) -> int:
        """Return the number of layers with experts."""
        return sum(e > 0 for e in self.experts)

    @property
    def ffn(self) -> int:
        """Return the feed-forward size F = 4M of dense layers and experts."""
        return 4 * self.hidden

    @property
    def head_size(self) -> int:
        """Return the head size D = M / H."""
        return self.hidden // self.heads

    def expert_parameters(self) -> int:
        """Return the parameters of one expert, of a dense feed-forward or of a residual layer's fixed branch."""
        return 2 * self.hidden * self.ffn + self.ffn + self.hidden

    def expert_bytes(self, dtype: str = "bf16") -> int:
        """Return the bytes of one expert's weights in `dtype`: fp32, bf16 or fp16."""
        return self.expert_parameters() * _itemsize(dtype)

    def _shared(self) -> int:
        """Count the parameters of embeddings, attention, norms and dense feed-forwards."""
        M = self.hidden
        attention = 4 * M * M + 4 * M
        norms = 4 * M
        dense_layers = self.layers - self.moe_layers
        return (
            (self.vocab + self.context) * M
            + self.layers * (attention + norms)
            + 2 * M
            + dense_layers * self.expert_parameters()
        )

    def _per_moe_layer(self, experts: int, used: int) -> int:
        gate = self.hidden * experts
        mix = 2 * self.hidden + 2 if self.residual_mix == "learned" else 0
        return gate + used * self.expert_parameters() + (self.expert_parameters() + mix if self.residual else 0)

    def parameters(self) -> int:
        """Return the number of parameters; the tied embedding counts once. Equals the built model's exactly."""
        return self._shared() + sum(self._per_moe_layer(e, e) for e in self.experts if e)

    def active_parameters(self) -> int:
        """Return the number of parameters that one token uses: K of each MoE layer's experts, and everything else."""
        return self._shared() + sum(self._per_moe_layer(e, self.top_k) for e in self.experts if e)

    def non_embedding_parameters(self) -> int:
        """Return the number of parameters outside the embeddings of tokens and positions."""
        return self.parameters() - (self.vocab + self.context) * self.hidden

    def flops_per_token(self, *, training: bool = True, context: int | None = None) -> float:
        """Return the matrix-multiply FLOPs per token: of a forward pass, times 3 for training.

        Causal attention counts at the mean of its prefix lengths. The output head and the experts that a token uses are
        included, unused slots of the capacity are not.
        """
        M, T = self.hidden, context or self.context
        mlp = 2 * M * self.ffn
        weights = self.vocab * M + self.layers * 4 * M * M + (self.layers - self.moe_layers) * mlp
        for e in self.experts:
            if e:
                mix = 2 * M if self.residual and self.residual_mix == "learned" else 0
                weights += M * e + self.top_k * mlp + (mlp + mix if self.residual else 0)
        attention = self.layers * 2 * M * (T + 1)
        forward = 2 * weights + attention
        return float(3 * forward if training else forward)

    def bytes(self, dtype: str = "bf16", *, active: bool = False) -> int:
        """Return the bytes of the weights (or of those that one token uses) in `dtype`: fp32, bf16 or fp16."""
        return (self.active_parameters() if active else self.parameters()) * _itemsize(dtype)


def _itemsize(dtype: str) -> int:
    _check(dtype in DTYPE_BYTES, f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    return DTYPE_BYTES[dtype]


_PAPER_NAMES = [
    *BASES,
    "350M+MoE-32",
    "350M+MoE-128",
    "1.3B+MoE-128",
    "350M+FirstHalf-MoE-32",
    "350M+SecondHalf-MoE-32",
    "350M+Top2-MoE-32",
    "350M+Residual-MoE-32",
    "350M+Pyramid-MoE-32/64",
    "350M+PR-MoE-32/64",
    "1.3B+PR-MoE-64/128",
    "350M+PR-MoE-32/64+L21",
    "1.3B+PR-MoE-64/128+L21",
]
