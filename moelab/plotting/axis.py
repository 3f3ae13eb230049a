"""Choose an axis that several rows of a page share, and draw its ticks as an inline SVG that is as wide as its cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

EDGE = 4.0
"""Percent of the width that stays free on either side, for the marks."""

LOWEST = 0.01
"""Smallest multiple that an axis shows."""


@dataclass(frozen=True)
class Axis:
    """An axis that rows share.

    Attributes:
        name: what it shows, with its unit.
        relative: it shows multiples of the paper's number on a logarithmic scale, else the values on a linear one.
        low, high: its ends.
        ticks: where it is labelled.
    """

    name: str
    relative: bool
    low: float
    high: float
    ticks: tuple[float, ...]

    @property
    def neutral(self) -> float:
        """Where the paper's number (relative) or no difference stands."""
        return 1.0 if self.relative else 0.0

    def percent(self, value: float) -> float:
        """Return the horizontal place of a value on the axis, in percent; beyond its ends, the end."""
        low, high, at = self.low, self.high, value
        if self.relative:
            low, high, at = math.log(low), math.log(high), math.log(max(value, 1e-9))
        share = (at - low) / ((high - low) or 1.0)
        return EDGE + (100 - 2 * EDGE) * min(max(share, 0.0), 1.0)

    def label(self, tick: float) -> str:
        """Return the text at a tick."""
        return f"{tick:g}×" if self.relative else f"{tick:+g}".replace("-", "−") if tick else "0"

    @classmethod
    def of_multiples(cls, name: str, values: Sequence[float]) -> Axis:
        """Return the logarithmic axis on which these multiples and 1 fit; it begins at `LOWEST`.

        An interval of a few samples may reach below zero, where there is no logarithm.
        """
        low, high = max(min([*values, 1.0]), LOWEST), max([*values, 1.0])
        low, high = min(low / 1.05, 0.8), max(high * 1.05, 1.25)
        coarse = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0) if low <= t <= high]
        fine = [t for t in (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0) if low <= t <= high]
        return cls(name, True, low, high, tuple(coarse if len(coarse) > 1 else fine))

    @classmethod
    def of_differences(cls, name: str, values: Sequence[float]) -> Axis:
        """Return the linear axis on which these differences and 0 fit."""
        low, high = min([*values, 0.0]), max([*values, 0.0])
        room = 0.04 * ((high - low) or 1.0)
        low, high = low - room, high + room
        step = 10 ** math.floor(math.log10((high - low) / 2))
        step *= next(f for f in (1, 2, 2.5, 5) if (high - low) / (f * step) <= 4)  # a cell has 195 pixels
        first, last = math.ceil(low / step), math.floor(high / step)
        return cls(name, False, low, high, tuple(round(i * step, 10) for i in range(first, last + 1)))

    def ruler(self) -> str:
        """Return the axis itself as an inline SVG: ticks with their labels."""
        parts = ['<line class="zero" x1="0" x2="100%" y1="14" y2="14"/>']
        for tick in self.ticks:
            x = f"{self.percent(tick):.2f}%"
            parts.append(f'<line class="zero" x1="{x}" x2="{x}" y1="14" y2="18"/>')
            parts.append(f'<text x="{x}" y="10" text-anchor="middle">{self.label(tick)}</text>')
        return f'<svg class="plot ruler" height="18" aria-hidden="true">{"".join(parts)}</svg>'

    def row(self, stated: Sequence[float], ours: Sequence[float], style: str) -> str:
        """Return a row as an inline SVG: the paper's value as a hollow diamond, ours below in the shape of `style`.

        Args:
            stated: the paper's value, then the ends of its range; may be empty.
            ours: our value, then the ends of its interval.
        """
        x = [f"{self.percent(value):.2f}%" for value in (self.neutral, *stated, *ours)]
        zero, stated_x, ours_x = x[0], x[1 : 1 + len(stated)], x[1 + len(stated) :]
        parts = [f'<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="26"/>']
        if stated:
            parts.append(_span("paper", stated, stated_x, 8))
            parts.append(
                f'<svg class="at" x="{stated_x[0]}"><path class="paper point" d="M0 3l5 5l-5 5l-5 -5z"/></svg>'
            )
        parts.append(_span("ours", ours, ours_x, 19))
        parts.append(f'<svg class="at" x="{ours_x[0]}">{mark(style)}</svg>')
        return f'<svg class="plot row {style}" height="26" aria-hidden="true">{"".join(parts)}</svg>'


def _span(name: str, values: Sequence[float], x: Sequence[str], y: int) -> str:
    low, high = values.index(min(values)), values.index(max(values))
    return (
        f'<line class="{name}" x1="{x[low]}" x2="{x[high]}" y1="{y}" y2="{y}"/>' if values[low] < values[high] else ""
    )


def mark(style: str, y: float = 19) -> str:
    """Return the mark of a class of verdicts around x = 0: shapes tell apart what colours do."""
    shapes = {
        "good": f'<circle class="ours full" cx="0" cy="{y}" r="4.2"/>',
        "part": f'<path class="ours full" d="M0 {y - 5}l5 9h-10z"/>',
        "bad": f'<path class="ours full" d="M-4.2 {y - 4.2}h8.4v8.4h-8.4z"/>',
        "none": f'<path class="ours" d="M-3.4 {y - 3.4}l6.8 6.8m0 -6.8l-6.8 6.8"/>',
    }
    return shapes.get(style, f'<circle class="ours open" cx="0" cy="{y}" r="3.8"/>')
