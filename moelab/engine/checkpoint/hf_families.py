"""Describe the formats of published MoE models: OLMoE, Mixtral, Qwen2-MoE and Qwen3-MoE.

All four have the decoder of `DecoderConfig.modern` and gated experts; they differ in names and in a few settings:

    olmoe       queries and keys normalised over all heads; weights of the choices not renormalised
    mixtral     weights renormalised; all layers MoE
    qwen2_moe   biases of query, key and value; shared experts with a gate; dense layers
    qwen3_moe   queries and keys normalised by head; head size apart from M / H; dense layers

Routing is drop-free in all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moelab.config import DecoderConfig, ExpertConfig, ModelConfig, RoutingConfig
from moelab.engine.checkpoint.hf_formats import Amount, Format, Part, agreed, check_fixed, setting

_ARCHITECTURES = {
    "olmoe": "OlmoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_QWEN = ("qwen2_moe", "qwen3_moe")
_NORM_EPS = {"olmoe": 1e-5, "mixtral": 1e-5, "qwen2_moe": 1e-6, "qwen3_moe": 1e-6}
_AUX_LOSS = {"olmoe": 0.01, "mixtral": 0.001, "qwen2_moe": 0.001, "qwen3_moe": 0.001}
_KV_HEADS = {"olmoe": 16, "mixtral": 8, "qwen2_moe": 16, "qwen3_moe": 4}
"""What a missing `rms_norm_eps`, `router_aux_loss_coef` and `num_key_value_heads` mean to transformers."""
_FIXED: dict[str, dict[str, Any]] = {
    "olmoe": {"hidden_act": "silu", "attention_bias": False, "clip_qkv": None, "sliding_window": None},
    "mixtral": {"hidden_act": "silu", "sliding_window": None},
    "qwen2_moe": {"hidden_act": "silu", "qkv_bias": True, "use_sliding_window": False},
    "qwen3_moe": {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
}


def _read_config(record: dict[str, Any], where: Path) -> ModelConfig:
    kind = record["model_type"]
    check_fixed(record, _FIXED[kind], where)
    layers, hidden, heads, ffn, vocab, context, top_k = (
        setting(record, name, where)
        for name in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
            "num_experts_per_tok",
        )
    )
    experts = setting(record, agreed(record, ("num_local_experts", "num_experts"), where), where)
    dense = _dense_layers(record, layers, where)
    expert = ExpertConfig()
    if kind in _QWEN:
        expert = ExpertConfig(ffn=setting(record, "moe_intermediate_size", where))
    if kind == "qwen2_moe":
        shared = setting(record, "shared_expert_intermediate_size", where)
        expert = ExpertConfig(expert.ffn, shared=1, shared_ffn=shared, shared_gate=True)
    kv_heads = setting({"num_key_value_heads": _KV_HEADS[kind], **record}, "num_key_value_heads", where, default=heads)
    head_size = setting(record, "head_dim", where, default=hidden // heads)
    norm_eps = setting(record, "rms_norm_eps", where, Amount, _NORM_EPS[kind])
    aux_loss = setting(record, "router_aux_loss_coef", where, Amount, _AUX_LOSS[kind])
    init_std, rotary_base = setting(record, "initializer_range", where, Amount, 0.02), _rotary_base(record, where)
    tied = setting(record, "tie_word_embeddings", where, bool, False)
    normalize = kind == "mixtral" or setting(record, "norm_topk_prob", where, bool, False)
    try:
        decoder = DecoderConfig.modern(
            norm_eps=norm_eps,
            qk_norm={"olmoe": "all", "qwen3_moe": "head"}.get(kind, "none"),
            rotary_base=rotary_base,
            kv_heads=0 if kv_heads == heads else kv_heads,
            head_size=0 if head_size * heads == hidden else head_size,
            ffn=ffn,
            biases="qkv" if kind == "qwen2_moe" else "none",
            tied=tied,
        )
        routing = RoutingConfig(
            drop_tokens=False,
            normalize_weights=normalize,
            aux_loss=aux_loss,
            aux_choices="all",
        )
        return ModelConfig(
            layers=layers,
            hidden=hidden,
            heads=heads,
            experts=tuple(0 if layer in dense else experts for layer in range(layers)),
            top_k=top_k,
            vocab=vocab,
            context=context,
            init_std=init_std,
            routing=routing,
            decoder=decoder,
            expert=expert,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _dense_layers(record: dict[str, Any], layers: int, where: Path) -> set[int]:
    """Return the layers without experts, counted from 0."""
    if record["model_type"] not in _QWEN:
        return set()
    step = setting(record, "decoder_sparse_step", where, default=1)
    named = setting(record, "mlp_only_layers", where, list[int], [])
    return {layer for layer in range(layers) if (layer + 1) % step} | set(named)


def _rotary_base(record: dict[str, Any], where: Path) -> float:
    """Return the base of the rotation: `rope_theta`, or in newer files a setting of `rope_parameters`."""
    name = agreed(record, ("rope_scaling", "rope_parameters"), where)
    parameters = setting(record, name, where, dict[str, Any], {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{where}: rotary positions of type {kind!r}, supported is 'default'")
    if odd := set(parameters) - {"rope_type", "type", "rope_theta"}:
        raise ValueError(f"{where}: {name} has {min(odd)!r}, supported are rope_type and rope_theta")
    default = 1e6 if record["model_type"] == "mixtral" else 10_000.0
    return float(
        setting(parameters, "rope_theta", where, Amount, setting(record, "rope_theta", where, Amount, default))
    )


def family_of(config: ModelConfig) -> str | None:
    """Return the model type of the family that describes a model, None if none does."""
    return next((kind for kind in _ARCHITECTURES if why_not(config, kind) is None), None)


def why_not(config: ModelConfig, kind: str) -> str | None:
    """Return in one line what a family lacks to describe a model; None if nothing."""
    d, r, x = config.decoder, config.routing, config.expert
    counts = {e for e in config.experts if e}
    qk_norm = {"olmoe": "all", "qwen3_moe": "head"}.get(kind, "none")
    own_size = d.head_size not in (0, config.hidden // config.heads)
    for problem, text in (
        (not config.is_moe or config.residual, "has routed experts without residual branch"),
        (len(counts) > 1, "has the same number of experts in each MoE layer"),
        (
            d.norm != "rms" or d.positions != "rotary" or d.feed_forward != "swiglu",
            "has RMSNorm, rotary positions and SwiGLU",
        ),
        (d.biases != ("qkv" if kind == "qwen2_moe" else "none"), "has other biases"),
        (d.qk_norm != qk_norm, f"has qk_norm {qk_norm!r}"),
        (d.smeared_keys, "has keys of single tokens, not smeared ones"),
        (own_size and kind not in ("mixtral", "qwen3_moe"), "has head_size M / H"),
        (r.scores != "softmax" or r.balance_rate > 0, "routes by a softmax, without bias"),
        (r.precision != "fp32", "routes in fp32"),
        (r.drop_tokens, "routes without dropping"),
        (kind == "mixtral" and not r.normalizes(config.top_k), "renormalises the weights"),
        (kind not in _QWEN and 0 in config.experts, "has no dense layers"),
        (kind not in _QWEN and x.ffn not in (0, config.ffn), "has one feed-forward size"),
        (x != ExpertConfig(x.ffn, x.shared, x.shared_ffn, x.shared_gate), "has no other kind of expert"),
        ((x.shared > 0) != (kind == "qwen2_moe"), "has shared experts" if kind == "qwen2_moe" else "has none shared"),
        (kind == "qwen2_moe" and not x.shared_gate, "has a gate of the shared experts"),
    ):
        if problem:
            return f"export: {kind} {text}; this model differs"
    return None


def _write_config(kind: str, config: ModelConfig, eot: int | None) -> dict[str, Any]:
    if problem := why_not(config, kind):
        raise ValueError(problem)
    d = config.decoder
    record: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind]],
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.ffn,
        "num_experts_per_tok": config.top_k,
        ("num_local_experts" if kind == "mixtral" else "num_experts"): max(config.experts),
        "rms_norm_eps": d.norm_eps,
        "rope_theta": d.rotary_base,
        "tie_word_embeddings": d.tied,
        "router_aux_loss_coef": config.routing.aux_loss,
        "initializer_range": config.init_std,
        "bos_token_id": None,
        "eos_token_id": eot,
        "pad_token_id": None,
        **_FIXED[kind],
    }
    if kind in ("mixtral", "qwen3_moe"):
        record["head_dim"] = config.head_size
    if kind != "mixtral":
        record["norm_topk_prob"] = config.routing.normalizes(config.top_k)
    if kind in _QWEN:
        dense = [layer for layer, experts in enumerate(config.experts) if not experts]
        record |= {
            "moe_intermediate_size": config.expert_feed_forward.ffn,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
        }
    if kind == "qwen2_moe" and config.fixed_feed_forward is not None:
        record["shared_expert_intermediate_size"] = config.fixed_feed_forward.ffn
    return record


# -- tensors -----------------------------------------------------------------------------------------------------------

_TOP = {
    "token_embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "ffn.router.weight": "{mlp}.gate.weight",
    "ffn.down.weight": "{mlp}.down_proj.weight",
    "ffn.mlp.down.weight": "{mlp}.shared_expert.down_proj.weight",
    "ffn.mix.weight": "{mlp}.shared_expert_gate.weight",
}
_GATED = {"ffn.up.weight": "{mlp}", "ffn.mlp.up.weight": "{mlp}.shared_expert"}


def _parts(kind: str, name: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[Part]:
    if name in _TOP:
        yield Part(_TOP[name])
        return
    _, layer, rest = name.split(".", 2)
    block = f"model.layers.{layer}"
    mlp = f"{block}.{'block_sparse_moe' if kind == 'mixtral' else 'mlp'}"
    if rest in _BLOCK:
        theirs = _BLOCK[rest]
        yield Part(theirs.format(mlp=mlp) if theirs.startswith("{") else f"{block}.{theirs}")
    elif rest in ("attention.qkv.weight", "attention.qkv.bias"):
        start = 0
        for letter, heads in zip("qkv", (config.heads, config.kv_heads, config.kv_heads), strict=True):
            end = start + heads * config.head_size
            yield Part(f"{block}.self_attn.{letter}_proj.{rest.rpartition('.')[2]}", (slice(start, end),))
            start = end
    elif rest in _GATED:
        owner, half = _GATED[rest].format(mlp=mlp), shape[0] // 2
        yield Part(f"{owner}.gate_proj.weight", (slice(0, half),))
        yield Part(f"{owner}.up_proj.weight", (slice(half, 2 * half),))
    else:
        gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        for expert in range(shape[0]):
            owner = f"{mlp}.experts.{expert}"
            if rest == "ffn.experts.down":
                yield Part(f"{owner}.{down}.weight", (expert,), True)
            else:  # ffn.experts.up: [E, M, 2, F]
                yield Part(f"{owner}.{gate}.weight", (expert, slice(None), 0), True)
                yield Part(f"{owner}.{up}.weight", (expert, slice(None), 1), True)


FAMILIES = tuple(
    Format(kind, _read_config, functools.partial(_write_config, kind), functools.partial(_parts, kind))
    for kind in _ARCHITECTURES
)
"""The published MoE models' formats."""
