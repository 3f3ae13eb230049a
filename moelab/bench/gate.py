"""`moelab bench gate`: the gate, forward and backward, against the baselines' gates.

Top-1, capacity factor 1.0, random token selection, load-balancing loss; the gradient goes back to the logits through
the weights and the loss. Candidates: ours, the mask form (the paper's PyTorch baseline), and DeepSpeed's own two forms
where it is installed. Inputs: see `moelab.bench.inputs.HiddenStates`, new ones each round. Floor: the logits read twice
and their gradient written once, at the measured copy rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moelab import terminal
from moelab.bench import harness, inputs, peers, plot
from moelab.bench.harness import Row, Timing
from moelab.kernels import gate
from moelab.models import baseline

HIDDEN = 128
"""M of the hidden states in front of the gate; the gate's product is not measured."""


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


def measure(
    tokens: int, experts: int, timing: Timing, *, on_failure: Callable[[str, Exception], None] | None = None
) -> list[Row]:
    """Return the rows of one case.

    Args:
        on_failure: called with the candidates beside ours that raise, which are then left out; None lets them raise.
    """
    states = inputs.HiddenStates(tokens, HIDDEN, experts, timing.device)
    capacity = max(4, math.ceil(tokens / experts))
    candidates = {
        "ours": lambda logits: _ours(logits, capacity),
        "masks (baseline)": lambda logits: _masks(logits, capacity),
    }
    for name, call in peers.gates().items():
        candidates[name] = lambda logits, call=call: _backward(logits, call(logits))
    if on_failure is not None:
        logits_SE = states(0).logits_SE.requires_grad_()
        for name, call in list(candidates.items()):
            try:
                timing.seconds(call, logits_SE)  # waits for the device
            except Exception as error:  # another library's, for this device or size
                if name == "ours":
                    raise
                on_failure(name, error)
                del candidates[name]
    times = harness.in_turns(candidates, lambda i: states(i).logits_SE.requires_grad_(), timing)
    floor_s = 3 * tokens * experts * 4 / harness.copy_rate(timing)
    case = {"tokens": tokens, "experts": experts, "capacity": capacity, "threads": torch.get_num_threads()}
    return harness.rows(
        {**case, **states.measured()},
        times,
        against="ours",
        floor_s=floor_s,
        timing=timing,
        inputs=inputs.described(inputs.HIDDEN),
    )


def main(*, tokens: int, experts: list[int], timing: Timing, threads: int, out: Path | None) -> None:
    """Measure, print and, with `out` (a folder), write `gate.jsonl` and its figure."""
    timing.check_threads(threads)
    torch.set_num_threads(threads)
    found: list[Row] = []
    for E in terminal.announced(experts, lambda E: f"the gate of {E} experts"):
        case = measure(tokens, E, timing)
        busiest = case[0].case["busiest_expert"]
        harness.show(f"gate, forward + backward: S={tokens} E={E} K=1 fp32, busiest expert {busiest:.1f} x mean", case)
        found += case
    if out is not None:
        objects = harness.write(found, out / "gate.jsonl")
        title = f"The mask form of the gate takes {harness.span(objects, 'masks (baseline)')} times as long as ours"
        plot.save(plot.ratios(objects, title=title), out / "gate")
