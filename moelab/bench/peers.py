"""What decoding is compared with, where installed (extra peers): `generate` of transformers, in the same process and protocol.

A dense model is exported (`moelab.engine.checkpoint.hf`) and loaded as `GPT2LMHeadModel`: the same weights, and the tokens must be the same. A
model with top-1 experts is compared with a Mixtral of as many MoE layers with as many experts of equal size (gated, so the width is cut to
two thirds) and nothing in between, so the peer has fewer layers of attention to compute.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moelab.config import ModelConfig
from moelab.engine.checkpoint import hf
from moelab.models import GPT


class Peer:
    """A transformers model, called as its users do: `generate` with its defaults, greedy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()

    def generate(self, prompts: list[list[int]], tokens: int, streamer: Any = None) -> list[list[int]]:
        """New tokens of each prompt; equal lengths."""
        device = next(self.model.parameters()).device
        ids = torch.tensor(prompts, device=device)
        # Streamers are for one sequence there; the check looks at beams alone, and ours only looks at the clock.
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=streamer,
            )
        return out[:, ids.shape[1] :].tolist()

    def distinct_experts(self, prompts: list[list[int]], tokens: int) -> float | None:
        """Experts that had tokens, mean over layers and decoding steps; None without experts."""
        met: list[int] = []
        hooks = [
            module.register_forward_pre_hook(lambda _, args: met.append(args[1].unique().numel()))
            for name, module in self.model.named_modules()
            if name.endswith(".experts")
        ]
        self.generate(prompts, tokens)
        for hook in hooks:
            hook.remove()
        return statistics.mean(met[len(hooks) :]) if hooks else None  # the first call of each layer is the prompts'

    def steps(self, prompts: list[list[int]]):
        """Turns, as `moelab.bench.decode.Steps`."""

        def run(tokens: int) -> list[float]:
            watch = _Watch()
            self.generate(prompts, tokens, watch)
            return watch.turns

        return run


class _Watch:
    """A streamer that notes when tokens come; the first call is the prompt's own tokens."""

    def __init__(self) -> None:
        self.turns: list[float] = []
        self._last: float | None = None

    def put(self, _: torch.Tensor) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.turns.append(now - self._last)
        self._last = now

    def end(self) -> None:
        pass


def candidates(model: GPT, length: int) -> dict[str, Peer]:
    """The peers of a model that is still unpacked, by name; none where transformers is not installed."""
    try:
        import transformers
    except ImportError:
        return {}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = model.token_embedding.weight.device
    if not model.config.is_moe:
        with tempfile.TemporaryDirectory() as folder:
            path = hf.export(model, Path(folder) / "model")
            theirs = transformers.GPT2LMHeadModel.from_pretrained(path)
        return {"transformers generate": Peer(theirs.to(device))}
    if model.config.top_k > 1 or model.config.residual:
        return {}
    return {"transformers Mixtral": Peer(_mixtral(model.config, length).to(device))}


def _mixtral(config: ModelConfig, length: int) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    theirs = MixtralConfig(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.ffn * 2 // 3 // 16 * 16,
        num_hidden_layers=config.moe_layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        num_local_experts=max(config.experts),
        num_experts_per_tok=1,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        initializer_range=config.init_std,
        bos_token_id=None,
        eos_token_id=None,
    )
    return MixtralForCausalLM(theirs)
