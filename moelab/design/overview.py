"""Tabulate what an experiment trains and how it ended: sizes, costs, mean losses and the load of the experts by arm."""

from __future__ import annotations

from collections.abc import Sequence

from moelab.design import comparison
from moelab.lazy import pd
from moelab.runs.collection import Runs
from moelab.runs.spec import RunSpec
from moelab.statistics import interval


def models(specs: Sequence[RunSpec]) -> pd.DataFrame:
    """Return, a row per arm, its twin's sizes (millions), experts by layer, and FLOPs per token (millions)."""
    rows = {
        spec.title: {
            "layers": spec.model.layers,
            "hidden": spec.model.hidden,
            "parameters (M)": spec.model.parameters() / 1e6,
            "active (M)": spec.model.active_parameters() / 1e6,
            "training MFLOPs a token": spec.model.flops_per_token(context=spec.data.context) / 1e6,
            "experts by layer": " ".join(str(e or "–") for e in spec.model.experts),
        }
        for spec in specs
    }
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="arm"))


def summary(runs: Runs) -> pd.DataFrame:
    """Return, a row per arm: mean final validation loss with its 95 % interval, bits per byte, seeds, tokens.

    Not the time of the runs, which depends on what else their machines did; `moelab bench train` measures arms in turn.
    """
    final = runs.final()
    if not len(final):
        return pd.DataFrame()
    comparison.by_arm(final)  # refuses runs with equal labels
    rows = []
    for arm, part in final.groupby("arm", sort=False):
        mean, low, high = interval(list(part["validation_loss"]))
        one = len(part) < 2
        rows.append(
            {
                "arm": arm,
                "validation loss": mean,
                "low": None if one else low,
                "high": None if one else high,
                "bits_per_byte": part["bits_per_byte"].mean(),
                "seeds": len(part),
                "tokens (M)": part["tokens"].iloc[0] / 1e6,
            }
        )
    return pd.DataFrame(rows).set_index("arm")


def costs(specs: Sequence[RunSpec]) -> pd.DataFrame:
    """Return, a row per arm: tokens of its trunk before it begins and its own (millions), and FLOPs of both (10^12)."""
    rows = {
        spec.title: {
            "tokens of its trunk (M)": spec.start.tokens / 1e6 if spec.start else 0.0,
            "own tokens (M)": spec.own_tokens / 1e6,
            "training TFLOPs of both": spec.total_cost / 1e12,
        }
        for spec in specs
    }
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="arm"))


def at_the_start(runs: Runs) -> pd.DataFrame:
    """Return, a row per branch, the loss of its trunk where it begins and its own there, on the same validation text.

    Columns: arm, seed, before, after (nats per token); before is missing where the trunk was not evaluated at that step
    or is not among the runs.
    """
    evaluated = {run.spec.id: run.rows("validation.jsonl") for run in runs.finished}
    rows = []
    for run in runs.finished:
        if run.spec.start is not None:
            first = evaluated[run.spec.id].iloc[0]
            trunk = evaluated.get(run.spec.start.run.id)
            there = [] if trunk is None else list(trunk.loc[trunk["step"] == first["step"], "loss"])
            rows.append([run.spec.title, run.spec.train.seed, there[0] if there else None, first["loss"]])
    return pd.DataFrame(rows, columns=["arm", "seed", "before", "after"]).astype({"before": float, "after": float})


BALANCE = (
    "max_violation",
    "busiest_rank",
    "load_variation",
    "dead_experts",
    "load_entropy",
    "router_entropy",
    "dropped_share",
)
"""Statistics of the experts' load in a row of training metrics, see `moelab.training.balance`."""


def balance(runs: Runs) -> pd.DataFrame:
    """Return, a row per MoE arm, the statistics of the experts' load at the end of training; empty without MoE runs.

    Columns: arm, those of `BALANCE` that the runs have, the `max_violation` of tokens that are dealt out at random, and
    p0 to p100, the percentiles of an expert's load relative to the mean load. Each is a mean over layers and seeds.
    """
    from moelab.training.balance import PERCENTILES, random_max_violation

    rows = []
    for run in runs.finished:
        training = [row for row in run.rows("train.jsonl").to_dict("records") if isinstance(row.get("balance"), dict)]
        if run.spec.model.is_moe and training:
            last = training[-1]
            layers = list(last["load_percentiles"].values())
            percentiles = {f"p{p}": sum(each[i] for each in layers) / len(layers) for i, p in enumerate(PERCENTILES)}
            values = {k: last[k] for k in BALANCE if k in last}
            model, tokens = run.spec.model, run.spec.train.batch_size * run.spec.data.context
            floors = [random_max_violation(tokens, experts, model.top_k) for experts in model.experts if experts]
            values |= {"max_violation, random": sum(floors) / len(floors)}
            rows.append({"arm": run.spec.title, **values, **percentiles})
    if not rows:
        return pd.DataFrame(columns=["arm"])
    return pd.DataFrame(rows).groupby("arm", sort=False).mean().reset_index()
