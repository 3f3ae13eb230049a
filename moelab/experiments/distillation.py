"""Distil a shallower student: throughout, and staged (paper section 4.2, Figs 5 and 6, Table 5).

Shows: validation loss of the PR-MoE-32/64 teacher (24 layers) and of its 21-layer student trained alone, distilled
throughout, and distilled for the first 70 % of its tokens (Mixture-of-Students). The paper stops at 400 K of 572 K
steps; the stop of its 1.3B student is not known, 70 % is taken for both.

Here: twins of 8 and 7 layers; the released code's loss (temperature 1, weight 1). The teacher is a finished run of the
same seed. It is trained on one half of the training text and its students on the other, so that it cannot tell them
what it remembers of their text; `measure_halves` shows its loss on both. The halves are alternating blocks of each
domain (`DataConfig.part`), so that they are alike. At `cpu` a half has 10.1 M tokens, so teacher and students read
theirs 1.6 times, the arm of equal cost 2.2 times; and a distilled student learns, by its teacher, of text that the one
alone never reads. (At `paper` scale all read the same text once, as published.) The premise is checked first: the
student alone is worse than its teacher. `L21 alone, equal cost` trains the student without a teacher for as many FLOPs
as distillation throughout takes with the teacher's forward passes. The staged student branches off the one distilled
throughout where distillation stops. There the rate of the twins is still at its peak, and that of the paper's cosine at
a fifth of it. What distillation changes at some step of a run is therefore compared at the peak rate until the decay
over the last fifth of the tokens.

At `full` all read the same text once, and rates follow the paper's cosine, both as published; the teacher is PR-MoE of
the experiment `pr-moe` (on the 350M base). The arm of equal cost, which is not the paper's, is left out there.

Fixed before the first run: 3 seeds, all arms on each. At `full` they are the first of looks at 3, 6 and 9 seeds, and
intervals are as wide as that takes; we train no further ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moelab import paper, paths
from moelab.config.distill import DistillConfig
from moelab.design import comparison, settings, shares
from moelab.design.experiment import FULL_HOURS, Experiment, Scale, full_cost
from moelab.design.judging import judge
from moelab.design.verdicts import Verdict
from moelab.lazy import pd
from moelab.runs import evaluations
from moelab.runs.collection import Runs
from moelab.runs.spec import RunSpec, Start
from moelab.runs.store import Run

TEACHERS = {"350M": "350M+PR-MoE-32/64", "1.3B": "1.3B+PR-MoE-64/128"}
"""Base -> the paper's teacher."""

ARMS = ("Teacher", "L21 alone", "L21 alone, equal cost", "L21 + KD", "L21 + staged KD")
STATED = (
    ("L21 + staged KD", "Teacher"),
    ("L21 + staged KD", "L21 alone"),
    ("L21 + staged KD", "L21 alone, equal cost"),
    ("L21 + staged KD", "L21 + KD"),
    ("L21 alone", "Teacher"),
)
"""Pairs of arms whose difference at the end is drawn."""

ON_350M_ALONE = (
    "full-kd-helps-early",
    "full-kd-hurts-late",
    "full-kd-turns-at-400k",
    "staged-kd-beats-full-kd",
    "student-alone-behind-teacher",
)
"""Claims that the paper shows on the 350M base alone (Fig 5 and parts of Table 5)."""

HALVES = "Teacher and student read different halves of the text."
BRANCH = "Twins, seed by seed: until distillation stops, the two are one run."
_SUFFIX = {"Teacher": "", "L21 alone": "+L21", "L21 + KD": "+L21+KD", "L21 + staged KD": "+L21+MoS"}


def names(base: str = "350M") -> dict[str, str]:
    """Return the paper's name of the run of each arm; the arm of equal cost is ours."""
    return {arm: TEACHERS[base] + suffix for arm, suffix in _SUFFIX.items()}


