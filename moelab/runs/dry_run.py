"""Say what an experiment would train: sizes, layouts, memory and cost. Needs no GPU and no cluster."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moelab import paper, terminal
from moelab.runs import records
from moelab.runs.progress import Snapshot
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run, RunStore

STATE_BYTES = 16
"""A parameter's training state in fp32: weight, gradient and AdamW's two moments."""


@dataclass(frozen=True)
class PlannedRun:
    """A run to be.

    Attributes:
        spec: what it is.
        state: "finished", "stopped" and so on, as the store knows it; "new".
        done: share of its steps that is done.
        again: FLOPs of its trunk up to the branch point, where that is trained again: the finished trunk has no
            checkpoint of that point (any more). From an earlier one it takes less.
    """

    spec: RunSpec
    state: str
    done: float
    again: float = 0.0

    @property
    def steps(self) -> int:
        """Its own optimiser steps, without a trunk's."""
        return self.spec.train.steps(self.spec.data.context) - self.spec.first_step

    @property
    def gpu_hours(self) -> float | None:
        """At the operations per second and GPU that the paper's Table 3 implies (A100); None off a GPU."""
        return (self.spec.cost + self.again) / paper_rate() / 3600 if self.spec.train.device == "cuda" else None


def planned_runs(specs: Sequence[RunSpec]) -> list[PlannedRun]:
    """One row a run, teachers and trunks before the runs that need them. Writes nothing."""
    store = RunStore()
    runs = [Run(spec, store.root / spec.id) for spec in store.needed(specs).values()]
    return [
        PlannedRun(
            run.spec,
            run.status.state if run.path.exists() else "new",
            Snapshot.of([run]).done,
            run.spec.total_cost - run.spec.cost if run.trains_trunk_again else 0.0,
        )
        for run in runs
    ]


def paper_rate() -> float:
    """Operations per second and A100 in the paper's training: the mean over Table 3, FLOP/s."""
    rows = paper.training_throughput()
    return sum(row.tflops_per_gpu for row in rows) / len(rows) * 1e12


