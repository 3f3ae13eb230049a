"""Say what was found in three sentences and one score, and what a dense model costs in one table.

The README, the start page and `answers.csv` have the same sentences: templates, filled with measured values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from moelab.design.verdicts import CANNOT_TELL, CANNOT_TEST, FAILS, HELD, MEASURED
from moelab.paper import claim
from moelab.report.site.claims import ClaimRow
from moelab.report.site.results import Result
from moelab.statistics import ratio_interval

COSTS = "costs.csv"
SPEED = "training-5x-cheaper"
_ALIKE = 1.1
"""Ratio of two computations below which they are called nearly the same."""

_TO_EQUAL_LOSS = {
    "training tokens": "Training tokens to an equal loss",
    "training FLOPs": "Training FLOPs to an equal loss",
    "time": "Training time to an equal loss, measured",
}


def _sure(row: ClaimRow) -> str:
    """Return the verdict of a claim, after adjustment, and on how many seeds it rests."""
    return row.verdict + (f" ({row.samples} seeds)" if row.kind == MEASURED else "")


def gain(row: ClaimRow) -> str:
    """Return how much lower the loss of an MoE is than its base's; empty without the paper's number."""
    theirs, moe, base = row.claim.value, row.claim.left, row.claim.right
    if row.ours is None or theirs is None or row.result is None:
        return ""
    flops = {run["arm"]: run["flops_per_token"] for run in row.result.rows_or_none("final.jsonl") if _complete(run)}
    more = flops[moe] / flops[base] if {moe, base} <= set(flops) else 1.0
    cost = "nearly the same computation" if more < _ALIKE else f"{more:.1f} times the computation"
    verb = "lower" if row.ours < 0 else "raise"
    return (
        f"{moe.rpartition('-')[2]} experts {verb} the {base} twin’s loss by {abs(row.ours):.3g} nats per token "
        f"at {cost} (paper: {abs(theirs):.3g}): {_sure(row)}."
    )


def _complete(run: Mapping[str, Any]) -> bool:
    return {"arm", "flops_per_token"} <= set(run)


def size(row: ClaimRow) -> str:
    """Return how many times its base's size the dense model is that an MoE equals."""
    theirs = row.paper.rstrip("×")
    return (
        f"An MoE matches a dense model with {row.ours:.1f} times its base’s parameters, "
        f"without embeddings (paper: {theirs}): {_sure(row)}."
    )


def speed(row: ClaimRow) -> str:
    """Return how many times as fast an MoE trains as the dense model that the paper finds equal."""
    return (
        f"The larger MoE trains {row.ours:.1f} times as fast as the dense model it matches, simulated "
        f"(paper: {row.claim.value:.1f}): {_sure(row)}."
    )


def score(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return how many of the paper's claims hold, and why most of the others are open.

    Args:
        rows: of `claims.csv`, by its names; rows that share a claim count once.
    """
    shared: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        shared.setdefault(row["same_as"] or row["claim"], []).append(row)
    distinct = [min(of, key=lambda row: row["adjusted"] not in (*HELD, FAILS)) for of in shared.values()]
    verdicts = Counter(row["adjusted"] for row in distinct)
    held, failed = sum(verdicts[verdict] for verdict in HELD), verdicts[FAILS]
    reasons = Counter(_open(row) for row in distinct if row["adjusted"] in (CANNOT_TELL, CANNOT_TEST))
    if not distinct or not reasons:
        return f"Of the paper’s {len(distinct)} claims {held} hold, and {failed} {_do(failed)} not."
    (reason, count), left = reasons.most_common(1)[0], reasons.total()
    which = "mostly" if 2 * count > left else "often"
    return (
        f"Of the paper’s {len(distinct)} claims {held} hold, {failed} {_do(failed)} not, and {left} are open, {which} "
        f"because {reason}."
    )


def _do(count: int) -> str:
    return "does" if count == 1 else "do"


def _open(row: Mapping[str, Any]) -> str:
    """Return the reason for which a claim is open."""
    if row["adjusted"] == CANNOT_TEST:
        return "models and machines are too small"
    if row["kind"] == MEASURED and not claim(row["claim"]).timed:
        return "seeds are too few"
    return "no result has a value"


def costs(scaling: Result | None, throughput: Result | None) -> list[dict[str, Any]]:
    """Return each ratio of what dense 6.7B and 1.3B+MoE-128 cost in training, with what is divided by what.

    Returns:
        Rows of cost, ratio, ours, low, high (95 % interval over seeds, None without one) and paper.
    """
    moe, dense = "1.3B+MoE-128", "6.7B"
    rows = []
    for row in throughput.rows_or_none("compared.jsonl") if throughput else []:
        flops = row.get(f"{moe} over {dense}") == "FLOPs a token"
        cost = "Training FLOPs per token" if flops else "Training speed, measured side by side"
        ratio = f"{dense}’s over {moe}’s" if flops else f"{moe}’s tokens per second over {dense}’s"
        rows.append(_cost(cost, ratio, row.get("twins"), row.get("paper's models")))
    for row in throughput.rows_or_none("simulated-ratios.jsonl")[:1] if throughput else []:
        ratio = f"{moe}’s samples per second over {dense}’s"
        rows.append(_cost("Training speed, simulated on 128 A100", ratio, row.get("ours"), row.get("paper")))
    found = scaling.rows_or_none("equal-loss.jsonl") if scaling else []
    for at, cost in _TO_EQUAL_LOSS.items():
        part = [row for row in found if row.get("at") == at and row.get("pair") == f"{moe} − {dense}"]
        if part:
            mean, *bounds = ratio_interval([row["times"] for row in part])
            low, high = bounds if len(part) > 1 else (None, None)
            rows.append(_cost(cost, f"{dense}’s over {moe}’s", mean, part[0].get("paper"), low, high))
    return [row for row in rows if row["ours"] is not None]


def _cost(cost: str, ratio: str, ours: Any, paper: Any, low: Any = None, high: Any = None) -> dict[str, Any]:
    return {"cost": cost, "ratio": ratio, "ours": ours, "low": low, "high": high, "paper": paper}
