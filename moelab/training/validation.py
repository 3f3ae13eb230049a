"""Compute a model's validation loss, on one process or shared by ranks."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from moelab.config import TrainConfig
from moelab.data.batches import PAIRS, bits_per_byte, overall_loss, pairs, validation_batches
from moelab.data.tokens import TokenData
from moelab.engine.collectives import all_reduce
from moelab.engine.launch import process
from moelab.engine.mesh import Mesh
from moelab.models.attention import uses_kernel
from moelab.models.gpt import GPT
from moelab.models.products import fastest_products
from moelab.training.precision import autocast


@torch.no_grad()
def evaluate(
    model: GPT,
    data: TokenData,
    config: TrainConfig,
    context: int,
    *,
    max_tokens: int = 0,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Return the validation loss in nats per token and in bits per byte of text, over all domains and by domain.

    Also ``by_pair``: the evaluated tokens' loss by what the sequence has shown before of a token and the next one
    (`moelab.data.batches.pairs`), with the shares of the tokens. It tells how well a model copies from its context.

    Args:
        model: the model; it is in training mode afterwards.
        context: tokens per sequence, T.
        max_tokens: bound on the tokens of each domain; 0 means no bound.
        mesh: the ranks that share the work, all of which call this function; None means this process alone.
    """
    model.eval()
    world, mine = (mesh.data.size, mesh.data.index) if mesh else (1, 0)
    domains = sorted(data.validation)
    sums = torch.zeros(len(domains), len(PAIRS), 2, dtype=torch.float64)  # nats, tokens
    # As many sequences at a time as training takes: what fits there fits here, and many ranks have work.
    batches = validation_batches(data, config.micro_batch or config.batch_size, context, max_tokens)
    while group := list(itertools.islice(batches, world)):
        process.beat()
        # All ranks run the model equally often, if necessary without tokens, because other ranks may need their
        # experts.
        domain, tokens_BT, targets_BT = group[mine % len(group)]
        if mine >= len(group):
            tokens_BT, targets_BT = tokens_BT[:0], targets_BT[:0]
        with (
            fastest_products(config.device == "cpu" and uses_kernel(model.config, context)),
            autocast(config),
        ):
            output = model(tokens_BT.to(config.device), targets_BT=targets_BT.to(config.device), reduction="none")
        nats_N = output.loss.double().cpu()
        found = torch.stack([nats_N, torch.ones_like(nats_N)], 1)
        sums[domains.index(domain)].index_add_(0, pairs(tokens_BT, targets_BT).flatten(), found)
    if mesh and world > 1:
        sums = sums.to(mesh.device)
        all_reduce(sums, mesh.data, "metrics")
    model.train()
    losses = {domain: nats / count for domain, (nats, count) in zip(domains, sums.sum(1).tolist(), strict=True)}
    by_pair = {kind: (nats, int(count)) for kind, (nats, count) in zip(PAIRS, sums.sum(0).tolist(), strict=True)}
    tokens = int(sums[..., 1].sum())
    overall = overall_loss(data, losses)
    return {
        "loss": overall,
        "bits_per_byte": bits_per_byte(data, overall),
        "by_domain": {
            domain: {"loss": loss, "bits_per_byte": bits_per_byte(data, loss, domain)}
            for domain, loss in losses.items()
        },
        "by_pair": {kind: {"loss": nats / n, "share": n / tokens} for kind, (nats, n) in by_pair.items() if n},
        "validation_tokens": tokens,
    }