def build(
    scale: str,
    seed: int,
    overrides: Mapping[str, Any],
    *,
    base: str = "350M",
    stop: float = 0.7,
    rate: settings.Rate = "own",
) -> list[RunSpec]:
    """Return the runs of one seed: the teacher, and the student with each kind of distillation.

    Args:
        base: 350M or 1.3B.
        stop: share of the tokens after which staged distillation stops.
        rate: see `settings.Rate`.
    """
    if base not in TEACHERS:
        raise ValueError(f"base must be one of {', '.join(TEACHERS)}, got {base!r}")
    if not 0 < stop < 1:
        raise ValueError(f"stop must be a share of the tokens between 0 and 1, got {stop}")
    split = reads_halves(scale)
    if split and "data.part" in overrides:
        raise ValueError(f"data.part cannot be set at scale {scale}, where teacher and student read a half each")
    if overrides.get("distill.unit", "tokens") != "tokens":
        raise ValueError("distill.unit must be tokens, which the experiment gives the end of staged distillation in")
    shared: dict[str, Any] = {"scale": scale, "seed": seed, "rate": rate}
    theirs = shared | {"overrides": {**overrides, **({"data.part": "even blocks"} if split else {})}}
    shared |= {"overrides": {**overrides, **({"data.part": "odd blocks"} if split else {})}}
    teacher = settings.spec(TEACHERS[base], label="Teacher", **theirs)
    kinds = {
        "L21 alone": None,
        "L21 + KD": DistillConfig(),
        "L21 + staged KD": DistillConfig(schedule="stop", stop=round(stop * teacher.train.tokens)),
    }
    students = [
        settings.spec(
            f"{TEACHERS[base]}+L21",
            published=TEACHERS[base] + _SUFFIX[arm],
            label=arm,
            teacher=teacher if distill else None,
            distill=distill,
            **shared,
        )
        for arm, distill in kinds.items()
    ]
    alone, taught = students[:2]
    if scale == "paper":
        return [teacher, *students]
    a_step = taught.train.batch_size * taught.data.context
    until = max(1, round(stop * taught.train.tokens / a_step)) * a_step
    taught = taught.with_checkpoints([until])
    staged = replace(alone, start=Start(taught, until), label="L21 + staged KD")
    if not split:
        return [teacher, alone, taught, staged]
    tokens = round(alone.train.tokens * taught.cost / alone.cost)
    longer = shared | {"overrides": shared["overrides"] | {"train.tokens": tokens}}
    equal = settings.spec(f"{TEACHERS[base]}+L21", label="L21 alone, equal cost", **longer)
    return [teacher, alone, equal, taught, staged]


def reads_halves(scale: str) -> bool:
    """Return whether teacher and students read different halves of the text at a scale."""
    return scale not in ("full", "paper")


def measure_halves(runs: Runs, tokens: int) -> list[dict[str, Any]]:
    """Return the loss of finished runs on both halves of the training text, beside their validation loss.

    Runs that have neither weights nor values measured with them are left out.

    Args:
        tokens: of each half, read in the order of the run's own batches.

    Returns:
        Rows of arm, seed, trained_on, even_blocks, odd_blocks, validation (nats per token).
    """
    return [
        {
            "arm": run.spec.title,
            "seed": run.spec.train.seed,
            "trained_on": run.spec.data.part,
            **losses,
            "validation": run.result["validation_loss"],
        }
        for run, losses in evaluations.measure_all(runs.finished, losses_on_halves, tokens)
    ]


