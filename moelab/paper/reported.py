"""What others report of their own mixtures of experts, where the number is printed."""

from __future__ import annotations

from dataclasses import dataclass

from moelab.paper._table import Provenance, Table, load


@dataclass(frozen=True, kw_only=True)
class Reported(Provenance):
    """One printed number of another project.

    project, model: whose, and of which model; experts: routed experts of a layer, None where it is not of one model.
    metric, value, unit: `loss` (nats per token) or `leverage` (training FLOPs of a dense model of the same loss over
    the MoE's own). date: when it was printed.
    """

    project: str
    model: str
    hidden: int | None
    experts: int | None
    k: int | None
    metric: str
    value: float
    unit: str
    date: str


def reported(project: str | None = None) -> Table[Reported]:
    """Return numbers that others printed, of one project or all; ValueError for a project that has none."""
    return load("reported.csv", Reported).where(project=project)
