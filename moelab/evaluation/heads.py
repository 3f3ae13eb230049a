"""Measure what each attention head of a trained model is for: how far the loss rises without it, by kind of token.

A head that copies (an induction head, Olsson et al. 2022, arXiv 2209.11895) is needed for tokens that can be copied
from the context and for little else. Reads a model and trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab.data.batches import PAIRS, pairs, validation_batches
from moelab.data.tokens import TokenData
from moelab.models import GPT

COPIES = 0.3
"""Nats by which removing a head must raise the loss of copyable tokens more than that of others: then it copies. Set
after the heads of two runs had been seen: theirs lie below 0.1 or above 0.5."""


@dataclass(frozen=True)
class Head:
    """Hold what the loss becomes without one head.

    Attributes:
        layer, head: counted from 1.
        rise: kind of token (`moelab.data.batches.PAIRS`) -> loss without the head minus loss with it, nats per token.
    """

    layer: int
    head: int
    rise: dict[str, float]

    @property
    def copies(self) -> bool:
        """Whether the head is needed for copying, see `COPIES`."""
        return self.rise["repeated"] - max(self.rise["changed"], self.rise["new"]) > COPIES


@torch.no_grad()
def head_effects(model: GPT, data: TokenData, batch_size: int, context: int, max_tokens: int) -> list[Head]:
    """Return, for each head of each layer, how far the loss rises where its output is zero.

    Args:
        model: in evaluation mode; unchanged afterwards.
        batch_size, context: sequences at a time, and tokens of each.
        max_tokens: validation tokens of each domain; 0 means all.
    """
    batches = [(x, y) for _, x, y in validation_batches(data, batch_size, context, max_tokens)]
    whole, found = _losses(model, batches), []
    for layer, block in enumerate(model.blocks, 1):
        weight_MX, D = block.attention.out.weight, block.attention.head_size
        for head in range(block.attention.heads):
            columns = slice(head * D, (head + 1) * D)
            kept = weight_MX[:, columns].clone()
            weight_MX[:, columns] = 0
            without = _losses(model, batches)
            weight_MX[:, columns] = kept
            rise = {kind: float(w - l) for kind, w, l in zip(PAIRS, without, whole, strict=True)}
            found.append(Head(layer, head + 1, rise))
    return found


def _losses(model: GPT, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean loss of each kind of token, in the order of `PAIRS`; NaN for a kind that does not occur."""
    sums = torch.zeros(len(PAIRS), 2, dtype=torch.float64)
    for tokens_BT, targets_BT in batches:
        nats_N = model(tokens_BT, targets_BT=targets_BT, reduction="none").loss.double()
        sums.index_add_(0, pairs(tokens_BT, targets_BT).flatten(), torch.stack([nats_N, torch.ones_like(nats_N)], 1))
    return sums[:, 0] / sums[:, 1]
