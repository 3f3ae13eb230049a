"""Build the decoder, dense or MoE.

By default it is the paper's, which is GPT-3-like: learned positions, pre-LayerNorm, GELU, tied embedding.
`DecoderConfig` replaces these parts.

    tokens_BT -> embedding -> L x (attention, feed-forward or MoE) -> norm -> logits_BTV

Letters as in `moelab.config`; B sequences, T tokens each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab.config import ModelConfig
from moelab.kernels.head import SoftTargets
from moelab.models.attention import Attention, Past, Rotation, rotation_at
from moelab.models.loss import linear_losses
from moelab.models.moe import MLP, Experts, MoE
from moelab.models.routing import Routing


@dataclass(frozen=True)
class Output:
    """Hold the results of a forward pass.

    Attributes:
        logits_BTV: logits of the next token, in the activations' dtype; None if the loss was computed without keeping
            them.
        routing: one `Routing` per MoE layer, in order.
        loss: next-token loss in nats, fp32, of the targets given to the forward pass, plus `soft_loss`; None without
            targets.
        soft_loss: the loss of soft targets, without gradient, or zero; None without targets.
    """

    logits_BTV: Tensor | None
    routing: tuple[Routing, ...]
    loss: Tensor | None = None
    soft_loss: Tensor | None = None

    def routing_loss(self) -> Tensor | float:
        """Return the routers' losses (`Router`), summed over MoE layers as in the released code."""
        return sum((routing.loss for routing in self.routing), start=0.0)


class Cache(Protocol):
    """Provide the state of earlier tokens to a forward pass.

    Attributes:
        positions_BT: int64, the new tokens' positions in their sequences.
    """

    positions_BT: Tensor

    @property
    def layers(self) -> Sequence[Past]:
        """One per layer."""
        ...


def make_norm(config: ModelConfig) -> nn.LayerNorm | nn.RMSNorm:
    """Return a norm over the hidden size."""
    kind = nn.LayerNorm if config.decoder.norm == "layer" else nn.RMSNorm
    return kind(config.hidden, eps=config.decoder.norm_eps)


