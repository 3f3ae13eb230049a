"""Serve the 52B model on 8 to 64 GPUs (paper section 5.5, Fig 10).

Shows: latency of a token and throughput per GPU of 1.3B+MoE-128 for the PyTorch baseline and for DeepSpeed-MoE,
simulated on the paper's cluster, with the breakdown of a step; beside it, measured decoding steps of the baseline and
the optimised mode (`moelab.experiments.decoding`).

Here: the simulator's two free constants are fitted on the eight latencies of this figure, so its bars are a fit, not a
prediction; the notebook shows the quality of the fit and what it does not determine.
"""

from __future__ import annotations

from functools import partial

from moelab import paper
from moelab.config import ModelConfig
from moelab.design.experiment import Experiment, Measure, Scale
from moelab.design.simulated import judge_simulated
from moelab.design.verdicts import Verdict
from moelab.experiments.decoding import check_file, steps, twins
from moelab.lazy import pd

RANKS = (1, 2, 4)
SHRINK: dict[str, dict[str, int]] = {
    "smoke": {"hidden": 64, "depth": 12, "experts": 16, "vocab": 256, "context": 32},
    "cpu": {"hidden": 16, "depth": 6, "experts": 4, "vocab": 2048, "context": 128},
    "gpu": {"hidden": 2, "depth": 2, "experts": 4, "vocab": 50304, "context": 2048},
}
"""Scale -> how the 1.3B+MoE-128 model is shrunk, see `ModelConfig.shrink`."""


def measured_steps(measure: Measure, scale: str, file: str | None = None) -> pd.DataFrame:
    """Return `decoding.steps` of the twin over `RANKS`, or over batches on one GPU; at paper read `file`."""
    ranks = RANKS[:2] if scale == "smoke" else RANKS
    models = twins({"1.3B+MoE-128": ModelConfig.parse("1.3B+MoE-128")}, scale, SHRINK)
    return steps(measure, EXPERIMENT.name, models, scale, file, by="size", ranks=ranks, batches=(1, 8, 32))


def latencies() -> pd.DataFrame:
    """Return the bars of Fig 10, simulated beside the paper's: `Bar.row`, and paper_throughput in tokens / s / GPU."""
    from moelab.simulate.paper_figures import fig10, frame

    read = paper.inference_results(figure="fig-10", metric="throughput-per-gpu")
    rates = {(row.system, row.gpus): row.value for row in read}
    table = frame(fig10())
    return table.assign(paper_throughput=[rates[row.system, row.gpus] for row in table.itertuples()])


def verdicts(frame: pd.DataFrame) -> list[Verdict]:
    """Judge the claims on Fig 10, from `latencies`."""
    ms = frame.set_index(["system", "gpus"])["simulated_ms"]
    rate = frame.set_index(["system", "gpus"])["simulated_throughput"]
    ours = {f"52b-speedup-{n}-gpus": ms["pytorch", n] / ms["deepspeed", n] for n in (8, 32, 64)}
    ours["52b-latency-falls"] = ms["deepspeed", 64] / ms["deepspeed", 8]
    ours["52b-superlinear"] = rate["deepspeed", 64] / rate["deepspeed", 8]
    return [
        judge_simulated(
            claim, ours.get(claim.id), fitted=True, note="" if claim.id in ours else "This system is not modelled."
        )
        for claim in paper.claims("inference-scaling")
    ]


EXPERIMENT = Experiment(
    name="inference-scaling",
    number=10,
    title="Serving 52B on 8 to 64 GPUs",
    paper="Fig 10 (section 5.5)",
    question="Does an MoE get faster, and each GPU more productive, when GPUs are added?",
    paper_answer="Yes: from 8 to 64 GPUs latency falls from 27.3 to 12.7 ms while throughput per GPU doubles.",
    scales={
        "smoke": Scale("simulated cluster; a tiny twin on 1 and 2 gloo ranks", "seconds"),
        "cpu": Scale(
            "simulated cluster; the 1.3B+MoE-128 twin on 1, 2, 4 gloo ranks", "half a minute on two cores (estimated)"
        ),
        "gpu": Scale(
            "simulated cluster; a twin of 1024 wide, 12 layers, 32 experts on one GPU", "not yet run; one GPU"
        ),
        "paper": Scale(
            "simulated cluster; 1.3B+MoE-128 as `srun moelab bench decode` measured it on 8 to 64 GPUs",
            "not yet run; 64 A100",
        ),
    },
    check=partial(check_file, "inference-scaling", "decode", ["ranks"]),
    measures=True,
    measures_on_gpu=("gpu",),
)
