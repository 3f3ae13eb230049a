"""Serve any model on any cluster (notebook 16), and compute the grid of answers that the explorer page shows.

Shows: for each model, cluster, number of GPUs and batch the fastest and the cheapest layout that the simulator finds.

Expect: everything is simulated, so no claim of the paper is judged here; notebooks 10 to 14 say how far to trust it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moelab import simulate
from moelab.design.experiment import Experiment, Scale

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MODELS = {
    "smoke": ("1.3B+MoE-128",),
    "cpu": (
        *("1.3B", "6.7B", "175B", "350M+MoE-128", "1.3B+MoE-128", "1.3B+PR-MoE-64/128"),
        *("1.3B+PR-MoE-64/128+L21", "8B+MoE-128", "24B+MoE-128"),
    ),
}
GPUS = {"smoke": (8, 16), "cpu": (1, 8, 32, 128, 256)}
BATCHES = {"smoke": (8,), "cpu": (1, 4, 16, 64, 256)}
"""Scale -> what the grid is made of; batches are of a tensor group."""
OBJECTIVES: tuple[simulate.Objective, ...] = ("latency", "cost")


def grid(scale: str, context: int) -> pd.DataFrame:
    """Return the best layout for each model, cluster, number of GPUs, batch and objective, where one fits.

    Columns: model, cluster, most_gpus, best_by, memory_gib and currency of the cluster, and those of
    `moelab.simulate.search.frame`.

    Args:
        context: tokens of a sequence in the cache.
    """
    import pandas as pd

    from moelab.simulate.search import frame

    rows = []
    for name in MODELS[scale]:
        for where in simulate.clusters():
            for most in GPUS[scale]:
                for batch in BATCHES[scale]:
                    for objective in OBJECTIVES:
                        try:
                            found = simulate.plan(
                                name, most, where, objective=objective, batches=[batch], context=context
                            ).best
                        except ValueError:  # it does not fit
                            continue
                        about = {"model": name, "cluster": where, "most_gpus": most, "best_by": objective}
                        of_cluster = {"memory_gib": found.capacity_gib, "currency": found.currency}
                        rows.append(about | frame([found]).iloc[0].to_dict() | of_cluster)
    return pd.DataFrame(rows)


def draw(rows: pd.DataFrame, ax: Axes) -> None:
    """Draw the fastest token of each model on the most GPUs, at the smallest batch: a row a model, a mark a cluster."""
    shown = rows[(rows["best_by"] == "latency") & (rows["most_gpus"] == rows["most_gpus"].max())]
    shown = shown[shown["batch"] == shown["batch"].min()]
    models = list(dict.fromkeys(shown["model"]))[::-1]
    for (where, part), (color, form, size) in zip(shown.groupby("cluster", sort=False), MARKS, strict=False):
        at = part["model"].map(models.index)
        ax.plot(part["latency_ms"], at, form, color=color, markersize=size, markerfacecolor="none", label=where)
    ax.set_yticks(range(len(models)), models)
    ax.set(xlabel="latency of a token (ms)", xlim=(0, None))


MARKS = (("#0072B2", "o", 11), ("#D55E00", "s", 7), ("#009E73", "x", 5))
"""Colour, form and size of each cluster's mark: equal latencies are seen through one another."""


def headline(rows: pd.DataFrame) -> str:
    """Return what the grid shows in one line: the largest model's fastest token on each cluster."""
    largest = rows[rows["model"] == rows["model"].iloc[-1]]
    fastest = largest.groupby("cluster", sort=False)["latency_ms"].min()
    said = ", ".join(f"{ms:.1f} on {where}" for where, ms in fastest.items())
    return (
        f"{largest['model'].iloc[0]} on up to {rows['most_gpus'].max()} GPUs: milliseconds a token at best {said} "
        "(simulated)"
    )


EXPERIMENT = Experiment(
    name="what-if",
    number=16,
    title="What if? Any model, cluster and layout",
    paper="beyond the paper",
    question="Which layout serves a model fastest or cheapest, and on how many GPUs?",
    paper_answer="For its own models and cluster: Table 6 and Figs 10 to 15.",
    scales={
        "smoke": Scale("one model on simulated clusters", "seconds (tests)"),
        "cpu": Scale("nine models on simulated clusters of up to 256 GPUs", "minutes (computed, nothing is measured)"),
    },
)
