"""Name the models that `moelab bench decode` measures by default; needs no torch, so that names are checked first."""

from __future__ import annotations

from dataclasses import replace

from moelab.config import DecoderConfig, ModelConfig, RoutingConfig


def decoders(hidden: int = 512, layers: int = 4, vocab: int = 4096) -> dict[str, ModelConfig]:
    """Return the models measured by default.

    The dense twin, which fits the caches; a dense base; the base with 8, 64 and 128 experts in every second layer; a
    dense model that fits no cache; an OLMoE of a quarter of the width.
    """
    base = ModelConfig(layers, hidden, hidden // 64, vocab=vocab, context=256, init_std=0.05, name=f"dense {hidden}")
    moe = {
        f"MoE-{e} {hidden}": replace(base, experts=(0, e) * (layers // 2), name=f"MoE-{e} {hidden}")
        for e in (8, 64, 128)
    }
    free = RoutingConfig(drop_tokens=False, normalize_weights=False, aux_choices="all")
    decoder = DecoderConfig.modern(qk_norm="all", ffn=hidden // 2)
    olmoe = replace(base, experts=(64,) * layers, top_k=8, routing=free, decoder=decoder, name=f"OLMoE {hidden}")
    return {
        "350M twin": ModelConfig.parse("350M twin", init_std=0.05),
        f"dense {hidden}": base,
        **moe,
        "350M+L6": ModelConfig.parse("350M+L6", context=256),
        f"OLMoE {hidden}": olmoe,
    }
