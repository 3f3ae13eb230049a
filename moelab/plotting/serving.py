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
from moelab.plotting.typography import typeset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SYSTEM_COLORS = {"pytorch": "#9A9A9A", "deepspeed": "#0072B2", "moelab": "#009E73"}
SYSTEM_NAMES = {"pytorch": "PyTorch baseline", "deepspeed": "DeepSpeed-MoE", "moelab": "moelab"}
STEP_COLORS = {
    "attention": "#56B4E9",
    "experts": "#009E73",
    "all-to-all": "#D55E00",
    "rest of the model": "#0072B2",
    "waiting for the host": "#C8C8C8",
}
"""Group of the parts of a decoding step -> its colour. The small parts are one group; the data keep them apart."""
SIMULATED_PARTS = {
    "attention": ("attention",),
    "experts": ("experts",),
    "all-to-all": ("all_to_all",),
    "rest of the model": ("dense", "gate", "dispatch", "all_reduce", "head"),
    "waiting for the host": ("launch",),
}
"""Group -> parts of a simulated decoding step (`moelab.simulate.decoding.PARTS`)."""
MEASURED_PARTS = {
    "attention": ("attention",),
    "experts": ("experts",),
    "all-to-all": ("all-to-all",),
    "rest of the model": ("gate", "dispatch", "combine", "feed-forward", "head", "sums", "rest"),
}
"""Group -> parts of a measured decoding step (`moelab.bench.clock.PARTS`)."""
MODE_FACES = {"baseline": "white", "optimised": "#444444"}
"""Mode -> colour inside of its mark: colours are for the parts of a step."""
VARIANT_COLORS = {"MoE": "#6E6E6E", "PR-MoE": "#56B4E9", "PR-MoE+MoS": "#0072B2"}


def grouped_bars(
    frame: pd.DataFrame,
    ax: Axes,
    *,
    by: str,
    series: str = "system",
    value: str = "simulated_ms",
    reported: str = "paper_ms",
    log: bool = False,
) -> Axes:
    """Draw a group of rows for each `by`, a bar for each series, the paper's values as diamonds, numbers at the ends.

    Bars to which the simulator's constants were fitted are hatched.

    Args:
        frame: columns `series`, `by` and `value`; `reported`, and kind ("fitted" or "predicted"), where there are any.
        series: the column whose values are told apart by colour: system or variant.
        value, reported: columns of our values and of the paper's.
        log: the axis is logarithmic, and values are dots, because it has no zero for bars to begin at.
    """
    groups, names = list(dict.fromkeys(frame[by])), list(dict.fromkeys(frame[series]))
    height = 0.8 / len(names)
    top, low = 0.0, float("inf")
    for _, row in frame.iterrows():
        at = groups.index(row[by]) + (names.index(row[series]) - (len(names) - 1) / 2) * height
        ours, theirs, kind = row[value], row.get(reported, np.nan), row.get("kind", "")
        color = (SYSTEM_COLORS | VARIANT_COLORS)[row[series]]
        name = SYSTEM_NAMES.get(row[series], row[series])
        label = f"{name}, {kind}" if kind and series == "system" else name
        if log:
            ax.plot(ours, at, "o", color=color, label=label)
        else:
            hatch = "////" if kind == "fitted" else None
            ax.barh(at, ours, height * 0.9, color=color, hatch=hatch, edgecolor="white", linewidth=0.5, label=label)
        end, text = ours, f"{ours:.3g}"
        if not pd.isna(theirs):
            figures.paper_points(ax, [theirs], [at], label="paper (its number in brackets)", across=True)
            end, text = max(ours, theirs), f"{text} ({theirs:.3g}, {100 * (ours / theirs - 1):+.0f} %)"
        ax.annotate(typeset(text), (end, at), xytext=(7, 0), textcoords="offset points", va="center")
        top, low = max(top, end), min(low, ours, end)
    ax.set_yticks(range(len(groups)), [str(g) for g in groups])
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    if log:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_xlim(low / 1.5, top * (top / low) ** 0.8)  # room for the numbers
    else:
        ax.set_xlim(0, top * (1.75 if reported in frame else 1.2))
    return ax


