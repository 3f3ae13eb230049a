"""The prediction of Clark's sealed settings from the designed twins: multipliers of arms, two intervals, scores."""

import functools

import numpy as np
import pandas as pd
import pytest

from moelab.design.expert_laws import Law
from moelab.experiments import outside, prediction
from moelab.experiments import second_prediction as second

LAW = Law("effective", -0.3, 0.3, 0.0, 1.0, 1.5, 2.0, 400.0)
ARMS = dict(zip(prediction.ARMS, (1.3, 0.7, 1.2), strict=True))
SIZES = {32: 1.7e5, 64: 5.4e5, 128: 1.9e6}


@functools.cache
def twins(noise):
    """Return final losses of all designed twins as `LAW` and `ARMS` have them."""
    draw, rows = np.random.default_rng(0), []
    for spec in prediction.EXPERIMENT.specs("full", 2):
        width, experts, (_, _, *arm) = spec.model.hidden, max(1, *spec.model.experts), spec.label.split(", ")
        gain = float(LAW.gain(SIZES[width], experts, LAW.dense, ARMS.get("".join(arm), 1.0)))
        loss = float(LAW.dense.loss(SIZES[width])) - gain + draw.normal(0, noise)
        rows.append([width, SIZES[width], experts, "".join(arm), spec.train.seed, loss])
    return pd.DataFrame(rows, columns=["width", "parameters", "experts", "arm", "seed", "loss"])


@functools.cache
def predicted():
    return second.predict(twins(0.004), draws=40)


def test_multipliers_of_arms_are_found_again_and_lie_on_lines_in_log2():
    points = twins(1e-5)
    found = second.multipliers(points, LAW.dense, draws=30)
    assert found.shape == (31, 3) and found[0] == pytest.approx(list(ARMS.values()), abs=1e-3)
    assert 0 < found[1:].std(axis=0).max() < 1e-3
    at = pd.DataFrame({"frequency": [1, 0.5, 0.25, 0.125, 0.5, 0.5, 2**-6], "k": [1, 1, 1, 1, 2, 4, 1]})
    share = second.shares(at["frequency"], at["k"], np.array([list(ARMS.values())]))[0]
    assert share == pytest.approx([1.3, 1.0, 0.7, 0.4, 1.2, 1.4, 0.0]), "few routed layers do not do harm"


def test_the_sealed_settings_are_predicted_with_two_intervals_and_simpler_ones_beside_them():
    table = predicted()
    ours = table[table["law"] == second.LAW]
    assert ours["settings"].sum() == 125 and not ours.duplicated(second.KEYS).any()
    sealed = outside.cells("sealed", arms=True)
    assert len(sealed.merge(ours, on=second.KEYS)) == len(sealed), "keys are those of Clark's table, not rounded"
    assert (ours["low"] < ours["gain"]).all() and (ours["gain"] < ours["high"]).all()
    wider = (ours["wide_high"] - ours["wide_low"]) / (ours["high"] - ours["low"])
    assert (wider > 1).all(), "these twins lie on the law, Clark's models do not"
    without = table[table["law"] == second.WITHOUT_ARMS]
    assert ((without["frequency"] != 0.5) | (without["k"] != 1)).all() and len(without) == 26
    assert set(table["law"]) == {second.LAW, second.WITHOUT_ARMS, *outside.SIMPLER}
    plain = table[(table["frequency"] == 0.5) & (table["k"] == 1)]
    assert plain.groupby("law").size().nunique() == 1, "one row a law and setting"
    more = ours[(ours["size"] == "25M") & (ours["experts"] == 64) & (ours["k"] == 1)].sort_values("frequency")
    assert more["gain"].is_monotonic_increasing and len(more) == 4


def test_the_wide_interval_holds_95_of_100_open_settings():
    found = second.fit(twins(0.004).query("arm == ''"), "effective", 1, pooled=True)
    apart, opened = second.calibrated(found), outside.measured("seen", "first")
    off = np.log(np.log(opened["times"]) / found.law.effect(opened["parameters"], opened["experts"])).abs()
    assert len(opened) == 81 and 0.95 <= (off <= apart).mean() < 1


def test_scores_count_what_is_inside_and_how_far_the_rest_is():
    table = predicted()
    ours = table[table["law"] == second.LAW]
    same = ours[[*second.KEYS, "gain", "times"]].assign(router="Hash")
    right = second.score(table, same).set_index("law")
    assert right.loc[second.LAW, ["inside", "inside_wide", "error", "rank"]].tolist() == pytest.approx([1, 1, 0, 1])
    assert right.loc[second.LAW, "error_times"] == pytest.approx(1) and right.loc[second.WITHOUT_ARMS, "error"] > 0
    far = second.score(table, same.assign(gain=ours["high"] + 1e-3)).set_index("law").loc[second.LAW]
    assert far["inside"] == 0 and far["inside_wide"] > 0.5 and far["bias"] > 0
    with pytest.raises(ValueError, match="has no prediction"):
        second.score(table, same.assign(k=3))


def test_a_first_comparison_with_arms_has_their_columns():
    opened = outside.measured("seen", arms=True)
    assert set(opened[opened["k"] == 2]["experts"]) == {8, 64} and len(opened) == 26
