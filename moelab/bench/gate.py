"""`moelab bench gate`: the gate, forward and backward, against the baselines' gates; and the parts around the experts.

Top-1, capacity factor 1.0, random token selection, load-balancing loss; the gradient goes back to the logits through
the weights and the loss. Candidates: ours, the mask form (the paper's PyTorch baseline), and DeepSpeed's own two forms
where it is installed. Inputs: see `moelab.bench.inputs.HiddenStates`, new ones each round. Floor: the logits read twice
and their gradient written once, at the measured copy rate.

`measure_parts` times the kernels around the experts at inference, part by part: gate, dispatch, combine (paper section
5.4). Forward only, top-1, slots for `max(4, S / E)` tokens an expert, first come first served. The experts are left
out: combine gets what dispatch made. Ours are the fused gate, the row table with the copies by it, and the weighted
sums; the baseline's are one-hot masks and an einsum each way. "all three" is one after the other in one call, not the
sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelab import terminal
from moelab.bench import harness, inputs, peers
from moelab.bench.harness import Row, Timing
from moelab.kernels import combine, dispatch, gate, row_table
from moelab.models import baseline
from moelab.plotting import benchmarks

HIDDEN = 128
"""M of the hidden states in front of the gate; the gate's product is not measured."""
PARTS = ("gate", "dispatch", "combine", "all three")
OURS, MASKS, BASELINE = "ours", "masks (baseline)", "einsum (baseline)"
"""Candidates; `BASELINE` is the mask form of the parts."""
Call = Callable[[], Any]


def slots(tokens: int, experts: int) -> int:
    """Return the slots of an expert at capacity factor 1.0, for so many (token, expert) pairs."""
    return max(4, math.ceil(tokens / experts))


def _backward(logits_SE: Tensor, loss: Tensor) -> None:
    loss.backward()
    logits_SE.grad = None


def _ours(logits_SE: Tensor, capacity: int) -> None:
    routing = gate(logits_SE, 1, capacity, seed=1)
    _backward(logits_SE, routing.weight_SK.sum() + routing.aux_loss)


def _masks(logits_SE: Tensor, capacity: int) -> None:
    routing = baseline.mask_gate(logits_SE, 1, capacity, seed=1)
    _, combine_SEC = baseline.one_hot_masks(routing, capacity, logits_SE.dtype)
    _backward(logits_SE, combine_SEC.sum() + routing.aux_loss)


def _theirs(call: Callable[[Tensor], Tensor], logits_SE: Tensor) -> None:
    _backward(logits_SE, call(logits_SE))


def measure(tokens: int, experts: int, timing: Timing) -> list[Row]:
    """Return the rows of one case; a gate of DeepSpeed that does not run is left out."""
    states = inputs.HiddenStates(tokens, HIDDEN, experts, timing.device)
    capacity = slots(tokens, experts)
    theirs = peers.gates()
    candidates: dict[str, Callable[[Tensor], Any]] = {
        OURS: lambda logits: _ours(logits, capacity),
        MASKS: lambda logits: _masks(logits, capacity),
    }
    candidates |= {name: functools.partial(_theirs, call) for name, call in theirs.items()}
    times = harness.in_turns(candidates, lambda i: states(i).logits_SE.requires_grad_(), timing, may_fail=theirs.keys())
    floor_s = 3 * tokens * experts * 4 / harness.copy_rate(timing)
    case = {"tokens": tokens, "experts": experts, "capacity": capacity, "threads": torch.get_num_threads()}
    return harness.rows(
        {**case, **states.measured()},
        times,
        against=OURS,
        floor_s=floor_s,
        timing=timing,
        inputs=inputs.described(inputs.HIDDEN),
    )


