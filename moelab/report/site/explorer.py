"""Collect what the explorer shows: the grid of simulated layouts that notebook 16 published (`experiments.what_if`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moelab.report.site.results import ODD, Result, strongest
from moelab.simulate.search import BOUND

PAGE = "explorer.html"
DATA = "grid.jsonl"
CHOICES = {"model": "Model", "cluster": "Cluster", "most_gpus": "GPUs at most", "best_by": "Best by"}
"""Column by which a reader chooses -> its label."""
NUMBERS = 7
"""Columns of the table that hold numbers, the first ones."""
START = {"model": "1.3B+MoE-128", "cluster": "a100-80gb", "most_gpus": "32", "best_by": "latency"}
HEADS = (
    "Batch",
    "ms a token",
    "range",
    "tokens/s/GPU",
    "per million tokens",
    "GiB a GPU",
    "GPUs",
    "Layout",
    "Bound by",
    "Nearest measurement",
)


def explorer(results: Sequence[Result]) -> dict[str, Any] | None:
    """Return the values of the explorer's template; None where no result has a grid, or one that can be read."""
    result = strongest(results, "what-if", DATA)
    try:
        rows = result.rows_or_none(DATA) if result else []
        packed = [[[str(row[name]) for name in CHOICES], _line(row)] for row in rows]
    except ODD:
        return None
    if not result or not packed:
        return None
    options = {name: list(dict.fromkeys(key[i] for key, _ in packed)) for i, name in enumerate(CHOICES)}
    start = {name: START[name] if START[name] in found else found[0] for name, found in options.items()}
    return {
        "result": result,
        "cached": result.summary.parameters.get("cached", "–"),
        "choices": [(name, label, options[name]) for name, label in CHOICES.items()],
        "start": start,
        "heads": HEADS,
        "numbers": NUMBERS,
        "rows": [line for key, line in packed if key == list(start.values())],
        "packed": {"fields": list(CHOICES), "heads": HEADS, "numbers": NUMBERS, "rows": packed},
    }


def _line(row: dict[str, Any]) -> list[str]:
    price = f"{row['cost_per_million']:.3g} {row['currency']}" if row.get("cost_per_million") else "–"
    return [
        f"{row['batch']}",
        f"{row['latency_ms']:.3g}",
        f"{row['low_ms']:.3g} to {row['high_ms']:.3g}" if row.get("low_ms") else "–",
        f"{row['tokens_per_s_per_gpu']:,.0f}",
        price,
        f"{row['gib_per_gpu']:.1f} of {row['memory_gib']:.1f}",
        f"{row['gpus']}",
        row["layout"].partition(", ")[2].rpartition(", ")[0],
        BOUND.get(row["bound"], row["bound"]),
        row.get("nearest") or "–",
    ]