def breakdown(frame: pd.DataFrame, ax: Axes, *, labels: Sequence[str]) -> Axes:
    """Draw the parts of simulated steps as stacked horizontal bars.

    Args:
        frame: columns `<part>_ms`; one bar per row, the first one on top.
        labels: one per row.
    """
    left = np.zeros(len(frame))
    rows = np.arange(len(frame))
    for group, parts in SIMULATED_PARTS.items():
        ms = frame[[f"{part}_ms" for part in parts]].sum(axis=1).to_numpy()
        if ms.max() > 0:
            ax.barh(rows, ms, left=left, color=STEP_COLORS[group], label=group, height=0.5)
            left += ms
    for row, total in enumerate(left):
        ax.annotate(f"{total:.1f}", (total, row), va="center", xytext=(4, 0), textcoords="offset points")
    figures.name_rows(ax, labels)
    ax.set_xlabel("milliseconds of a step")
    ax.set_xlim(0, left.max() * 1.14)
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
            s=30,
            zorder=3,
            label=f"{kind}: median error {medians[kind]:.0f} %",
        )
    names = scores["what"].tolist()
    for name, shown in {"fig-": "Fig ", "pytorch": "PyTorch", "deepspeed": "DeepSpeed-MoE"}.items():
        names = [one.replace(name, shown) for one in names]
    figures.name_rows(ax, names, above=0.25)
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
        [best[0]],
        [best[1]],
        s=140,
        facecolor="none",
        edgecolor="#D55E00",
        linewidth=2,
        zorder=4,
        label=f"best by {objective}",
    )
    some = front if len(front) <= 5 else front.iloc[[round(i * (len(front) - 1) / 4) for i in range(5)]]
    for row in some.itertuples():
        ax.annotate(
            f"{row.gpus} GPU{'s' if row.gpus > 1 else ''}, batch {row.batch}"
            + (f", tensor {row.tensor}" if row.tensor > 1 else ""),
            (row.latency_ms, row.tokens_per_s_per_gpu),
            xytext=(8, -4),
            textcoords="offset points",
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
    ax.set_xlim(low, high * (high / low) ** 0.6)  # room for the labels
    figures.legend_below(ax)
    return ax


def decoding_steps(steps: pd.DataFrame, latency: Axes, parts: Axes) -> None:
    """Draw measured decoding steps: the latency of each, and the parts of the optimised one.

    Latencies are medians with a bar to the 95th percentile; a line marks the floor.
    `steps`: see `moelab.experiments.decoding.steps`.
    """
    best = steps[steps["candidate"] == "optimised"]
    names = [str(label).replace("\n", ", ") for label in best["label"]]
    for mode, face in MODE_FACES.items():
        of_mode = steps[steps["candidate"] == mode]
        above = (of_mode["p95_ms"] - of_mode["median_ms"]).clip(lower=0)
        latency.errorbar(
            of_mode["median_ms"],
            range(len(of_mode)),
            xerr=[[0.0] * len(of_mode), above],
            fmt="o",
            capsize=3,
            color="#444444",
            markerfacecolor=face,
            label=mode,
        )
    latency.plot(best["floor_ms"], range(len(best)), "|", markersize=14, color="#444444", label="floor")
    figures.name_rows(latency, names, above=0.2)
    latency.set(xscale="log", xlabel="latency of a step (ms)")
    latency.xaxis.set_major_formatter("{x:g}")
    latency.xaxis.set_minor_formatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "25" else "")
    figures.legend_below(latency, columns=3)
    ends = np.zeros(len(best))
    for group, of in MEASURED_PARTS.items():
        ms = np.array([sum(row.get(part) or 0.0 for part in of) for row in best["parts_ms"]])
        if ms.max() > 0:
            parts.barh(range(len(best)), ms, left=ends, color=STEP_COLORS[group], label=group, height=0.5)
            ends += ms
    figures.name_rows(parts, names)
    parts.set(xlabel="ms of a step, optimised, with every part timed")
    figures.legend_below(parts)


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
    figures.legend_below(ax)
    return ax


def against_dense(frame: pd.DataFrame, ax: Axes, *, paper_ratio: float) -> Axes:
    """Draw latencies as bars, the dense model first, with their speed and cost relative to it.

    A mark shows where the paper's ratio would put the last one.

    Args:
        frame: columns model, gpus, system, simulated_ms, faster and cheaper.
        paper_ratio: how many times faster than the dense model the last one is in the paper.
    """
    ms, rows = frame["simulated_ms"].tolist(), range(len(frame))
    ax.barh(rows, ms, color=[SYSTEM_COLORS[system] for system in frame["system"]], height=0.5)
    target = ms[0] / paper_ratio
    label = "where the paper’s ratio to dense would put it"
    figures.paper_points(ax, [target], [len(ms) - 1], label=label, across=True)
    for i, row in enumerate(frame.itertuples()):
        ax.annotate(
            f"{row.simulated_ms:.1f}: {row.faster:.1f}×, cost {1 / row.cheaper:.2f}",
            (max(row.simulated_ms, target if i == len(ms) - 1 else 0), i),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
        )
    names = [
        f"{row.model}, {row.gpus} GPU{'s' if row.gpus > 1 else ''}, {SYSTEM_NAMES[row.system].split()[0]}"
        for row in frame.itertuples()
    ]
    figures.name_rows(ax, names)
    ax.set(xlabel="latency of a token (ms), predicted", xlim=(0, max(ms) * 1.55))
    return ax


CLUSTER_MARKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#000000", "v"))
"""Colour and form of each cluster's mark."""


def fastest_tokens(rows: pd.DataFrame, ax: Axes) -> None:
    """Draw the fastest token of each model on the most GPUs, at the smallest batch: a row a model, a mark a cluster.

    The clusters of a model lie one below another, so that equal latencies hide nothing.

    Args:
        rows: from `moelab.experiments.what_if.grid`.
    """
    shown = rows[(rows["best_by"] == "latency") & (rows["most_gpus"] == rows["most_gpus"].max())]
    shown = shown[shown["batch"] == shown["batch"].min()]
    models = list(dict.fromkeys(shown["model"]))
    clusters = list(shown.groupby("cluster", sort=False))
    for i, ((where, part), (color, form)) in enumerate(zip(clusters, CLUSTER_MARKS, strict=False)):
        at = part["model"].map(models.index) + 0.13 * (i - (len(clusters) - 1) / 2)
        ax.plot(part["latency_ms"], at, form, color=color, markersize=4, label=where)
    for row in range(1, len(models), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="#888888", alpha=0.08, zorder=0)
    ax.grid(axis="y", visible=False)
    ax.set_yticks(range(len(models)), models)
    ax.set(xlabel="latency of a token (ms)", xlim=(0, None), ylim=(len(models) - 0.5, -0.5))
