"""Draw the figure of the README and the start page: how large a dense model an MoE with 128 experts equals."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moelab.config import ModelConfig
from moelab.design import budgets, comparison
from moelab.experiments.scaling import EQUAL_SIZE, PAIRS
from moelab.files import write_text
from moelab.lazy import pd
from moelab.plotting.typography import typeset
from moelab.report.site.claims import ClaimRow
from moelab.report.site.results import ODD, Result, strongest
from moelab.statistics import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "hero.svg"
DATA = "final.jsonl"
"""Final losses, in a result of scaling."""

AXIS = "dense model of equal loss: its parameters, divided by those of the MoE’s base (without embeddings)"


@dataclass(frozen=True)
class Row:
    """What a row of the figure shows: our value, its 95 % interval (NaN of one seed), and what the paper has."""

    name: str
    ours: float
    low: float
    high: float
    paper: tuple[float, ...]


def caption(result: Result) -> str:
    """Return what the figure shows."""
    sizes = [run.result["parameters"] / 1e6 for run in result.summary.runs if "parameters" in run.result]
    size = f" of {min(sizes):.1f} to {max(sizes):.1f} million parameters" if sizes else ""
    return (
        f"How many times as many parameters as its base, without embeddings, the dense model has that an MoE with 128 "
        f"experts equals. Bars: our twins{size}, mean of {result.seeds} with the 95 % interval; the loss between two "
        f"dense models goes by the logarithm of their size. Diamonds: the paper, read off the ends of the curves of "
        f"its Fig 1; in the last row the range of its text."
    )


def rows(result: Result, claims: Sequence[ClaimRow]) -> list[Row]:
    """Return the rows: one for each pair of an MoE and its base, then their mean, which is the claim's value."""
    final = pd.DataFrame(result.rows_or_none(DATA))
    found = []
    try:
        for moe, base, larger in PAIRS:
            times = list(budgets.effective_size(final, moe, base, larger, result.summary.scale)["times"])
            whole = comparison.tokens_a_parameter(base)
            theirs = budgets.paper_effective_size(moe, base, larger, whole)
            if times and math.isfinite(sum(times)):
                experts = max(ModelConfig.parse(moe).experts)
                found.append(Row(f"{base} with {experts} experts", *interval(times), (theirs,) if theirs else ()))
    except ODD:
        return []
    both = next((row for row in claims if row.claim.id == EQUAL_SIZE and row.decides and row.result is result), None)
    if found and both and both.ours is not None and both.low is not None and both.high is not None:
        bounds = tuple(value for value in (both.claim.value_low, both.claim.value_high) if value is not None)
        found.append(Row("mean of both", both.ours, both.low, both.high, bounds))
    return found


def write(results: Sequence[Result], folder: Path, claims: Sequence[ClaimRow] = ()) -> tuple[Result | None, bool]:
    """Write the figure if its data have changed; return the result that it shows, and whether it was written."""
    result = strongest(results, "scaling", DATA)
    shown = rows(result, claims) if result else []
    if not shown:
        return None, False
    drawn = json.dumps([asdict(row) for row in shown]) + Path(__file__).read_text(encoding="utf-8")
    mark = f"<!-- drawn from {hashlib.sha256(drawn.encode()).hexdigest()[:32]} -->"
    path = folder / FILE
    if path.exists() and path.read_text(encoding="utf-8", errors="replace").endswith(f"{mark}\n"):
        return result, False
    _write(shown, path)
    write_text(path, f"{path.read_text(encoding='utf-8').rstrip()}\n{mark}\n")
    return result, True


def _write(shown: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from moelab.plotting import figures

    figures.theme()
    fig, (ax,) = figures.panels(height=0.85 * len(shown) + 0.7)
    draw(shown, ax)
    figures.legend_below(ax)
    figures.title(fig, f"An MoE equals a dense model {shown[-1].ours:.1f}× its base")
    figures.save(fig, path.with_suffix(""))
    plt.close(fig)


def draw(shown: Sequence[Row], ax: Axes) -> None:
    """Draw a bar for each row from nothing to our value, with its interval, and the paper's diamonds."""
    from matplotlib.ticker import MaxNLocator

    from moelab.plotting import figures, palette

    color, below = palette.colors(["MoE-128"])["MoE-128"], 0.32
    for at, row in enumerate(shown):
        ax.barh(at, row.ours, height=0.34, color=color, label="ours, with the 95 % interval" if at == 0 else "")
        if math.isfinite(row.low + row.high):
            around = [[row.ours - row.low], [row.high - row.ours]]
            ax.errorbar(
                [row.ours], [at], xerr=around, fmt="none", ecolor="#888888", elinewidth=1.8, capsize=4, zorder=2
            )
        ax.annotate(f"{row.ours:.1f}×", (0.1, at), color="white", weight="bold", va="center")
        if row.paper:
            heights, label = [at + below] * len(row.paper), "paper" if at == 0 else ""
            figures.paper_points(ax, row.paper, heights, across=True, line=len(row.paper) > 1, label=label)
    figures.name_rows(ax, [typeset(row.name) for row in shown], above=0.22)
    ax.set_ylim(len(shown) - 1 + below + 0.2, -0.75)
    ends = [end for row in shown for end in (row.ours, row.high, *row.paper) if math.isfinite(end)]
    ax.set_xlim(0, 1.05 * max(ends))
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    ax.xaxis.set_major_formatter("{x:g}×")
    ax.set_xlabel(AXIS)
