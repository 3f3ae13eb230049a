"""Sweep the learning rate of the dense model and of an MoE (the rates in use are in `settings`).

Shows: final validation loss of the 350M twin, dense and with MoE-128, at three rates, each twice the one before; of the
larger bases on request.

Here: the regime of the scale itself, tokens included, on one seed that no other experiment uses. The dense model and
the MoE models of a base each take the best of the same three rates, so neither family is tuned more finely.

At `full` four families are swept on the 350M and the 1.3B base (`settings.FAMILIES`), on two seeds, and the dense
6.7B at two rates. An optimum counts when it is bracketed: a rate above and one below it have ended higher
(`unbracketed`). Where it was at an edge, the sweep was continued in factors of two (`AT_FULL`), so that the dense
models are tuned over more rates there than MoE models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moelab.design import comparison, settings
from moelab.design.experiment import FULL_HOURS, Experiment, Scale, full_cost
from moelab.lazy import pd
from moelab.runs.spec import RunSpec

ARMS = {
    "350M": {"Dense": "350M", "MoE-128": "350M+MoE-128"},
    "1.3B": {"Dense": "1.3B", "MoE-128": "1.3B+MoE-128"},
    "6.7B": {"Dense": "6.7B"},
}
"""Base -> arm -> the paper's model."""

RATES = (4e-3, 8e-3, 16e-3)
"""Peak rates of the 350M base; larger bases are swept at less, in the proportion of the paper's dense rates
(`settings.rate_ratio`)."""

AT_FULL: dict[str, dict[str, tuple[float, ...]]] = {
    "350M": {"Dense": (2e-3, *RATES, 32e-3)},
    "1.3B": {"Dense": (2e-3, *RATES)} | {arm: (2e-3, 4e-3, 8e-3) for arm in ("MoE-128", "MoE-32", "PR-MoE")},
    "6.7B": {"Dense": (4e-3, 8e-3)},
}
"""Base -> arm -> rates that are tried at `full` in place of `RATES`, until no lowest loss was at an edge (LOG.md)."""


def arms(base: str = "350M", scale: str = "cpu") -> dict[str, str]:
    """Return the swept arms of a base: arm -> the paper's model."""
    if base not in ARMS:
        raise ValueError(f"base must be one of {', '.join(ARMS)}, got {base!r}")
    more = (
        {"MoE-32": "350M+MoE-32", "PR-MoE": "350M+PR-MoE-32/64"} if scale == "full" and base in settings.BASES else {}
    )
    return ARMS[base] | {arm: settings.on_base(name, base) for arm, name in more.items()}


def rates(
    base: str = "350M", scale: str = "cpu", chosen: Sequence[float] | None = None, arm: str | None = None
) -> list[float]:
    """Return the peak rates that the sweep of a base tries, ascending.

    Args:
        chosen: other rates of the 350M base than the scale's.
        arm: those of one arm; None means those of any.
    """
    of_arm = {name: AT_FULL.get(base, {}).get(name, RATES) if scale == "full" else RATES for name in arms(base, scale)}
    tried = chosen or {rate for name, rates in of_arm.items() if arm in (None, name) for rate in rates}
    return [round(rate * settings.rate_ratio(base), 6) for rate in sorted({*tried})]


def build(
    scale: str,
    seed: int,
    overrides: Mapping[str, Any],
    *,
    base: str = "350M",
    peaks: Sequence[float] | None = None,
) -> list[RunSpec]:
    """Return every arm of a base at every swept rate, for one of the sweep's seeds (from `settings.SWEEP_SEED`).

    Args:
        peaks: peak rates of the 350M base in place of the scale's own.
    """
    if "train.lr" in overrides:
        raise ValueError("train.lr is what its runs differ in, so it cannot be set; peaks are the rates to try")
    return [
        settings.spec(
            name,
            scale,
            settings.SWEEP_SEED + seed,
            label=arm,
            overrides={"train.lr": rate, **overrides},
        )
        for arm, name in arms(base, scale).items()
        for rate in rates(base, scale, peaks, arm)
    ]


