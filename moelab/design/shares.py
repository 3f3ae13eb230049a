"""Lay curves over the paper's at equal shares of the training.

At the scale `full` a twin has the paper's tokens a parameter and the paper's schedule in proportion, so a share of its
training is the same share of the paper's 300 B tokens, the state of the learning rate included. At other scales a run
ends before its curve would show what the rest of the paper's does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moelab import paper
from moelab.design import comparison
from moelab.lazy import pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ["pair", "seed", "share", "gap"]


def gaps(curves: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Return left minus right over the share of the training, by seed.

    Args:
        curves: `Runs.curves()`: columns arm, seed, tokens, loss; the training ends at an arm's last tokens.
        pairs: (left, right) arms.

    Returns:
        Columns pair ("left − right"), seed, share (0 to 1), gap (nats per token).
    """
    found = [pd.DataFrame(columns=COLUMNS)]
    for left, right in pairs:
        moved = comparison.over_training(curves, [left], right)
        if len(moved):
            end = curves.loc[curves["arm"] == left, "tokens"].max()
            found.append(
                moved.assign(pair=_named(left, right), share=moved["tokens"] / end, gap=moved["loss"])[COLUMNS]
            )
    return pd.concat(found[1:] or found, ignore_index=True)


def paper_gaps(pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Return the same from the paper's Fig 1, for pairs of its models.

    Columns: pair, share, gap, low, high.
    """
    rows = []
    for left, right in pairs:
        ours, theirs = paper.loss_curve(left), paper.loss_curve(right)
        whole = paper.training_settings(left).train_tokens / 1e9
        against = dict(zip(theirs.tokens_B, zip(theirs.loss, theirs.uncertainty, strict=True), strict=True))
        for billions, loss, wide in zip(ours.tokens_B, ours.loss, ours.uncertainty, strict=True):
            if billions in against:
                gap, both = loss - against[billions][0], wide + against[billions][1]
                rows.append([_named(left, right), billions / whole, gap, gap - both, gap + both])
    return pd.DataFrame(rows, columns=["pair", "share", "gap", "low", "high"])


def crossing(curve: pd.DataFrame) -> float | None:
    """Return the share of the training from which on left is below right, interpolated; None where it never stays so.

    Args:
        curve: one pair's rows of one seed, from `gaps`, or of the paper.
    """
    points = sorted(zip(curve["share"], curve["gap"], strict=True))
    if not points or points[-1][1] >= 0:
        return None
    above = max((i for i, (_, gap) in enumerate(points) if gap >= 0), default=-1)
    if above < 0:
        return points[0][0]
    (before, high), (after, low) = points[above], points[above + 1]
    return before + (after - before) * high / (high - low)


def crossings(table: pd.DataFrame) -> pd.DataFrame:
    """Return `crossing` for each pair and seed of `gaps`: columns pair, seed, share (missing where there is none)."""
    rows = [[pair, seed, crossing(part)] for (pair, seed), part in table.groupby(["pair", "seed"], sort=False)]
    return pd.DataFrame(rows, columns=["pair", "seed", "share"]).astype({"share": float})


def headline(table: pd.DataFrame) -> str:
    """Return, in one line, from which share of the training on each pair stays below zero: the mean over seeds."""
    found = crossings(table)
    said = []
    for pair, part in found.groupby("pair", sort=False):
        crossed = part["share"].dropna()
        where = f"from {crossed.mean():.0%} of the training on" if len(crossed) else "never"
        seeds = f" ({len(crossed)} of {len(part)} seeds)" if 0 < len(crossed) < len(part) else ""
        said.append(f"{pair} below zero {where}{seeds}")
    return "; ".join(said) or "no pair has finished"


def draw(
    ax: Axes, table: pd.DataFrame, pairs: Sequence[tuple[str, str]], models: Mapping[str, str] | None = None
) -> Axes:
    """Draw gaps over the share of the training: the mean over seeds with its 95 % interval, the paper's beside it.

    Args:
        table: from `gaps`.
        pairs: of arms, what to draw; pairs of models of Fig 1 get its points in their colour.
        models: arm -> the paper's model, where an arm has another name.
    """
    from moelab.plotting import figures

    palette = figures.colors([_named(*pair) for pair in pairs])
    known = {point.model for point in paper.loss_points()}
    for pair in pairs:
        part = table[table["pair"] == _named(*pair)].groupby("share")["gap"]
        if len(part):
            x, mean = [100 * share for share in part.groups], part.mean()
            low, high = zip(*(figures.student(values) for _, values in part), strict=True)
            ax.plot(x, mean, color=palette[_named(*pair)], label=_named(*pair))
            ax.fill_between(x, low, high, color=palette[_named(*pair)], alpha=0.15, linewidth=0)
        published = ((models or {}).get(pair[0], pair[0]), (models or {}).get(pair[1], pair[1]))
        if known.issuperset(published):
            theirs = paper_gaps([published])
            bounds = (theirs["gap"], theirs["low"], theirs["high"])
            color, label = palette[_named(*pair)], f"paper: {theirs['pair'].iloc[0]}"
            figures.paper_points(ax, 100 * theirs["share"], *bounds, color=color, label=label)
    ax.axhline(0, color="#888888", linewidth=1)
    ax.set(xlabel="share of the training (%)", ylabel="difference of validation losses (nats per token)")
    figures.legend_below(ax, columns=1)
    return ax


def _named(left: str, right: str) -> str:
    return f"{left} − {right}"
