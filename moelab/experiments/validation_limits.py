"""Validate trained models with and without a capacity limit: what training with one costs, and what using one does.

A batch of the validation has text of one domain (`moelab.data.batches.validation_batches`), whose tokens prefer the
same experts, so that a limit drops more of them than in training, where a batch has text of all domains.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moelab import paths
from moelab.design import comparison
from moelab.lazy import pd
from moelab.runs import evaluations
from moelab.runs.collection import Runs
from moelab.runs.store import Run


def measure(runs: Runs, tokens: int = 0) -> list[dict[str, Any]]:
    """Return the validation loss of finished runs under other limits than in training; arguments as `validated`'s.

    Runs that have neither weights nor values measured with them are left out.

    Returns:
        Rows of arm, seed and what `validated` returns.
    """
    return [
        {"arm": run.spec.title, "seed": run.spec.train.seed, **losses}
        for run, losses in evaluations.measure_all(runs.finished, validated, tokens)
    ]


def validated(run: Run, tokens: int = 0) -> dict[str, float]:
    """Return a run's loss on the validation text, in nats per token, under three kinds of limit.

    Args:
        tokens: bound on the tokens of each domain; 0 means no bound.

    Returns:
        ``by_domain``: with the run's own limit in batches of one domain, as `moelab.training.validation` has it;
        ``mixed``: with its own limit in batches of sequences from all domains, as in training on one rank; ``without``:
        no limit.
        ``by_domain_dropped`` and ``mixed_dropped``: share of the tokens dropped, the mean over MoE layers.
    """
    import torch

    from moelab.data.batches import validation_batches
    from moelab.data.preparation import prepare
    from moelab.engine import checkpoint
    from moelab.inference.text import weights_for
    from moelab.models import build
    from moelab.training.precision import autocast

    spec, losses = run.spec, dict[str, Any]()
    data = prepare(spec.data, paths.home() / "data")
    size = spec.train.micro_batch or spec.train.batch_size  # a limit is one of a micro-batch
    alone = [(x, y) for _, x, y in validation_batches(data, size, spec.data.context, tokens)]
    x_NT, y_NT = torch.cat([x for x, _ in alone]), torch.cat([y for _, y in alone])
    order_N = torch.randperm(len(x_NT), generator=torch.Generator().manual_seed(0))
    mixed = [(x_NT[part], y_NT[part]) for part in order_N.split(size)]
    free = replace(spec.model, routing=replace(spec.model.routing, drop_tokens=False))
    for name, config, batches in (
        ("by_domain", spec.model, alone),
        ("mixed", spec.model, mixed),
        ("without", free, mixed),
    ):
        if not spec.model.routing.drop_tokens and losses:
            losses[name] = losses["by_domain"]  # equal up to rounding
            continue
        model = build(config, spec.train.seed, spec.train.device)
        checkpoint.load_model(weights_for(run.path, data), model)
        model.eval()
        nats = dropped = 0.0
        for x_BT, y_BT in batches:
            with (
                torch.no_grad(),
                autocast(spec.train),
            ):
                output = model(x_BT.to(spec.train.device), targets_BT=y_BT.to(spec.train.device), reduction="none")
            nats += float(output.loss.sum())
            dropped += sum(float((r.load_E - r.kept_E).sum()) for r in output.routing) / len(output.routing)
        losses[name] = nats / y_NT.numel()
        if config.routing.drop_tokens:
            losses[f"{name}_dropped"] = dropped / (y_NT.numel() * config.top_k)
    return losses


KINDS = {
    "by_domain": "with the limit, one domain a batch",
    "mixed": "with the limit, domains mixed",
    "without": "without a limit",
}
"""What `validated` returns -> what it is."""


def costs(final: pd.DataFrame, measured: list[dict[str, Any]], reference: str) -> pd.DataFrame:
    """Return columns arm, seed, validation and gap: an arm's loss minus the reference arm's, nats per token.

    Differences are within a seed.

    Args:
        final: as of `Runs.final`; its loss is that of batches of one domain.
        measured: rows of `measure`; the other kinds are left out unless all runs of `final` have them.
    """
    losses = {"by_domain": final[["arm", "seed", "validation_loss"]]}
    if 0 < len(measured) == len(final):
        table = pd.DataFrame(measured)
        for kind in ("mixed", "without"):
            losses[kind] = table.assign(validation_loss=table[kind])[["arm", "seed", "validation_loss"]]
    tables = [comparison.gaps(part, reference).assign(validation=KINDS[kind]) for kind, part in losses.items()]
    return pd.concat(tables, ignore_index=True)
