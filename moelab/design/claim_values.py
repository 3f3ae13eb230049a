"""Say in numbers what a claim states: the paper's range, its "no effect", the effect that plans are made for."""

from __future__ import annotations

import math

from moelab.paper.claims import Claim

TOLERANCE = 0.15
"""Share of the paper's value by which a simulated number, or one claimed *at* a number, may differ and still count as
the paper's; also the range of a measured number where the paper gives none."""


def neutral(claim: Claim) -> float:
    """Return what "no effect" is for a claim."""
    return 1.0 if claim.kind == "ratio" else 0.0


def unit(claim: Claim) -> str:
    """Return the unit of a claim's differences with a space in front; empty for a ratio."""
    if claim.unit not in ("", "x", "nats/token"):
        return f" {claim.unit}"
    return " nats" if "loss" in claim.quantity else ""


def paper_range(claim: Claim, *, exact: bool = False, wide: bool = False) -> tuple[float, float]:
    """Return the range in which a value is the paper's; for a bound that in which it is kept.

    That is the paper's own range, open on a side that it leaves empty, or `TOLERANCE` of its value where it gives none.
    Two bounds that the text states ("4 to 5 times") are exact; a number at which something happens has the wider of
    its reading and `TOLERANCE`.

    Args:
        exact: a value without tolerance, for arithmetic.
        wide: the wider of both, for simulations.
    """
    value = neutral(claim) if claim.value is None else claim.value
    if claim.kind == "bound" and claim.direction != "equal":
        return (-math.inf, value) if claim.direction == "lower" else (value, math.inf)
    near = 0.0 if exact else TOLERANCE * abs(value)
    if claim.value_low is None and claim.value_high is None:
        return value - near, value + near
    low, high = (
        v if v is not None else value if wide else end
        for v, end in ((claim.value_low, -math.inf), (claim.value_high, math.inf))
    )
    if wide or (claim.kind == "bound" and "quoted text" not in claim.how):
        return min(low, value - near), max(high, value + near)
    return low, high


def effect(claim: Claim) -> float | None:
    """Return the effect that a plan is made for, with its sign: half the paper's, or the smallest of interest."""
    if claim.direction == "equal" or claim.kind == "bound":
        return None
    if claim.value is not None:
        return (claim.value - neutral(claim)) / 2
    return claim.smallest and (-claim.smallest if claim.direction == "lower" else claim.smallest)


def paper_text(claim: Claim) -> str:
    """Return the paper's value with its unit, or its bounds, or the side that it claims."""
    if claim.kind == "bound" and claim.direction == "equal" and "quoted text" in claim.how and claim.value_low:
        return f"{claim.value_low:g} to {claim.value_high:g} {claim.unit}"
    return claim.direction if claim.value is None else f"{claim.value:g} {claim.unit}".strip()
