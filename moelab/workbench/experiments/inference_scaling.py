"""Serving the 52B model on 8 to 64 GPUs (paper section 5.5, Fig 10).

Shows: latency of a token and throughput a GPU of 1.3B+MoE-128 for the PyTorch baseline and for DeepSpeed-MoE, simulated on the paper's cluster, with
the breakdown of a step.

Paper: more GPUs make DeepSpeed-MoE faster and each GPU more productive: 27.3 to 12.7 ms, 292 to 620 tokens/s/GPU; the baseline falls from 56.6 to
43.9 ms only.

Here: the simulator's two free constants are fitted on the eight latencies of this figure, so its bars are a fit, not a prediction; the notebook
shows how good it is and what it leaves undecided. Beside it, decoding steps of the model's twin on gloo ranks of this machine, measured with
`moelab bench decode`'s own function: the baseline and the optimised mode, experts spread over the ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moelab import paper
from moelab.workbench.experiments.base import Experiment, Scale, no_runs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from moelab.config import ModelConfig
    from moelab.workbench.claims import Verdict

RANKS = (1, 2, 4)
TWINS: dict[str, dict[str, int]] = {
    "smoke": {"hidden": 64, "depth": 12, "experts": 16, "vocab": 256, "context": 32},
    "cpu": {"hidden": 16, "depth": 6, "experts": 4, "vocab": 2048, "context": 128},
}
"""scale -> how the 1.3B+MoE-128 model is shrunk, see `ModelConfig.shrink`."""


def twin(scale: str) -> ModelConfig:
    """The model that is measured here; its weights are random, and spread tokens over the experts."""
    from dataclasses import replace

    from moelab.config import ModelConfig

    shrunk = ModelConfig.parse("1.3B+MoE-128").shrink(**TWINS[scale])
    return replace(shrunk, init_std=0.05)


def measured(scale: str) -> list[dict]:
    """Decoding steps on 1, 2 and 4 gloo ranks: rows of `moelab bench decode`, a mode and number of ranks each; 8 sequences over all ranks."""
    from moelab.inference.bench import Protocol, measure_ranks

    protocol = Protocol(4, 4, 1, 2) if scale == "smoke" else Protocol(16, 24, 5, 4)
    return measure_ranks(twin(scale), list(RANKS), 8, protocol)


def draw_measured(rows: list[dict], left: Axes, right: Axes) -> None:
    """Left: latency over ranks with the bar to p95, and the floor. Right: where the optimised mode's step goes."""
    from moelab.inference.clock import PARTS
    from moelab.workbench import simulated

    colors = {"baseline": simulated.SYSTEM_COLORS["pytorch"], "optimised": simulated.SYSTEM_COLORS["moelab"]}
    for mode, color in colors.items():
        mine = [row for row in rows if row["candidate"] == mode]
        median = [row["median_ms"] for row in mine]
        above = [max(row["p95_ms"] - row["median_ms"], 0.0) for row in mine]
        x = range(len(mine))
        left.errorbar(x, median, yerr=[[0.0] * len(mine), above], fmt="o-", capsize=3, color=color, label=mode)
    best = [row for row in rows if row["candidate"] == "optimised"]
    labels = [f"{row['ranks']} rank{'s' if row['ranks'] > 1 else ''}" for row in best]
    left.plot(range(len(best)), [row["floor_ms"] for row in best], "_", markersize=24, color="#444444", label="floor")
    left.set(yscale="log", ylabel="latency of a step (ms)")
    left.set_xticks(range(len(best)), labels)
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "25" else "")
    left.legend()
    ends = [0.0] * len(best)
    tints = (
        "#56B4E9",
        "#F0E442",
        "#E69F00",
        "#D55E00",
        "#009E73",
        "#CC79A7",
        "#0072B2",
        "#7A5195",
        "#AAAAAA",
        "#DDDDDD",
    )
    for part, color in zip(PARTS, tints, strict=True):
        ms = [row["parts_ms"].get(part, 0.0) for row in best]
        if max(ms):
            right.barh(labels, ms, left=ends, color=color, label=part)
            ends = [a + b for a, b in zip(ends, ms, strict=True)]
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.set(xlabel="ms of a step, optimised, under the clock")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))


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
        "smoke": Scale("simulated cluster; a tiny twin on 1, 2, 4 gloo ranks", "seconds"),
        "cpu": Scale(
            "simulated cluster; the 1.3B+MoE-128 twin on 1, 2, 4 gloo ranks", "half a minute on two cores (estimated)"
        ),
    },
    specs=no_runs,
    trains=False,
    measures=True,
)
