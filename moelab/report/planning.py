"""Say how many seeds the comparisons of an experiment need, from the spreads in its newest result (`moelab power`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moelab import paper
from moelab.config import ModelConfig, from_json
from moelab.design import comparison, power, rates
from moelab.design.judging import restate
from moelab.design.verdicts import MEASURED
from moelab.experiments import experiment as find
from moelab.lazy import pd
from moelab.report.summary import Summary, read_all
from moelab.runs.spec import RunSpec
from moelab.statistics import Estimate

SMALLEST = 0.01
"""Nats per token: the effect that two arms are planned to show where no claim and no user names another."""

COLUMNS = ("comparison", "seeds", "spread", "effect", "effect from", "at once", "at most", "on average")


def needs(
    experiment: str, scale: str, *results: Path, against: str | None = None, effect: float | None = None
) -> pd.DataFrame:
    """Return how many seeds each comparison of an experiment needs to decide with 80 % power.

    The comparisons are the paper's claims that the newest result of this experiment and scale measures, or, with
    `against` and for experiments without such claims, each arm and one other arm. Of two rates that must agree on a
    claim, the one that takes more seeds counts.

    Args:
        results: folders of results; of several of this experiment and scale the newest with two seeds or more counts,
            one with the scale's own settings before those with others, that of the 350M base before those of others.
        against: an arm with which all others are compared.
        effect: nats per token that two arms are to show, `SMALLEST` by default; claims have their own.

    Returns:
        Columns comparison; seeds and spread, those of the result (spread: standard deviation of the difference of a
        seed of each arm, or of a ratio over sessions); effect, and where it is from; at once, with one look; at most
        and on average, with a look at every third seed. A number of seeds that is missing is more than
        `moelab.design.power.MAX_SEEDS`, or unknown where no effect can be named.

    Raises:
        ValueError: one line: an unknown experiment, scale or arm, a bad effect, no result, or fewer than two seeds.
    """
    about = find(experiment)  # by its name, or by its number
    about.scale(scale)
    summaries = [s for _, s in read_all(*results)[0] if (s.experiment, s.scale) == (about.name, scale)]
    if not summaries:
        raise ValueError(
            f"power: no result of {about.name} at scale {scale} to take a spread from; "
            f"`moelab run {about.name} --scale {scale} -p seeds=3` makes one"
        )
    summaries.sort(key=lambda summary: summary.finished, reverse=True)
    # One seed has no spread, the plan is for the scale's settings, and the arms of every base have the same names.
    summaries.sort(key=lambda s: (len(s.seeds) == 1, bool(s.parameters.get("overrides")), s.other_base != ""))
    rows = _claims(summaries) if against is None and effect is None else []
    return _frame(rows) if rows else needs_of(_final(summaries[0]), against=against, effect=effect)


def needs_of(final: pd.DataFrame, *, against: str | None = None, effect: float | None = None) -> pd.DataFrame:
    """Return the same for each arm and one other, by default the first, from their final losses.

    At `full` an arm at the shared rate is compared with one at that rate, others with one at its own.

    Args:
        final: columns arm, seed, validation_loss, as of `Runs.final()`.
        against, effect: as for `needs`.
    """
    if effect is not None and not 0 < effect < float("inf"):
        raise ValueError(f"power: effect must be a positive number of nats per token, got {effect}")
    arms = list(dict.fromkeys(final["arm"])) if len(final) else []
    if against is not None and against not in arms:
        raise ValueError(f"power: no arm {against!r} in these runs; there are {', '.join(arms) or 'none'}")
    reference, wanted, rows = against or next(iter(arms), ""), effect or SMALLEST, []
    for arm in arms:
        other = arm != reference and arm.endswith(rates.SHARED) == reference.endswith(rates.SHARED)
        found = comparison.estimated(final, arm, reference) if other else None
        same = other and not any(comparison.paired(final, arm, reference))  # where a run stands for two arms
        if found and found.samples > 1 and not same:
            spreads = {one: final.loc[final["arm"] == one, "validation_loss"].std() for one in (arm, reference)}
            need = power.of_contrasts([({arm: 1.0, reference: -1.0}, wanted)], spreads)
            why = "given" if effect else "assumed"
            rows.append([f"{arm} − {reference}", found.samples, found.spread, wanted, why, *_numbers(need)])
    if not rows:
        raise ValueError("power: there are no two arms with two seeds each to take a spread from")
    return _frame(rows)


def spread_of(spec: RunSpec, *results: Path) -> tuple[float, int, str] | None:
    """Return the spread of a run's final loss over seeds in published results; None where no result has two seeds.

    Runs count that have the model, the text and the length; budgets, whose decay begins as late in proportion, too. Of
    several results the one with the most seeds counts.

    Returns:
        (standard deviation in nats per token, seeds, experiment and scale).
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    for _, summary in read_all(*results)[0]:
        for run in summary.runs:
            if run.result.get("tokens") == spec.train.tokens and _alike(run.spec, spec):
                losses = found.setdefault((f"{summary.experiment} at {summary.scale}", run.label), {})
                losses[run.seed] = float(run.result["validation_loss"])
    known = {place: losses for place, losses in found.items() if len(losses) > 1}
    if not known:
        return None
    (where, _), losses = max(known.items(), key=lambda item: len(item[1]))
    return Estimate.of(list(losses.values())).spread, len(losses), where


def _alike(stored: Mapping[str, Any], spec: RunSpec) -> bool:
    """Return whether a stored run has a spec's model, corpus and peak rate."""
    try:
        same = from_json(ModelConfig, stored["model"], known=True) == spec.model
    except (ValueError, KeyError):  # of another version
        return False
    train, data = stored.get("train", {}), stored.get("data", {})
    return same and data.get("corpus") == spec.data.corpus and train.get("lr") == spec.train.lr


def _frame(rows: list[list]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS).astype({"at once": "Int64", "at most": "Int64"})


def _final(summary: Summary) -> pd.DataFrame:
    """Return the final losses behind a result; budgets are left out."""
    runs = [run for run in summary.runs if not run.is_budget and "validation_loss" in run.result]
    rows = [[run.label, run.seed, run.result["validation_loss"]] for run in runs]
    final = pd.DataFrame(rows, columns=["arm", "seed", "validation_loss"])
    return comparison.by_peak_rate(final, [run.training.get("lr", 0.0) for run in runs])


def _claims(summaries: list[Summary]) -> list[list]:
    """Return a row for each claim that any of these results measures; of several the newest counts."""
    known, rows = {claim.id: claim for claim in paper.claims()}, {}
    for summary in summaries:
        for stored in summary.claims:
            claim = known.get(stored.claim)
            verdict = restate(claim, stored, summary.scale) if claim else stored
            if claim and verdict.kind == MEASURED and verdict.samples > 1 and stored.claim not in rows:
                both = [one for one in (verdict, verdict.other) if one and one.samples > 1]
                plans = [(one, *power.of_claim(claim, one)) for one in both]
                one, need, effect, why = max(plans, key=lambda plan: (plan[1] and plan[1].at_once) or power.MAX_SEEDS)
                rows[claim.id] = [claim.id, one.samples, power.spread(claim, one), effect, why, *_numbers(need)]
    return list(rows.values())


def _numbers(need: power.Need | None) -> tuple[int | None, int | None, float | None]:
    return (None,) * 3 if need is None else (need.at_once, need.looks[-1] if need.looks else None, need.mean)
