"""Pack a model's weights once for inference on a CPU, for `moelab.kernels.decode`: prompts and steps in one call each.

The model itself is for training and evaluation. What the operation cannot compute, `why_not` says; such a model
generates with its own modules.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moelab import kernels
from moelab.inference.cache import KVCache
from moelab.kernels import ACTIVATIONS
from moelab.kernels.decode import (
    HEAD_NORMS,
    LARGEST_HEAD,
    MIXES,
    PARTS,
    SCORES,
    Decoder,
    LayerSizes,
    LayerWeights,
    Sequences,
    Sizes,
    angles_of,
    decode,
)
from moelab.kernels.packed import MULTIPLE
from moelab.kernels.residual import differences
from moelab.models import GPT
from moelab.models.attention import rotation_at
from moelab.models.dispatch import LocalDispatch
from moelab.models.gpt import Block
from moelab.models.moe import MLP, Experts, Mix, MoE, SharedGate

Logits = tuple[Tensor, Tensor]
"""The logits [B, V], and int64 [B] the likeliest tokens, -1 where the largest logit is infinite or any is NaN."""


def why_not(model: GPT) -> str | None:
    """Return why this model cannot be packed here, or None if it can.

    Feed-forward sizes always fit: they are filled up with zeros.
    """
    weight, config = model.token_embedding.weight, model.config
    if model.mode != "optimised":
        return f"it is in {model.mode} mode"
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"its dtype is {weight.dtype}"
    if not kernels.cpp_available():
        return "there are no CPU kernels"
    if config.hidden % MULTIPLE or config.head_size % MULTIPLE or config.head_size > LARGEST_HEAD:
        return (
            f"its width of {config.hidden} and heads of {config.head_size} are not multiples of {MULTIPLE} "
            f"(heads up to {LARGEST_HEAD})"
        )
    layers = [module for module in model.modules() if isinstance(module, (MLP, Experts))]
    if unknown := {layer.activation for layer in layers if ACTIVATIONS[layer.activation].number is None}:
        return f"the C++ lacks its activation {unknown.pop()}"
    moes = [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]
    if any(not isinstance(moe.dispatcher, LocalDispatch) for moe in moes):
        return "its experts are on several ranks"
    if config.is_moe and config.routing.scores not in SCORES:
        return f"the C++ lacks its scores {config.routing.scores}"
    if config.is_moe and config.routing.precision != "fp32":
        return f"its router computes in {config.routing.precision}"
    if any(moe.router.config.drop_tokens for moe in moes):
        return "its experts drop tokens"
    return None


class Packed:
    """Compute tokens with a model's packed weights.

    Attributes:
        seconds: where `moelab.kernels.decode` adds up the time of its parts; None, the default, leaves that out.
    """

    def __init__(self, model: GPT, *, release: bool = False) -> None:
        """Pack the weights.

        Args:
            model: one for which `why_not` has no reason.
            release: free the model's weights layer by layer, so that few exist twice. It computes nothing afterwards.
        """
        self.seconds: Tensor | None = None
        self._config = model.config
        self._angles: Tensor | None = None
        with torch.no_grad():
            self._model = _pack(model, release)

    def __call__(self, cache: KVCache, tokens: Sequence[int], sequences: Sequences) -> Logits:
        """Return the logits after the new tokens of B sequences, whose keys and values the cache gets."""
        if self._config.decoder.positions == "rotary" and (self._angles is None or len(self._angles) < cache.length):
            rotation = rotation_at(torch.arange(cache.length), self._config.head_size, self._config.decoder.rotary_base)
            self._angles = angles_of(*rotation)
        ids = torch.tensor(tokens, dtype=torch.long)
        return decode(self._model, ids, sequences, cache.keys, cache.values, cache.last, self._angles, self.seconds)

    def prefill(self, cache: KVCache, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Logits:
        """Return the logits after whole prompts, one for each of the slots."""
        tokens = list(itertools.chain.from_iterable(prompts))
        return self(cache, tokens, Sequences(slots, [0] * len(prompts), [len(p) for p in prompts]))

    def step(self, cache: KVCache, tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        """Return the logits after one token for each of the slots 0, 1, ..., which hold `lengths` tokens."""
        return self(cache, tokens, Sequences(range(len(tokens)), lengths, [1] * len(tokens)))

    def time(self) -> Tensor:
        """Return `seconds`, set to zero, from now on added up."""
        self.seconds = torch.zeros(len(PARTS) + 2, dtype=torch.float64)
        return self.seconds


def _pack(model: GPT, release: bool) -> Decoder:
    config, routing = model.config, model.config.routing
    weights: list[Tensor | None] = [
        model.token_embedding.weight.detach(),
        None if model.position_embedding is None else model.position_embedding.weight.detach(),
        *_norm(model.norm),
        kernels.pack(model.output_weight),
    ]
    head_norm = HEAD_NORMS.index(config.decoder.qk_norm)
    heads = config.heads, config.kv_heads, config.head_size, head_norm
    rules = config.top_k, int(routing.normalizes(config.top_k)), SCORES.index(routing.scores)
    sizes, numbers = [*Sizes(*heads, int(config.decoder.norm == "rms"), *rules)], [config.decoder.norm_eps]
    if release and model.output is not None:
        _free(model.output)
    for block in model.blocks:
        of_layer, of_sizes, bias = _pack_block(block, release)
        weights += of_layer
        sizes += of_sizes
        numbers.append(bias)
    return Decoder(weights, sizes, numbers)


def _pack_block(block: Block, release: bool) -> tuple[LayerWeights, LayerSizes, float]:
    """Return a layer's weights, its sizes, and the bias of its mix."""
    attention, ffn = block.attention, block.ffn
    weights: dict[str, Tensor | None] = {}
    weights["attention_norm"], weights["attention_norm_bias"] = _norm(block.attention_norm)
    weights["norm"], weights["norm_bias"] = _norm(block.ffn_norm)
    if attention.q_norm is not None and attention.k_norm is not None:
        weights["q_norm"], weights["k_norm"] = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
    if attention.smear is not None:
        weights["shares"] = attention.smear.detach().sigmoid().float()
    for name, linear in (("qkv", attention.qkv), ("out", attention.out)):
        weights[name], weights[f"{name}_bias"] = kernels.pack(linear.weight), _detached(linear.bias)
    sizes, bias = LayerSizes(), 0.0
    if isinstance(ffn, MoE):
        weights["router"] = kernels.pack(ffn.router.weight.float())
        if ffn.router.balance_bias is not None:
            weights["balance"] = ffn.router.balance_bias.detach().float()
        weights["up"], weights["up_bias"], weights["down"], weights["down_bias"] = _pack_experts(ffn.experts)
        sizes = LayerSizes(ffn.router.experts, _number(ffn.experts))
        if isinstance(ffn.mix, SharedGate):
            weights["mix"], sizes = ffn.mix.weight.detach()[0].float(), sizes._replace(mix=MIXES.index("shared_gate"))
        elif isinstance(ffn.mix, Mix):
            weights["mix"], bias = differences(ffn.mix.weight, ffn.mix.bias)
            sizes = sizes._replace(mix=MIXES.index("learned"))
    mlp = ffn.mlp if isinstance(ffn, MoE) else ffn
    if mlp is not None:
        weights["mlp_up"], weights["mlp_up_bias"], weights["mlp_down"], weights["mlp_down_bias"] = _pack_mlp(mlp)
        sizes = sizes._replace(mlp_activation=_number(mlp))
    if release:
        for module in (attention.qkv, attention.out, ffn):
            _free(module)
    return LayerWeights(**weights), sizes, bias


