"""Draw claims as rows: the paper's value and our interval on an axis that several rows share.

A row is an inline SVG whose horizontal places are percentages, so it is as wide as its cell on every screen. Screen
readers skip it: the same numbers stand beside it as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from moelab.plotting.axis import Axis
from moelab.report.site.claims import ClaimRow, sign
from moelab.report.site.template import ORDERED


def family(row: ClaimRow) -> tuple[bool, str]:
    """Return what rows must have in common to share an axis: whether it is relative, and its name."""
    claim = row.claim
    if claim.kind in ("ratio", "bound") and claim.value:
        return True, "our value over the paper’s"
    unit = claim.unit or next((unit for word, unit in ORDERED.items() if word in claim.quantity), "")
    unit = unit.replace("nats/token", "nats per token")
    return False, f"difference in {unit}" if unit not in ("", "x") else ""


def _axis(relative: bool, name: str, rows: Sequence[ClaimRow]) -> Axis:
    every = [v for row in rows for part in places(row) for v in part]
    return Axis.of_multiples(name, every) if relative else Axis.of_differences(name, every)


def places(row: ClaimRow) -> tuple[list[float], list[float]]:
    """Return the paper's value with its range, and our value with its interval, in the unit of the row's axis."""
    claim = row.claim
    by = claim.number if family(row)[0] else 1.0
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


def row_plot(row: ClaimRow, axis: Axis | None) -> Markup:
    """Return a row: the paper's value as a hollow diamond with its range, ours with its interval below.

    The shape and colour of our mark are those of the verdict; a vertical line marks the axis's neutral place.
    """
    if row.ours is None or axis is None:
        return Markup("")
    return Markup(axis.row(*places(row), sign(row.verdict)[1]))
