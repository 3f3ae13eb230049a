"""Upcycling: where the branches begin, and what they are compared with."""

import numpy as np
import pandas as pd
import pytest

from moelab.design import comparison
from moelab.experiments import upcycling
from tests.experiments.helpers import final


@pytest.mark.parametrize("scale", ["smoke", "quick", "cpu", "gpu"])
def test_an_upcycled_run_is_a_branch_before_the_decay(scale):
    specs = upcycling.EXPERIMENT.specs(scale)
    arms = {spec.label: spec for spec in specs}
    assert tuple(arms) == upcycling.ARMS
    assert set(arms) >= {arm for left, right, _ in upcycling.EXPECTED for arm in (left, right)}
    whole = arms["Dense"].train
    for label, (trunk, becomes, _) in upcycling.BRANCHES.items():
        run = arms[label]
        assert run.start.run.id == arms[trunk].id and specs.index(arms[trunk]) < specs.index(run)
        assert run.model == arms[becomes].model and run.train == arms[becomes].train
        assert run.start.tokens in arms[trunk].train.keep_at
        assert run.start.tokens <= whole.tokens - whole.cooldown_tokens
        factor = max(run.model.experts) / max(1, *run.start.run.model.experts)
        assert any(run.start.upcycle.scale == pytest.approx(scale) for scale in (1, factor, 0.36 * factor))
    own, equal = (arms[label] for label in upcycling.SHORTER)
    assert own.train.tokens == arms["Upcycled"].own_tokens
    ratio = equal.total_cost / arms["Upcycled"].total_cost
    assert ratio == pytest.approx(1, abs=0.5 / whole.steps(own.data.context) * 1.5)
    assert arms["Top-2"].total_cost == arms["Top-2"].cost > arms["Upcycled"].total_cost
    if scale != "smoke":  # they decay on their own, from the trunk's checkpoint
        assert {s.start.run.id for s in (own, equal)} == {arms["Top-2"].id}
        assert {s.start.tokens for s in (own, equal)} == set(arms["Top-2"].train.keep_at)


def test_a_shorter_run_whose_warm_up_does_not_fit_begins_anew():
    arms = {s.label: s for s in upcycling.EXPERIMENT.specs("quick", upcycle_at=0.8)}
    own = arms["Top-2, MoE's tokens"].train
    assert arms["Top-2, MoE's tokens"].start is None and own.tokens == 204_800
    assert (own.warmup_tokens, own.cooldown_tokens) == (81_920, 40_960)


def test_differences_of_upcycling():
    losses = {"Upcycled": 5.0, "Dense": 5.2, "Top-2": 5.0, "MoE-128": 4.9}
    table = final({arm: [loss, loss + 0.01, loss + 0.02] for arm, loss in losses.items()})
    found = comparison.differences(table, upcycling.EXPECTED).set_index("right")["found"]
    assert dict(found) == {"Dense": "below", "Top-2": "cannot tell"}
    table["validation_loss"] -= np.where(table["arm"] == "Top-2", 0.1, 0)
    found = comparison.differences(table, upcycling.EXPECTED).set_index("right")
    assert found.loc["Top-2", "found"] == "above" and found.loc["Top-2", "mean"] == pytest.approx(0.1)
    assert set(comparison.differences(table[table["seed"] < 2], upcycling.EXPECTED)["found"]) == {"too few seeds"}


def test_differences_name_a_lost_seed_and_allow_for_looks():
    table = final({"a": [2.0, 2.1, 2.2, 2.3], "b": [1.1, 1.17, 1.32, 1.4]})
    expected = [("a", "b", "above")]
    plain, planned = (comparison.differences(table, expected, looks).iloc[0] for looks in ((), (4, 8)))
    assert plain["found"] == planned["found"] == "above" and planned["low"] < plain["low"]
    lost = comparison.differences(table.drop(index=6), expected).iloc[0]
    assert (lost["found"], lost["seeds"]) == ("without seed 2 of b", 3), "it may have diverged"


def test_rows_of_a_kind_are_ordered_by_their_mean():
    rows = [("Upcycled", 0, 0.2), ("Top-2", 0, 0.0), ("Dense", 0, 0.3), ("Grown", 0, 0.1), ("Upcycled", 1, 0.4)]
    table = upcycling.by_kind(pd.DataFrame(rows, columns=["arm", "seed", "gap"]))
    assert list(table["arm"]) == ["Top-2", "Dense", "Grown", "Upcycled", "Upcycled"]
    assert list(table["kind"].unique()) == ["trained from scratch", "begins with copies"]
