"""A dense decoder and its training loop as one writes them in ten minutes, beside which `bench train` measures ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab.bench import inputs
from moelab.config import ModelConfig, TrainConfig

Step = Callable[[int], None]
"""One optimizer step on the batch of that number."""


class BareGPT(nn.Module):
    """The dense model of a config."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.wte, self.wpe = nn.Embedding(c.vocab, c.hidden), nn.Embedding(c.context, c.hidden)
        M = c.hidden
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln1": nn.LayerNorm(M),
                    "qkv": nn.Linear(M, 3 * M),
                    "proj": nn.Linear(M, M),
                    "ln2": nn.LayerNorm(M),
                    "fc": nn.Linear(M, 4 * M),
                    "fc2": nn.Linear(4 * M, M),
                }
            )
            for _ in range(c.layers)
        )
        self.ln = nn.LayerNorm(M)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the loss."""
        B, T = tokens_BT.shape
        x = self.wte(tokens_BT) + self.wpe.weight[:T]
        layer: Any  # a ModuleDict
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["ln1"](x)).chunk(3, dim=-1)
            q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["proj"](y.transpose(1, 2).reshape(B, T, -1))
            x = x + layer["fc2"](F.gelu(layer["fc"](layer["ln2"](x)), approximate="tanh"))
        logits = F.linear(self.ln(x), self.wte.weight)
        return F.cross_entropy(logits.view(B * T, -1).float(), targets_BT.reshape(-1))


def bare_loop(model_config: ModelConfig, config: TrainConfig, context: int) -> Step:
    """Return the step of a hand-written loop around `BareGPT`."""
    torch.manual_seed(0)
    model = BareGPT(model_config).to(config.device)
    nn.init.normal_(model.wte.weight, 0.0, 0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=config.betas, weight_decay=0.1, fused=True)
    batches = inputs.TextBatches(config.batch_size, context, model_config.vocab)

    def step(number: int) -> None:
        tokens_BT, targets_BT = (t.to(config.device) for t in batches.batch(number))
        with torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bf16"):
            loss = model(tokens_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
