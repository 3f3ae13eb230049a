"""Say from which share of the training a model stays below one of half as many experts, in Clark's curves and in ours.

Losses during training are noisy and of one seed each, so a lead that is lost for one point counts as lost until then.
"""

from __future__ import annotations

import math

from moelab import paper
from moelab.experiments.outside import ROUTERS
from moelab.lazy import pd
from moelab.runs.collection import Runs


def ahead_from(fewer: pd.Series, more: pd.Series) -> float:
    """Return the share of the training from which `more` is below `fewer` at every later point, NaN if not at the end.

    It is that of the last common point where `more` is not below, so 0 if it is below at all of them.

    Args:
        fewer: losses in nats by step; the points of both are compared.
        more: those of the model with more experts.
    """
    gap = (more - fewer).dropna().sort_index()
    if not len(gap) or gap.iloc[-1] >= 0:
        return math.nan
    behind = gap.index[gap >= 0]
    return float(behind[-1] / gap.index[-1]) if len(behind) else 0.0


def open_curves() -> pd.DataFrame:
    """Return the points of Clark's open curves: columns setting, step, loss (nats)."""
    curves = paper.routed_curves().frame().explode(["steps", "losses"])
    return curves.rename(columns={"steps": "step", "losses": "loss"})[["setting", "step", "loss"]].astype(
        {"loss": float}
    )


def theirs() -> pd.DataFrame:
    """Return the shares of Clark's pairs whose both settings are open: columns router, size, experts, share.

    Pairs have one expert a token in every second layer; two experts are compared with dense models of the size, whose
    seeds are averaged. Points are every 10,000 of 249,000 steps, from 4 % of the training on.
    """
    models = paper.routed_models().frame()
    models = models[(models["k"] == 1) & (models["frequency"] == 0.5) & (models["flop_increase"] == 1)]
    points = open_curves().merge(models.drop(columns=["loss", "step"]))
    curves = points.groupby(["router", "size", "parameters", "experts", "step"])["loss"].mean()
    rows = []
    for router, size, parameters, experts in sorted(set(curves.index.droplevel("step"))):
        half = ("Dense" if experts == 2 else router, size, parameters, experts // 2)
        if router in ROUTERS and half in curves.index.droplevel("step"):
            share = ahead_from(curves.loc[half], curves.loc[router, size, parameters, experts])
            rows.append([router, size, parameters, experts, share])
    table = pd.DataFrame(rows, columns=["router", "size", "parameters", "experts", "share"])
    table = table.sort_values(["router", "parameters", "experts"], kind="stable", ignore_index=True)
    return table.drop(columns="parameters")


def ours(runs: Runs) -> pd.DataFrame:
    """Return the shares of the designed twins without arms: columns width, experts, seed, share.

    Losses are of a part of the validation text, at 30 points of a training at scale `full`.
    """
    curves = {}
    for run in runs.finished:
        if run.spec.label.count(",") == 1:  # the label of an arm names it after the width
            rows = run.rows("validation.jsonl")
            rows = rows[rows["step"] > 0].drop_duplicates("step", keep="last")
            key = (run.spec.model.hidden, max(1, *run.spec.model.experts), run.spec.train.seed)
            curves[key] = rows.set_index("step")["loss"]
    found = [
        [width, experts, seed, ahead_from(curves[width, experts // 2, seed], more)]
        for (width, experts, seed), more in sorted(curves.items())
        if (width, experts // 2, seed) in curves
    ]
    return pd.DataFrame(found, columns=["width", "experts", "seed", "share"])


def summary(table: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Return how many pairs there are in each group, and from which share of the training they are ahead.

    Columns: those of `by`, pairs, ahead (how many are at the end), median and latest (shares of the training).
    """
    grouped = table.groupby(list(by))["share"]
    return grouped.agg(pairs="size", ahead="count", median="median", latest="max").reset_index()
