"""Judge claims of the paper by simulations, which have no seeds and no spread."""

from __future__ import annotations

from dataclasses import replace

from moelab.design import claim_values
from moelab.design.judging import judge, restate
from moelab.design.verdicts import CANNOT_TELL, FAILS, FITTED, HOLDS, SIMULATED, Verdict
from moelab.paper.claims import Claim

APART = 0.05
"""Share by which two simulated values must differ before their order counts: the simulator's latencies are predicted
with a median error of more than that, much of it common to both."""


def judge_simulated(
    claim: Claim, ours: float | None, *, against: float | None = None, note: str = "", fitted: bool = False
) -> Verdict:
    """Return the verdict of a simulation, which has no seeds and no spread.

    A number within 15 % of the paper's value, or in its range, is the paper's; else it is larger or smaller, or on the
    other side. Limits hold or do not. An order counts where the two values are `APART`.

    Args:
        ours: None where it is not simulated.
        against: for an ordering, the value of its right side; `ours` is left - right.
        fitted: the constants of the simulator were fitted on this number.

    Raises:
        ValueError: an ordering without `against`.
    """
    row = judge(claim, note=note)
    if ours is None:
        return row
    how = "from bars the constants were fitted on" if fitted else "on numbers that it was not fitted on"
    row = replace(
        row, ours=ours, kind=FITTED if fitted else SIMULATED, why="", note=f"Simulated, {how}. {note}".strip()
    )
    if claim.kind != "ordering" and claim.value is not None:
        return restate(claim, row)
    if not against:
        raise ValueError(f"{claim.id}: the order of simulated values needs the value of the right side")
    apart = abs(ours / against)
    directed = (ours < claim_values.neutral(claim)) == (claim.direction == "lower")
    why = f"The two are {100 * apart:.2g} % apart; an order counts from {100 * APART:g} %."
    return replace(row, verdict=CANNOT_TELL if apart < APART else HOLDS if directed else FAILS, why=why)
