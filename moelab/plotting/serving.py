"""Draw how models are served: bars of systems, breakdowns of a step, errors, the Pareto front, measured steps, memory.

Every function draws on axes that it is given. Frames come from `moelab.simulate` and `moelab.experiments`; the columns
that a function reads are in its docstring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moelab.plotting import figures
from moelab.plotting.figures import PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SYSTEM_COLORS = {"pytorch": "#9A9A9A", "deepspeed": "#0072B2", "moelab": "#009E73"}
SYSTEM_NAMES = {"pytorch": "PyTorch baseline", "deepspeed": "DeepSpeed-MoE", "moelab": "moelab"}
SIMULATED_PARTS = {
    "attention": ("#56B4E9", "attention"),
    "dense": ("#0072B2", "dense feed-forward"),
    "gate": ("#F0E442", "gate"),
    "dispatch": ("#E69F00", "to experts and back (local)"),
    "all_to_all": ("#D55E00", "all-to-all"),
    "experts": ("#009E73", "experts"),
    "all_reduce": ("#CC79A7", "all-reduce of slices"),
    "head": ("#7A5195", "output head"),
    "launch": ("#C8C8C8", "waiting for the host"),
}
"""Part of a simulated decoding step (`moelab.simulate.decoding.PARTS`) -> its colour and name."""
MEASURED_PARTS = {
    "attention": "#56B4E9",
    "gate": "#F0E442",
    "dispatch": "#E69F00",
    "all-to-all": "#D55E00",
    "experts": "#009E73",
    "combine": "#CC79A7",
    "feed-forward": "#0072B2",
    "head": "#7A5195",
    "sums": "#AAAAAA",
    "rest": "#DDDDDD",
}
"""Part of a measured decoding step (`moelab.bench.clock.PARTS`) -> its colour."""
MODE_COLORS = {"baseline": SYSTEM_COLORS["pytorch"], "optimised": SYSTEM_COLORS["moelab"]}
VARIANT_COLORS = {"MoE": "#6E6E6E", "PR-MoE": "#56B4E9", "PR-MoE+MoS": "#0072B2"}


def grouped_bars(
    frame: pd.DataFrame,
    ax: Axes,
    *,
    x: str,
    value: str = "simulated_ms",
    reported: str = "paper_ms",
    log: bool = False,
) -> Axes:
    """Draw a group of bars for each `x`, one bar per system, the paper's values as diamonds and the errors above.

    Bars to which the simulator's constants were fitted are hatched.

    Args:
        frame: columns system, kind ("fitted" or "predicted"), `x`, `value` and `reported`.
        value, reported: columns of our values and of the paper's.
        log: draw on a logarithmic axis.
    """
    groups = list(dict.fromkeys(frame[x]))
    systems = list(dict.fromkeys(frame["system"]))
    width = 0.8 / len(systems)
    seen: set[str] = set()

    def once(label: str) -> str:
        return "_" if label in seen else seen.add(label) or label

    top = frame[[value, reported]].max().max()
    for _, row in frame.iterrows():
        at = groups.index(row[x]) + (systems.index(row["system"]) - (len(systems) - 1) / 2) * width
        fitted = row["kind"] == "fitted"
        ax.bar(
            at,
            row[value],
            width * 0.92,
            color=SYSTEM_COLORS[row["system"]],
            hatch="////" if fitted else None,
            edgecolor="white",
            linewidth=0.5,
            label=once(f"{SYSTEM_NAMES[row['system']]}, simulated ({'fitted' if fitted else 'predicted'})"),
        )
        given = not pd.isna(row[reported])
        if given:
            ax.plot(
                at,
                row[reported],
                marker=PAPER["marker"],
                color=PAPER["color"],
                markerfacecolor="white",
                linestyle="none",
                markersize=6,
                label=once("paper (its number in brackets)"),
            )
        height = max(row[value], row[reported]) if given else row[value]
        # Over the higher of bar and diamond, so both numbers are named: a lone one would read as the diamond's.
        against = f"\n({row[reported]:.3g})\n{100 * (row[value] / row[reported] - 1):+.0f} %" if given else ""
        ax.annotate(
            f"{row[value]:.3g}{against}",
            (at, height),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
    ax.set_xticks(range(len(groups)), [str(g) for g in groups])
    ax.grid(axis="x", visible=False)
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_ylim(frame[value].min() / 3, top * 2.6)
    else:
        ax.set_ylim(0, top * 1.2)
    return ax


def breakdown(frame: pd.DataFrame, ax: Axes, *, labels: Sequence[str]) -> Axes:
    """Draw the parts of simulated steps as stacked horizontal bars.

    Args:
        frame: columns `<part>_ms`; one bar per row, the first one on top.
        labels: one per row.
    """
    left = np.zeros(len(frame))
    rows = np.arange(len(frame))
    for part, (color, name) in SIMULATED_PARTS.items():
        ms = frame[f"{part}_ms"].to_numpy()
        if ms.max() > 0:
            ax.barh(rows, ms, left=left, color=color, label=name, height=0.7)
            left += ms
    for row, total in enumerate(left):
        ax.annotate(f" {total:.1f}", (total, row), va="center", fontsize=8, xytext=(2, 0), textcoords="offset points")
    ax.set_yticks(rows, labels)
    ax.invert_yaxis()
    ax.set_xlabel("milliseconds of a step")
    ax.set_xlim(0, left.max() * 1.1)
    ax.grid(axis="y", visible=False)
    return ax


def errors(scores: pd.DataFrame, ax: Axes, *, tolerance: float, medians: Mapping[str, float]) -> Axes:
    """Draw the error of every number, one line each: fitted ones hollow, predicted ones filled, the tolerance shaded.

    Args:
        scores: columns what, kind ("fitted" or "predicted") and error_percent.
        tolerance: share of the paper's value within which a number counts as met.
        medians: kind -> median error in percent, for the legend.
    """
    rows = np.arange(len(scores))
    limit = 100 * tolerance
    ax.axvspan(-limit, limit, color="#009E73", alpha=0.12, zorder=0, label=f"within {limit:.0f} %")
    ax.axvline(0, color="#888888", linewidth=1, zorder=1)
    ax.hlines(rows, 0, scores["error_percent"], color="#BBBBBB", linewidth=1, zorder=1)
    for kind, face in (("fitted", "white"), ("predicted", "#0072B2")):
        of_kind = scores["kind"] == kind
        ax.scatter(
            scores.loc[of_kind, "error_percent"],
            rows[of_kind],
            facecolor=face,
            edgecolor="#0072B2",
            s=36,
            zorder=3,
            label=f"{kind}: median error {medians[kind]:.0f} %",
        )
    labels = scores["what"].tolist()
    for name, shown in {"fig-": "Fig ", "pytorch": "PyTorch", "deepspeed": "DeepSpeed-MoE"}.items():
        labels = [label.replace(name, shown) for label in labels]
    ax.set_yticks(rows, labels)
    ax.invert_yaxis()
    ax.set_xlabel("simulated against the paper (%)")
    return ax


def pareto(front: pd.DataFrame, ax: Axes, *, best: tuple[float, float], objective: str) -> Axes:
    """Draw latency against throughput a GPU: the Pareto front, and the layout that was chosen.

    Args:
        front: columns latency_ms, tokens_per_s_per_gpu, gpus, tensor and batch, the fastest first.
        best: latency and throughput of the choice.
        objective: what it is best by.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    at = front[["latency_ms", "tokens_per_s_per_gpu"]]
    ax.plot(*at.to_numpy().T, marker="o", color="#0072B2", label="Pareto front")
    ax.scatter(
        *([value] for value in best),
        s=140,
        facecolor="none",
        edgecolor="#D55E00",
        linewidth=2,
        zorder=4,
        label=f"best by {objective}",
    )
    some = front if len(front) <= 7 else front.iloc[[round(i * (len(front) - 1) / 6) for i in range(7)]]
    for row in some.itertuples():
        ax.annotate(
            f"{row.gpus} GPU{'s' if row.gpus > 1 else ''}, tensor {row.tensor}, batch {row.batch}",
            (row.latency_ms, row.tokens_per_s_per_gpu),
            xytext=(8, -4),
            textcoords="offset points",
            fontsize=8,
            va="top",
        )
    ax.margins(x=0.12, y=0.1)
    ax.set(xscale="log", yscale="log", xlabel="latency of a token (ms)", ylabel="tokens / s / GPU")
    for axis in (ax.xaxis, ax.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 5 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    low, high = ax.get_xlim()
    ax.set_xlim(low, high * (high / low) ** 0.25)  # room for the last label
    ax.legend(loc="lower right")
    return ax


def decoding_steps(steps: pd.DataFrame, left: Axes, right: Axes, *, join: bool = False) -> None:
    """Draw measured decoding steps.

    Left: latency of each label with a bar to the 95th percentile, and the floor. Right: parts of the optimised step.

    Args:
        steps: see `moelab.experiments.decoding.steps`.
        join: draw a line through the labels, where they are sizes of one model.
    """
    for mode, color in MODE_COLORS.items():
        of_mode = steps[steps["candidate"] == mode]
        above = (of_mode["p95_ms"] - of_mode["median_ms"]).clip(lower=0)
        left.errorbar(
            range(len(of_mode)),
            of_mode["median_ms"],
            yerr=[[0.0] * len(of_mode), above],
            fmt="o-" if join else "o",
            capsize=3,
            color=color,
            label=mode,
        )
    best = steps[steps["candidate"] == "optimised"]
    labels = list(best["label"])
    left.plot(range(len(best)), best["floor_ms"], "_", markersize=24, color="#444444", label="floor")
    left.set(yscale="log", ylabel="latency of a step (ms)", xlim=(-0.5, len(best) - 0.5))
    left.set_xticks(range(len(best)), labels)
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "25" else "")
    left.legend()
    ends = np.zeros(len(best))
    for part, color in MEASURED_PARTS.items():
        ms = np.array([parts.get(part, 0.0) for parts in best["parts_ms"]])
        if ms.max() > 0:
            right.barh(labels, ms, left=ends, color=color, label=part)
            ends += ms
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.set(xlabel="ms of a step, optimised, with every part timed")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def memory(held: pd.DataFrame, ax: Axes, *, capacity: float, paper: Mapping[str, int]) -> Axes:
    """Draw memory per GPU over GPUs, one line per variant.

    A ring marks the fewest GPUs that hold the model, diamonds at the bottom mark the paper's numbers.

    Args:
        held: columns variant, gpus, gib_per_gpu and fits.
        capacity: of a GPU, in GiB.
        paper: variant -> fewest GPUs.
    """
    for variant, color in VARIANT_COLORS.items():
        of_variant = held[held["variant"] == variant]
        ax.plot(of_variant["gpus"], of_variant["gib_per_gpu"], color=color, marker="o", label=variant)
        least = of_variant[of_variant["fits"]].nsmallest(1, "gpus")
        ax.scatter(least["gpus"], least["gib_per_gpu"], s=150, facecolor="none", edgecolor=color, linewidth=2)
    ax.axhline(capacity, color="#D55E00", linewidth=1.5, label="memory of a GPU")
    for i, (variant, gpus) in enumerate(paper.items()):
        figures.paper_points(ax, [gpus], [6], color=VARIANT_COLORS[variant], label="_" if i else "paper: fewest GPUs")
    ax.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="GiB a GPU")
    counts = sorted(set(held["gpus"]))
    ax.set_xticks(counts, [str(n) for n in counts])
    ax.set_yticks([5, 10, 20, 40, 80, 160], ["5", "10", "20", "40", "80", "160"])
    ax.minorticks_off()
    ax.legend()
    return ax


