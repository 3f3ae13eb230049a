"""Predict Clark's sealed settings from the designed twins (`moelab.experiments.prediction`), and score the prediction.

Fixed before the twins had ended: the law is `effective` (`moelab.design.expert_laws`), as of the first prediction's
laws it alone carried over in size. What a share of routed layers or more experts a token do is one number each that
multiplies the law's effect (`multipliers`). Every prediction has two intervals of a single setting, 95 %:

- low, high: from the twins alone, as those of the first prediction, but with one spread over seeds for all settings.
- wide_low, wide_high: as wide as the twins' errors on the settings that are open already (`calibrated`). About half of
  the first prediction's settings lay inside intervals of the other kind, which hold no error of the law's form.

The prediction does not distinguish routers. Dense models with wider feed-forward layers are not predicted, because no
twin has such layers.
"""

from __future__ import annotations

import math

from moelab.design.expert_laws import DenseCurve, Fit, fit, redrawn
from moelab.experiments import outside
from moelab.experiments.prediction import ARM_EXPERTS, ARMS
from moelab.lazy import np, pd
from moelab.statistics import ALPHA

LAW, WITHOUT_ARMS = "effective on the designed twins", "the same, routed layers and k left out"
KEYS = ["size", "experts", "frequency", "k"]


def multipliers(points: pd.DataFrame, curve: DenseCurve, scale: str = "full", draws: int = 0) -> np.ndarray:
    """Return what the effect of experts is multiplied by in each of `ARMS`: rows of values, the measured ones first.

    The effect is ln of the factor of parameters, read along the twins' dense curve; a multiplier is that of an arm
    over that of every second layer with one expert a token, each summed over the widths that have both.

    Args:
        points: from `moelab.experiments.prediction.points`.
        curve: the dense curve of the law fitted to them.
        draws: further rows, with losses redrawn by the spread over seeds (`redrawn`).
    """
    groups = points.groupby(["parameters", "experts", "arm"])["loss"]
    losses = {key: part.to_numpy(float) for key, part in groups}
    sizes = sorted({size for size, _, arm in losses if arm})
    source, rows = np.random.default_rng(4), []
    for i in range(1 + draws):
        drawn = [c.mean() for c in losses.values()] if i == 0 else redrawn(list(losses.values()), source)
        means = dict(zip(losses, drawn, strict=True))

        def effect(arm: str, means: dict[tuple[float, int, str], float] = means) -> float:
            gains = [means[size, 1, ""] - means[size, ARM_EXPERTS[scale], arm] for size in sizes]
            return math.fsum(np.log(outside.factor(sizes, gains, curve)))

        rows.append([effect(arm) / effect("") for arm in ARMS])
    return np.array(rows)


def shares(frequency: pd.Series, k: pd.Series, multiplied: np.ndarray) -> np.ndarray:
    """Return what the law's effect is multiplied by at shares of routed layers and experts a token.

    It is linear in log2 of the share, from every fourth to every second layer (and beyond, to none), and from there to
    every layer; and linear in log2 k. No setting of Clark's has both.

    Args:
        multiplied: rows of multipliers of `ARMS`, from `multipliers`.

    Returns:
        A row for each row of `multiplied`, a column for each setting.
    """
    every, fourth, two = (multiplied[:, [i]] for i in range(3))
    log = np.log2(frequency.to_numpy(float))[None]
    routed = np.where(log >= -1, 1 + (every - 1) * (log + 1), 1 + (1 - fourth) * (log + 1))
    return np.maximum(routed, 0) * (1 + (two - 1) * np.log2(k.to_numpy(float))[None])


def calibrated(found: Fit) -> float:
    """Return by which factor the effect of a setting may lie above or below the law's, ln, for a 95 % interval.

    It is the quantile of the law's errors on the settings of Clark's that are open (split conformal prediction: with n
    of them the one of rank 0.95 (n + 1)), all sizes, learned routers and Hash together.
    """
    opened = outside.measured("seen", "first")
    expected = found.law.effect(opened["parameters"], opened["experts"])
    apart = np.sort(np.abs(np.log(np.log(opened["times"]) / expected)))
    return float(apart[min(math.ceil((1 - ALPHA) * (len(apart) + 1)), len(apart)) - 1])


