"""What the paper measured at inference: Figs 10 to 15 and the figures of the talks and the tutorial."""

from __future__ import annotations

from dataclasses import dataclass

from moelab.paper._table import Provenance, Table, load


@dataclass(frozen=True, kw_only=True)
class InferenceResult(Provenance):
    """One measured or stated number.

    figure: `fig-10` to `fig-15`, `sc22-slide-13`, `sc22-slide-23`, `tutorial` or `early-headline`. model: the
    architecture's name, or a description where the text has no name. variant: `standard`, `pr-moe`, `pr-moe-mos` or
    `dense`. system: `pytorch` (the authors' own distributed baseline), `deepspeed` (the full system),
    `deepspeed-generic` (its released part) or `other`. gpus: `None` when not stated.

    metric, with the unit of value: `latency` (ms per generated token), `throughput-per-gpu` (tokens/s/GPU),
    `throughput` (all GPUs, tokens/s), `speedup` and `cost-saving` (x, baseline over this system, so above 1 is better),
    `gpus-needed` (GPUs), `tokens-per-step-per-gpu` (tokens). baseline and baseline_gpus say what a ratio compares with.
    value_low and value_high: the range of the reading or of the printed digits.
    """

    figure: str
    model: str
    variant: str
    system: str
    baseline: str
    gpus: int | None
    baseline_gpus: int | None
    metric: str
    value: float
    value_low: float | None
    value_high: float | None
    unit: str


def inference_results(
    figure: str | None = None, model: str | None = None, system: str | None = None, metric: str | None = None
) -> Table[InferenceResult]:
    """Return the inference numbers, filtered by what is given; ValueError for a value that no row has."""
    rows = load("inference.csv", InferenceResult)
    return rows.where(figure=figure, model=model, system=system, metric=metric)
