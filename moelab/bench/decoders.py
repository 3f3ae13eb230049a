"""What `moelab bench decode` shares with processes that import no torch: its default models, and its clock."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

from moelab.config import DecoderConfig, ModelConfig, RoutingConfig


class Turns(list[float]):
    """Seconds of each turn of a generation: the prompts with the first tokens, then each step."""

    def __init__(self) -> None:
        super().__init__()
        self._last = perf_counter()

    def end(self) -> None:
        """End a turn; the next one begins."""
        now = perf_counter()
        self.append(now - self._last)
        self._last = now


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