def against_dense(frame: pd.DataFrame, ax: Axes, *, paper_ratio: float) -> Axes:
    """Draw latencies as bars, the dense model first, with their speed and cost relative to it.

    A mark shows where the paper's ratio would put the last one.

    Args:
        frame: columns model, gpus, system, simulated_ms, faster and cheaper.
        paper_ratio: how many times faster than the dense model the last one is in the paper.
    """
    ms = frame["simulated_ms"].tolist()
    ax.bar(range(len(ms)), ms, color=[SYSTEM_COLORS[system] for system in frame["system"]], width=0.7)
    target = ms[0] / paper_ratio
    figures.paper_points(ax, [len(ms) - 1], [target], label="where the paper's ratio to dense would put it")
    labels = []
    for i, row in enumerate(frame.itertuples()):
        last = i == len(ms) - 1
        ax.annotate(
            f"{row.simulated_ms:.1f}\n{row.faster:.1f}x, cost {1 / row.cheaper:.2f}",
            (i, max(row.simulated_ms, target if last else 0)),
            xytext=(0, 9 if last else 5),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
        model = row.model.replace(" ", "\n").replace("+", "\n+")
        labels.append(f"{model}\n{row.gpus} GPU{'s' if row.gpus > 1 else ''}\n{SYSTEM_NAMES[row.system].split()[0]}")
    ax.set_xticks(range(len(ms)), labels, fontsize=8)
    ax.set(ylabel="latency of a token (ms), predicted", ylim=(0, max(ms) * 1.2))
    ax.grid(axis="x", visible=False)
    return ax