def main(*, tokens: int, experts: list[int], timing: Timing, threads: int, out: Path | None) -> None:
    """Measure, print and, with `out` (a folder), write `gate.jsonl`, after each case, and its figure."""
    timing.check_threads(threads)
    torch.set_num_threads(threads)
    measured: list[Row] = []
    for E in terminal.announced(experts, lambda E: f"the gate of {E} experts"):
        case = measure(tokens, E, timing)
        busiest = case[0].case["busiest_expert"]
        harness.show(f"gate, forward + backward: S={tokens} E={E} K=1 fp32, busiest expert {busiest:.1f} x mean", case)
        measured += case
        if out is not None:
            objects = harness.write(measured, out / "gate.jsonl")
    if out is not None and benchmarks.possible():
        title = f"The mask form of the gate takes {harness.span(objects, MASKS)} times as long as ours"
        benchmarks.save(benchmarks.ratios(objects, title=title), out / "gate")


# -- the parts around the experts, at inference ------------------------------------------------------------------------


def our_parts(x_SM: Tensor, logits_SE: Tensor, capacity: int) -> dict[str, Call]:
    """Return part -> call; what a part takes is made beforehand."""
    routing = gate(logits_SE, 1, capacity)
    table = row_table(routing)
    rows_RM = dispatch(x_SM, table)

    def all_three() -> Tensor:
        routing = gate(logits_SE, 1, capacity)
        table = row_table(routing)
        return combine(dispatch(x_SM, table), table, routing.weight_SK)

    return {
        "gate": lambda: gate(logits_SE, 1, capacity),
        "dispatch": lambda: dispatch(x_SM, row_table(routing)),
        "combine": lambda: combine(rows_RM, table, routing.weight_SK),
        "all three": all_three,
    }


def mask_parts(x_SM: Tensor, logits_SE: Tensor, capacity: int) -> dict[str, Call]:
    """Return the same of the baseline."""

    def both_masks() -> tuple[Tensor, Tensor]:
        return baseline.one_hot_masks(baseline.mask_gate(logits_SE, 1, capacity), capacity, x_SM.dtype)

    dispatch_SEC, combine_SEC = both_masks()
    rows_ECM = baseline.einsum_dispatch(x_SM, dispatch_SEC)

    def all_three() -> Tensor:
        dispatch_SEC, combine_SEC = both_masks()
        return baseline.einsum_combine(baseline.einsum_dispatch(x_SM, dispatch_SEC), combine_SEC)

    return {
        "gate": both_masks,
        "dispatch": lambda: baseline.einsum_dispatch(x_SM, dispatch_SEC),
        "combine": lambda: baseline.einsum_combine(rows_ECM, combine_SEC),
        "all three": all_three,
    }


@torch.no_grad()
def measure_parts(tokens: int, hidden: int, experts: int, timing: Timing, *, calls: int = 20) -> list[dict[str, Any]]:
    """Return a row for each part, candidate and round, with the milliseconds of a call.

    All parts of both candidates take turns, so that a ratio within a round meets the same machine.

    Args:
        calls: of a part in a row; the mean counts.
    """
    capacity = slots(tokens, experts)
    states = inputs.HiddenStates(tokens, hidden, experts, timing.device)

    def new_round(i: int) -> dict[str, dict[str, Call]]:
        made = states(i)
        arguments = (made.x_SM, made.logits_SE, capacity)
        return {OURS: our_parts(*arguments), BASELINE: mask_parts(*arguments)}

    names = [(part, name) for part in PARTS for name in (OURS, BASELINE)]
    candidates = {pair: lambda made, pair=pair: made[pair[1]][pair[0]]() for pair in names}
    times = harness.in_turns(candidates, new_round, timing, functools.partial(timing.seconds, calls=calls))
    case = {"tokens": tokens, "hidden": hidden, "experts": experts, "capacity": capacity, **states.measured()}
    device = harness.device_name(timing.device)
    return [
        {**case, "part": part, "device": device, "candidate": name, "round": i, "ms": seconds * 1e3}
        for part, name in names
        for i, seconds in enumerate(times[part, name])
    ]
