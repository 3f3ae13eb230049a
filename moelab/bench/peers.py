"""Call what others wrote for the same work, where it is installed (extra `peers`).

DeepSpeed's gate and MoE layer, transformers' experts and its `generate`. Each is called as its users call it, in the
same process, on the same tokens. llama.cpp: `moelab.bench.llama`.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moelab.bench.decoders import Turns
from moelab.config import DecoderConfig, ExpertConfig, RoutingConfig
from moelab.engine.checkpoint import hf
from moelab.models import GPT


def has(package: str) -> bool:
    """Return whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def gated_width(ffn: int) -> int:
    """Return the feed-forward size of experts of three matrices for the FLOPs of two: two thirds, a multiple of 16."""
    return max(ffn * 2 // 3 // 16, 1) * 16


def gates() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return DeepSpeed's top-1 gates: its mask form, and its table form where the release has one.

    Each takes logits_SE and returns the sum of the weights and the load-balancing loss.
    """
    if not has("deepspeed"):
        return {}
    from deepspeed.moe import sharded_moe

    def call(logits_SE: Tensor, **options: bool) -> Tensor:
        least = min(4, len(logits_SE))  # DeepSpeed refuses more slots than tokens
        out = sharded_moe.top1gating(logits_SE, 1.0, least, use_rts=True, drop_tokens=True, **options)
        weight = next(o for o in out[1:] if torch.is_tensor(o) and o.requires_grad)
        return weight.sum() + out[0]

    calls: dict[str, Callable[[Tensor], Tensor]] = {"deepspeed, masks": call}
    if "sparse_routes" in inspect.signature(sharded_moe.top1gating).parameters:
        calls["deepspeed, sparse routes"] = functools.partial(call, sparse_routes=True)
    return calls


class DeepSpeedLayer(nn.Module):
    """DeepSpeed's MoE layer in one process: capacity factor 1.0, random token selection."""

    def __init__(self, hidden: int, ffn: int, gate_EM: Tensor, top_k: int = 1) -> None:
        super().__init__()
        if not dist.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        import deepspeed
        from deepspeed.moe.layer import MoE

        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        expert = nn.Sequential(nn.Linear(hidden, ffn), nn.GELU(approximate="tanh"), nn.Linear(ffn, hidden))
        options = {"num_experts": len(gate_EM), "k": top_k, "capacity_factor": 1.0, "min_capacity": 4}
        self.moe = MoE(hidden, expert, **options, use_rts=True)
        self.moe.set_deepspeed_parallelism()
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(gate_EM)

    def forward(self, x_SM: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [S, M] and the load-balancing loss."""
        y_SM, aux_loss, _ = self.moe(x_SM)
        return y_SM, aux_loss


class MixtralLayer(nn.Module):
    """The experts of transformers' Mixtral behind a top-1 (or top-k) gate, drop-free.

    They are gated, three matrices each, so the feed-forward size is cut to two thirds for equal FLOPs. `forward` takes
    the name of one of transformers' implementations: "eager" or "grouped_mm".
    """

    def __init__(self, hidden: int, ffn: int, gate_EM: Tensor, top_k: int = 1) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        self.config = MixtralConfig(
            hidden_size=hidden,
            intermediate_size=gated_width(ffn),
            num_local_experts=len(gate_EM),
            num_experts_per_tok=top_k,
        )
        self.experts = MixtralExperts(self.config)
        self.gate = nn.Parameter(gate_EM.clone())
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, 0.0, hidden**-0.5)

    def forward(self, x_SM: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
        """Return the output [S, M] and a stand-in for the load-balancing loss, which Mixtral computes elsewhere."""
        self.config._experts_implementation = implementation
        probs_SE = F.softmax(F.linear(x_SM.float(), self.gate.float()), -1)
        weight_SK, expert_SK = probs_SE.topk(self.config.num_experts_per_tok, -1)
        return self.experts(x_SM, expert_SK, weight_SK.to(x_SM.dtype)), probs_SE.mean()


# -- generation -----------------------------------------------------------------------------------------------------


class Peer:
    """A transformers model that generates as its users do: `generate` with its defaults, greedy."""

    def __init__(self, model: Any) -> None:
        self.model, self.about = model.eval(), dict[str, str]()

    def generate(
        self, prompts: list[list[int]], tokens: int, turn_ends: Callable[[], None] = lambda: None
    ) -> list[list[int]]:
        """Return the new tokens of each prompt; prompts have equal lengths.

        Args:
            turn_ends: called when each prompt has got one more token.
        """

        def goes_on(ids_BT: Tensor, _: Any) -> Tensor:
            turn_ends()
            return torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)

        ids = torch.tensor(prompts, device=next(self.model.parameters()).device)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            out = self.model.generate(ids, attention_mask=mask, stopping_criteria=[goes_on], **options)
        return out[:, ids.shape[1] :].tolist()

    def turns(self, prompts: list[list[int]], tokens: int) -> Turns:
        """Generate and time it."""
        turns = Turns()
        self.generate(prompts, tokens, turns.end)
        return turns


def generators(model: GPT, length: int) -> dict[str, Peer]:
    """Return name -> transformers' counterpart of a model with its weights; none where transformers is not installed.

    A model that one of transformers' classes describes (GPT-2, or one of the MoE families of
    `moelab.engine.checkpoint.hf_families`) is exported and loaded: the same weights, and the tokens must be the same. A
    model of the paper with top-1 experts is compared with a Qwen3-MoE of the same layers, dense and MoE in turn, whose
    feed-forwards and experts have equal numbers of weights (they are gated, so the width is cut to two thirds). It
    normalises queries and keys and rotates positions in addition.

    Args:
        length: of prompt and output, in tokens.
    """
    if not has("transformers"):
        return {}
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config, weight = model.config, model.token_embedding.weight
    if hf.suitable_format(config) != "moelab":
        with tempfile.TemporaryDirectory() as folder:
            path = hf.export(model, Path(folder) / "model")
            theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=weight.dtype)
        return {"transformers generate": Peer(theirs.to(weight.device))}
    like_qwen3 = replace(
        config,
        context=length,
        decoder=DecoderConfig.modern(qk_norm="head", ffn=gated_width(config.ffn), tied=True),
        expert=ExpertConfig(ffn=gated_width(config.ffn)),
        routing=RoutingConfig(drop_tokens=False),
    )
    if config.decoder != DecoderConfig() or hf.suitable_format(like_qwen3) != "qwen3_moe":
        return {}
    record = hf.FORMATS["qwen3_moe"].write_config(like_qwen3, None)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**record))
    return {"transformers Qwen3-MoE": Peer(theirs.to(weight.device, weight.dtype))}
