"""Lay curves over the paper's at equal shares of the training.

At the scale `full` a twin has the paper's tokens a parameter and the paper's schedule in proportion, so a share of its
training is the same share of the paper's 300 B tokens, the state of the learning rate included. At other scales a run
ends before its curve would show what the rest of the paper's does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moelab import paper
from moelab.design import comparison
from moelab.design.judging import can_test, judge
from moelab.design.verdicts import Verdict
from moelab.lazy import np, pd

COLUMNS = ["pair", "seed", "share", "gap"]


def gaps(curves: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Return left minus right over the share of the training, by seed.

    Args:
        curves: `Runs.curves()`: columns arm, seed, tokens, loss; the training ends at an arm's last tokens.
        pairs: (left, right) arms.

    Returns:
        Columns pair ("left − right"), seed, share (0 to 1), gap (nats per token).
    """
    parts = [pd.DataFrame(columns=COLUMNS)]
    for left, right in pairs:
        moved = comparison.over_training(curves, [left], right)
        if len(moved):
            end = curves.loc[curves["arm"] == left, "tokens"].max()
            parts.append(
                moved.assign(pair=_named(left, right), share=moved["tokens"] / end, gap=moved["loss"])[COLUMNS]
            )
    return pd.concat(parts[1:] or parts, ignore_index=True)


def paper_gaps(pairs: Sequence[tuple[str, str]]) -> dict[str, pd.DataFrame]:
    """Return the same from the paper's Fig 1, for the pairs of which it has both curves: pair -> points.

    Columns: share, gap, low, high.
    """
    known, by_pair = {point.model for point in paper.loss_points()}, {}
    for left, right in pairs:
        if {left, right} <= known:
            whole = paper.training_settings(left).train_tokens / 1e9
            curve = paper.loss_curve(left).minus(paper.loss_curve(right))
            rows = [[billions / whole, *gap] for billions, *gap in curve]
            by_pair[_named(left, right)] = pd.DataFrame(rows, columns=["share", "gap", "low", "high"])
    return by_pair


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


def costs_to_equal_loss(
    curves: pd.DataFrame, pairs: Sequence[tuple[str, str]], costs: Mapping[str, Mapping[str, float]]
) -> pd.DataFrame:
    """Return how many times as much it costs to train right as to train left to an equal loss, by seed.

    The equal loss is the higher of the two curves' ends. The arm that ends there has all its tokens; the other has the
    tokens from which on its curve is below, interpolated over log tokens (as in `budgets.tokens_at`). Its rate has not
    decayed by then, so a run that was planned for that loss would cost less. A seed in which this lies before the first
    evaluation of a trained model is left out.

    Args:
        curves: as in `gaps`.
        costs: what -> arm -> cost of a token, such as {"training FLOPs": {"1.3B": 4e6, "350M+MoE-128": 1.3e6}}.

    Returns:
        Columns pair, seed, at ("training tokens" and each of the costs), times.
    """
    rows = []
    for left, right in pairs:
        for seed, part in curves[curves["arm"].isin([left, right])].groupby("seed"):
            lines = {arm: line.sort_values("tokens") for arm, line in part.groupby("arm")}
            if len(lines) < 2:
                continue
            goal = max(line["loss"].iloc[-1] for line in lines.values())
            with np.errstate(divide="ignore"):  # an untrained model has no tokens
                reached = {
                    arm: crossing(pd.DataFrame({"share": np.log(line["tokens"]), "gap": line["loss"] - goal}))
                    for arm, line in lines.items()
                }
            tokens = {arm: lines[arm]["tokens"].iloc[-1] if at is None else np.exp(at) for arm, at in reached.items()}
            if not all(count > 0 for count in tokens.values()):
                continue
            for what, a_token in {"training tokens": {left: 1.0, right: 1.0}, **costs}.items():
                if {left, right} <= set(a_token):
                    times = tokens[right] * a_token[right] / (tokens[left] * a_token[left])
                    rows.append([_named(left, right), seed, what, times])
    return pd.DataFrame(rows, columns=["pair", "seed", "at", "times"])


def crossings(table: pd.DataFrame) -> pd.DataFrame:
    """Return `crossing` for each pair and seed of `gaps`: columns pair, seed, share (missing where there is none).

    Pairs keep their order; the seeds of each ascend.
    """
    order = list(dict.fromkeys(table["pair"]))
    found = {of: crossing(part) for of, part in table.groupby(["pair", "seed"])}
    rows = [[pair, seed, found[pair, seed]] for pair, seed in sorted(found, key=lambda of: (order.index(of[0]), of[1]))]
    return pd.DataFrame(rows, columns=["pair", "seed", "share"]).astype({"share": float})


def judge_crossing(
    claim: paper.Claim, curves: pd.DataFrame, arms: tuple[str, str], whole: float, share: float | None, **how: Any
) -> Verdict:
    """Judge a claim on where two curves cross: in each seed from there on one arm stays below the other.

    An arm that is below from the first evaluation on crosses there. Where it does not end below, the crossing is
    censored: later than the end of the training, which is what counts. A seed that an arm lacks has no value. Runs that
    end before the claim's share of the training have none at all.

    Args:
        curves: `Runs.curves()`.
        arms: (the arm that is below after the crossing, the other).
        whole: the paper's training, in the claim's unit.
        share: of it that the runs reach.
        how: further arguments of `judging.judge`.
    """
    both = curves[curves["arm"].isin(arms)] if len(curves) else curves
    if not can_test(claim, how.get("scale"), share) or not len(both) or both["arm"].nunique() < 2:
        return judge(claim, share=share, **how)
    found = crossings(gaps(both, [arms])).set_index("seed")["share"]
    end, there = whole * min(1.0, share or 1.0), set(both["seed"])
    values, lost, censored = {}, {}, []
    for seed in map(int, sorted(curves["seed"].unique())):
        values[seed] = end * found[seed] if seed in found.index else math.nan
        if seed not in found.index:
            lost[seed] = f"{'one arm' if seed in there else 'both arms'} did not finish"
        elif pd.isna(found[seed]):
            values[seed] = end
            censored.append(seed)
    note = "Where the curves cross, seed by seed, on a part of the validation text."
    if censored:
        seeds = f"seed{'s' * (len(censored) > 1)} {', '.join(map(str, censored))}"
        note += f" {arms[0]} does not end below {arms[1]} in {seeds}, which counts as a crossing at the end."
    return judge(claim, values, lost=lost, censored=censored, note=note, share=share, **how)


def headline(table: pd.DataFrame) -> str:
    """Return, in one line, the pair whose left arm is the last to stay below the right one, and from which share on.

    Only pairs that cross on every seed count.
    """
    shares = crossings(table).groupby("pair", sort=False)["share"].agg(lambda of: of.mean(skipna=False)).dropna()
    if not len(shares):
        return "No MoE stays below the dense model on every seed"
    left, right = str(shares.idxmax()).split(" − ")
    return f"{left} stays below {right} from {shares.max():.0%} of the training on"


def _named(left: str, right: str) -> str:
    return f"{left} − {right}"
