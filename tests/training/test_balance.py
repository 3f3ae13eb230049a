"""Statistics of the experts' load against their formulas, and in a run's rows."""

import math

import numpy as np
import pytest

from moelab.training.balance import PERCENTILES, layer_statistics, max_violation, percentiles, statistics
from moelab.training.metrics import TRAIN, Window, scalars


def test_formulas_on_a_load_made_by_hand():
    load = [6, 2, 0, 4]  # mean 3
    found = layer_statistics(load, ranks=2)
    assert found["load_variation"] == pytest.approx(np.std([2, 2 / 3, 0, 4 / 3]))
    assert found["dead_experts"] == 0.25
    shares = [0.5, 1 / 6, 1 / 3]
    assert found["load_entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(4))
    assert found["busiest_rank"] == pytest.approx(8 / 6 - 1)
    assert max_violation({"2": load, "4": [1, 1]}) == pytest.approx((2 - 1 + 0) / 2)
    assert percentiles([0, 1, 2, 3, 4]) == [0, 0, 1, 2, 2] and len(PERCENTILES) == 5
    nothing = statistics({"2": [0, 0, 0]}, {})
    assert nothing["load_variation"] == 0 and nothing["load_percentiles"] == {"2": [0.0] * 5}
    assert max_violation({"2": [0, 0]}) == 0


@pytest.mark.parametrize("experts", [2, 7, 64])
def test_even_and_one_sided_loads(experts):
    even, one = [13] * experts, [13 * experts] + [0] * (experts - 1)
    assert layer_statistics(even) == pytest.approx({"load_variation": 0, "dead_experts": 0, "load_entropy": 1})
    found = layer_statistics(one)
    assert found["load_entropy"] == pytest.approx(0, abs=1e-12)
    assert found["dead_experts"] == pytest.approx(1 - 1 / experts)
    assert max_violation({"1": even}) == 0 and max_violation({"1": one}) == experts - 1


def test_violation_is_that_of_each_step_and_the_rest_that_of_the_window():
    """Two steps whose loads even out: each violates the balance, their sum does not."""
    window = Window()
    for load in ([4, 0], [0, 4]):
        window.add(1.0, 0.0, 0.0, {"2": load}, {"2": 4})
    row = window.row({"2": 2})
    assert row["max_violation"] == 1 and row["load_variation"] == 0 and row["busiest_rank"] == 0
    assert row["balance"]["2"]["load_entropy"] == pytest.approx(1) and row["dropped_share"] == 0
    assert "balance" not in Window(steps=1).row(), "a dense model has no experts"


def test_tensorboard_has_every_statistic():
    window = Window()
    window.add(1.0, 0.0, 0.0, {"2": [3, 1], "4": [2, 2]}, {"2": 4, "4": 4})
    row = {"step": 1, **window.row({"2": 2}), "router_entropy": 0.9}
    found = dict(scalars(TRAIN, row))
    means = ("max_violation", "load_variation", "dead_experts", "load_entropy", "router_entropy", "dropped_share")
    assert {f"train/{name}" for name in (*means, "busiest_rank")} <= found.keys()
    assert found["balance/layer2/busiest_rank"] == 0.5 and found["balance/layer4/load_variation"] == 0
    assert "balance/layer4/busiest_rank" not in found, "its experts are on one rank"
    assert [found[f"expert_load/layer2/p{p}"] for p in (0, 100)] == [0.5, 1.5]
    del row["expert_load"]  # as in a published record
    assert dict(scalars(TRAIN, row)) == found
