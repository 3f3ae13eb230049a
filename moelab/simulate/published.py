"""Shapes of published MoE models, for the simulator alone; those that moelab can load are read from their files.

From the models' config.json; Mixtral, Qwen3 and DeepSeek-V3 also as in yanring/Megatron-MoE-ModelZoo,
model_configs/benchmarking (commit e865051).
"""

from __future__ import annotations

import difflib
from typing import Any

from moelab.config import DecoderConfig, ExpertConfig, ModelConfig, unknown
from moelab.config.routing import RoutingConfig
from moelab.simulate.attention import LatentModel

DROPLESS = RoutingConfig(drop_tokens=False)


def _model(
    layers: int, hidden: int, heads: int, experts: int, ffn: int, top_k: int, vocab: int, **more: Any
) -> dict[str, Any]:
    decoder = DecoderConfig.modern(ffn=ffn, **more)
    return {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "experts": (experts,) * layers,
        "top_k": top_k,
        "vocab": vocab,
        "routing": DROPLESS,
        "decoder": decoder,
    }


def named(model: ModelConfig | str) -> ModelConfig:
    """Return a model by a published name or a name of the paper, or the model itself.

    Raises:
        ValueError: one line: it is neither name; a published one that is spelt alike is named.
    """
    if isinstance(model, ModelConfig):
        return model
    if model.lower() in MODELS:
        return MODELS[model.lower()]
    if close := difflib.get_close_matches(model.lower(), MODELS, n=1, cutoff=0.75):
        raise ValueError(unknown(f"no model {model!r}", model, MODELS, close=close))
    return ModelConfig.parse(model)


MODELS: dict[str, ModelConfig] = {
    "mixtral-8x7b": ModelConfig(**_model(32, 4096, 32, 8, 14336, 2, 32000, kv_heads=8), name="Mixtral-8x7B"),
    "mixtral-8x22b": ModelConfig(**_model(56, 6144, 48, 8, 16384, 2, 32768, kv_heads=8), name="Mixtral-8x22B"),
    "dbrx": ModelConfig(**_model(40, 6144, 48, 16, 10752, 4, 100352, kv_heads=8), name="DBRX"),
    "qwen3-30b": ModelConfig(
        **_model(48, 2048, 32, 128, 768, 8, 151936, kv_heads=4, head_size=128, qk_norm="head"), name="Qwen3-30B-A3B"
    ),
    "qwen3-235b": ModelConfig(
        **_model(94, 4096, 64, 128, 1536, 8, 151936, kv_heads=4, head_size=128, qk_norm="head"), name="Qwen3-235B-A22B"
    ),
    "deepseek-v3": LatentModel(
        **{
            **_model(61, 7168, 128, 256, 18432, 8, 129280, head_size=128),
            "experts": (0,) * 3 + (256,) * 58,
            "expert": ExpertConfig(ffn=2048, shared=1),
        },
        name="DeepSeek-V3",
    ),
}

DTYPES = dict.fromkeys(MODELS, "bf16") | {"deepseek-v3": "fp8"}
"""Published name -> dtype of the published weights, from the models' config.json."""
