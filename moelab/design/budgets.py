"""Compare arms at several token budgets, each with its own cooldown of the learning rate.

A loss in the middle of a run is not the loss of a run of that length, because its learning rate has not decayed yet. A
*budget* is a run that branches off a longer one, its *trunk*, in the stable phase of a warm-up-stable-decay schedule,
where its own cooldown begins (`moelab.runs.branching.token_budgets`). It equals the run of that length and costs a
fifth of it.

Budgets are compared across model sizes by *tokens a parameter*: tokens over the parameters that the dense base has
outside its embeddings, for the base and for the MoE on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moelab import paper
from moelab.config import ExpertConfig, ModelConfig, RoutingConfig
from moelab.design import settings
from moelab.lazy import np, pd
from moelab.runs.branching import token_budgets
from moelab.runs.collection import Runs
from moelab.runs.spec import RunSpec

BUDGETS = {
    "smoke": (6_144, 12_288),
    "cpu": (1_024_000, 2_048_000, 4_096_000, 8_192_000),
    "gpu": (25_001_984, 50_003_968, 100_007_936, 200_015_872),
}
"""Scale -> tokens of the budgets below the trunk's own."""

MAX_FACTOR = 3
"""Between budgets whose tokens are further apart than by this factor nothing is interpolated."""

COLUMNS = ["arm", "seed", "tokens", "per_parameter", "loss"]


def with_budgets(trunk: RunSpec, scale: str) -> list[RunSpec]:
    """Return a run and its budgets; the run keeps the checkpoints that they start from.

    Budgets that do not fit the trunk's schedule, because its tokens were overridden, are left out.
    """
    train = trunk.train
    if not train.cooldown_tokens:
        return [trunk]
    share = 1 - train.cooldown_tokens / train.tokens
    fitting = [
        budget
        for budget in BUDGETS.get(scale, ())
        if train.warmup_tokens < budget * share and budget < train.tokens - train.cooldown_tokens
    ]
    kept = trunk.with_checkpoints(branch.start.tokens for branch in token_budgets(trunk, fitting) if branch.start)
    named = [replace(branch, label=label(trunk.title, branch.train.tokens)) for branch in token_budgets(kept, fitting)]
    return [kept, *named]


def expand(specs: Sequence[RunSpec], arms: Sequence[str], scale: str) -> list[RunSpec]:
    """Return runs followed by the budgets of those whose label is among the arms."""
    families = [with_budgets(spec, scale) if spec.label in arms else [spec] for spec in specs]
    return [family[0] for family in families] + [branch for family in families for branch in family[1:]]


def label(trunk: str, tokens: int) -> str:
    """Return the label of a trunk's budget of so many tokens."""
    return f"{trunk}, {tokens / 1e6:.1f} M tokens"


def is_budget(spec: RunSpec) -> bool:
    """Return whether a run is a budget; other branches, such as a student that loses its teacher, are arms."""
    return spec.start is not None and spec.label == label(spec.start.run.title, spec.train.tokens)


def trunks(runs: Runs) -> Runs:
    """Return the runs that are no budget of another."""
    return Runs([run for run in runs if not is_budget(run.spec)])


def losses(runs: Runs) -> pd.DataFrame:
    """Return the final validation loss of every finished trunk and budget.

    Columns: arm, seed, tokens, per_parameter (tokens over the base's parameters outside its embeddings), loss (nats per
    token).
    """
    rows = []
    for run in runs.finished:
        spec = run.spec
        arm = spec.start.run.title if spec.start and is_budget(spec) else spec.title
        without: dict[str, Any] = {"residual": False, "top_k": 1, "expert": ExpertConfig(), "routing": RoutingConfig()}
        dense = replace(spec.model, experts=(0,) * spec.model.layers, **without)
        tokens = run.result["tokens"]
        each = tokens / dense.non_embedding_parameters()
        rows.append([arm, spec.train.seed, tokens, each, run.result["validation_loss"]])
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(["arm", "seed", "tokens"], ignore_index=True)


