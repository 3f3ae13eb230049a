"""Serving the 52B model on 8 to 64 GPUs (paper section 5.5, Fig 10).

Shows: latency of a token and throughput a GPU of 1.3B+MoE-128 for the PyTorch baseline and for DeepSpeed-MoE, simulated on the paper's cluster, with
the breakdown of a step.

Paper: more GPUs make DeepSpeed-MoE faster and each GPU more productive: 27.3 to 12.7 ms, 292 to 620 tokens/s/GPU; the baseline falls from 56.6 to
43.9 ms only.

Here: the simulator's three free constants are fitted on the eight latencies of this figure, so its bars are a fit, not a prediction; the notebook
shows how good it is and what it leaves undecided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moelab import paper
from moelab.workbench.experiments.base import Experiment, Scale, no_runs

if TYPE_CHECKING:
    import pandas as pd

    from moelab.workbench.claims import Verdict


def verdicts(frame: pd.DataFrame) -> list[Verdict]:
    """The claims on Fig 10, from `simulated.bar_frame(bars.fig10())`."""
    from moelab.workbench.simulated import verdict

    ms = frame.set_index(["system", "gpus"])["simulated_ms"]
    rate = frame.set_index(["system", "gpus"])["simulated_throughput"]
    ours = {f"52b-speedup-{n}-gpus": ms["pytorch", n] / ms["deepspeed", n] for n in (8, 32, 64)}
    ours["52b-latency-falls"] = ms["deepspeed", 64] / ms["deepspeed", 8]
    ours["52b-superlinear"] = rate["deepspeed", 64] / rate["deepspeed", 8]
    return [
        verdict(claim, ours.get(claim.id), fitted=True, note="" if claim.id in ours else "This system is not modelled.")
        for claim in paper.claims("inference-scaling")
    ]


EXPERIMENT = Experiment(
    name="inference-scaling",
    title="Serving 52B on 8 to 64 GPUs",
    paper="Fig 10 (section 5.5)",
    question="Does a MoE get faster, and each GPU more productive, when GPUs are added?",
    paper_answer="Yes: from 8 to 64 GPUs latency falls from 27.3 to 12.7 ms while throughput per GPU doubles.",
    notebook="10_inference_scaling.ipynb",
    scales={
        "smoke": Scale("simulated cluster", "seconds"),
        "cpu": Scale("simulated cluster", "seconds on one core"),
    },
    specs=no_runs,
)
