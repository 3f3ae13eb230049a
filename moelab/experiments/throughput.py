"""Measure the training throughput of an MoE and of the dense model it equals (paper section 3, Table 3).

Shows: training tokens per second of the dense 6.7B twin and of the 1.3B+MoE-128 twin, side by side, and the ratio of
their FLOPs per token. In the paper both models run at about the same operations per second and GPU (44.7 and 47.1
TFLOP/s, our arithmetic), so the gain comes from fewer active parameters.

Here: two twins train in turns in one process, so that other load on the machine affects both. The ratio of FLOPs
follows from the models, the ratio of times is a CPU's. The cluster is simulated (`moelab.simulate`, not fitted to this
table).

Expect: at `cpu` a ratio of FLOPs of 4.2, where the paper's models have 4.9 (twins have larger embeddings, in
proportion, and the 6.7B twin is only 11 layers deep); measured somewhat less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from moelab import paper
from moelab.config import ModelConfig
from moelab.design.experiment import Experiment, Scale, at_least_one
from moelab.design.simulated import judge_simulated
from moelab.design.verdicts import Verdict
from moelab.lazy import pd
from moelab.runs.spec import RunSpec

ARMS = {name: name for name in ("6.7B", "1.3B+MoE-128")}


def flops_ratio(dense: ModelConfig, moe: ModelConfig) -> float:
    """Return the dense model's training FLOPs per token over the MoE's: the speed-up at equal operations per second."""
    return dense.flops_per_token() / moe.flops_per_token()


def speeds(specs: Sequence[RunSpec], steps: int, rounds: int) -> dict[str, list[float]]:
    """Measure the training tokens/s of each arm, in turns, by `moelab.bench.train.side_by_side`.

    The sequences are as long as those of the runs, which may be shorter than a model's context.
    """
    from moelab.bench.train import side_by_side

    models = {spec.label: replace(spec.model, context=spec.data.context) for spec in specs}
    return side_by_side(models, specs[0].train, steps=steps, rounds=rounds)


def compared(specs: Sequence[RunSpec], ratios: Sequence[float]) -> pd.DataFrame:
    """Return the MoE's advantage by FLOPs per token and by training speed, for the twins and for the paper's models.

    Args:
        ratios: the MoE's measured training speed over the dense model's, round by round.

    Returns:
        Rows FLOPs per token and training speed; columns twins, paper's models, and the share of the first that the
        second delivers.
    """
    twins = {spec.label: spec.model for spec in specs}
    full = {name: ModelConfig.parse(name) for name in twins}
    printed = {row.model: row.samples_per_s for row in paper.training_throughput()}
    flops, speed = flops_ratio(twins["6.7B"], twins["1.3B+MoE-128"]), float(pd.Series(ratios).median())
    return pd.DataFrame(
        {
            "twins": [flops, speed],
            "paper's models": [
                flops_ratio(full["6.7B"], full["1.3B+MoE-128"]),
                printed["1.3B+MoE-128"] / printed["6.7B"],
            ],
            "twins: share delivered": [None, speed / flops],
        },
        index=pd.Index(["FLOPs a token", "training speed"], name="1.3B+MoE-128 over 6.7B"),
    )


def simulated_ratios(predicted: pd.DataFrame) -> pd.DataFrame:
    """Return 1.3B+MoE-128 over 6.7B on 128 A100: columns what, ours (simulated) and paper, a row for each rate.

    `predicted` comes from `moelab.simulate.frames.training`.
    """
    moe, dense = predicted.loc["1.3B+MoE-128"], predicted.loc["6.7B"]
    rates = {"samples per second": "samples/s", "operations per second and GPU": "TFLOP/s a GPU"}
    rows = [
        {"what": what, "ours": moe[rate] / dense[rate], "paper": moe[f"paper: {rate}"] / dense[f"paper: {rate}"]}
        for what, rate in rates.items()
    ]
    return pd.DataFrame(rows)


def simulated_headline(ratios: pd.DataFrame) -> str:
    """Return the ratio of speeds of `simulated_ratios` in one line."""
    speed = ratios.iloc[0]
    return f"Simulated, 1.3B+MoE-128 trains {speed.ours:.2f} times as fast as 6.7B (paper {speed.paper:.2f})"


def verdicts(predicted: pd.DataFrame) -> list[Verdict]:
    """Judge Table 3's claims, which speak of 128 A100, on the simulated cluster.

    `predicted` comes from `moelab.simulate.frames.training`.
    """
    speed, operations = simulated_ratios(predicted)["ours"]
    values = {"training-5x-cheaper": speed, "moe-flop-efficiency": operations}
    return [judge_simulated(c, float(values[c.id]), note="128 A100.") for c in paper.claims("throughput")]


EXPERIMENT = Experiment(
    name="throughput",
    number=6,
    title="Training throughput at equal quality",
    paper="Table 3 (section 3)",
    question="How much cheaper is training an MoE than training the dense model it equals?",
    paper_answer="Five times: 372 against 70 samples per second on 128 A100.",
    scales={
        "smoke": Scale("twins 64 and 128 wide", "seconds (tests)"),
        "cpu": Scale("twins 64 and 128 wide, 8 and 11 layers", "about a minute on one core"),
        "gpu": Scale("twins 256 and 512 wide", "not yet run; one GPU"),
    },
    arms=ARMS,
    check=partial(at_least_one, "throughput", ["rounds"]),
    trains=False,
    measures=True,
    measures_on_gpu=("gpu",),
)
