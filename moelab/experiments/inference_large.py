"""Serve 107 billion to 2 trillion parameters (paper section 5.5.2, Fig 11).

Shows: latency and throughput per GPU of the four large models on 128 and 256 GPUs, predicted with constants fitted on
Fig 10 alone; every other number of the paper with which the simulator can be compared, with its error; beside it,
measured decoding steps of the models' twins.

Here: the predicted DeepSpeed bars are close to the paper's; the baseline's are far too fast, and nothing in Fig 10
explains why.
"""

from __future__ import annotations

from functools import partial

from moelab import paper
from moelab.config import ModelConfig
from moelab.design.experiment import Experiment, Scale
from moelab.design.simulated import judge_simulated
from moelab.design.verdicts import Verdict
from moelab.experiments.decoding import check_file
from moelab.lazy import pd

SIZES = {"2.4B+MoE-128": "107B", "8B+MoE-128": "349B", "24B+MoE-128": "1T", "47B+MoE-128": "2T"}


def models() -> dict[str, ModelConfig]:
    """Return the four models by their total parameters."""
    return {size: ModelConfig.parse(name) for name, size in SIZES.items()}


def latencies() -> pd.DataFrame:
    """Return the bars of Fig 11, simulated beside the paper's: `Bar.row`, and size (total parameters)."""
    from moelab.simulate.paper_figures import fig11, frame

    table = frame(fig11())
    return table.assign(size=table["model"].map(SIZES))


def speedups() -> pd.DataFrame:
    """Return each size's speed-up over PyTorch, simulated and as the paper prints it, for `serving.grouped_bars`."""
    from moelab.simulate import scoreboard

    rows = [
        {"size": SIZES[name], "simulated": ratio, "paper": scoreboard.printed_speedup(name)}
        for name, ratio in scoreboard.speedups().items()
    ]
    return pd.DataFrame(rows).assign(system="deepspeed", kind="predicted")


def verdicts(frame: pd.DataFrame) -> list[Verdict]:
    """Judge the claims on Fig 11, from `latencies`."""
    ms = frame.set_index(["model", "system"])["simulated_ms"]
    rate = frame.set_index(["model", "system"])["simulated_throughput"]

    def speedup(model: str) -> float:
        return ms[model, "pytorch"] / ms[model, "deepspeed"]

    ours = {
        "speedup-107b": speedup("2.4B+MoE-128"),
        "speedup-1t": speedup("24B+MoE-128"),
        "speedup-2t": speedup("47B+MoE-128"),
        "1t-under-25ms": ms["24B+MoE-128", "deepspeed"],
        "throughput-up-to-7.3x": rate["47B+MoE-128", "deepspeed"] / rate["47B+MoE-128", "pytorch"],
    }
    return [judge_simulated(claim, ours.get(claim.id)) for claim in paper.claims("inference-large")]


EXPERIMENT = Experiment(
    name="inference-large",
    number=11,
    title="Serving 107B to 2T",
    paper="Fig 11 (section 5.5.2)",
    question="How fast can a trillion parameters be served?",
    paper_answer="In under 25 ms a token on 256 GPUs, up to 7.3 times faster than the PyTorch baseline.",
    scales={
        "smoke": Scale("simulated cluster; tiny twins on 2 gloo ranks", "seconds"),
        "cpu": Scale(
            "simulated cluster, with what the fit leaves open; twins on 2 gloo ranks",
            "a minute on two cores (estimated)",
        ),
        "gpu": Scale("simulated cluster; twins 448 to 1024 wide on one GPU", "not yet run; one GPU"),
        "paper": Scale(
            "simulated cluster; the models as `srun moelab bench decode` measured them", "not yet run; 128 to 256 A100"
        ),
    },
    check=partial(check_file, "inference-large", "decode", ["model"]),
    measures=True,
    measures_on_gpu=("gpu",),
)
