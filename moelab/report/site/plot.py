"""Draw a claim's numbers in a table cell: the paper's range and our interval on one small axis."""

from __future__ import annotations

from markupsafe import Markup

from moelab.report.site.claims import ClaimRow

WIDTH, HEIGHT, EDGE = 150, 26, 8


def interval_plot(row: ClaimRow) -> Markup:
    """Return an inline SVG: the paper's value as a hollow diamond with its range, ours as a dot with its interval.

    A vertical line marks no difference. Screen readers skip it, because the same numbers stand beside it as text. Empty
    for a claim without a value of ours.
    """
    claim = row.claim
    if row.ours is None:
        return Markup("")
    neutral = {"ratio": 1.0, "bound": None}.get(claim.kind, 0.0)
    stated = [v for v in (claim.value, claim.value_low, claim.value_high) if v is not None]
    ours = [v for v in (row.ours, row.low, row.high) if v is not None]
    every = [*stated, *ours, *([neutral] if neutral is not None else [])]
    low, high = min(every), max(every)
    span = (high - low) or 1.0

    def x(value: float) -> str:
        return f"{EDGE + (WIDTH - 2 * EDGE) * (value - low) / span:.1f}"

    parts = []
    if neutral is not None:
        parts.append(f'<path class="zero" d="M{x(neutral)} 2V{HEIGHT - 2}"/>')
    if stated:
        at = claim.value if claim.value is not None else stated[0]
        parts.append(f'<path class="paper" d="M{x(min(stated))} 8H{x(max(stated))}"/>')
        parts.append(f'<path class="paper point" d="M{x(at)} 3.5l4.5 4.5l-4.5 4.5l-4.5 -4.5z"/>')
    parts.append(f'<path class="ours" d="M{x(min(ours))} 19H{x(max(ours))}"/>')
    parts.append(f'<circle class="ours" cx="{x(row.ours)}" cy="19" r="3.6"/>')
    body = "".join(parts)
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" aria-hidden="true">'
        f"{body}</svg>"
    )
