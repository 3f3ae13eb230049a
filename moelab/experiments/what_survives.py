"""Put today's routing and experts beside the paper's (beyond the paper).

Shows: validation loss of the 350M base with the paper's residual experts and with what later models have in their
place, at equal active parameters (two feed-forwards a token in an MoE layer): a shared expert, whose output is added
(DeepSeek-MoE) instead of mixed; fine-grained experts, four routed ones of a quarter of the width; balancing by a bias
instead of a loss; sigmoid scores; the capacity limit that the paper trains with, where all other arms are drop-free as
later models are; and the paper's pyramid on top of them. The dense base, top-1 and top-2 stand beside.

Here: twins, paired by seed. All MoE arms but MoE-32 have the same active parameters up to gates and mixes, and the same
total but for the pyramids; `Shared, fine` has four times the experts and so the larger gate, 5 % more FLOPs a token. A
residual branch that is added, as the paper's text says, *is* a shared expert of the same width (a test compares them);
`Residual` is the released code's learned mix of the two. One learning rate for all MoE arms, which was swept on
MoE-128.

Fixed before the first run: 3 seeds, all arms on each; the question is whether `Shared` differs from `Residual`. The arm
`Shared, capacity 1` was added after the others were seen at `quick`. At `cpu` the seven arms with shared experts ran on
another machine than the others. The same run on two machines ends up to 0.02 nats apart (LOG.md, "Runs are compared
within one machine").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moelab.design import settings
from moelab.design.experiment import Experiment, twin_scales
from moelab.runs.spec import RunSpec

_SHARED = {"model.expert.shared": 1}
_BIAS = {"model.routing.balance_rate": 1e-3, "model.routing.aux_loss": 0.0}
_LIMITED = {"model.routing.drop_tokens": True}  # the default factor is 1

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "Dense": ("350M", {}),
    "MoE-32": ("350M+MoE-32", {}),
    "Top-2": ("350M+Top2-MoE-32", {}),
    "Residual": ("350M+Residual-MoE-32", {}),
    "Shared": ("350M+MoE-32", _SHARED),
    "Shared, gated": ("350M+MoE-32", _SHARED | {"model.expert.shared_gate": True}),
    "Shared, fine": ("350M+Top4-MoE-128", _SHARED),
    "Shared, bias": ("350M+MoE-32", _SHARED | _BIAS),
    "Shared, sigmoid": ("350M+MoE-32", _SHARED | {"model.routing.scores": "sigmoid"}),
    "Shared, capacity 1": ("350M+MoE-32", _SHARED | _LIMITED),
    "PR-MoE": ("350M+PR-MoE-32/64", {}),
    "Shared, pyramid": ("350M+Pyramid-MoE-32/64", _SHARED),
}
"""Arm -> the paper's model, and what is changed of its twin."""

LIMITED = ("Shared", "Shared, capacity 1")
"""The arms that differ by the capacity limit alone."""


def build(scale: str, seed: int, overrides: Mapping[str, Any]) -> list[RunSpec]:
    """Return every arm of one seed; a fine-grained expert is a quarter as wide as the others."""
    runs = []
    for label, (name, changes) in ARMS.items():
        fine: dict[str, int] = {}
        if label == "Shared, fine":
            dense = settings.spec(name, scale, overrides=overrides).model.ffn
            fine = {"model.expert.ffn": dense // 4, "model.expert.shared_ffn": dense}
        runs.append(settings.spec(name, scale, seed, label=label, overrides={**changes, **fine, **overrides}))
    return runs


EXPERIMENT = Experiment(
    name="what-survives",
    number=25,
    title="What survives of PR-MoE",
    paper="beyond the paper",
    question="Is the residual branch today's shared expert, and does the pyramid help beside it?",
    paper_answer="Not examined; later models have shared and fine-grained experts, and balance by a bias.",
    scales=twin_scales(12),
    build=build,
    measures_on_gpu=("gpu",),
)
