"""Collect what the simulator's pages show: the explorer, and the scoreboard next to public measurements.

The explorer has the grid of simulated layouts that notebook 16 published (`experiments.what_if`); the scoreboard what
was recorded when the seal was opened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from moelab.plotting.axis import Axis, mark
from moelab.report.site.results import ODD, Result, strongest
from moelab.simulate import public
from moelab.simulate.search import BOUND

EXPLORER = "explorer.html"
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
        "rows": [line for key, line in packed if key == list(start.values())],
        "packed": {"fields": list(CHOICES), "heads": list(COLUMNS), "numbers": NUMBERS, "rows": packed},
    }


SCOREBOARD = "scoreboard.html"
LANES = {"open": "open", "good": "sealed, in range", "bad": "sealed, out of range"}
"""Style of a lane's marks -> its label."""
LEVELS = 4
"""Heights at which the marks of a lane take turns, so that neighbours stay apart."""


def scoreboard() -> dict[str, Any]:
    """Return the values of the page's template."""
    record, known = public.opened(), {m.id: m for m in public.measurements()}
    groups = []
    for name, words in public.GROUPS.items():
        rows = [{**r, "m": known[r["id"]]} for r in record["rows"] if known[r["id"]].group == name]
        for row in rows:
            row["ratio"] = 1 + row["error_percent"] / 100
        by_half = {s["half"]: s for s in record["summary"] if s["group"] == name}
        factor = by_half["sealed"]["range_factor"]
        axis = Axis.of_multiples("simulated time over measured time", [*(r["ratio"] for r in rows), factor, 1 / factor])
        groups.append(
            {
                "name": name,
                "words": words,
                "open": by_half["open"],
                "sealed": by_half["sealed"],
                "factor": factor,
                "axis": axis,
                "lanes": [(label, len(of), lane(of, axis, factor, style)) for style, label, of in _lanes(rows)],
                "rows": rows,
            }
        )
    return {"groups": groups, "record": record, "seal": public.seal(), "share": record["within"] / record["sealed"]}


def _lanes(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    kinds: dict[str, list[dict[str, Any]]] = {style: [] for style in LANES}
    for row in rows:
        kinds["open" if row["kind"] != "sealed" else "good" if row["within"] else "bad"].append(row)
    return [(style, LANES[style], of) for style, of in kinds.items() if of]


def lane(rows: Sequence[dict[str, Any]], axis: Axis, factor: float, style: str) -> Markup:
    """Return the marks of rows on an axis as an inline SVG, with lines at 1 and at the ends of the range."""
    height = 12 + 7 * LEVELS
    lines = [("zero", 1.0), ("paper", factor), ("paper", 1 / factor)]
    parts = []
    for name, value in lines:
        x = f"{axis.percent(value):.2f}%"
        parts.append(f'<line class="{name}" x1="{x}" x2="{x}" y1="0" y2="{height}"/>')
    for i, row in enumerate(sorted(rows, key=lambda r: r["ratio"])):
        at = f'<svg class="at" x="{axis.percent(row["ratio"]):.2f}%">{mark(style, 9 + 7 * (i % LEVELS))}</svg>'
        parts.append(at)
    return Markup(f'<svg class="plot row {style}" height="{height}" aria-hidden="true">{"".join(parts)}</svg>')