def predict(points: pd.DataFrame, draws: int = 0) -> pd.DataFrame:
    """Return the prediction of every sealed setting with experts, and simpler ones next to it.

    Columns: those of `KEYS`, settings, law, gain, low, high, wide_low, wide_high (nats), times (factor of parameters).
    Rows: `LAW` for all; `WITHOUT_ARMS` where an arm's multiplier enters; `moelab.experiments.outside.SIMPLER` for one
    expert a token in every second layer, Clark's law at 15M fitted to the open settings of both learned routers.

    Args:
        points: from `moelab.experiments.prediction.points`, all of scale `full`.
        draws: refits, see `moelab.design.expert_laws.fit`.
    """
    at, curve, plain = outside.cells("sealed", arms=True), outside.dense_curve(), points[points["arm"] == ""]
    found = fit(plain, "effective", draws, pooled=True)
    share = shares(at["frequency"], at["k"], multipliers(points, found.law.dense, draws=len(found.draws)))
    size, experts, apart = at["parameters"].to_numpy(), at["experts"].to_numpy(), math.exp(calibrated(found))
    value, low, high = found.predict(size, experts, curve, stream=1, times=share).T

    def gain(times: np.ndarray | float) -> np.ndarray:
        return found.law.gain(size, experts, curve, times)

    wide = {"wide_low": gain(share[0] / apart), "wide_high": gain(share[0] * apart)}
    ours = at.assign(law=LAW, gain=value, low=low, high=high, **wide)
    arms = (at["frequency"] != 0.5) | (at["k"] != 1)
    without = at.assign(law=WITHOUT_ARMS, gain=gain(1.0))[arms]
    rest = at[~arms].reset_index(drop=True)
    smallest = outside.from_smallest(outside.measured("seen", "first").assign(router="learned"), rest)
    others = pd.concat([outside.simpler(plain, rest), smallest.drop(columns=["router", "twins"])])
    others = others.merge(rest, on=["size", "experts"])
    table = pd.concat([ours, without, others], ignore_index=True)
    table["times"] = outside.factor(table["parameters"], table["gain"], curve)
    values = ["gain", "low", "high", "wide_low", "wide_high", "times"]
    return table[[*KEYS, "settings", "law", *values]].round(dict.fromkeys(values, 4))


def score(predicted: pd.DataFrame, opened: pd.DataFrame) -> pd.DataFrame:
    """Return how well each law of a prediction did on the settings of Clark's once they are open, a row each.

    Columns: law, settings, inside and inside_wide (shares in the 95 % intervals, NaN without one), error (median,
    nats), error_times (median factor between expected and measured factor of parameters), rank (Spearman's correlation
    over settings), bias (median of measured minus expected, nats).

    Args:
        predicted: from `predict`.
        opened: from `moelab.experiments.outside.measured` with `arms`.

    Raises:
        ValueError: one line: a setting that was opened has no prediction.
    """
    ours = predicted.loc[predicted["law"] == LAW, KEYS]
    if len(opened.merge(ours, on=KEYS)) != len(opened):
        raise ValueError("second_prediction.score: a setting that was opened has no prediction")
    given = predicted.rename(columns={"gain": "expected", "times": "expected_times"}).drop(columns="settings")
    rows = []
    for law, part in opened.merge(given, on=KEYS).groupby("law", sort=False):
        miss, gain = part["gain"] - part["expected"], part["gain"]
        inside = [
            float(gain.between(part[f"{wide}low"], part[f"{wide}high"]).mean()) if law == LAW else math.nan
            for wide in ("", "wide_")
        ]
        with np.errstate(divide="ignore", invalid="ignore"):  # a factor is infinite where no dense model ends as low
            apart = math.exp(np.log(part["times"] / part["expected_times"]).abs().median())
        rank = gain.corr(part["expected"], method="spearman")
        rows.append([law, len(part), *inside, miss.abs().median(), apart, rank, miss.median()])
    columns = ["law", "settings", "inside", "inside_wide", "error", "error_times", "rank", "bias"]
    return pd.DataFrame(rows, columns=columns)
