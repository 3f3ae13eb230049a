"""From which share of the training more experts are ahead."""

import math
from types import SimpleNamespace

import pandas as pd

from moelab import paper
from moelab.experiments import overtaking, prediction


def series(*losses):
    return pd.Series(losses, index=[10, 20, 30, 40])


def test_a_lead_that_is_lost_counts_from_its_last_return():
    fewer = series(4.0, 3.0, 2.0, 1.0)
    assert overtaking.ahead_from(fewer, fewer - 0.1) == 0
    assert overtaking.ahead_from(fewer, series(3.9, 3.1, 1.9, 0.9)) == 0.5
    assert math.isnan(overtaking.ahead_from(fewer, series(3.9, 2.9, 1.9, 1.0))), "level at the end is not ahead"
    assert overtaking.ahead_from(fewer, series(4.1, 2.9, 1.9, 0.9).drop(10)) == 0, "points of both alone"
    assert math.isnan(overtaking.ahead_from(fewer, series(1, 1, 1, 1)[:0]))


def test_open_curves_of_clark_are_complete_and_sealed_ones_are_not_there():
    models, points = paper.routed_models().frame(), overtaking.open_curves()
    opened = models[models["seal"] != "sealed"].set_index("setting")
    assert set(points["setting"]) == set(opened.index) and points["step"].min() == 10_000
    last = points.sort_values("step").groupby("setting")["loss"].last()
    assert (last == opened["loss"].sort_index()).all(), "curves end at the losses of the table"


def test_pairs_of_clark_have_open_settings_alone_and_two_experts_are_compared_with_dense_models():
    table = overtaking.theirs()
    assert len(table) == 58 and not table.duplicated(["router", "size", "experts"]).any()
    assert (table["experts"] == 2).sum() == 12 and table["share"].between(0, 1).all()
    counted = overtaking.summary(table, "experts")
    assert counted["pairs"].sum() == 58 and (counted["median"] <= counted["latest"]).all()


def test_twins_are_compared_with_half_as_many_experts_of_their_width_and_seed_and_arms_are_left_out():
    def run(spec):
        experts = max(1, *spec.model.experts)
        late = {10: 5.0 + experts / 1e3, 20: 4.0 - experts / 1e3, 30: 3.0 - experts / 1e3}
        rows = pd.DataFrame({"step": [0, 10, 10, *late], "loss": [7.0, 9.0, 9.0, *late.values()]})
        return SimpleNamespace(spec=spec, rows=lambda _: rows)

    runs = SimpleNamespace(finished=[run(spec) for spec in prediction.EXPERIMENT.specs("full", 2)])
    table = overtaking.ours(runs)
    assert table.groupby(["width", "seed"]).size().to_dict() == {(w, s): 8 for w in (32, 64) for s in (0, 1)}
    assert set(table["share"]) == {1 / 3}, "the last row of a step counts, and the untrained model does not"
