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
from typing import Any, Literal, Self

from moelab.config._check import check as _check
from moelab.config._check import check_choices, unknown
from moelab.config.decoder import DecoderConfig
from moelab.config.feed_forward import ExpertConfig, FeedForward, itemsize, scaled
from moelab.config.names import BASES, GRAMMAR, NAME, PAPER_NAMES
from moelab.config.parallel import ParallelConfig
from moelab.config.routing import RoutingConfig

MAX_SIZE = 1 << 24
"""No size of a model is larger: one that is comes from a damaged file or a slip."""


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
        dropout: applied to embeddings, attention weights, and the outputs of attention and feed-forward.
        routing: the gate's behaviour.
        decoder: norms, positions, attention and the kind of feed-forward; the default is the paper's decoder.
        expert: the experts' width, and shared experts.
        dispatch: always "local"; earlier versions could also train by the masks of the paper's PyTorch baseline.
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
    routing: RoutingConfig = field(default=RoutingConfig())
    decoder: DecoderConfig = field(default=DecoderConfig())
    expert: ExpertConfig = field(default=ExpertConfig())
    dispatch: Literal["local"] = "local"
    name: str = field(default="", compare=False, metadata={"identity": False})

    def __post_init__(self) -> None:
        where = f"model {self.name}" if self.name else "model"
        for what in ("layers", "hidden", "heads", "vocab", "context"):
            value = getattr(self, what)
            _check(value >= 1, f"{where}: {what} must be at least 1, got {value}")
            _check(value <= MAX_SIZE, f"{where}: {what} must be at most {MAX_SIZE:,}, got {value:,}")
        for what in ("head_size", "ffn"):
            value = getattr(self.decoder, what)
            _check(value <= MAX_SIZE, f"{where}: decoder.{what} must be at most {MAX_SIZE:,}, got {value:,}")
        _check(self.init_std >= 0, f"{where}: init_std must not be negative, got {self.init_std}")
        _check(
            self.decoder.head_size > 0 or self.hidden % self.heads == 0,
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
        _check(
            not self.expert.shared or (self.is_moe and not self.residual),
            f"{where}: shared experts need MoE layers without residual, which is a fixed branch of its own",
        )
        _check(
            self.heads % self.kv_heads == 0,
            f"{where}: {self.kv_heads} key and value heads do not divide {self.heads} heads",
        )
        _check(
            self.decoder.positions == "learned" or self.head_size % 2 == 0,
            f"{where}: rotary positions rotate halves of a head, so its size {self.head_size} must be even",
        )
        _check(0 <= self.dropout < 1, f"{where}: dropout must be in [0, 1), got {self.dropout}")
        _check(
            self.routing.choice_noise != "gumbel_second" or self.top_k > 1,
            f"{where}: choice_noise 'gumbel_second' is of the choices after the first, so top_k must be at least 2, "
            f"got {self.top_k}",
        )
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
        match = NAME.fullmatch("".join(name.split()))
        if match is None:
            hyphened = re.sub(r"(?i)(?<=moe)(?=\d)", "-", "".join(name.split()))
            close = [hyphened] if NAME.fullmatch(hyphened) else difflib.get_close_matches(name, PAPER_NAMES, n=1)
            raise ValueError(unknown(f"model name {name!r} is not understood", name, (), listing=GRAMMAR, close=close))
        bases = {b.upper(): b for b in BASES}
        if (base := bases.get(match["base"].upper())) is None:
            raise ValueError(f"model name {name!r}: unknown base {match['base']}; allowed: {', '.join(BASES)}")
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
            _check(bool(positions), f"model name {name!r}: none of its {layers} layers would have experts")
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
        shared = f" shared={self.expert.shared}" if self.expert.shared else ""
        return f"GPT(layers={self.layers} hidden={self.hidden} heads={self.heads}{moe}{residual}{shared})"

    def shrink(
        self,
        *,
        hidden: float = 16,
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
        as 1 / sqrt(hidden), so that products start at the source's magnitude (effect: docs/log/training.md). Heads are
        about `head_size` wide (the 350M model's own width; narrower ones are slower on a CPU). A twin without MoE
        layers has neither a residual branch nor shared experts.
        """
        layers = max(1, round(self.layers / depth))
        ratio = self.layers / layers
        twin_experts = [0] * layers
        for i in range(2, layers + 1, 2):
            window = self.experts[math.floor((i - 2) * ratio + 1e-9) : math.floor(i * ratio + 1e-9)]
            count = max(window, default=0)
            twin_experts[i - 1] = max(2, round(count / experts)) if count else 0
        width = max(16, round(self.hidden / hidden / 16) * 16)
        decoder, expert = self.decoder, self.expert if any(twin_experts) else ExpertConfig()
        unit = 1 if decoder.positions == "learned" else 2  # rotary positions rotate halves of a head
        heads = max(1, round(width / max(head_size, unit)))
        while width % (heads * unit):
            heads += 1
        scale = width / self.hidden
        kv_heads = decoder.kv_heads and math.gcd(heads, max(1, round(heads * decoder.kv_heads / self.heads)))
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
            decoder=replace(decoder, kv_heads=kv_heads, head_size=0, ffn=scaled(decoder.ffn, scale)),
            expert=expert.scaled(scale),
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
        """Return the feed-forward size F of dense layers and of a residual layer's fixed branch: 4M if not given."""
        return self.decoder.ffn or 4 * self.hidden

    @property
    def dense_feed_forward(self) -> FeedForward:
        """Return the feed-forward of dense layers."""
        return FeedForward(self.hidden, self.ffn, self.decoder.feed_forward, self.decoder.biases == "all")

    @property
    def expert_feed_forward(self) -> FeedForward:
        """Return the feed-forward of one routed expert."""
        return self.expert.routed(self.dense_feed_forward)

    @property
    def fixed_feed_forward(self) -> FeedForward | None:
        """Return the branch beside the routed experts, residual or shared; None without one."""
        dense = self.dense_feed_forward
        return dense if self.residual else self.expert.shared_branch(dense)

    @property
    def head_size(self) -> int:
        """Return the head size D, M / H if not given."""
        return self.decoder.head_size or self.hidden // self.heads

    @property
    def kv_heads(self) -> int:
        """Return the number of heads of keys and values."""
        return self.decoder.kv_heads or self.heads

    @property
    def attention_weights(self) -> int:
        """Return the elements of one layer's attention matrices: query, key, value and output."""
        return self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)

    def check_layout(self, parallel: ParallelConfig, *, copies: bool = False) -> None:
        """Check that the model can be distributed in a layout; ValueError, one line, if not.

        Args:
            copies: whether a head of keys and values may be copied to several ranks of a tensor group.
        """
        heads = self.heads if copies and parallel.tensor % self.kv_heads == 0 else self.kv_heads
        kind = "attention" if heads == self.heads else "key-value"
        dense = self.dense_feed_forward if self.moe_layers < self.layers else None
        fixed, expert_ffn = (self.fixed_feed_forward, self.expert_feed_forward.ffn) if self.is_moe else (None, 0)
        for ffn in sorted({one.ffn for one in (dense, fixed) if one is not None}) or [0]:
            parallel.check(self.experts, heads=heads, ffn=ffn, expert_ffn=expert_ffn, kind=kind)

    def attention_parameters(self) -> int:
        """Return the parameters of one layer's attention, with the norms of queries and keys and the shares of keys."""
        M, D, d = self.hidden, self.head_size, self.decoder
        qkv = (self.heads + 2 * self.kv_heads) * D
        biases = {"all": qkv + M, "qkv": qkv, "none": 0}[d.biases]
        norms = {"none": 0, "head": 2 * D, "all": (self.heads + self.kv_heads) * D}[d.qk_norm]
        return self.attention_weights + biases + norms + (self.kv_heads if d.smeared_keys else 0)

    def mixing_parameters(self) -> int:
        """Return the parameters that weigh an MoE layer's two branches: residual's learned mix or the shared gate."""
        if self.residual:
            return 2 * self.hidden + 2 if self.residual_mix == "learned" else 0
        return self.hidden if self.expert.shared_gate else 0

    def _shared(self) -> int:
        """Count the parameters of embeddings, attention, norms and dense feed-forwards."""
        M, d = self.hidden, self.decoder
        norm = 2 * M if d.norm == "layer" else M
        dense_layers = self.layers - self.moe_layers
        return (
            self.embedding_parameters()
            + self.layers * (self.attention_parameters() + 2 * norm)
            + norm
            + dense_layers * self.dense_feed_forward.parameters
        )

    def _per_moe_layer(self, experts: int, used: int) -> int:
        gate = self.hidden * experts + (experts if self.routing.balance_rate else 0)
        fixed = 0 if self.fixed_feed_forward is None else self.fixed_feed_forward.parameters
        return gate + used * self.expert_feed_forward.parameters + fixed + self.mixing_parameters()

    def parameters(self) -> int:
        """Return the number of parameters; a tied embedding counts once. Equals the built model's exactly."""
        return self._shared() + sum(self._per_moe_layer(e, e) for e in self.experts if e)

    def active_parameters(self) -> int:
        """Return the number of parameters that one token uses: K of each MoE layer's experts, and everything else."""
        return self._shared() + sum(self._per_moe_layer(e, self.top_k) for e in self.experts if e)

    def embedding_parameters(self) -> int:
        """Return the parameters of the embeddings of tokens and positions, and of an output head of its own."""
        rows = self.vocab * (1 if self.decoder.tied else 2)
        return (rows + (self.context if self.decoder.positions == "learned" else 0)) * self.hidden

    def non_embedding_parameters(self, *, active: bool = False) -> int:
        """Return the parameters besides `embedding_parameters`: all of them, or those that one token uses."""
        return (self.active_parameters() if active else self.parameters()) - self.embedding_parameters()

    def flops_per_token(self, *, training: bool = True, context: int | None = None) -> float:
        """Return the matrix-multiply FLOPs per token: of a forward pass, times 3 for training.

        Causal attention counts at the mean of its prefix lengths. The output head and the experts that a token uses are
        included, unused slots of the capacity are not.
        """
        M, D, T = self.hidden, self.head_size, context or self.context
        dense_layers, fixed = self.layers - self.moe_layers, self.fixed_feed_forward
        weights = self.vocab * M + self.layers * self.attention_weights + M * sum(self.experts)
        weights += dense_layers * self.dense_feed_forward.weights
        weights += self.moe_layers * self.top_k * self.expert_feed_forward.weights
        weights += self.moe_layers * (0 if fixed is None else fixed.weights)
        weights += self.moe_layers * (self.mixing_parameters() // M * M)
        scores = self.layers * 2 * self.heads * D * (T + 1)
        forward = 2 * weights + scores
        return float(3 * forward if training else forward)

    def bytes(self, dtype: str = "bf16", *, active: bool = False) -> int:
        """Return the bytes of the weights (or of those that one token uses) in `dtype`: fp32, bf16 or fp16."""
        return (self.active_parameters() if active else self.parameters()) * itemsize(dtype)
