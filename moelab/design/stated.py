"""Say in numbers what a claim states: the paper's range, its "no effect", the effect that plans are made for."""

from __future__ import annotations

import math
from typing import Any

from moelab.design import sequential
from moelab.design.verdicts import Verdict
from moelab.paper.claims import Claim
from moelab.statistics import Estimate

TOLERANCE = 0.15
"""Share of the paper's value by which a simulated number may differ and still count as the paper's; also the range of a
measured number where the paper gives none."""


def neutral(claim: Claim) -> float:
    """Return what "no effect" is for a claim."""
    return 1.0 if claim.kind == "ratio" else 0.0


def unit(claim: Claim) -> str:
    """Return the unit of a claim's differences with a space in front; empty for a ratio."""
    return " nats" if "loss" in claim.quantity else f" {claim.unit}" if claim.unit not in ("", "x") else ""


def paper_range(claim: Claim, exact: bool = False) -> tuple[float, float]:
    """Return the paper's range: as read, open on the side it leaves empty; `TOLERANCE` of its value if it gives none.

    Arithmetic has no tolerance. A bound is open on the side that keeps it; claimed at a number, it is the range as
    read or `TOLERANCE` of the value on either side, whichever is wider.
    """
    value = neutral(claim) if claim.value is None else claim.value
    if claim.kind == "bound" and claim.direction != "equal":
        return (-math.inf, value) if claim.direction == "lower" else (value, math.inf)
    wide = 0.0 if exact else TOLERANCE * abs(value)
    if claim.kind == "bound":
        low, high = (value if v is None else v for v in (claim.value_low, claim.value_high))
        return min(low, value - wide), max(high, value + wide)
    if claim.value_low is None and claim.value_high is None:
        return value - wide, value + wide
    return (
        -math.inf if claim.value_low is None else claim.value_low,
        math.inf if claim.value_high is None else claim.value_high,
    )


def short_of_bound(claim: Claim, low: float, high: float) -> bool:
    """Return whether the paper says "more than x" and an interval includes "no effect" and lies wholly short of x."""
    paper_low, paper_high = paper_range(claim)
    open_range = math.isinf(paper_low) or math.isinf(paper_high)
    return open_range and low <= neutral(claim) <= high and (high < paper_low or low > paper_high)


def effect(claim: Claim) -> float | None:
    """Return the effect that a plan is made for, with its sign: half the paper's, or the smallest of interest."""
    if claim.direction == "equal" or claim.kind == "bound":
        return None
    if claim.value is not None:
        return (claim.value - neutral(claim)) / 2
    return claim.smallest and (-claim.smallest if claim.direction == "lower" else claim.smallest)


def row(claim: Claim, estimate: Estimate | None, of: str, note: str, stored: dict[str, Any]) -> Verdict:
    """Return the row of a verdict, with the interval at the level of its look where there are two samples or more."""
    paper = claim.direction if claim.value is None else f"{claim.value:g} {claim.unit}".strip()
    low = high = None
    if estimate is not None and estimate.samples > 1 and math.isfinite(estimate.error):
        low, high = estimate.interval(sequential.level(estimate.samples, stored.get("looks", ())))
    return Verdict(
        claim=claim.id,
        statement=claim.statement,
        where=claim.where,
        paper=paper,
        ours=None if estimate is None else estimate.mean,
        low=low,
        high=high,
        unit=claim.unit,
        samples=0 if estimate is None else estimate.samples,
        verdict=of,
        note=note,
        **stored,
    )
