"""Draw the start page's figure: how far MoE twins are below their dense base, over the share of the training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from moelab.files import write_text
from moelab.lazy import pd
from moelab.report.site.charts import gap_of_fig_1, models_of, whole_training
from moelab.report.site.results import Result, strongest

FILE = "hero.svg"
ARMS = ("MoE-32", "PR-MoE-32/64", "MoE-128")
BASE = "Dense"
DATA = "over-training.jsonl"
"""Curves of differences to the base at the same step and seed, in a result of pr-moe."""


def caption(result: Result) -> str:
    """Return what the figure shows, and why its curves differ from the paper's."""
    models = models_of(result)
    reached = max(_curves(result, models)["share"], default=0.0)
    sizes = [run.result["parameters"] / 1e6 for run in result.summary.runs if "parameters" in run.result]
    size = f" of {min(sizes):.1f} to {max(sizes):.1f} million parameters" if sizes else ""
    early = ", and lower their learning rate at their own end" if reached < 0.99 else ""
    return (
        f"Loss minus the dense base’s: twins{size} (lines: mean of {result.seeds}; the bar at the end is the 95 % "
        f"interval of that point by itself), which see {reached:.0%} of the paper’s tokens for each parameter, and the "
        f"paper’s MoE-128 (diamonds: Fig 1, read off the plot). The twins are smaller and read other text{early}, so "
        f"the size of a gap is not comparable; its sign and its course are."
    )


def write(results: Sequence[Result], folder: Path) -> tuple[Result | None, bool]:
    """Write the figure if its data have changed; return the result that it shows, and whether it was written."""
    result = strongest(results, "pr-moe", DATA)
    if result is None:
        return None, False
    models = models_of(result)
    curves = _curves(result, models)
    theirs = gap_of_fig_1(models.get("MoE-128", ""), models.get(BASE, ""))
    drawn = json.dumps([curves.to_numpy().tolist(), theirs]) + Path(__file__).read_text(encoding="utf-8")
    mark = f"<!-- drawn from {hashlib.sha256(drawn.encode()).hexdigest()[:32]} -->"
    path = folder / FILE
    if path.exists() and path.read_text(encoding="utf-8", errors="replace").endswith(f"{mark}\n"):
        return result, False
    _draw(curves, theirs, path)
    write_text(path, f"{path.read_text(encoding='utf-8').rstrip()}\n{mark}\n")
    return result, True


def _curves(result: Result, models: dict[str, str]) -> pd.DataFrame:
    """Return the differences over the share of the paper's training: columns arm, share, loss, a row a seed."""
    wholes = {arm: whole_training(models.get(arm, ""), result.summary.scale) for arm in ARMS}
    found = []
    for row in result.rows_or_none(DATA):
        arm, tokens, loss = (row.get(name) for name in ("arm", "tokens", "loss"))
        if arm not in ARMS or not isinstance(tokens, int | float) or not isinstance(loss, int | float):
            continue
        if wholes[arm] and tokens > 0:
            found.append((arm, tokens / wholes[arm], loss))
    return pd.DataFrame(found, columns=["arm", "share", "loss"])


def _draw(curves: pd.DataFrame, theirs: Sequence[tuple[float, float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from moelab.plotting import figures

    figures.theme()
    fig, (ax,) = figures.panels(height=3.0)
    read = pd.DataFrame(theirs, columns=["share", "gap", "uncertainty"])
    read = read.assign(low=read["gap"] - read["uncertainty"], high=read["gap"] + read["uncertainty"])
    figures.loss_curves(curves, ax, arms=ARMS, against=BASE, along="share", log=True, paper={"MoE-128": read})
    ticks = (1, 2, 5, 10, 20, 50, 100)
    ax.set_xticks(ticks, [f"{tick} %" for tick in ticks])
    ax.minorticks_off()
    ax.set(xlabel="share of the paper’s training (tokens a parameter)")
    figures.save(fig, path.with_suffix(""))
    plt.close(fig)
