"""Collect what the scoreboard shows: the simulator beside public measurements, as recorded when the seal was opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from moelab.plotting.axis import Axis, mark
from moelab.simulate import public

PAGE = "scoreboard.html"
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
