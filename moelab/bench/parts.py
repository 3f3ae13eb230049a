"""The kernels around the experts at inference, part by part: gate, dispatch, combine (paper section 5.4).

Forward only, top-1, slots for `max(4, S / E)` tokens an expert, first come first served, the experts left out: combine gets what dispatch made. Ours are the
fused gate, the row table with the copies by it, and the weighted sums; the baseline's are one-hot masks and an einsum each way. "all three" is one after
the other in one call, not the sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moelab.bench import harness as common
from moelab.kernels import combine, dispatch, gate, row_table
from moelab.models import baseline

PARTS = ("gate", "dispatch", "combine", "all three")
OURS, BASELINE = "ours", "einsum (baseline)"


def ours(x_SM: Tensor, logits_SE: Tensor, capacity: int) -> dict[str, common.Candidate]:
    """Part -> call; a part's inputs are made beforehand."""
    g = gate(logits_SE, 1, capacity)
    table = row_table(g)
    rows_RM = dispatch(x_SM, table)

    def all_three() -> Tensor:
        g = gate(logits_SE, 1, capacity)
        table = row_table(g)
        return combine(dispatch(x_SM, table), table, g.weight_SK)

    calls = (
        lambda: gate(logits_SE, 1, capacity),
        lambda: dispatch(x_SM, row_table(g)),
        lambda: combine(rows_RM, table, g.weight_SK),
        all_three,
    )
    return dict(zip(PARTS, calls, strict=True))


def masks(x_SM: Tensor, logits_SE: Tensor, capacity: int) -> dict[str, common.Candidate]:
    """The same of the baseline."""

    def gate_() -> tuple[Tensor, Tensor]:
        return baseline.one_hot_masks(baseline.mask_gate(logits_SE, 1, capacity), capacity, x_SM.dtype)

    dispatch_SEC, combine_SEC = gate_()
    rows_ECM = baseline.einsum_dispatch(x_SM, dispatch_SEC)

    def all_three() -> Tensor:
        dispatch_SEC, combine_SEC = gate_()
        return baseline.einsum_combine(baseline.einsum_dispatch(x_SM, dispatch_SEC), combine_SEC)

    calls = (
        gate_,
        lambda: baseline.einsum_dispatch(x_SM, dispatch_SEC),
        lambda: baseline.einsum_combine(rows_ECM, combine_SEC),
        all_three,
    )
    return dict(zip(PARTS, calls, strict=True))


@torch.no_grad()
def measure(tokens: int, M: int, experts: int, rounds: int, device: str, *, calls: int = 20) -> list[dict]:
    """Tidy rows, one for each part, candidate and round: `ms` a call, the mean of `calls` in a row.

    All parts of both candidates take turns, so that a ratio within a round meets the same machine.
    """
    torch.manual_seed(0)
    x_SM = torch.randn(tokens, M, device=device)
    logits_SE = torch.randn(tokens, experts, device=device)
    capacity = max(4, math.ceil(tokens / experts))

    def several(call: common.Candidate) -> common.Candidate:
        def run() -> None:
            for _ in range(calls):
                call()

        return run

    made = {OURS: ours(x_SM, logits_SE, capacity), BASELINE: masks(x_SM, logits_SE, capacity)}
    candidates = {f"{part}\n{name}": several(made[name][part]) for part in PARTS for name in made}
    times = common.in_turns(candidates, rounds, device)
    case = {"tokens": tokens, "hidden": M, "experts": experts, "capacity": capacity}
    case["device"] = common.device_name(device)
    return [
        {**case, "part": part, "candidate": name, "round": i, "ms": seconds / calls * 1e3}
        for key, measured in times.items()
        for part, name in [key.split("\n")]
        for i, seconds in enumerate(measured)
    ]
