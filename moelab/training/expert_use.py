"""Count the tokens that a trained model sends to each expert, by domain and by token id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moelab.config import ModelConfig, TrainConfig
from moelab.data import TokenData, validation_batches
from moelab.engine import checkpoint
from moelab.models import GPT, build


@dataclass(frozen=True)
class ExpertUse:
    """Hold how one MoE layer routed the validation text, counting all K choices of a token.

    Attributes:
        layer: number of the layer, from 1.
        domains: names of the domains.
        by_domain_DE: tokens of each domain whose choices include the expert, int64.
        by_token_VE: the same by token id.
    """

    layer: int
    domains: tuple[str, ...]
    by_domain_DE: np.ndarray
    by_token_VE: np.ndarray


@torch.no_grad()
def routed(
    model: GPT, batches: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, np.ndarray, tuple[np.ndarray, ...]]]:
    """Route text, and iterate over (domain, token ids [S], the experts [S, K] that each MoE layer chose).

    Args:
        model: in evaluation mode.
        batches: (domain, tokens [B, T]).
    """
    device = model.token_embedding.weight.device
    for domain, tokens_BT in batches:
        _, routing = model.trunk(tokens_BT.to(device))
        yield domain, tokens_BT.flatten().numpy(), tuple(layer.expert_SK.cpu().numpy() for layer in routing)


def expert_use(
    config: ModelConfig, train: TrainConfig, run_dir: Path, data: TokenData, context: int, *, max_tokens: int = 0
) -> list[ExpertUse]:
    """Return one `ExpertUse` per MoE layer of a finished run, over its validation text.

    Args:
        context: tokens per sequence, T.
        max_tokens: bound on the tokens of each domain; 0 means no bound.

    Raises:
        ValueError: the run has no checkpoint of its last step.
    """
    last = checkpoint.weights_of(run_dir)
    model = build(config, train.seed, train.device)
    checkpoint.load_model(last, model)
    model.eval()
    layers = [(i + 1, experts) for i, experts in enumerate(config.experts) if experts]
    by_domain: dict[str, list[np.ndarray]] = {}
    by_token = [np.zeros((config.vocab, experts), np.int64) for _, experts in layers]
    batches = validation_batches(data, train.batch_size, context, max_tokens)
    for domain, ids_S, routing in routed(model, ((domain, tokens_BT) for domain, tokens_BT, _ in batches)):
        counts = by_domain.setdefault(domain, [np.zeros(experts, np.int64) for _, experts in layers])
        for i, expert_SK in enumerate(routing):
            for expert_S in expert_SK.T:
                counts[i] += np.bincount(expert_S, minlength=layers[i][1])
                np.add.at(by_token[i], (ids_S, expert_S), 1)
    names = tuple(by_domain)
    return [
        ExpertUse(number, names, np.stack([by_domain[name][i] for name in names]), by_token[i])
        for i, (number, _) in enumerate(layers)
    ]
