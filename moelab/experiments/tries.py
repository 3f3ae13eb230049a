"""Try ideas of the field on the twin of MoE-128, one change at a time (beyond the paper), and judge any such try.

Shows: the final validation loss of MoE-128 with each of `IDEAS` minus that without, how many times fewer FLOPs the
idea takes to the baseline's loss, and which ideas the seeds can tell from the baseline. `moelab try` judges a user's
idea by the same functions.

Here: twins, all at the baseline's learning rate, with which an idea is at a disadvantage if it wants another one. The
350M base at `smoke`, `quick` and `cpu`; the 1.3B base at `full`, where its seeds agree to 0.004 nats.

Fixed before the first run: the ideas with their settings, and `EFFECTS`, from which the number of seeds follows.
Expert choice is not among the ideas, because the gate has no form of it that is causal, nor is router warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moelab.config.overrides import check_overrides
from moelab.design import budgets, comparison, power, settings
from moelab.design.experiment import Experiment, Scale, full_cost, twin_scales
from moelab.design.judging import MIN_SAMPLES
from moelab.design.verdicts import CANNOT_TELL
from moelab.lazy import pd
from moelab.runs.collection import Runs
from moelab.runs.spec import RunSpec
from moelab.statistics import ALPHA

BASELINE = "MoE-128"
HELPS, HURTS = "lowers the loss", "raises the loss"
"""The verdicts other than `CANNOT_TELL`."""

RUNGS = ("quick", "cpu", "full")
"""Scales of the ladder, in order."""

WORTH = 0.01
"""Nats per token: a smaller gain is not worth the next rung."""

EFFECTS = {"smoke": 0.1, "quick": 0.03, "cpu": 0.04, "full": 0.01}
"""Scale -> the difference, nats per token, that the planned number of seeds detects with 80 % power."""

MOST_SEEDS = 9
"""Seeds that are planned at most; a user may ask for more."""


@dataclass(frozen=True)
class Idea:
    """Describe an idea: the settings that it changes, and where it comes from, in one line.

    Attributes:
        model: the paper's name of the model, without base.
        fine: the experts' width is the dense layers' divided by this.
    """

    settings: Mapping[str, Any]
    source: str
    model: str = BASELINE
    fine: int = 1


IDEAS = {
    "z-loss": Idea({"model.routing.z_loss": 1e-3}, "ST-MoE, arXiv 2202.08906"),
    "QK norm": Idea({"model.decoder.qk_norm": "head"}, "Qwen3, arXiv 2505.09388"),
    "bias balancing": Idea(
        {"model.routing.balance_rate": 1e-3, "model.routing.aux_loss": 0.0}, "Wang et al. 2024, arXiv 2408.15664"
    ),
    "shared expert": Idea({"model.expert.shared": 1}, "DeepSeekMoE, arXiv 2401.06066"),
    "fine-grained experts": Idea({}, "DeepSeekMoE, arXiv 2401.06066", "Top2-MoE-256", fine=2),
    "sigmoid scores": Idea({"model.routing.scores": "sigmoid"}, "DeepSeek-V3, arXiv 2412.19437"),
    "router in bf16": Idea({"model.routing.precision": "bf16"}, "the opposite of Switch, arXiv 2101.03961"),
    "router jitter": Idea({"model.routing.input_jitter": 0.01}, "Switch, arXiv 2101.03961"),
    "capacity 1.25": Idea(
        {
            "model.routing.drop_tokens": True,
            "model.routing.capacity_factor": 1.25,
            "model.routing.capacity_factor_eval": 1.25,
        },
        "Switch, arXiv 2101.03961",
    ),
}
"""Name -> idea."""


def base(scale: str) -> str:
    """Return the base whose twin is tried on at a scale: the one whose seeds agree best where it has been measured."""
    return "1.3B" if scale == "full" else "350M"


def spec_of(idea: Idea, scale: str, seed: int, overrides: Mapping[str, Any], label: str) -> RunSpec:
    """Return a run of an idea; `overrides` are those of every run."""
    name = f"{base(scale)}+{idea.model}"
    own = dict(idea.settings)
    if idea.fine > 1:
        own["model.expert.ffn"] = settings.spec(name, scale, overrides=overrides).model.ffn // idea.fine
    return settings.spec(name, scale, seed, overrides={**own, **overrides}, label=label)


def build(scale: str, seed: int, overrides: Mapping[str, Any]) -> list[RunSpec]:
    """Return the baseline and every idea of one seed."""
    ideas = {BASELINE: Idea({}, ""), **IDEAS}
    return [spec_of(idea, scale, seed, overrides, label) for label, idea in ideas.items()]


def pair(given: Mapping[str, Any], scale: str, seeds: int, label: str, *, same: bool = False) -> list[RunSpec]:
    """Return the runs of the baseline, then those of a variant with a user's settings.

    Args:
        given: dotted name -> value or its text.
        same: whether the settings may leave the model as it is, because a part of the user's is replaced.

    Raises:
        ValueError: one line: an unknown setting or value, one that makes losses incomparable, or no change at all.
    """
    checked = check_overrides(given)
    if other := [name for name in checked if name.startswith(("data.", "distill.", "parallel."))]:
        raise ValueError(f"try: {other[0]} cannot be tried; both sides have the same text, no teacher, and one rank")
    variant = Idea(checked, "")
    specs = [
        spec_of(idea, scale, seed, {}, name)
        for name, idea in ((BASELINE, Idea({}, "")), (label, variant))
        for seed in range(seeds)
    ]
    if not same and specs[0].id == specs[seeds].id:
        raise ValueError(f"try: with {', '.join(checked) or 'no setting'} the model is the baseline; change something")
    return specs


def planned_seeds(scale: str, spread: float | None, effect: float | None = None) -> int:
    """Return how many seeds of each side detect an effect with 80 % power, from `MIN_SAMPLES` to `MOST_SEEDS`.

    Args:
        spread: standard deviation of the baseline's final loss over seeds; None where it is not known.
        effect: nats per token; default: that of `EFFECTS`.
    """
    if not spread or scale == "smoke":
        return MIN_SAMPLES
    sides = {"with": spread, "without": spread}
    wanted = [({"with": 1.0, "without": -1.0}, effect or EFFECTS[scale])]
    needed = power.of_contrasts(wanted, sides, looks=False).at_once or MOST_SEEDS
    return min(max(needed, MIN_SAMPLES), MOST_SEEDS)


@dataclass(frozen=True)
class Outcome:
    """Hold what a try found. Losses are in nats per token, all differences the idea's minus the baseline's.

    Attributes:
        idea, scale, seeds: what was tried, where, and the seeds that each side has at least.
        difference, low, high: of the mean final losses, with its 95 % interval (Welch); bounds None for one seed.
        noise: half of the 95 % interval between two groups of as many seeds of the baseline alone.
        flops, flops_low, flops_high: how many times fewer training FLOPs the idea takes to the baseline's final loss,
            at the difference and at the ends of its interval; below 1 it takes more. None where curves do not say.
        seconds: the same in measured seconds of training; None across processors.
        verdict: `HELPS`, `HURTS` or `CANNOT_TELL`, with the reason.
        to_know: seeds of each side that show a difference of this size with 80 % power; None is more than 99.
        next: what the rule of the ladder says.
    """

    idea: str
    scale: str
    seeds: int
    difference: float
    low: float | None
    high: float | None
    noise: float | None
    flops: float | None
    flops_low: float | None
    flops_high: float | None
    seconds: float | None
    verdict: str
    to_know: int | None
    next: str


def judge(runs: Runs, idea: str, scale: str) -> Outcome | None:
    """Return what the runs say of an idea against `BASELINE`; None where one of the two has no result.

    Raises:
        ValueError: one line: the two were validated on different texts.
    """
    final = runs.final()
    found = comparison.estimated(final, idea, BASELINE) if len(final) else None
    if found is None:
        return None
    arms = {arm: Runs(run for run in runs.finished if run.spec.title == arm) for arm in (idea, BASELINE)}
    spreads = {arm: final.loc[final["arm"] == arm, "validation_loss"].std() for arm in arms}
    low, high = found.interval() if found.samples > 1 else (math.nan, math.nan)
    verdict = HELPS if high < 0 else HURTS if low > 0 else CANNOT_TELL
    if found.samples < MIN_SAMPLES:
        verdict = f"{CANNOT_TELL}: fewer than {MIN_SAMPLES} seeds"
    if lost := comparison.missing(final, idea, BASELINE):
        verdict = f"{CANNOT_TELL}: without {', '.join(lost)}"
    curves = {arm: _curve(of) for arm, of in arms.items()}
    costs = {arm: of[0].spec.cost for arm, of in arms.items()}
    moved = [0.0, *((bound - found.mean) for bound in (high, low))]  # a lower loss is a larger speed-up
    flops = [_speed_up(curves[BASELINE], _moved(curves[idea], by), costs[BASELINE] / costs[idea]) for by in moved]
    to_know = None
    if found.samples > 1 and found.mean:
        apart = {arm: max(float(spread), 1e-9) for arm, spread in spreads.items()}
        sign = math.copysign(1.0, found.mean)
        weights = {idea: sign, BASELINE: -sign}
        to_know = power.of_contrasts([(weights, abs(found.mean))], apart, looks=False).at_once
    return Outcome(
        idea=idea,
        scale=scale,
        seeds=found.samples,
        difference=found.mean,
        low=_known(low),
        high=_known(high),
        noise=_noise(spreads[BASELINE], found.samples),
        flops=flops[0],
        flops_low=flops[1],
        flops_high=flops[2],
        seconds=_seconds(arms[idea], arms[BASELINE], flops[0], costs[BASELINE] / costs[idea]),
        verdict=verdict,
        to_know=to_know,
        next=go_on(scale, low, verdict),
    )


def go_on(scale: str, low: float, verdict: str) -> str:
    """Return the rule of the ladder for a result: the next rung, unless a gain of `WORTH` is excluded.

    Args:
        low: the lower end of the interval of the difference; NaN where there is none.
    """
    if low > -WORTH:
        return f"stop: a gain of {WORTH} nats per token is excluded"
    if verdict.startswith(f"{CANNOT_TELL}:"):
        return "more seeds on this rung"
    if scale not in RUNGS[:-1]:
        return "the last rung" if scale == RUNGS[-1] else f"start at {RUNGS[0]}: smoke shows only that it runs"
    return f"go on to {RUNGS[RUNGS.index(scale) + 1]}: a gain of {WORTH} nats per token is possible"


def table(runs: Runs, scale: str, ideas: Sequence[str] = tuple(IDEAS)) -> pd.DataFrame:
    """Return a row per idea that has a result, with the fields of `Outcome`, and settings and source as texts."""
    rows = []
    for idea in ideas:
        if outcome := judge(runs, idea, scale):
            about = IDEAS[idea]
            changed = [f"{name}={value}" for name, value in about.settings.items()]
            if about.fine > 1:
                changed.append(f"{about.model}, experts 1/{about.fine} as wide")
            rows.append({**outcome.__dict__, "settings": " ".join(changed), "source": about.source})
    return pd.DataFrame(rows, columns=[*Outcome.__dataclass_fields__, "settings", "source"])


def headline(found: pd.DataFrame) -> str:
    """Return the result in one line: how many of the ideas of `table` lower the loss, and the largest gain."""
    if not len(found):
        return "no idea and the baseline have both been trained"
    sure = found[found["verdict"] == HELPS]
    said = f"{len(sure)} of {len(found)} ideas lower the loss of {BASELINE} for sure"
    if not len(sure):
        return said
    best = sure.loc[sure["difference"].idxmin()]
    return f"{said}, {best['idea']} most, by {-best['difference']:.3f} nats per token"


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _noise(spread: float, seeds: int) -> float | None:
    """Return half of the 95 % interval of the difference of two groups of seeds of one spread; None for one seed."""
    from scipy.special import stdtrit

    if seeds < 2 or math.isnan(spread):
        return None
    return -float(stdtrit(2 * seeds - 2, ALPHA / 2)) * spread * math.sqrt(2 / seeds)


def _curve(runs: Runs) -> pd.DataFrame:
    """Return the mean validation curve of one arm: columns tokens and loss, ending at the mean final loss.

    The points before are of a part of the validation text; the difference of the last one to the final loss, which is
    of the whole text, is added to them.
    """
    points = runs.curves()
    mean = points[points["tokens"] > 0].groupby("tokens")["loss"].mean().reset_index()
    final = runs.final()["validation_loss"].mean()
    return mean.assign(loss=mean["loss"] - mean["loss"].iloc[-1] + final) if len(mean) else mean


def _moved(curve: pd.DataFrame, by: float) -> pd.DataFrame:
    return curve.assign(loss=curve["loss"] + by)


def _speed_up(baseline: pd.DataFrame, variant: pd.DataFrame, cost: float) -> float | None:
    """Return how many times fewer FLOPs the variant takes to the loss that both reach, see `Outcome.flops`.

    Where the variant ends above the baseline, the baseline's curve is read at the variant's final loss.

    Args:
        cost: FLOPs of the baseline's whole training over the variant's.
    """
    if not len(baseline) or not len(variant) or variant["loss"].isna().any():
        return None
    (ours, end), (theirs, goal) = ((of["tokens"].iloc[-1], of["loss"].iloc[-1]) for of in (variant, baseline))
    if end <= goal:
        tokens = budgets.tokens_at(variant, goal)
        return ours / tokens * cost if tokens else None
    tokens = budgets.tokens_at(baseline, end)
    return tokens / theirs * cost if tokens else None


def _seconds(idea: Runs, baseline: Runs, flops: float | None, cost: float) -> float | None:
    """Return the speed-up in seconds: that in FLOPs, with the measured time of a training in place of its FLOPs."""
    cpus = {str((run.provenance.get("hardware") or {}).get("cpu")) for run in (*idea, *baseline)}
    if flops is None or len(cpus) > 1:
        return None
    times = [sum(run.own_seconds for run in of) / len(of) for of in (baseline, idea)]
    return flops / cost * times[0] / times[1] if all(times) else None


EXPERIMENT = Experiment(
    name="tries",
    number=31,
    title="Ideas of the field, tried one at a time",
    paper="beyond the paper",
    question="Which changes that later models make to an MoE lower the loss here?",
    paper_answer="Not examined; most of these ideas are later than the paper.",
    scales={name: scale for name, scale in twin_scales(len(IDEAS) + 1).items() if name != "gpu"}
    | {
        "full": Scale(
            "twins of the 1.3B base, 64 wide, 8 layers; 101.6 M tokens of mix15",
            full_cost((len(IDEAS) + 1) * 0.65),
        )
    },
    build=build,
)
