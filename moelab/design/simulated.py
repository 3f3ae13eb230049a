"""Judge claims of the paper by simulations, which have no seeds and no spread."""

from __future__ import annotations

from dataclasses import replace

from moelab.design import stated
from moelab.design.verdicts import (
    FITTED,
    NOT_TESTED,
    PREDICTED,
    SIMULATED_CLOSE,
    SIMULATED_DIRECTION,
    SIMULATED_FAILS,
    SIMULATED_HOLDS,
    SIMULATED_WITHIN,
    Verdict,
)
from moelab.paper.claims import Claim

APART = 0.05
"""Share by which two simulated values must differ before their order counts: the simulator's latencies are predicted
with a median error of more than that, much of it common to both."""


def judge_simulated(
    claim: Claim, ours: float | None, *, against: float | None = None, note: str = "", fitted: bool = False
) -> Verdict:
    """Return the verdict of a simulation, which has no seeds and no spread.

    A number is within 15 % of the paper's value, or in its range, or else only its direction holds or not. Limits hold
    or do not. An ordering does where the two values are `APART`, else it is within the simulator's error.

    Args:
        ours: None where it is not simulated.
        against: for an ordering, the value of its right side; `ours` is left - right.
        fitted: the constants of the simulator were fitted on this number.

    Raises:
        ValueError: an ordering without `against`.
    """
    if ours is None:
        return stated.row(claim, None, NOT_TESTED, note, {})
    if claim.kind == "ordering" or claim.value is None:
        if not against:
            raise ValueError(f"{claim.id}: the order of simulated values needs the value of the right side")
        apart = abs(ours / against)
        directed = (ours < stated.neutral(claim)) == (claim.direction == "lower")
        of = SIMULATED_CLOSE if apart < APART else SIMULATED_HOLDS if directed else SIMULATED_FAILS
        note = f"{note} {100 * apart:.2g} % apart; an order counts from {100 * APART:g} %.".strip()
    else:
        of = simulated(claim, ours)
    how = "Simulated, from bars the constants were fitted on." if fitted else "Simulated, predicted."
    row = stated.row(claim, None, of, f"{how} {note}".strip(), {"kind": FITTED if fitted else PREDICTED})
    return replace(row, ours=ours)


def simulated(claim: Claim, ours: float) -> str:
    """Return the verdict on a simulated limit or number."""
    lower, value = claim.direction == "lower", claim.number
    if claim.kind == "bound" and claim.direction != "equal":
        return SIMULATED_HOLDS if (ours <= value if lower else ours >= value) else SIMULATED_FAILS
    near = abs(ours - value) <= stated.TOLERANCE * abs(value)
    low, high = (value if v is None else v for v in (claim.value_low, claim.value_high))
    if near or low <= ours <= high:
        return SIMULATED_WITHIN
    directed = ours < stated.neutral(claim) if lower else ours > stated.neutral(claim)
    return SIMULATED_DIRECTION if directed and claim.direction != "equal" else SIMULATED_FAILS
