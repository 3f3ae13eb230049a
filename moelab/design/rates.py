"""Compare arms at each one's own peak rate and at one that all share (scale `full`).

A rate moves a loss by more than most arms differ by. Where a comparison at each arm's best rate and one at a shared
rate say the same, it is not the choice of rates that says it. An arm whose own rate is the shared one is one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from moelab import paper
from moelab.design import judging, settings
from moelab.design.verdicts import Verdict
from moelab.lazy import pd
from moelab.runs.collection import Runs
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run

SHARED = ", shared rate"
"""Ends the label of an arm at the shared rate."""

NOTE = "At one shared rate"
"""Says in a verdict what its `other` is."""

LOSSES = "final losses at each arm's own rate and at one shared rate"
"""Title of the table of `losses`."""


def at_both(build: Callable[[settings.Rate], list[RunSpec]]) -> list[RunSpec]:
    """Return an experiment's runs at each arm's own rate, then those at the shared rate, which their labels say.

    Args:
        build: returns the runs at a rate.
    """
    return build("own") + [replace(spec, label=spec.label + SHARED) for spec in build("shared")]


def arm(label: str) -> str:
    """Return the label without the rate."""
    return label.removesuffix(SHARED)


def at_own(specs: Sequence[RunSpec]) -> list[RunSpec]:
    """Return the specs at each arm's own rate; all of them at other scales."""
    return [spec for spec in specs if not spec.label.endswith(SHARED)]


def by_rate(runs: Runs) -> tuple[Runs, Runs]:
    """Return the runs at each arm's own rate, and those at the shared rate under their arms' labels.

    The second is empty where there are none.
    """
    own = [run for run in runs if not run.spec.label.endswith(SHARED)]
    shared = [run for run in runs if run.spec.label.endswith(SHARED)]
    return Runs(own), Runs([Run(replace(run.spec, label=arm(run.spec.label)), run.path) for run in shared])


def losses(own: Runs, shared: Runs) -> pd.DataFrame:
    """Return the final losses at both rates: columns arm, rate ("own", "shared"), peak, seed, loss (nats per token)."""
    rows = [
        [run.spec.title, rate, run.spec.train.lr, run.spec.train.seed, run.result["validation_loss"]]
        for rate, runs in (("own", own), ("shared", shared))
        for run in runs.finished
    ]
    return pd.DataFrame(rows, columns=["arm", "rate", "peak", "seed", "loss"])


def agreed(own: Sequence[Verdict], shared: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts at each arm's own rate, each with that at the shared rate; see `judging.agreed`.

    Args:
        own, shared: verdicts on the same claims; times depend on no rate and stay as they are.
    """
    others = {v.claim: replace(v, note=NOTE) for v in shared if not paper.claim(v.claim).timed}
    return [judging.agreed(finding, others[finding.claim]) if finding.claim in others else finding for finding in own]
