"""Draw a value over the points of a sweep: curves over one varied setting, heat maps over two.

A table of points has a column for each varied setting, one that names a series (an arm, a claim), and columns of values
with their intervals, such as loss, loss_low and loss_high; numbers are missing where there are none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from moelab.plotting import figures
from moelab.plotting.palette import colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAR = 8
"""From this ratio of the largest to the smallest value of a setting on, its axis is logarithmic."""
BESIDE = 0.006
"""Distance of the series at a point, of the length of a measured axis."""


def draw(table: pd.DataFrame, varied: Sequence[str], *, series: str, values: Mapping[str, str]) -> Figure:
    """Return the figure of a table of points.

    Over one setting it has a panel for each value, with a curve for each series; over two a heat map of the first value
    for each series. Over more, the points stand side by side, in the table's order. Where the values have no label, the
    series have units of their own, and each a panel of its own.

    Args:
        varied, series: columns.
        values: column of a value -> the label of its axis; columns without any number are left out.
    """
    names, maps = list(dict.fromkeys(table[series])), len(varied) == 2
    values = {column: label for column, label in values.items() if table[column].notna().any()}
    first = next(iter(values))
    apart = not values[first]
    panels = [(first, [name]) for name in names] if maps or apart else [(column, names) for column in values]
    figures.theme()
    fig, axes = figures.panels(len(panels), height=3.0)
    for ax, (value, shown) in zip(axes, panels, strict=True):
        part = table[table[series].isin(shown)]
        if maps:
            heat_map(part, ax, *varied, value=value, of=part if apart else table)
        else:
            curves(part, ax, varied, series=series, value=value, of=table)
            ax.set_ylabel(values[value])
        if maps or apart:
            ax.set_title(str(shown[0]))
    return fig


def curves(table: pd.DataFrame, ax: Axes, varied: Sequence[str], *, series: str, value: str, of: pd.DataFrame) -> Axes:
    """Draw a value over the points, a line for each series, with its intervals, side by side at a point.

    Args:
        of: the table of all series, which determines their colours and the places of the points.
    """
    points = list(dict.fromkeys(of[list(varied)].itertuples(index=False, name=None)))
    measured = len(varied) == 1 and all(_is_number(at) for (at,) in points)
    places = {point: float(point[0]) if measured else float(i) for i, point in enumerate(points)}
    least, most = min(places.values()), max(places.values())
    wide = measured and 0 < FAR * least <= most
    table = table[table[value].notna()]
    names, palette = list(dict.fromkeys(table[series])), colors(list(dict.fromkeys(of[series])))
    for i, name in enumerate(names):
        part = table[table[series] == name].copy()
        part["at"] = [places[point] for point in part[list(varied)].itertuples(index=False, name=None)]
        part = part.sort_values("at")
        shift = (i - (len(names) - 1) / 2) * (BESIDE if measured else min(0.1, 0.6 / len(names)))
        at = part["at"] * (most / least) ** shift if wide else part["at"] + shift * (most - least if measured else 1)
        low, high = (list(part[f"{value}_{end}"].astype(float).fillna(part[value])) for end in ("low", "high"))
        look: dict[str, Any] = {"label": str(name), "color": palette[name], "line": len(varied) == 1}
        figures.our_points(ax, list(at), list(part[value]), low, high, **look)
    if wide:
        ax.set_xscale("log")
        ax.minorticks_off()
    ax.set_xticks(list(places.values()), ["; ".join(map(text, at)) for at in places])
    ax.set_xlabel("; ".join(varied))
    if len(names) > 1:
        figures.legend_below(ax)
    return ax


def heat_map(table: pd.DataFrame, ax: Axes, x: str, y: str, *, value: str, of: pd.DataFrame) -> Axes:
    """Draw a value over two settings as coloured cells, each with its number and half the width of its interval.

    Args:
        of: the table whose values determine the range of colours and the order of rows and columns.
    """
    xs, ys = (list(dict.fromkeys(of[name])) for name in (x, y))
    cells = [[math.nan] * len(xs) for _ in ys]
    for row in table.to_dict("records"):
        column, line = xs.index(row[x]), ys.index(row[y])
        cells[line][column] = row[value]
        low, high = row[f"{value}_low"], row[f"{value}_high"]
        half = "" if pd.isna(low) or pd.isna(high) else f"\n± {(high - low) / 2:.2g}"
        # On a ground of its own, because a picture keeps its colours on dark pages, and text does not.
        ground = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none"}
        ax.text(column, line, f"{row[value]:.4g}{half}", ha="center", va="center", fontsize=9, bbox=ground)
    limits = {"vmin": of[value].min(), "vmax": of[value].max()}
    ax.imshow(cells, aspect="auto", cmap="viridis_r", interpolation="nearest", **limits)
    ax.grid(visible=False)
    ax.set_xticks(range(len(xs)), [text(at) for at in xs])
    ax.set_yticks(range(len(ys)), [text(at) for at in ys])
    ax.set(xlabel=x, ylabel=y)
    return ax


def text(value: Any) -> str:
    """Return a setting's value as a short text: ``2048``, ``16.4 M``, ``0.001``, ``Dense, MoE-128``."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if not _is_number(value):
        return value if isinstance(value, str) else json.dumps(value)
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.6g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
