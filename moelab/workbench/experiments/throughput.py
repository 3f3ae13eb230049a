"""Training throughput of an MoE and of the dense model it equals (paper section 3, Table 3).

Shows: training tokens per second of the dense 6.7B twin and of the 1.3B+MoE-128 twin, side by side, and the ratio of their FLOPs a token.

Paper: 70 and 372 samples per second on 128 A100: 5.3 times, printed as 5; both run at the same operations per second and GPU (44.7 and 47.1
TFLOP/s, our arithmetic), so the gain is fewer active parameters.

Here: two twins taking turns in one process, so that other load meets both. What the ratio of FLOPs promises and how much of it the machine delivers
are told apart. No cluster: the ratio of times is a CPU's.

Expect: a ratio of FLOPs near 3.5 (twins have larger embeddings, in proportion, and the 6.7B twin is only 11 layers deep); measured somewhat less.
"""

from __future__ import annotations

from collections.abc import Sequence

from moelab import paper
from moelab.config import ModelConfig
from moelab.workbench.claims import Verdict, judge
from moelab.workbench.experiments import common
from moelab.workbench.experiments.base import Experiment, Scale
from moelab.workbench.specs import RunSpec

ARMS = {name: name for name in ("6.7B", "1.3B+MoE-128")}


def specs(
    scale: str = "cpu", seeds: int = 1, *, arms: Sequence[str] = (), tokens: int = 0, corpus: str = ""
) -> list[RunSpec]:
    """The two runs whose steps are measured, the same as in `scaling`; they need not be trained."""
    EXPERIMENT.scale(scale)
    return common.specs("throughput", ARMS, scale, seeds, selected=arms, tokens=tokens, corpus=corpus)


def flops_ratio(dense: ModelConfig, moe: ModelConfig) -> float:
    """Training FLOPs a token, dense over MoE: the speed-up at equal operations per second."""
    return dense.flops_per_token() / moe.flops_per_token()


def verdicts(ratios: Sequence[float], efficiency: Sequence[float], scale: str) -> list[Verdict]:
    """Table 3's claims; they speak of the cluster, so what twins show is beside them, not a verdict.

    Args:
        ratios: tokens/s of the MoE over the dense model's, round by round.
        efficiency: the same for FLOP/s.
    """
    values = {"training-5x-cheaper": ratios, "moe-flop-efficiency": efficiency}
    note = "Twins on this machine; rounds, not seeds."
    return [judge(c, values[c.id], note=note, scale=scale) for c in paper.claims("training-throughput")]


EXPERIMENT = Experiment(
    name="throughput",
    title="Training throughput at equal quality",
    paper="Table 3 (section 3)",
    question="How much cheaper is training an MoE than training the dense model it equals?",
    paper_answer="Five times: 372 against 70 samples per second on 128 A100.",
    notebook="06_throughput.ipynb",
    scales={
        "smoke": Scale("twins 64 and 128 wide", "seconds (tests)"),
        "cpu": Scale("twins 64 and 128 wide, 8 and 11 layers", "about a minute on one core"),
        "gpu": Scale("twins 512 and 1024 wide", "not yet run; one GPU"),
        "paper": Scale("1.3B+MoE-128 and 6.7B", "not run; see its dry run"),
    },
    specs=specs,
    trains=False,
    measures=True,
)