def losses_on_halves(run: Run, tokens: int) -> dict[str, float]:
    """Return a run's loss on each half of the training text, in nats per token; arguments as of `measure_halves`."""
    import torch

    from moelab.data.batches import TrainBatches
    from moelab.data.preparation import prepare
    from moelab.inference.text import load_run

    spec, loss = run.spec, {}
    text = prepare(spec.data, paths.home() / "data")
    model = load_run(run.path, data=text, device=spec.train.device).eval()
    for part in ("even blocks", "odd blocks"):
        data = prepare(replace(spec.data, part=part), paths.home() / "data")
        batches = TrainBatches(data, spec.train.batch_size, spec.data.context, spec.train.seed)
        count = max(1, tokens // batches.tokens_per_step)
        with torch.no_grad():
            pairs = (batches.batch(step) for step in range(count))
            losses = [float(model(x.to(spec.train.device), targets_BT=y.to(spec.train.device)).loss) for x, y in pairs]
        loss[part.replace(" ", "_")] = sum(losses) / count
    return loss


def early_losses(curves: pd.DataFrame, share: float = 0.5) -> pd.DataFrame:
    """Return the mean loss of each arm and seed over the evaluations up to a share of the tokens of a student alone.

    Columns: arm, seed, loss.
    """
    end = curves.loc[curves["arm"] == "L21 alone", "tokens"].max()  # the arm of equal cost is longer
    part = curves[(curves["tokens"] > 0) & (curves["tokens"] <= share * end)]
    return part.groupby(["arm", "seed"], sort=False)["loss"].mean().reset_index()


def early(curves: pd.DataFrame, share: float = 0.5) -> pd.DataFrame:
    """Return the gap between the student with and without distillation early in training, per arm and seed.

    Columns: arm, seed, gap (negative where distillation helps), of `early_losses`.
    """
    table = early_losses(curves, share).pivot(index="seed", columns="arm", values="loss")
    rows = [
        {"arm": arm, "seed": seed, "gap": value}
        for arm in ("L21 + KD", "L21 + staged KD")
        if {arm, "L21 alone"} <= set(table)
        for seed, value in (table[arm] - table["L21 alone"]).dropna().items()
    ]
    return pd.DataFrame(rows, columns=["arm", "seed", "gap"])


def over_training_headline(moved: pd.DataFrame, stop: float) -> str:
    """Return, from `comparison.over_training`, what distillation changes at its stop and at the end, in one line."""
    taught = "L21 + KD" if "L21 + KD" in set(moved["arm"]) else moved["arm"].iloc[0]
    found = comparison.then_and_at_the_end(moved[moved["arm"] == taught], stop)
    return f"{taught.removeprefix('L21 + ')} minus alone: {found}"


def decay_begins(specs: Sequence[RunSpec]) -> float:
    """Return the share of the tokens at which the learning rate begins its decay at the end; 1 where it has none."""
    return min(1 - spec.train.cooldown_tokens / spec.train.tokens for spec in specs)


def late_training(curves: pd.DataFrame, training: pd.DataFrame, until: float) -> pd.DataFrame:
    """Return, by arm, how far the loss falls late in training, and the first and last distillation term.

    Args:
        until: share of the tokens at which the learning rate begins its decay; the fall is that over the 15 % of the
            tokens before, because in the decay the loss of every model falls. At 1 the decay is along the whole run.
            It is missing where a run has fewer than two evaluations there.
    """
    share = curves["tokens"] / curves.groupby("arm")["tokens"].transform("max")  # the arm of equal cost is longer
    late = curves[(share >= until - 0.15) & (share <= until + 1e-9)].sort_values("tokens").groupby(["arm", "seed"])
    rows = {
        f"fall of the loss from {100 * (until - 0.15):.0f} to {100 * until:.0f} % of the tokens": (
            (late["loss"].first() - late["loss"].last()).where(late.size() > 1)
        )
        .groupby("arm")
        .mean()
    }
    if "distill_loss" in training:
        term = training.dropna(subset=["distill_loss"]).sort_values("tokens").groupby(["arm", "seed"])["distill_loss"]
        for which, each in (("first", term.first()), ("last", term.last())):
            rows[f"distillation term, {which} row"] = each.groupby("arm").mean()
    return pd.DataFrame(rows).T


def verdicts(final: pd.DataFrame, curves: pd.DataFrame, scale: str, base: str = "350M") -> list[Verdict]:
    """Judge the claims on distillation throughout and staged that are about one base.

    The twins of a larger base also answer what the paper shows on the 350M base alone.
    """
    plan, judged = EXPERIMENT.plan(scale, base), []
    for claim in paper.claims("distillation"):
        of = settings.base_of(claim.left)
        if of != base and (base == settings.BASES[0] or claim.id not in ON_350M_ALONE):
            continue
        arms = names(of)
        if claim.id == "full-kd-helps-early":
            peak = ", at the peak rate" if reads_halves(scale) else ""
            note = f"{comparison.TWINS} Means over the evaluations of the first half of training{peak}."
            sides = comparison.samples(claim, early_losses(curves), arms, "loss")
            judged.append(judge(claim, arms=sides, note=note, scale=scale, **plan))
        elif claim.id == "full-kd-turns-at-400k":
            share = comparison.share_of_training((claim.left, claim.right), final, arms, scale)
            whole, pair = paper.training_settings(claim.left).steps, ("L21 alone", "L21 + KD")
            judged.append(shares.judge_crossing(claim, curves, pair, whole, share, scale=scale, **plan))
        elif claim.id == "staged-kd-beats-full-kd":
            share = comparison.share_of_training((claim.left, claim.right), final, arms, scale)
            sides = comparison.samples(claim, final, arms)
            values = by_seed(sides[claim.left], sides[claim.right]) if sides else {}
            judged.append(judge(claim, values, note=BRANCH, scale=scale, share=share, **plan))
        else:
            halves = reads_halves(scale) and arms["Teacher"] in (claim.left, claim.right)
            note = f"{comparison.TWINS} {HALVES}" if halves else comparison.TWINS
            judged.append(comparison.judge_loss(claim, final, arms, scale, note=note, **plan))
    return judged


def by_seed(left: Mapping[int, float], right: Mapping[int, float]) -> dict[int, float]:
    """Return left - right of each seed; NaN where one of them is missing."""
    return {s: left.get(s, math.nan) - right.get(s, math.nan) for s in sorted(left.keys() | right.keys())}


def headline(final: pd.DataFrame, base: str = "350M", scale: str = "") -> str:
    """Return the result in one line, which names the base, because results of both bases appear together."""
    taught = "L21 + staged KD" if "L21 + staged KD" in set(final["arm"]) else "L21 + KD"
    return f"{base} base: {comparison.difference(final, taught, 'L21 alone', **EXPERIMENT.plan(scale, base))}"


EXPERIMENT = Experiment(
    name="distillation",
    number=5,
    title="Mixture-of-Students: staged distillation",
    paper="Figs 5 and 6, Table 5 (section 4.2)",
    question="Does a teacher make up for an eighth of the layers, and when should it stop?",
    paper_answer="Distillation helps early and hurts late; stopped at 70 % of training, the student ends almost at the "
    "teacher's loss.",
    scales={
        "smoke": Scale("twins of 32 wide, 4 layers; 12 k tokens of sotu", "seconds (tests)"),
        "quick": Scale("twins 32 wide, 8 and 7 layers; 1 M tokens of mix5", "about 6 minutes a seed on one core"),
        "cpu": Scale(
            "twins 32 wide (1.3B base: 64), 8 and 7 layers; 16.4 M tokens of mix5", "about 1.3 hours a seed on one core"
        ),
        "full": Scale(
            "twins 32 wide (1.3B base: 64, three times the cost), 8 and 7 layers; 101.6 M tokens of mix15",
            full_cost(3.8 * FULL_HOURS["350M"]),
        ),
        "gpu": Scale("twins 128 wide, 12 layers; 400 M tokens of the Pile", "not yet run; one GPU"),
        "paper": Scale("PR-MoE on either base; 300 B tokens a run", "not run; see its dry run"),
    },
    build=build,
    measures_on_gpu=("gpu",),
)
