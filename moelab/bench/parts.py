"""The kernels around the experts at inference, part by part: gate, dispatch, combine (paper section 5.4).

Forward only, top-1, slots for `max(4, S / E)` tokens an expert, first come first served. The experts are left out:
combine gets what dispatch made. Ours are the fused gate, the row table with the copies by it, and the weighted sums;
the baseline's are one-hot masks and an einsum each way. "all three" is one after the other in one call, not the sum.
Inputs: see `moelab.bench.inputs.HiddenStates`, new ones each round. Floor: the bytes of the part (logits; tokens there
and back) at the measured copy rate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moelab.bench import harness, inputs
from moelab.bench.harness import Row, Timing
from moelab.kernels import combine, dispatch, gate, row_table
from moelab.models import baseline

PARTS = ("gate", "dispatch", "combine", "all three")
OURS, BASELINE = "ours", "einsum (baseline)"
Call = Callable[[], Any]


def ours(x_SM: Tensor, logits_SE: Tensor, capacity: int) -> dict[str, Call]:
    """Return part -> call; what a part takes is made beforehand."""
    routing = gate(logits_SE, 1, capacity)
    table = row_table(routing)
    rows_RM = dispatch(x_SM, table)

    def all_three() -> Tensor:
        routing = gate(logits_SE, 1, capacity)
        table = row_table(routing)
        return combine(dispatch(x_SM, table), table, routing.weight_SK)

    calls = (
        lambda: gate(logits_SE, 1, capacity),
        lambda: dispatch(x_SM, row_table(routing)),
        lambda: combine(rows_RM, table, routing.weight_SK),
        all_three,
    )
    return dict(zip(PARTS, calls, strict=True))


def masks(x_SM: Tensor, logits_SE: Tensor, capacity: int) -> dict[str, Call]:
    """Return the same of the baseline."""

    def both_masks() -> tuple[Tensor, Tensor]:
        return baseline.one_hot_masks(baseline.mask_gate(logits_SE, 1, capacity), capacity, x_SM.dtype)

    dispatch_SEC, combine_SEC = both_masks()
    rows_ECM = baseline.einsum_dispatch(x_SM, dispatch_SEC)

    def all_three() -> Tensor:
        dispatch_SEC, combine_SEC = both_masks()
        return baseline.einsum_combine(baseline.einsum_dispatch(x_SM, dispatch_SEC), combine_SEC)

    calls = (
        both_masks,
        lambda: baseline.einsum_dispatch(x_SM, dispatch_SEC),
        lambda: baseline.einsum_combine(rows_ECM, combine_SEC),
        all_three,
    )
    return dict(zip(PARTS, calls, strict=True))


@torch.no_grad()
def measure(tokens: int, hidden: int, experts: int, timing: Timing, *, calls: int = 20) -> list[Row]:
    """Return a row for each part and candidate, times a call; the case's `part` names the part.

    All parts of both candidates take turns, so that a ratio within a round meets the same machine.

    Args:
        calls: of a part in a row; the mean counts.
    """
    capacity = max(4, math.ceil(tokens / experts))
    states = inputs.HiddenStates(tokens, hidden, experts, timing.device)

    def new_round(i: int) -> dict[str, dict[str, Call]]:
        made = states(i)
        arguments = (made.x_SM, made.logits_SE, capacity)
        return {OURS: ours(*arguments), BASELINE: masks(*arguments)}

    names = [(part, name) for part in PARTS for name in (OURS, BASELINE)]
    candidates = {pair: lambda made, pair=pair: made[pair[1]][pair[0]]() for pair in names}
    times = harness.in_turns(candidates, new_round, timing, functools.partial(timing.seconds, calls=calls))
    rate = harness.copy_rate(timing)
    numbers = {"gate": tokens * experts, "dispatch": 2 * tokens * hidden, "combine": 2 * tokens * hidden}
    numbers["all three"] = sum(numbers.values())
    case = {"tokens": tokens, "hidden": hidden, "experts": experts, "capacity": capacity, **states.measured()}
    return [
        row
        for part in PARTS
        for row in harness.rows(
            {**case, "part": part},
            {name: times[part, name] for name in (OURS, BASELINE)},
            against=OURS,
            floor_s=4 * numbers[part] / rate,
            timing=timing,
            inputs=inputs.described(inputs.HIDDEN),
        )
    ]
