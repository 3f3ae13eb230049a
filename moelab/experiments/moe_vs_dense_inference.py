"""Serve MoE and dense models of equal quality (paper section 5.5.4, Figs 14 and 15).

Shows: latency and cost of a token of dense 6.7B on one GPU against the 52B family on 128, and of dense 175B in 16
slices against a 1.5T family in 8.

Here: predictions. Equal quality of the second pair is the paper's assumption. The shape of the 1.5T model, its GPU
count and its PR-MoE are not in the paper; they are those of the authors' script
(`moelab.simulate.paper_figures.SCRIPT`).
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


def models() -> dict[str, ModelConfig]:
    """Return the models of Fig 14, by name."""
    from moelab.simulate import paper_figures

    return {bar.label: bar.model for bar in paper_figures.fig14()}


def costs() -> pd.DataFrame:
    """Return the bars of Figs 14 and 15, simulated: `Bar.row`, with gpu_ms_per_token, faster and cheaper.

    gpu_ms_per_token stands for the cost of a token; faster and cheaper are ratios to the dense model of the same
    figure.
    """
    from moelab.simulate import paper_figures

    frame = paper_figures.frame(paper_figures.fig14() + paper_figures.fig15())
    frame = frame.assign(gpu_ms_per_token=1e3 / frame["simulated_throughput"])
    dense = frame[frame["model"].str.endswith("dense")].set_index("figure")
    return frame.assign(
        faster=frame["figure"].map(dense["simulated_ms"]) / frame["simulated_ms"],
        cheaper=frame["figure"].map(dense["gpu_ms_per_token"]) / frame["gpu_ms_per_token"],
    )


def steps_headline(steps: pd.DataFrame) -> str:
    """Return, from `decoding.steps`, the MoE models' optimised steps over the dense one's baseline step as text."""
    ms = steps.set_index(["name", "candidate"])["median_ms"]
    dense, *others = sorted(dict.fromkeys(steps["name"]), key=lambda name: "MoE" in name)  # files have any order
    compared = ", ".join(f"{name} {ms[name, 'optimised'] / ms[dense, 'baseline']:.2f}" for name in others)
    return f"Step over {dense}'s: {compared}"


def verdicts(frame: pd.DataFrame) -> list[Verdict]:
    """Judge the claims on Figs 14 and 15, from `costs`."""
    rows = frame.set_index(["figure", "model", "system"])
    small = {figure: rows.loc[figure, "PR-MoE+MoS", "deepspeed"] for figure in ("fig-14", "fig-15")}
    moe, dense = (rows.loc["fig-14", model, "pytorch"]["simulated_ms"] for model in ("52B MoE", "6.7B dense"))
    guess = "Shapes and GPU count from the authors' script."
    ours = {
        "pytorch-moe-slower-than-dense": (moe - dense, ""),
        "faster-than-6.7b": (small["fig-14"]["faster"], ""),
        "cheaper-than-6.7b": (small["fig-14"]["cheaper"], ""),
        "faster-than-175b": (small["fig-15"]["faster"], guess),
        "cheaper-than-175b": (small["fig-15"]["cheaper"], guess),
    }
    return [
        judge_simulated(claim, float(ours[claim.id][0]), against=dense, note=ours[claim.id][1])
        for claim in paper.claims("moe-vs-dense-inference")
    ]


EXPERIMENT = Experiment(
    name="moe-vs-dense-inference",
    number=14,
    title="MoE against dense at inference",
    paper="Figs 14 and 15 (section 5.5.4)",
    question="Is an MoE cheaper to serve than the dense model it matches?",
    paper_answer="On PyTorch it is slower; as PR-MoE with the staged student on DeepSpeed-MoE 2.4 times faster and "
    "cheaper, and 4.5 and 9 times at 1.5T.",
    scales={
        "smoke": Scale("simulated cluster; tiny twins on 2 gloo ranks", "seconds"),
        "cpu": Scale("simulated cluster; twins on 2 gloo ranks", "a minute on two cores (estimated)"),
        "gpu": Scale("simulated cluster; twins of Fig 14, 256 and 512 wide, on one GPU", "not yet run; one GPU"),
        "paper": Scale(
            "simulated cluster; the models of Fig 14 as `srun moelab bench decode` measured them",
            "not yet run; A100 cluster",
        ),
    },
    check=partial(check_file, "moe-vs-dense-inference", "decode", ["model"]),
    measures=True,
    measures_on_gpu=("gpu",),
)
