"""Simulated results in notebooks: figures with the paper beside, and verdicts that say they are simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from moelab import paper
from moelab.experiments.verdicts import (
    SIMULATED_DIRECTION,
    SIMULATED_FAILS,
    SIMULATED_HOLDS,
    SIMULATED_WITHIN,
    Verdict,
    judge,
)
from moelab.plotting.figures import PAPER
from moelab.simulate.bars import BATCH, Bar
from moelab.simulate.decoding import PARTS
from moelab.simulate.scoreboard import TOLERANCE, median_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moelab.simulate.search import Plan

SYSTEM_COLORS = {"pytorch": "#9A9A9A", "deepspeed": "#0072B2", "moelab": "#009E73"}
SYSTEM_NAMES = {"pytorch": "PyTorch baseline", "deepspeed": "DeepSpeed-MoE", "moelab": "moelab"}
PART_COLORS = dict(
    zip(
        PARTS,
        ("#56B4E9", "#0072B2", "#F0E442", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#7A5195", "#C8C8C8"),
        strict=True,
    )
)
PART_NAMES = {
    "attention": "attention",
    "dense": "dense feed-forward",
    "gate": "gate",
    "dispatch": "to experts and back (local)",
    "all_to_all": "all-to-all",
    "experts": "experts",
    "all_reduce": "all-reduce of slices",
    "head": "output head",
    "launch": "waiting for the host",
}


def bar_frame(bars: Sequence[Bar]) -> pd.DataFrame:
    """`Bar.row` of each bar, and its tokens / s / GPU."""
    frame = pd.DataFrame([bar.row() for bar in bars])
    tokens = np.array([BATCH / bar.parallel.tensor for bar in bars])  # of a step, a GPU
    frame["simulated_throughput"] = tokens / frame["simulated_ms"] * 1e3
    return frame


def grouped_bars(
    frame: pd.DataFrame,
    ax: Axes,
    *,
    x: str,
    value: str = "simulated_ms",
    reported: str | None = "paper_ms",
    log: bool = False,
) -> Axes:
    """A group of bars an `x`, one bar a system; hatched where the constants were fitted on it, the paper's value as a diamond, the error
    above."""
    groups = list(dict.fromkeys(frame[x]))
    systems = list(dict.fromkeys(frame["system"]))
    width = 0.8 / len(systems)
    seen: set[str] = set()

    def once(label: str) -> str:
        return "_" if label in seen else seen.add(label) or label

    top = frame[[value, *([reported] if reported else [])]].max().max()
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
        given = reported is not None and not pd.isna(row[reported])
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
    """Stacked horizontal bars, a row of `frame` (columns `<part>_ms`) a bar, first row on top."""
    left = np.zeros(len(frame))
    rows = np.arange(len(frame))
    for part in PARTS:
        ms = frame[f"{part}_ms"].to_numpy()
        if ms.max() > 0:
            ax.barh(rows, ms, left=left, color=PART_COLORS[part], label=PART_NAMES[part], height=0.7)
            left += ms
    for row, total in enumerate(left):
        ax.annotate(f" {total:.1f}", (total, row), va="center", fontsize=8, xytext=(2, 0), textcoords="offset points")
    ax.set_yticks(rows, labels)
    ax.invert_yaxis()
    ax.set_xlabel("milliseconds of a step")
    ax.set_xlim(0, left.max() * 1.1)
    ax.grid(axis="y", visible=False)
    return ax


def scores(found: Sequence[Mapping], ax: Axes) -> Axes:
    """The error of every number, one line each: fitted ones hollow, predicted ones filled; the aim of 15 % shaded."""
    frame = pd.DataFrame(list(found))
    rows = np.arange(len(frame))
    limit = 100 * TOLERANCE
    ax.axvspan(-limit, limit, color="#009E73", alpha=0.12, zorder=0, label=f"within {limit:.0f} %")
    ax.axvline(0, color="#888888", linewidth=1, zorder=1)
    ax.hlines(rows, 0, frame["error_percent"], color="#BBBBBB", linewidth=1, zorder=1)
    for kind, face in (("fitted", "white"), ("predicted", "#0072B2")):
        of_kind = frame["kind"] == kind
        ax.scatter(
            frame.loc[of_kind, "error_percent"],
            rows[of_kind],
            facecolor=face,
            edgecolor="#0072B2",
            s=36,
            zorder=3,
            label=f"{kind}: median error {median_error(list(found), kind=kind):.0f} %",
        )
    names = {"fig-": "Fig ", "pytorch": "PyTorch", "deepspeed": "DeepSpeed-MoE"}
    labels = frame["what"].tolist()
    for name, shown in names.items():
        labels = [label.replace(name, shown) for label in labels]
    ax.set_yticks(rows, labels)
    ax.invert_yaxis()
    ax.set_xlabel("simulated against the paper (%)")
    return ax


def pareto(plan: Plan, ax: Axes) -> Axes:
    """Latency against throughput a GPU: the front, and the plan's choice."""
    front = plan.front
    ax.plot(
        [e.latency_ms for e in front],
        [e.tokens_per_s_per_gpu for e in front],
        marker="o",
        color="#0072B2",
        label="Pareto front",
    )
    ax.scatter(
        [plan.best.latency_ms],
        [plan.best.tokens_per_s_per_gpu],
        s=140,
        facecolor="none",
        edgecolor="#D55E00",
        linewidth=2,
        zorder=4,
        label=f"best by {plan.objective}",
    )
    shown = list(front) if len(front) <= 7 else [front[round(i * (len(front) - 1) / 6)] for i in range(7)]
    for e in shown:
        p = e.parallel
        ax.annotate(
            f"{p.ranks} GPUs, tensor {p.tensor}, batch {e.batch}",
            (e.latency_ms, e.tokens_per_s_per_gpu),
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


def pareto_finding(plan: Plan, gpus: int) -> str:
    """What `pareto` shows, in a line."""
    fastest, most = plan.front[0], plan.front[-1]
    return (
        f"{plan.best.model} on up to {gpus} GPUs of {plan.best.cluster}: {fastest.latency_ms:.1f} ms a token at best, "
        f"{most.tokens_per_s_per_gpu:,.0f} tokens/s/GPU at most, at {most.latency_ms:.0f} ms ({plan.best.system}, simulated)"
    )


def verdict(claim: paper.Claim, ours: float | None, *, note: str = "", fitted: bool = False) -> Verdict:
    """A claim judged by a simulation, which has no seeds and no spread: within 15 % of the paper's value (or range), else whether the
    direction holds. Limits and orderings hold or do not. `ours` None: not simulated."""
    if ours is None:
        return judge(claim, [], note=note)
    plain = judge(claim, [ours], exact=True)
    text = "Simulated" + (", from bars the constants were fitted on" if fitted else ", predicted") + "."
    neutral = 1.0 if claim.kind == "ratio" else 0.0
    lower = claim.direction == "lower"
    if claim.kind == "bound" and claim.direction != "equal":
        found = SIMULATED_HOLDS if (ours <= claim.value if lower else ours >= claim.value) else SIMULATED_FAILS
    elif claim.kind == "ordering" or claim.value is None:
        right = ours < neutral if lower else ours > neutral
        found = SIMULATED_HOLDS if right else SIMULATED_FAILS
    else:
        low = claim.value if claim.value_low is None else claim.value_low
        high = claim.value if claim.value_high is None else claim.value_high
        if low * (1 - TOLERANCE) <= ours <= high * (1 + TOLERANCE):
            found = SIMULATED_WITHIN
        elif ours < neutral if lower else ours > neutral:
            found = SIMULATED_DIRECTION
        else:
            found = SIMULATED_FAILS
    return replace(plain, low=None, high=None, verdict=found, note=f"{text} {note}".strip())


def claims_frame(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts as the notebooks show them."""
    return pd.DataFrame(verdicts)[["statement", "where", "paper", "ours", "unit", "verdict", "note"]]
