"""Draw what the inference and exchange experiments find: bars of systems, breakdowns, errors, measured steps, messages over ranks.

Every function draws on axes that it is given. Frames come from `moelab.experiments`; the columns that a function reads are in its docstring.
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
EXCHANGE_COLORS = {"flat": "#6E6E6E", "hierarchical": "#0072B2", "coordinated": "#D55E00"}


def grouped_bars(
    frame: pd.DataFrame,
    ax: Axes,
    *,
    x: str,
    value: str = "simulated_ms",
    reported: str = "paper_ms",
    log: bool = False,
) -> Axes:
    """Draw a group of bars for each `x`, one bar a system: hatched where the constants were fitted on it, the paper's value as a diamond, the error above.

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
    """Draw the parts of simulated steps as stacked horizontal bars: a row of `frame` (columns `<part>_ms`) a bar, the first one on top."""
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
        front: columns latency_ms, tokens_per_s_per_gpu and label, the fastest first.
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
            row.label,
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
    """Draw measured decoding steps. Left: latency of each label with a bar to the 95th percentile, and the floor. Right: the parts of the optimised step.

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


def exchange_counts(counted: pd.DataFrame, left: Axes, right: Axes) -> None:
    """Draw messages over ranks, and rows over those of the flat exchange: formulas as lines, counts as dots.

    Args:
        counted: columns as the fields of `moelab.experiments.all_to_all.Count`.
    """
    worlds = sorted(counted["ranks"].unique())
    flat = counted[counted["way"] == "flat"].set_index("ranks")
    for way, color in EXCHANGE_COLORS.items():
        there = counted[counted["way"] == way].set_index("ranks")
        there = there[there["messages"] > 0]
        left.plot(there.index, there["formula_messages"], color=color, label=f"{way}, the paper's formula")
        left.plot(there.index, there["messages"], "o", color=color, label=f"{way}, counted")
        out = (there["rows"] + there["gathered_rows"]) / flat["rows"]
        expected = (there["formula_rows"] + there["formula_gathered_rows"]) / flat["formula_rows"]
        right.plot(there.index, expected[there.index], color=color)
        right.plot(there.index, out[there.index], "o", color=color)
    left.set(yscale="log", ylabel="messages a rank")
    right.set(ylabel="rows that leave a rank, over flat", ylim=(0, 2.1))
    left.yaxis.set_major_formatter("{x:g}")
    for ax in (left, right):
        ax.set(xscale="log", xlabel="ranks")
        ax.set_xticks(worlds, [str(p) for p in worlds])
        ax.minorticks_off()
    left.legend()


def exchange_times(predicted: pd.DataFrame, axes: Sequence[Axes]) -> None:
    """Draw the time over that of the flat exchange over ranks, a panel for each size; columns as `moelab.experiments.all_to_all.simulated` has them."""
    for ax, (size, part) in zip(axes, predicted.groupby("bytes"), strict=True):
        for way, color in EXCHANGE_COLORS.items():
            there = part[part["way"] == way]
            ax.plot(there["ranks"], there["ratio"], "o-", color=color, label=way)
        ax.set(xscale="log", xlabel="GPUs", title=f"{size // 1024} KiB a GPU", ylim=(0, None))
        ax.set_xticks(sorted(part["ranks"].unique()), [str(p) for p in sorted(part["ranks"].unique())])
        ax.minorticks_off()
    axes[0].set_ylabel("time / flat, simulated")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))


def kernel_speedups(whole: pd.DataFrame, ax: Axes, *, bound: float) -> Axes:
    """Draw the baseline's time over ours over experts, a line for each number of tokens: means over rounds with 95 % intervals, and the paper's bound.

    Args:
        whole: columns tokens, experts, ratio; a row a round.
        bound: the ratio that the paper says is exceeded.
    """
    experts = sorted(whole["experts"].unique())
    tokens = sorted(whole["tokens"].unique())
    palette = figures.colors(["", *map(str, tokens)])
    for i, S in enumerate(tokens):
        part = whole[whole["tokens"] == S].groupby("experts")["ratio"]
        low, high = zip(*(figures.student(values) for _, values in part), strict=True)
        at = [experts.index(E) + (i - (len(tokens) - 1) / 2) * 0.06 for E in part.groups]
        # An interval may reach below zero, where a logarithmic axis ends.
        low = [max(bound, mean / 10) for bound, mean in zip(low, part.mean(), strict=True)]
        figures.measured(ax, at, list(part.mean()), low, high, label=f"{S} tokens", color=palette[str(S)])
    figures.paper_bound(ax, bound, label=f"paper: over {bound:g}")
    ax.axhline(1, color="#888888", linewidth=1)
    ax.set(xlabel="experts", ylabel="baseline's time over ours", yscale="log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xticks(range(len(experts)), [str(E) for E in experts])
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return ax


def kernel_breakdown(table: pd.DataFrame, axes: Sequence[Axes]) -> None:
    """Draw median milliseconds as stacked bars, a panel for each number of tokens with its own scale.

    Args:
        table: index tokens, experts, candidate; columns gate, dispatch, combine.
    """
    names = ["gate", "dispatch", "combine"]
    palette = figures.colors(["", *names])
    panels = sorted(table.index.unique("tokens"))
    for ax, tokens in zip(axes, panels, strict=True):
        shown = table.loc[tokens].sort_index(level=["experts", "candidate"], ascending=[True, False])
        labels = [f"{candidate.split()[0]}, {experts}" for experts, candidate in shown.index]
        left = [0.0] * len(shown)
        for name in names:
            ax.barh(labels, shown[name], left=left, color=palette[name], label=name)
            left = [a + b for a, b in zip(left, shown[name], strict=True)]
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_title(f"{tokens} tokens")
        ax.set_xlabel("ms")
    axes[0].set_ylabel("form, experts")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