class Block(nn.Module):
    """Compute one layer: attention, then a feed-forward or MoE, each after a norm and added to the residual."""

    def __init__(self, config: ModelConfig, experts: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.ffn_norm = make_norm(config)
        self.ffn = MoE(config, experts) if experts else MLP(config.dense_feed_forward)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BTM: Tensor, past: Past | None = None, rotation: Rotation | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Return (the layer's output [B, T, M], the routing, None for a dense layer)."""
        x_BTM = x_BTM + self.dropout(self.attention(self.attention_norm(x_BTM), past, rotation))
        result = self.ffn(self.ffn_norm(x_BTM))
        y_BTM, routing = result if isinstance(result, tuple) else (result, None)
        return x_BTM + self.dropout(y_BTM), routing


class GPT(nn.Module):
    """Compute the decoder of a `ModelConfig`.

    Its weights are uninitialised until `init_weights` is called; on the meta device nothing is allocated.

    Attributes:
        mode: how it decodes, set by `moelab.inference.set_mode`.
    """

    mode = "optimised"
    blocks: Sequence[Block]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = _embedding(config.vocab, config.hidden)
        learned = config.decoder.positions == "learned"
        self.position_embedding = _embedding(config.context, config.hidden) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        blocks: Any = nn.ModuleList(Block(config, experts) for experts in config.experts)
        self.blocks = blocks
        self.norm = make_norm(config)
        self.output = None if config.decoder.tied else nn.Linear(config.hidden, config.vocab, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """Return the matrix [V, M] of the output head: the embedding's if it is tied."""
        return (self.token_embedding if self.output is None else self.output).weight

    def forward(
        self,
        tokens_BT: Tensor,
        cache: Cache | None = None,
        *,
        targets_BT: Tensor | None = None,
        reduction: str = "mean",
        soft: SoftTargets | None = None,
    ) -> Output:
        """Return logits, or with `targets_BT` the loss instead of them.

        Args:
            tokens_BT: int64 ids, T up to the config's context (ValueError beyond).
            cache: state of the earlier tokens that `tokens_BT` follows.
            targets_BT: int64 ids of the next tokens.
            reduction: of the loss over tokens, "mean", or "none": each token's [B * T], without gradient.
            soft: a teacher's logits [B * T, V], whose loss is added to that of the targets.
        """
        x_BTM, routings = self.hidden_states(tokens_BT, cache)
        if targets_BT is None:
            return Output(self.head(x_BTM), routings)
        return Output(None, routings, *self.losses(x_BTM, targets_BT, reduction, soft))

    def hidden_states(self, tokens_BT: Tensor, cache: Cache | None = None) -> tuple[Tensor, tuple[Routing, ...]]:
        """Compute the embedding and all blocks; return (x_BTM, a `Routing` per MoE layer)."""
        T, config = tokens_BT.shape[1], self.config
        if cache is None and T > config.context:
            raise ValueError(f"model: sequence of {T} tokens is longer than the context of {config.context}")
        x_BTM, rotation = self.token_embedding(tokens_BT), None
        if self.position_embedding is None:
            positions_BT = torch.arange(T, device=tokens_BT.device)[None] if cache is None else cache.positions_BT
            rotation = rotation_at(positions_BT, config.head_size, config.decoder.rotary_base)
        elif cache is not None:
            x_BTM = x_BTM + self.position_embedding(cache.positions_BT)
        else:
            x_BTM = x_BTM + self.position_embedding.weight[:T]
        x_BTM = self.dropout(x_BTM) if self.training else x_BTM
        routings = []
        for i, block in enumerate(self.blocks):
            x_BTM, routing = block(x_BTM, None if cache is None else cache.layers[i], rotation)
            if routing is not None:
                routings.append(routing)
        return x_BTM, tuple(routings)

    def head(self, x: Tensor) -> Tensor:
        """Return the logits of the next token, [..., V], from the hidden states [..., M]."""
        return F.linear(self.norm(x), self.output_weight)

    def losses(
        self, x_BTM: Tensor, targets_BT: Tensor, reduction: str = "mean", soft: SoftTargets | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (`Output.loss`, `Output.soft_loss`) from the hidden states; arguments as of `forward`."""
        x_NM = self.norm(x_BTM).flatten(0, 1)
        return linear_losses(x_NM, self.output_weight, targets_BT.flatten(), reduction, soft)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set the initial weights, see `initial_weight`."""
        for name, parameter in self.named_parameters():
            owner = self.get_submodule(name.rpartition(".")[0])
            for expert, piece in enumerate(parameter.unbind() if isinstance(owner, Experts) else [parameter]):
                piece.copy_(initial_weight(self.config, seed, name, piece.shape, expert))


def initial_weight(config: ModelConfig, seed: int, name: str, shape: tuple[int, ...], expert: int = 0) -> Tensor:
    """Return the initial values of one parameter (or of one expert's part of it), fp32.

    Given config and shape, they depend on (seed, name, expert) alone. So a dense model and its MoE variants start from
    the same shared weights under one seed (their comparison is paired), and an expert's weights do not depend on the
    number of experts or on their ranks. Weights are normal with `init_std`; projections that write to the residual
    stream are scaled by 1 / sqrt(2L) (GPT-2, Megatron); biases and the logits of smeared keys are zero, norms one.

    Args:
        name: the parameter's name in the model.
        shape: of the parameter, or of one expert's part of a stacked one.
        expert: the expert's global id.
    """
    if name.endswith(("bias", "smear")):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    into_stream = name.endswith(("attention.out.weight", "down.weight", "experts.down"))
    std = config.init_std / math.sqrt(2 * config.layers) if into_stream else config.init_std
    key = hashlib.sha256(f"{seed}/{name}/{expert}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Return an embedding without initial values.

    nn.Embedding draws some, and drawing on the meta device makes torch load its compiler, which takes longer than all
    the rest of a training's start.
    """
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def allocate(model: nn.Module, device: str | torch.device) -> None:
    """Give a model that was made on the meta device memory on another one, without values.

    It does what nn.Module.to_empty does, without torch's Python code for the meta device and its symbolic algebra,
    whose import takes half a second.
    """
    model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))


def build(config: ModelConfig, seed: int, device: str | torch.device = "cpu") -> GPT:
    """Return a model with initial weights, fp32, on `device`."""
    model = empty(config, device)
    model.init_weights(seed)
    return model


def empty(config: ModelConfig, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> GPT:
    """Return a model on `device` whose weights have no values yet."""
    with torch.device("meta"):
        model = GPT(config).to(dtype)
    allocate(model, device)
    return model
