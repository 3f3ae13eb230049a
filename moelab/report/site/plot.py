"""Draw claims as rows: the paper's value and our interval on an axis that several rows share.

A row is an inline SVG whose horizontal places are percentages, so it is as wide as its cell on every screen. Screen
readers skip it: the same numbers stand beside it as text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from moelab.report.site.claims import ClaimRow, sign
from moelab.report.site.template import ORDERED

EDGE = 4.0
"""Percent of the width that stays free on either side, for the marks."""


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


def family(row: ClaimRow) -> tuple[bool, str]:
    """Return what rows must have in common to share an axis: whether it is relative, and its name."""
    claim = row.claim
    if claim.kind in ("ratio", "bound") and claim.value:
        return True, "our value over the paper’s"
    unit = claim.unit or next((unit for word, unit in ORDERED.items() if word in claim.quantity), "")
    unit = unit.replace("nats/token", "nats per token")
    return False, f"difference in {unit}" if unit not in ("", "x") else ""


def places(row: ClaimRow) -> tuple[list[float], list[float]]:
    """Return the paper's value with its range, and our value with its interval, in the unit of the row's axis."""
    claim = row.claim
    by = claim.value if family(row)[0] else 1.0
    stated = [v / by for v in (claim.value, claim.value_low, claim.value_high) if v is not None]
    ours = [v / by for v in (row.ours, row.low, row.high) if v is not None]
    return stated, ours


def axes(rows: Iterable[ClaimRow]) -> list[tuple[Axis | None, list[ClaimRow]]]:
    """Return the rows that have a value of ours with the axis that they share, in the order of their first row.

    Rows whose quantity has no unit to draw, such as a ratio to which the paper gives no number, have no axis.
    """
    groups: dict[tuple[bool, str], list[ClaimRow]] = {}
    for row in rows:
        if row.ours is not None:
            groups.setdefault(family(row), []).append(row)
    return [(_axis(*key, members) if key[1] else None, members) for key, members in groups.items()]


def _axis(relative: bool, name: str, rows: Sequence[ClaimRow]) -> Axis:
    every = [v for row in rows for part in places(row) for v in part] + [1.0 if relative else 0.0]
    if relative:
        low, high = min(every), max(every)
        low, high = min(low / 1.05, 0.8), max(high * 1.05, 1.25)
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0) if low <= t <= high]
        more = [t for t in (0.8, 0.9, 1.1, 1.2) if low <= t <= high]
        return Axis(name, True, low, high, tuple(ticks if len(ticks) > 1 else sorted([*ticks, *more])))
    low, high = min(every), max(every)
    room = 0.04 * ((high - low) or 1.0)
    low, high = low - room, high + room
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (f * step) <= 6)
    first = math.ceil(low / step)
    ticks_ = tuple(round(i * step, 10) for i in range(first, math.floor(high / step) + 1))
    return Axis(name, False, low, high, ticks_)


def ruler(axis: Axis) -> Markup:
    """Return the axis itself as an inline SVG: ticks with their labels."""
    parts = ['<line class="zero" x1="0" x2="100%" y1="14" y2="14"/>']
    for tick in axis.ticks:
        x = f"{axis.percent(tick):.2f}%"
        parts.append(f'<line class="zero" x1="{x}" x2="{x}" y1="14" y2="18"/>')
        parts.append(f'<text x="{x}" y="10" text-anchor="middle">{axis.label(tick)}</text>')
    return Markup(f'<svg class="plot ruler" height="18" aria-hidden="true">{"".join(parts)}</svg>')


def row_plot(row: ClaimRow, axis: Axis | None) -> Markup:
    """Return a row: the paper's value as a hollow diamond with its range, ours with its interval below.

    The shape and colour of our mark are those of the verdict; a vertical line marks the axis's neutral place.
    """
    if row.ours is None or axis is None:
        return Markup("")
    stated, ours = places(row)

    def x(value: float) -> str:
        return f"{axis.percent(value):.2f}%"

    parts = [f'<line class="zero" x1="{x(axis.neutral)}" x2="{x(axis.neutral)}" y1="0" y2="26"/>']
    if stated:
        if min(stated) < max(stated):
            parts.append(f'<line class="paper" x1="{x(min(stated))}" x2="{x(max(stated))}" y1="8" y2="8"/>')
        parts.append(f'<svg class="at" x="{x(stated[0])}"><path class="paper point" d="M0 3l5 5l-5 5l-5 -5z"/></svg>')
    if min(ours) < max(ours):
        parts.append(f'<line class="ours" x1="{x(min(ours))}" x2="{x(max(ours))}" y1="19" y2="19"/>')
    parts.append(f'<svg class="at" x="{x(ours[0])}">{mark(sign(row.verdict)[1])}</svg>')
    return Markup(f'<svg class="plot row {sign(row.verdict)[1]}" height="26" aria-hidden="true">{"".join(parts)}</svg>')


def mark(style: str, y: float = 19) -> Markup:
    """Return the mark of a kind of verdict around x = 0: shapes tell apart what colours do."""
    shapes = {
        "good": f'<circle class="ours full" cx="0" cy="{y}" r="4.2"/>',
        "part": f'<path class="ours full" d="M0 {y - 5}l5 9h-10z"/>',
        "bad": f'<path class="ours full" d="M-4.2 {y - 4.2}h8.4v8.4h-8.4z"/>',
    }
    return Markup(shapes.get(style, f'<circle class="ours open" cx="0" cy="{y}" r="3.8"/>'))
