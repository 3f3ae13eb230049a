"""Serving the 52B model on 8 to 64 GPUs (paper section 5.5, Fig 10).

Shows: latency of a token and throughput a GPU of 1.3B+MoE-128 for the PyTorch baseline and for DeepSpeed-MoE, simulated on the paper's cluster, with
the breakdown of a step.

Paper: more GPUs make DeepSpeed-MoE faster and each GPU more productive: 27.3 to 12.7 ms, 292 to 620 tokens/s/GPU; the baseline falls from 56.6 to
43.9 ms only.

Here: the simulator's two free constants are fitted on the eight latencies of this figure, so its bars are a fit, not a prediction; the notebook
shows how good it is and what it leaves undecided. Beside it, decoding steps measured with `moelab bench decode`'s own functions, the baseline and the
optimised mode: of the model's twin on gloo ranks of this machine, experts spread over the ranks (smoke, cpu); of a larger twin on one GPU (gpu); or, of the
model itself, by `srun moelab bench decode` on the cluster, whose numbers are read here (paper).
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
    "gpu": {"hidden": 2, "depth": 2, "experts": 4, "vocab": 50304, "context": 2048},
}
"""scale -> how the 1.3B+MoE-128 model is shrunk, see `ModelConfig.shrink`."""


def twin(scale: str) -> ModelConfig:
    """The model that is measured here; its weights are random, and spread tokens over the experts."""
    from dataclasses import replace

    from moelab.config import ModelConfig

    shrunk = ModelConfig.parse("1.3B+MoE-128").shrink(**TWINS[scale])
    return replace(shrunk, init_std=0.05)


def measured(scale: str, file: str = "") -> list[dict]:
    """Decoding steps: rows of `moelab bench decode`.

    smoke and cpu: 8 sequences over 1, 2 and 4 gloo ranks. gpu: 1, 8 and 32 sequences on one GPU. paper: what is in `file`.

    Raises:
        ValueError: one line: no such file at scale paper, or it is not that of ranks.
    """
    from moelab.inference.bench import Protocol, measure, measure_ranks

    if scale == "paper":
        return read_measured(file)
    if scale == "gpu":
        found = measure(twin(scale), [1, 8, 32], Protocol(), "cuda")
        return [row for row in found if row["candidate"] in ("baseline", "optimised")]
    protocol = Protocol(4, 4, 1, 2) if scale == "smoke" else Protocol(16, 24, 5, 4)
    return measure_ranks(twin(scale), list(RANKS), 8, protocol)


def read_measured(file: str) -> list[dict]:
    """The rows that `srun moelab bench decode --device cuda --out ...` wrote on the cluster, of one run or of several joined together, fewest ranks first."""
    import json
    from pathlib import Path

    if not file:
        raise ValueError(
            "inference-scaling: scale paper needs -p measured=FILE, the decode.jsonl of `srun moelab bench decode`"
        )
    try:
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON lines"
        raise ValueError(f"inference-scaling: {file}: {reason}") from None
    rows = [row for row in rows if isinstance(row, dict) and "empty_collective_ms" in row]
    if not rows:
        raise ValueError(f"inference-scaling: {file}: no rows of ranks in it")
    return sorted(rows, key=lambda row: row["ranks"])


def label(row: dict) -> str:
    """What tells a measured row from the others: its ranks, or on one GPU its batch."""
    if "empty_collective_ms" in row:
        return f"{row['ranks']} rank{'s' if row['ranks'] > 1 else ''}"
    return f"batch {row['batch']}"


def draw_measured(rows: list[dict], left: Axes, right: Axes) -> None:
    """Left: latency over ranks (or batches) with the bar to p95, and the floor. Right: where the optimised mode's step goes."""
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
    labels = [label(row) for row in best]
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
        "gpu": Scale(
            "simulated cluster; a twin of 1024 wide, 12 layers, 32 experts on one GPU", "not yet run; one GPU"
        ),
        "paper": Scale(
            "simulated cluster; 1.3B+MoE-128 as `srun moelab bench decode` measured it on 8 to 64 GPUs",
            "not yet run; 64 A100",
        ),
    },
    specs=no_runs,
    trains=False,
    measures=True,
)