def _number(layer: MLP | Experts) -> int:
    """Return the number of a layer's activation in the C++."""
    number = ACTIVATIONS[layer.activation].number
    assert number is not None  # else `why_not` has a reason
    return number


def _norm(norm: nn.LayerNorm | nn.RMSNorm) -> tuple[Tensor, Tensor | None]:
    """Return a norm's weight and, unless it has none, its bias."""
    return norm.weight.detach(), _detached(norm.bias if isinstance(norm, nn.LayerNorm) else None)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _free(module: nn.Module) -> None:
    """Free the weights of a module that have been packed."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


def _pack_mlp(mlp: MLP) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    gates = 1 + ACTIVATIONS[mlp.activation].gated
    up = kernels.pack(_filled(mlp.up.weight.unflatten(0, (gates, -1)), 1))
    up_bias = None if mlp.up.bias is None else _filled(mlp.up.bias.detach().view(gates, -1), 1).flatten()
    return up, up_bias, kernels.pack(_filled(mlp.down.weight, 1)), _detached(mlp.down.bias)


def _pack_experts(experts: Experts) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    gates = 1 + ACTIVATIONS[experts.activation].gated
    w1_EMN, b1_EN, w2_EFM, b2_EM = experts.weights()
    up = kernels.pack(_filled(w1_EMN.unflatten(2, (gates, -1)).permute(0, 2, 3, 1), 2))
    b1_EN = b1_EN if b1_EN is None else _filled(b1_EN.detach().unflatten(1, (gates, -1)), 2).flatten(1)
    return up, b1_EN, kernels.pack(_filled(w2_EFM, 1).mT), _detached(b2_EM)


def _filled(x: Tensor, dim: int) -> Tensor:
    """Return x with zeros after the last element of a dim, up to a size that the operations take."""
    shape = list(x.shape)
    shape[dim] = -shape[dim] % MULTIPLE
    return torch.cat((x, x.new_zeros(shape)), dim) if shape[dim] else x