def gaps(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return the losses minus the reference arm's of the same seed and budget, as a column gap; without the reference.

    A column against names the reference. `table` comes from `losses`.
    """
    keys = ["seed", "tokens"]
    base = table[table["arm"] == reference].set_index(keys)["loss"].rename("base")
    both = table[table["arm"] != reference].join(base, on=keys, how="inner")
    return both.assign(against=reference, gap=both["loss"] - both["base"]).drop(columns="base")


def paper_gaps(model: str, base: str) -> pd.DataFrame:
    """Return the paper's gap of an MoE to its base over training, read off the two curves of Fig 1.

    The readings are along one run each; all but the last two are from before the end of the base's decay of the rate.

    Columns: tokens, per_parameter, gap, low, high.
    """
    parameters = ModelConfig.parse(base).non_embedding_parameters()
    rows = [
        [billions * 1e9, billions * 1e9 / parameters, *gap]
        for billions, *gap in paper.loss_curve(model).minus(paper.loss_curve(base))
    ]
    return pd.DataFrame(rows, columns=["tokens", "per_parameter", "gap", "low", "high"])


def efficiency(table: pd.DataFrame, moe: str, base: str) -> pd.DataFrame:
    """Return how many times fewer tokens an MoE needs for the loss that its base reaches with each budget.

    Both sides are budgets with a decay of their own; between them the MoE's loss is interpolated over the logarithm of
    the tokens. Budgets whose loss the MoE's smallest budget already beats, or that none of its budgets reaches, are
    left out.

    Args:
        table: from `losses`.

    Returns:
        Columns arm, seed, tokens (the base's budget), per_parameter, times.
    """
    rows = []
    for seed, part in table.groupby("seed"):
        ours, theirs = (part[part["arm"] == arm].sort_values("tokens") for arm in (moe, base))
        for goal in theirs.itertuples():
            tokens = tokens_at(ours, goal.loss)
            if tokens:
                rows.append([moe, seed, goal.tokens, goal.per_parameter, goal.tokens / tokens])
    return pd.DataFrame(rows, columns=["arm", "seed", "tokens", "per_parameter", "times"])


def tokens_at(curve: pd.DataFrame, goal: float) -> float | None:
    """Return the tokens at which an arm's budgets reach a loss, interpolated over log tokens.

    None outside of the budgets, and between two that are more than `MAX_FACTOR` apart.
    """
    points = list(zip(curve["tokens"], curve["loss"], strict=True))
    for (before, high), (after, low) in zip(points, points[1:], strict=False):
        if low <= goal <= high and low < high and after <= MAX_FACTOR * before:
            return math.exp(math.log(before) + (high - goal) / (high - low) * (math.log(after) - math.log(before)))
    return None


def loss_at(curve: pd.DataFrame, tokens: float) -> float | None:
    """Return an arm's loss at a number of tokens, interpolated over log tokens; None as in `tokens_at`."""
    points = list(zip(curve["tokens"], curve["loss"], strict=True))
    for (before, high), (after, low) in zip(points, points[1:] or points, strict=False):
        if before <= tokens <= after and after <= MAX_FACTOR * before:
            share = math.log(tokens / before) / math.log(after / before) if after > before else 0.0
            return high + share * (low - high)
    return None


def at_equal_cost(table: pd.DataFrame, costs: Mapping[str, Mapping[str, float]], base: str) -> pd.DataFrame:
    """Return each arm's loss minus the base's where both have cost the same: as much as all the base's tokens.

    A seed counts for an arm only if the arm's budgets span the tokens at every cost, so that the means over seeds of
    different costs can be compared.

    Args:
        table: from `losses`.
        costs: what -> arm -> cost of a token, such as {"training FLOPs": {"Dense": 1e6, "MoE-128": 1.1e6}}.

    Returns:
        Columns at (what), arm, seed, gap.
    """
    rows = []
    for seed, part in table.groupby("seed"):
        dense = part[part["arm"] == base].sort_values("tokens")
        for arm in dict.fromkeys(part["arm"]):
            if arm == base or not len(dense):
                continue
            last, curve = dense.iloc[-1], part[part["arm"] == arm].sort_values("tokens")
            dearer = {"training tokens": 1.0} | {
                what: a_token[arm] / a_token[base] for what, a_token in costs.items() if {arm, base} <= set(a_token)
            }
            losses = {what: loss_at(curve, last["tokens"] / times) for what, times in dearer.items()}
            if None not in losses.values():
                rows += [[what, arm, seed, loss - last["loss"]] for what, loss in losses.items()]
    return pd.DataFrame(rows, columns=["at", "arm", "seed", "gap"])


def effective_size(final: pd.DataFrame, moe: str, base: str, larger: str, scale: str) -> pd.DataFrame:
    """Return the size of the dense model that an MoE equals at equal tokens, in units of its base's.

    Between the two dense models the loss is interpolated over the logarithm of the parameters outside the embeddings;
    outside of them it is extrapolated. A seed in which the larger dense model does not end below the base is left out:
    no size equals then.

    Args:
        final: `Runs.final()` of runs of equal tokens.
        scale: whose twins these are.

    Returns:
        Columns seed, times.
    """
    table = final.pivot(index="seed", columns="arm", values="validation_loss")
    if not {moe, base, larger} <= set(table):
        return pd.DataFrame(columns=["seed", "times"])
    table = table[table[larger] < table[base]]
    small, large = (settings.spec(name, scale).model.non_embedding_parameters() for name in (base, larger))
    share = (table[base] - table[moe]) / (table[base] - table[larger])
    times = share.mul(math.log(large / small)).clip(-700, 700).map(math.exp)  # two dense models may end alike
    return times.rename("times").dropna().reset_index()


def paper_effective_size(moe: str, base: str, larger: str, per_parameter: float) -> float | None:
    """Return the same from the paper's Fig 1, at the tokens where its base has seen so many tokens a parameter.

    None before its first reading.
    """
    small, large = (ModelConfig.parse(name).non_embedding_parameters() for name in (base, larger))
    at = per_parameter * small / 1e9
    curves = {name: paper.loss_curve(name) for name in (moe, base, larger)}
    if at < min(curves[base].tokens_B):
        return None
    loss = {name: float(np.interp(at, curve.tokens_B, curve.loss)) for name, curve in curves.items()}
    return math.exp((loss[base] - loss[moe]) / (loss[base] - loss[larger]) * math.log(large / small))
