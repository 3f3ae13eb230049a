"""`moelab bench gate`: the gate, forward and backward, against the baselines' gates.

Top-1, capacity factor 1.0, random token selection, load-balancing loss; the gradient goes back to the logits through the weights and the
loss. Candidates: ours, the mask form (the paper's PyTorch baseline), and DeepSpeed's own two forms where it is installed.
Floor: the logits read twice and their gradient written once, at the measured copy rate.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from moelab.bench import harness as common
from moelab.kernels import gate
from moelab.models import baseline


def _deepspeed(logits: torch.Tensor) -> dict[str, common.Candidate]:
    """DeepSpeed's top-1 gate: its mask form, and its table form where the release has one."""
    try:
        from deepspeed.moe import sharded_moe
    except ImportError:
        return {}
    import inspect

    def call(**options):
        out = sharded_moe.top1gating(logits, 1.0, 4, use_rts=True, drop_tokens=True, **options)
        logits.grad = None
        weight = next(o for o in out[1:] if torch.is_tensor(o) and o.requires_grad)
        (weight.sum() + out[0]).backward()

    named = {"deepspeed, masks": call}
    if "sparse_routes" in inspect.signature(sharded_moe.top1gating).parameters:
        named["deepspeed, sparse routes"] = lambda: call(sparse_routes=True)
    return named


def measure(tokens: int, experts: int, rounds: int, device: str) -> list[dict]:
    """Rows of one case; see `common.rows`."""
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, device=device, requires_grad=True)
    capacity = max(4, math.ceil(tokens / experts))

    def ours():
        g = gate(logits, 1, capacity, seed=1)
        logits.grad = None
        (g.weight_SK.sum() + g.aux_loss).backward()

    def masks():
        g = baseline.mask_gate(logits, 1, capacity, seed=1)
        _, combine_SEC = baseline.one_hot_masks(g, capacity, logits.dtype)
        logits.grad = None
        (combine_SEC.sum() + g.aux_loss).backward()

    times = common.in_turns({"ours": ours, "masks (baseline)": masks, **_deepspeed(logits)}, rounds, device)
    floor = 3 * logits.numel() * 4 / common.copy_rate(device)
    case = {"tokens": tokens, "experts": experts, "capacity": capacity, "device": common.device_name(device)}
    return common.rows(case, times, "ours", floor)


def main(*, tokens: int, experts: list[int], rounds: int, threads: int, device: str, out: Path | None) -> None:
    """Measure, print and, with `out` (a folder), write `gate.jsonl`."""
    torch.set_num_threads(threads)
    found = []
    for E in experts:
        case = measure(tokens, E, rounds, device)
        common.show(f"gate, forward + backward: S={tokens} E={E} K=1 fp32, {case[0]['device']}", case)
        found += case
    if out is not None:
        common.write(found, out / "gate.jsonl")
        draw(found, out)


def draw(found: list[dict], out: Path) -> None:
    """The figure of `gate.jsonl`."""
    title = f"The mask form of the gate takes {common.span(found, 'masks (baseline)')} times as long as ours"
    common.draw(found, out / "gate", title=title)
