"""Collect what the explorer shows: the grid of simulated layouts that notebook 16 published (`experiments.what_if`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "Batch": lambda row: f"{row['batch']}",
    "ms a token": lambda row: f"{row['latency_ms']:.3g}",
    "range": lambda row: f"{row['low_ms']:.3g} to {row['high_ms']:.3g}" if row.get("low_ms") else "–",
    "tokens/s/GPU": lambda row: f"{row['tokens_per_s_per_gpu']:,.0f}",
    "per million tokens": lambda row: (
        f"{row['cost_per_million']:.3g} {row['currency']}" if row.get("cost_per_million") else "–"
    ),
    "GiB a GPU": lambda row: f"{row['gib_per_gpu']:.1f} of {row['memory_gib']:.1f}",
    "GPUs": lambda row: f"{row['gpus']}",
    "Layout": lambda row: row["layout"].partition(", ")[2].rpartition(", ")[0],
    "Bound by": lambda row: BOUND.get(row["bound"], row["bound"]),
    "Nearest measurement": lambda row: row.get("nearest") or "–",
}
"""Head of a column -> its text in a row."""


def explorer(results: Sequence[Result]) -> dict[str, Any] | None:
    """Return the values of the explorer's template; None where no result has a grid, or one that can be read."""
    result = strongest(results, "what-if", DATA)
    try:
        rows = result.rows_or_none(DATA) if result else []
        packed = [[[str(row[name]) for name in CHOICES], [text(row) for text in COLUMNS.values()]] for row in rows]
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
        "heads": list(COLUMNS),
        "numbers": NUMBERS,
        "rows": [line for key, line in packed if key == list(start.values())],
        "packed": {"fields": list(CHOICES), "heads": list(COLUMNS), "numbers": NUMBERS, "rows": packed},
    }