def state_bytes(spec: RunSpec) -> int:
    """Bytes of a rank's weights, gradients and moments, without activations.

    Experts are spread over the expert-parallel ranks, everything else is whole on each rank, or over the data ranks
    with `shard`; a tensor-sliced share of it is not subtracted (embeddings stay whole).
    """
    model, layout = spec.model, spec.parallel
    an_expert = model.expert_feed_forward.parameters
    experts = sum(layout.experts(e).experts_per_rank * an_expert for e in model.experts if e)
    others = model.parameters() - sum(e * an_expert for e in model.experts)
    return STATE_BYTES * (experts + (others // layout.data if layout.shard else others))


def show(runs: Sequence[PlannedRun]) -> None:
    """Print the plan, two lines for the seeds of an arm, with totals."""
    from rich.padding import Padding
    from rich.text import Text

    if not runs:
        terminal.console().print("nothing to train: the notebook measures or computes, and reads what is there")
        return
    seeds: dict[tuple[str, str, str, str], list[int]] = {}
    rates = {(r.spec.title, r.spec.train.lr) for r in runs}
    for r in runs:
        spec, model, train, ranks = r.spec, r.spec.model, r.spec.train, r.spec.parallel.ranks
        size = state_bytes(spec)
        memory = f"{size / 2**30:.1f} GiB" if size > 2**30 else f"{size / 2**20:.0f} MiB"
        cost = f"{spec.cost:.2g} FLOPs" + (f", {_hours(r.gpu_hours)}" if r.gpu_hours is not None else "")
        passes = train.batch_size // (train.micro_batch or train.batch_size) // spec.parallel.data
        numbers = (
            f"{terminal.short(model.parameters())} parameters, {terminal.short(model.active_parameters())} active; "
            f"{terminal.short(spec.own_tokens)} tokens in {r.steps:,} steps; "
            f"{ranks} rank{'s' * (ranks > 1)} x {passes}, {memory}; {cost}"
        )
        swept = sum(title == spec.title for title, _ in rates) > 1
        name = _name(spec) + (f", rate {train.lr:g}" if swept else "")
        seeds.setdefault((spec.title, name, r.state, numbers), []).append(train.seed)
    console = terminal.console()
    for (arm, name, state, numbers), which in seeds.items():
        head = Text(arm, "bold").append(f" · {name}" * (name != arm), "not bold")
        head.append(f" · seed{'s' * (len(which) > 1)} {_ranges(which)} · {state}", "not bold")
        console.print(head)
        console.print(Padding(numbers, (0, 0, 0, 2)), highlight=False)
    hours = sum((r.gpu_hours or 0) * (1 - r.done) for r in runs)
    left = sum(r.state != "finished" for r in runs)
    small = "; small models reach far less" if any(0 < (r.gpu_hours or 0) < 1 for r in runs) else ""
    cost = f", {_hours(hours)} at the paper's {paper_rate() / 1e12:.0f} TFLOP/s a GPU (Table 3){small}" if hours else ""
    console.print(
        f"{left} of {len(runs)} runs to train{cost}; numbers are a seed's; active: for a token; ranks x micro-batches "
        "a step, and a rank's fp32 weights, gradients and moments",
        highlight=False,
    )
    for line in on_this_machine(runs):
        console.print(line, markup=False, highlight=False)


def on_this_machine(runs: Sequence[PlannedRun]) -> list[str]:
    """Return in a line each how long unfinished runs on a CPU take, how many train a trunk again, which are published.

    If they will train without the CPU kernels, a line says why. The time of a run is that of the FLOPs it has left, at
    the rate of finished runs here of nearly its cost, or of published ones where there are none.
    """
    left = [run for run in runs if run.gpu_hours is None and run.state != "finished"]
    known = records.published()
    there = [run.spec for run in left if run.spec.id in known]
    lines = []
    timed, whose = _timed(known) if left else ([], "")
    if timed:
        rates = {cost: _rate(cost, timed) for cost in {run.spec.cost for run in left}}
        hours = sum((run.spec.cost * (1 - run.done) + run.again) / rates[run.spec.cost] for run in left) / 3600
        took = f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.0f} minutes" if hours > 1 / 60 else "a minute"
        lines.append(f"about {took} on one core, at the speed of {whose}")
    if left and (slower := _without_kernels()):
        lines.append(slower)
    if again := sum(run.again > 0 for run in runs):
        lines.append(f"{again} of these train their trunk again first: it has no checkpoint of the branch point here")
    if there:
        arms = ", ".join(dict.fromkeys(spec.title for spec in there if spec.start is None))
        lines.append(f"{len(there)} of these are published ({arms}): `moelab runs import` takes their numbers over")
    return lines


def _without_kernels() -> str:
    """Return in one line why plain PyTorch will compute on this CPU; empty where it will not, or is asked for."""
    from moelab import kernels

    if kernels.instructions() == "none" or not (reason := kernels.why_not()):
        return ""
    return f"no CPU kernels: {reason}; plain PyTorch computes instead, and training takes up to 2.4 times as long"


def _timed(known: Mapping[str, records.Archive]) -> tuple[list[tuple[RunSpec, float]], str]:
    """Return finished runs on a CPU with the seconds of each, and whose they are: published ones if none is here."""
    timed, store = [], RunStore()
    for name in store.ids(file="result.json"):
        with contextlib.suppress(ValueError, RuntimeError, OSError):  # a damaged run tells nothing
            run = store.at(name)
            trained_here = (run.path / "holder.json").exists()  # an imported run has no holder
            if trained_here and run.spec.train.device == "cpu" and (seconds := run.own_seconds) > 0:
                timed.append((run.spec, seconds))
    if timed:
        return timed, "the finished runs here"
    for archive in list(known.values())[:: max(1, len(known) // _READ)]:
        with contextlib.suppress(ValueError):
            spec, result = records.glance(archive)
            if spec.train.device == "cpu" and spec.start is None:
                timed.append((spec, result["seconds"]))
    return timed, "the published runs"


def _rate(cost: float, timed: Sequence[tuple[RunSpec, float]]) -> float:
    """Return FLOPs a second and core: the median of the runs nearest in cost, as larger runs compute faster."""
    apart = sorted((abs(math.log(spec.cost / cost)), spec.cost / s / spec.train.threads) for spec, s in timed)
    return statistics.median(rate for distance, rate in apart[:_ASKED] if distance <= apart[0][0] + _ALIKE)


_READ = 30
"""Published runs that are read for their speed."""
_ASKED = 10
"""Runs whose speed counts, at most."""
_ALIKE = 0.05
"""How much further than the nearest run these may be from the cost that is asked for (logarithm of the ratio)."""


def _hours(hours: float) -> str:
    return f"{hours:,.0f} A100 hour{'s' * (round(hours) != 1)}" if hours >= 1 else "under 1 A100 hour"


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as ``0-3, 7``."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def _name(spec: RunSpec) -> str:
    """Return the model, how it is taught and where it starts."""
    sum_ = " (sum)" if spec.model.residual and spec.model.residual_mix == "sum" else ""
    taught = f", KD {spec.distill.schedule}" if spec.distill else ""
    return f"{spec.model}{sum_}{taught}" + (f", from {terminal.short(spec.start.tokens)} tokens" if spec.start else "")
