"""Draw benchmarks, all in one way: a panel for each case, a series for each candidate, medians with their spread.

Rows are those of `moelab.bench.harness.Row.json`, or as read from a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.plotting import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


MARKERS = "os^D"
"""Markers that tell series apart which share a colour, because there are more series than colours."""


def ratios(
    measured: Rows,
    *,
    title: str,
    x: str = "experts",
    xlabel: str = "",
    panel: str | None = None,
    tick: Callable[[Any], str] = str,
    panel_title: Callable[[Any], str] = str,
    line: bool = False,
) -> Figure:
    """Draw times over those of `against`: medians of the rounds' ratios, bars from the least to the greatest.

    Args:
        x: the column along the horizontal axis, its values at equal distances.
        panel: a column, one panel for each of its values.
        tick, panel_title: the text of a value of `x` and of `panel`.
        line: join the points of a candidate.
    """
    against = measured[0]["against"]
    shown = [row for row in measured if row["candidate"] != against]
    fig, axes = _panels(shown, panel, panel_title)
    palette = figures.colors(list(dict.fromkeys(row["candidate"] for row in shown)))
    for ax, rows in axes:
        _series(ax, rows, x, palette, ("ratio", "ratio_min", "ratio_max"), tick, line)
        ax.axhline(1, color="#888888", linewidth=1)
        ax.set_ylabel(f"time / {against} (median, least to greatest)")
    axes[-1][0].set_xlabel(xlabel or x)
    return _finish(fig, title, measured)


def times(
    measured: Rows,
    *,
    title: str,
    x: str,
    panels: Sequence[tuple[str, Rows]],
    ylabel: str,
    high: str = "max_ms",
) -> Figure:
    """Draw milliseconds, bars from the median to `high`, and the floor of the first candidate's row as a line.

    Args:
        panels: (title, its rows); the horizontal axis is `x`, or a row's "across" column where it names one.
    """
    figures.theme()
    fig, axes = figures.panels(len(panels))
    palette = figures.colors(list(dict.fromkeys(row["candidate"] for row in measured)))
    for ax, (heading, rows) in zip(axes, panels, strict=True):
        across = rows[0].get("across", x)
        _series(ax, rows, across, palette, ("median_ms", "median_ms", high), str, False)
        floors: dict[Any, float] = {}
        for row in rows:
            floors.setdefault(row[across], row["floor_ms"])
        for at, (_, value) in enumerate(floors.items()):
            ends = [at - 0.4, at + 0.4]
            ax.plot(ends, [value, value], color="#444444", linewidth=1.5, label="_" if at else "floor")
        ax.set_title(heading)
        ax.tick_params("x", rotation=30 if across == x else 0)
        ax.set(xlabel="" if across == x else across, ylabel=ylabel)
    return _finish(fig, title, measured)


def possible() -> bool:
    """Return whether there is what figures are drawn with; say so where it is missing, as on a borrowed machine."""
    missing = find_spec("seaborn") is None
    if missing:
        print("no figure: seaborn is not installed")
    return not missing


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG (`moelab.plotting.figures.save`), `path` without suffix, and close it."""
    import matplotlib.pyplot as plt

    written = figures.save(figure, path)
    plt.close(figure)
    print(f"drawn to {written}")


def _panels(shown: Rows, panel: str | None, text: Callable[[Any], str]) -> tuple[Figure, list[tuple[Axes, Rows]]]:
    figures.theme()
    values = list(dict.fromkeys(row[panel] for row in shown)) if panel else [None]
    fig, axes = figures.panels(len(values))
    for ax, value in zip(axes, values, strict=True):
        ax.set_title("" if value is None else text(value))
    parts = [[row for row in shown if panel is None or row[panel] == value] for value in values]
    return fig, list(zip(axes, parts, strict=True))


def _series(
    ax: Axes,
    rows: Rows,
    x: str,
    palette: Mapping[str, str],
    columns: tuple[str, str, str],
    tick: Callable[[Any], str],
    line: bool,
) -> None:
    """One series for each candidate, side by side at each value of `x`; the scale is logarithmic."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    values = list(dict.fromkeys(row[x] for row in rows))
    names = [name for name in palette if any(row["candidate"] == name for row in rows)]
    center, low, high = columns
    shared = {
        name: sum(palette[other] == palette[name] for other in list(palette)[:at]) for at, name in enumerate(palette)
    }
    for i, name in enumerate(names):
        mine = [row for row in rows if row["candidate"] == name]
        shift = 0.0 if line else (i - (len(names) - 1) / 2) * min(0.2, 0.8 / len(names))
        at = [values.index(row[x]) + shift for row in mine]
        y = [row[center] for row in mine]
        # The 95th percentile may lie under a median of medians.
        lows, highs = [min(row[low], row[center]) for row in mine], [max(row[high], row[center]) for row in mine]
        figures.our_points(
            ax,
            at,
            y,
            lows,
            highs,
            label=name,
            color=palette[name],
            line=line,
            marker=MARKERS[shared[name] % len(MARKERS)],
        )
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    ax.yaxis.set_minor_formatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "25" else "")
    bottom, top = ax.get_ylim()
    decades = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)))  # too few labels at their 1, 2 and 5?
    if sum(bottom <= m * 10**decade <= top for decade in decades for m in (1, 2, 5)) < 3:
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xticks(range(len(values)), [tick(value) for value in values])


def _finish(fig: Figure, title: str, measured: Rows) -> Figure:
    figures.legend_below(fig.axes[-1], of=fig.axes)
    clock = " (processor time)" if measured[0].get("clock") == "cpu" else ""
    return figures.title(fig, f"{title}{clock}")
