"""All numbers of the paper that the simulator can be compared with, each with its error, fitted on or predicted."""

from __future__ import annotations

from typing import Any

import numpy as np

from moelab import paper
from moelab.config.parallel import ParallelConfig
from moelab.simulate import paper_figures
from moelab.simulate.calibrate import fit
from moelab.simulate.constants import Constants
from moelab.simulate.search import least_gpus
from moelab.simulate.step import TrainingEstimate, training

Row = dict[str, Any]


def rows(constants: Constants | None = None) -> list[Row]:
    """Return a row for each number: group, what, paper, simulated, unit, error_percent, kind, assumed.

    `kind` is "fitted" or "predicted".
    """
    found: list[Row] = []

    def add(
        group: str, what: str, reported: float, ours: float, unit: str, kind: str = "predicted", assumed: str = ""
    ) -> None:
        found.append(
            {
                "group": group,
                "what": what,
                "paper": reported,
                "simulated": ours,
                "unit": unit,
                "error_percent": 100 * (ours / reported - 1),
                "kind": kind,
                "assumed": assumed,
            }
        )

    for bar in (*paper_figures.fig10(), *paper_figures.fig11(), *paper_figures.tutorial()):
        if bar.paper_ms is not None:
            row = bar.row(constants=constants)
            what = f"{bar.figure}: {bar.label}, {bar.system}, {bar.gpus} GPUs"
            add("latency", what, bar.paper_ms, row["simulated_ms"], "ms", row["kind"], bar.assumed)
    for label, ratio in speedups(constants).items():
        add("ratio", f"fig-11: speed-up at {label}", printed_speedup(label), ratio, "x")
    against = against_dense(constants)
    for what, ratio in against.items():
        figure, metric = what.split(":")
        reported = paper.inference_results(figure=figure, metric=metric)[0].value
        assumed = "shapes and GPU count from the authors' script" if figure == "fig-15" else ""
        word = "faster" if metric == "speedup" else "cheaper"
        add("ratio", f"{figure}: {word} than dense", reported, ratio, "x", assumed=assumed)
    family = paper_figures.family("8B")
    needed = paper.inference_results(figure="fig-12", metric="gpus-needed")[0]
    assert needed.baseline_gpus is not None
    for what, gpus, model in (
        ("8B+MoE-128", needed.baseline_gpus, family["MoE"]),
        ("its PR-MoE+MoS", needed.value, family["PR-MoE+MoS"]),
    ):
        assumed = "" if what == "8B+MoE-128" else "experts from the authors' script"
        add(
            "GPUs",
            f"fig-12: fewest for {what}",
            gpus,
            least_gpus(model, paper_figures.CLUSTER)[0],
            "GPUs",
            assumed=assumed,
        )
    speeds = table3(constants)
    theirs = {t.model: t.samples_per_s for t in paper.training_throughput()}
    ours = {name: speeds[name].samples_per_s for name in theirs}
    for name in theirs:
        add("training", f"Table 3: {name}", theirs[name], ours[name], "samples/s", assumed=TABLE3_ASSUMED)
    (dense, moe), (our_dense, our_moe) = theirs.values(), ours.values()
    add("ratio", "Table 3: MoE over dense", moe / dense, our_moe / our_dense, "x", assumed=TABLE3_ASSUMED)
    return found


def median_error(found: list[Row], **wanted: str) -> float:
    """Return the median absolute error, in per cent, of matching rows, such as kind="predicted", group="latency"."""
    return float(np.median([abs(r["error_percent"]) for r in found if all(r[k] == v for k, v in wanted.items())]))


def speedups(constants: Constants | None = None) -> dict[str, float]:
    """Return Fig 11's ratios, latency of PyTorch over DeepSpeed, for the sizes that have a printed one."""
    latency = {(b.label, b.system): b.simulate(constants=constants).latency_ms for b in paper_figures.fig11()}
    labels = [r.model for r in paper.inference_results(figure="fig-11", metric="speedup")]
    return {label: latency[label, "pytorch"] / latency[label, "deepspeed"] for label in labels}


def against_dense(constants: Constants | None = None) -> dict[str, float]:
    """Return Figs 14 and 15: PR-MoE+MoS on DeepSpeed over the dense model on PyTorch, in latency and cost.

    Cost is GPU time per token: both sides rent the same machines.
    """
    ratios = {}
    for figure, found in (("fig-14", paper_figures.fig14()), ("fig-15", paper_figures.fig15())):
        dense, small = (found[i].simulate(constants=constants) for i in (0, -1))
        ratios[f"{figure}:speedup"] = dense.latency_ms / small.latency_ms
        ratios[f"{figure}:cost-saving"] = small.tokens_per_s_per_gpu / dense.tokens_per_s_per_gpu
    return ratios


TABLE3_ASSUMED = "batch, micro-batch and slicing of the released scripts, recomputation as there"


def table3(constants: Constants | None = None) -> dict[str, TrainingEstimate]:
    """Return Table 3: both models on 128 A100, with the released scripts' batch, micro-batch, slicing, recomputation.

    The scripts' 64 GPUs become 128 by data parallelism, so a rank's micro-batch is at most its share of the batch.
    """
    found = {}
    for row in paper.training_throughput():
        settings = paper.training_settings(row.model)
        data = row.gpus // settings.script_tp
        found[row.model] = training(
            row.model,
            ParallelConfig(tensor=settings.script_tp, data=data, recompute=settings.activation_checkpointing),
            paper_figures.CLUSTER,
            batch=settings.batch_seqs,
            micro_batch=min(settings.micro_batch_seqs, settings.batch_seqs // data),
            zero=settings.zero_stage,
            constants=constants,
        )
    return found


def sensitivity(values: dict[str, list[float]]) -> list[Row]:
    """Return what the fit does not determine.

    One constant is held at each of some values and the others are fitted again. The last row fits all constants, but
    without the baseline's 64-GPU bar, which the paper's text contradicts (`moelab.paper.conflicts`, fig10-pytorch-64).

    Returns:
        Rows with the constant, its value, the worst error of the fitted bars, and the median errors of predicted
        latencies and of all predictions, in per cent.
    """

    def row(what: str, value: float, known: Constants) -> Row:
        found = rows(known)
        return {
            "constant": what,
            "value": value,
            "worst_fitted_percent": max(abs(r["error_percent"]) for r in found if r["kind"] == "fitted"),
            "predicted_latency_percent": median_error(found, kind="predicted", group="latency"),
            "all_predicted_percent": median_error(found, kind="predicted"),
        }

    table = []
    for name, options in values.items():
        for value in options:
            start = Constants().with_free({name: value})
            table.append(row(name, value, start.with_free(fit(start=start, held=(name,))["constants"])))
    undisputed = [b for b in paper_figures.fig10() if (b.system, b.gpus) != ("pytorch", 64)]
    known = Constants().with_free(fit(undisputed)["constants"])
    return [*table, row("far_us, fitted without the baseline's 64-GPU bar", known.far_us, known)]


def printed_speedup(label: str) -> float:
    """Return the ratio that the paper's chart prints for a model of Fig 11."""
    return paper.inference_results(figure="fig-11", metric="speedup", model=label)[0].value