def losses(final: pd.DataFrame, specs: list[RunSpec]) -> pd.DataFrame:
    """Return columns arm, rate, seed, loss, and behind: how far above the arm's best rate (mean over seeds)."""
    rates = {spec.id: spec.train.lr for spec in specs}
    table = final.assign(rate=final["run"].map(rates), loss=final["validation_loss"])[["arm", "rate", "seed", "loss"]]
    best = {arm: mean_losses(part).min() for arm, part in table.groupby("arm")}
    return table.assign(behind=table["loss"] - table["arm"].map(best))


def used(base: str, scale: str) -> dict[str, float]:
    """Return the rate that each arm of a base has in the other experiments."""
    return {arm: settings.peak_rate(name, scale) for arm, name in arms(base, scale).items()}


def mean_losses(part: pd.DataFrame) -> pd.Series:
    """Return an arm's mean loss at each rate from its rows of `losses`, see `comparison.common_means`."""
    return comparison.common_means(part.pivot(index="seed", columns="rate", values="loss"))


def unbracketed(table: pd.DataFrame) -> list[str]:
    """Return what is at an edge: "MoE-128's lowest loss is at 0.002, the lowest rate", an item for each such arm.

    `table` comes from `losses`.
    """
    problems = []
    for arm, part in table.groupby("arm", sort=False):
        means = mean_losses(part)
        best = means.idxmin()
        if best in (edges := {means.index.min(): "lowest", means.index.max(): "highest"}):
            problems.append(f"{arm}'s lowest loss is at {best:g}, the {edges[best]} rate")
    return problems


def headline(table: pd.DataFrame, base: str) -> str:
    """Return in one line the best rate of each arm on a base, from `losses`."""
    if not len(table):
        return f"{base} base: no run has finished"
    best = {arm: mean_losses(part).idxmin() for arm, part in table.groupby("arm", sort=False)}
    moe = {arm: rate for arm, rate in best.items() if arm != "Dense"}
    if len(moe) > 1 and len({*moe.values()}) == 1:
        best = {arm: rate for arm, rate in best.items() if arm == "Dense"} | {"all MoE": next(iter(moe.values()))}
    said = ", ".join(f"{arm} {rate:g}" for arm, rate in best.items())
    return f"Best rates on the {base} base: {said}{' (some not bracketed)' if unbracketed(table) else ''}"


def leads(table: pd.DataFrame, used: Mapping[str, float]) -> str:
    """Return how far each arm's best rate is below the next, and what a rate in use costs that is another.

    Args:
        table: from `losses`.
        used: from `used`.
    """
    said = []
    for arm, part in table.groupby("arm", sort=False):
        means = mean_losses(part)
        best = means.idxmin()
        cost = f"{means[used[arm]] - means.min():.3f} nats above" if used[arm] in means else "not among these"
        lead = ""
        if len(means) > 1:
            second = means.drop(best)
            lead = f", {second.min() - means.min():.3f} nats below the next best, {second.idxmin():g}"
        also = "" if best == used[arm] else f" (in use: {used[arm]:g}, {cost})"
        said.append(f"{arm} ends lowest on average at rate {best:g}{lead}{also}.")
    edges = [f"Not bracketed: {edge}." for edge in unbracketed(table)]
    return " ".join([*said, *edges])


EXPERIMENT = Experiment(
    name="learning-rate",
    number=24,
    title="Learning rates of the dense and the MoE models",
    paper="how our arms are tuned",
    question="Which rate suits each family of models?",
    paper_answer="The paper's MoE runs use rates below their dense base's (2e-4 and 3e-4 at 350M); PR-MoE's equals "
    "the base's at 350M, the MoE's at 1.3B.",
    scales={
        "smoke": Scale("twins of 32 wide, 4 layers; 12 k tokens of sotu", "seconds (tests)"),
        "cpu": Scale("twins 32 wide, 8 layers; 16.4 M tokens of mix5; one seed", "about 1.3 hours on one core"),
        "full": Scale(
            "twins 32 wide (1.3B base: 64, twice the cost), 8 layers; 101.6 M tokens of mix15; two seeds",
            full_cost(14 * FULL_HOURS["350M"]),
        ),
    },
    build=build,
)
