"""Pack the curves of a figure for an interactive chart, which `moelab/report/templates/curves.js` draws with uPlot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moelab.plotting import svg
from moelab.plotting.palette import DASHES, colors, ranks

MAX_ROWS = 60_000
"""Points of a chart; a figure with more keeps its picture only."""


@dataclass(frozen=True)
class Curves:
    """The curves of a figure.

    Attributes:
        values: ``loss``, or ``gap`` where the figure shows differences.
        against: the arm whose loss is subtracted, as far as the data says it.
        along: these are evaluations along training; else they are final losses of runs of these lengths.
        arms: arm -> its colours on light and dark pages, and the dashes by which arms of one colour differ.
        grids: the training tokens of the points; several curves share a grid.
        series: arm, seed, index of the grid, values.
    """

    values: str
    against: str
    along: bool
    arms: dict[str, tuple[str, str, tuple[float, ...]]]
    grids: list[list[float]]
    series: list[tuple[str, int, int, list[float]]]


def pack(rows: Sequence[dict[str, Any]], order: Sequence[str] = ()) -> Curves | None:
    """Return the curves in a figure's data, None if it has none.

    Curves are rows with an arm, a seed, training tokens and a `loss` or `gap`, at least three of each arm and seed, and
    of none two at the same tokens. The untrained model is left out: its loss would compress the rest.

    Args:
        order: all arms of the experiment in the order in which they are to be listed; others follow.
    """
    if not rows or len(rows) > MAX_ROWS or not {"arm", "seed", "tokens"} <= rows[0].keys():
        return None
    column = next((name for name in ("gap", "loss") if name in rows[0]), None)
    if column is None:
        return None
    points_of: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows:
        tokens, value = row.get("tokens"), row.get(column)
        if not isinstance(tokens, int | float) or not isinstance(value, int | float):
            continue
        if tokens > 0:
            points_of.setdefault((str(row["arm"]), int(row["seed"])), []).append((tokens, value))
    points_of = {key: sorted(points) for key, points in points_of.items() if len(points) >= 3}
    repeated = any(len(dict(points)) < len(points) for points in points_of.values())  # a ladder's, of several widths
    if repeated or not points_of:
        return None
    grids: list[list[float]] = []
    series = []
    for (arm, seed), points in points_of.items():
        grid = [tokens for tokens, _ in points]
        if grid not in grids:
            grids.append(grid)
        series.append((arm, seed, grids.index(grid), [round(value, 5) for _, value in points]))
    differences = column == "gap" or any(value < 0 for points in points_of.values() for _, value in points)
    there = list(dict.fromkeys(arm for arm, _ in points_of))
    palette = colors(list(dict.fromkeys([*order, *there])))  # of all arms: each keeps its colour in every figure
    drawn = {arm: color for arm, color in palette.items() if arm in there}
    dashes = {arm: DASHES[rank % len(DASHES)] for arm, rank in ranks(drawn).items()}
    arms = {arm: (color, svg.dark_color(color), dashes[arm]) for arm, color in drawn.items()}
    kind, along = "gap" if differences else "loss", "per_parameter" not in rows[0]
    return Curves(kind, str(rows[0].get("against", "")), along, arms, grids, series)
