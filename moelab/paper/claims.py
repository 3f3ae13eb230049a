"""The paper's checkable statements, one row each, by the experiment that tests them, in the order of the paper."""

from __future__ import annotations

from dataclasses import dataclass

from moelab.paper._table import Provenance, Table, load

KINDS = ("difference", "ratio", "ordering", "bound")
DIRECTIONS = ("lower", "higher", "equal")
SCALES = ("smoke", "quick", "cpu", "full", "gpu", "paper")
"""The sizes at which experiments run, from the smallest to the largest."""
PRIMARY, SECONDARY = "primary", "secondary"
TESTABLE_AT = (*SCALES, "simulated")


@dataclass(frozen=True, kw_only=True)
class Claim(Provenance):
    """One statement: `left` compared with `right` in `quantity`.

    kind says what `value` is: `difference` left - right, in `unit`; `ratio` left / right (unit `x`); `ordering` no
    number, only `direction`; `bound` a limit that left keeps, in `unit`. direction says what holds: left is lower or
    higher than, or equal to, right (for a bound: left stays below, above or at `value`). value is the paper's number,
    `None` when it gives none, with value_low and value_high its range where the reading or rounding has one. For a
    loss or a latency, lower is better. testable_at: the smallest scale at which the statement can be tested at all:
    `smoke` (arithmetic or counting, seconds), `cpu` (a scaled-down twin), `gpu` (one GPU), `paper` (the A100 cluster)
    or `simulated` (the cluster model). where: section, table or figure. same_as: the id of another row that states the
    same claim in other words or under other conditions, such as a latency and its inverse; the two count as one.

    smallest: the smallest effect of interest, in the quantity's unit, of a claim for which the paper gives no number;
    smallest_why: its reason. Both were fixed before runs were judged by them. gain_of, gain_over: for an equality, the
    runs whose difference is the gain that it is about: two arms can be called equal only by that gain, and only where
    these two differ. from_share: the share of the paper's training from which the statement holds, for one on a late
    point of it; runs that stop earlier cannot test it.

    role: `primary` for the one statement of a figure or table without which its others say nothing, `secondary` for
    those others, which are tested only where the primary one holds; empty for what is counted, simulated, timed or
    cannot be tested here, and so belongs to no family of tests. figure: the figure or table whose family that is, where
    `where` does not name it (`family`).
    """

    id: str
    experiment: str
    where: str
    statement: str
    kind: str
    quantity: str
    left: str
    right: str
    value: float | None
    value_low: float | None
    value_high: float | None
    unit: str
    direction: str
    testable_at: str
    same_as: str
    smallest: float | None
    smallest_why: str
    gain_of: str
    gain_over: str
    from_share: float | None
    role: str
    figure: str

    @property
    def number(self) -> float:
        """The paper's number; ValueError for a claim that has none."""
        if self.value is None:
            raise ValueError(f"{self.id}: the paper gives no number")
        return self.value

    @property
    def at_the_end(self) -> bool:
        """Whether the paper's number is one of the end of its training."""
        return self.value is not None and self.quantity == "final validation loss"

    @property
    def family(self) -> str:
        """The figure or table whose tests are adjusted together with this claim's."""
        return self.figure or self.where

    @property
    def lower_is_better(self) -> bool:
        """Whether the better of two arms has the lower value, as for a loss; not so for the score of tasks."""
        return any(word in self.quantity for word in ("loss", "latency", "bits"))

    @property
    def timed(self) -> bool:
        """Whether measurements of it are times or rates: their samples are sessions, not rounds."""
        return self.quantity.startswith(("latency", "training throughput", "throughput per GPU", "cost"))


def claims(experiment: str | None = None) -> Table[Claim]:
    """All claims, or those of one experiment such as `pr-moe`; ValueError names close matches."""
    return load("claims.csv", Claim).where(experiment=experiment)


def claim(id: str) -> Claim:
    """One claim by its kebab-case id, such as `pr-moe-size`; ValueError names close matches."""
    return claims().where(id=id)[0]


def experiments() -> tuple[str, ...]:
    """Return the experiments that have claims, in the order of the paper."""
    return tuple(dict.fromkeys(row.experiment for row in claims()))
