"""The study of the twin: onset, spread and the rule by which a twin passes, on made values."""

import math

import pandas as pd
import pytest

from moelab.data.batches import PAIRS
from moelab.design import settings
from moelab.experiments import seeds
from moelab.runs.collection import Runs


def test_kinds_of_tokens_are_those_of_the_validation():
    assert seeds.TOKEN_KINDS == PAIRS


def test_copying_begins_where_the_loss_stays_below_the_limit():
    assert seeds.onset([0, 10, 20, 30], [7.7, 3.7, 1.7, 1.0]) == pytest.approx(15)
    assert seeds.onset([0, 10, 20, 30], [7.7, 2.6, 2.8, 1.0]) == pytest.approx(20 + 10 / 18)
    assert math.isnan(seeds.onset([0, 10], [7.7, 3.0])) and seeds.onset([5, 10], [2.0, 1.0]) == 5


def table(rows):
    columns = ["arm", "seed", "onset", "loss", "repeated", "changed", "new"]
    return pd.DataFrame(
        [[arm, seed, began, loss, loss, loss, loss] for arm, seed, began, loss in rows], columns=columns
    )


def test_an_arm_passes_with_early_copying_on_every_seed_and_a_narrow_spread():
    rows = [
        ("good", 0, 0.05, 3.00), ("good", 1, 0.09, 3.02), ("good", 2, 0.05, 3.01),
        ("wide", 0, 0.05, 3.00), ("wide", 1, 0.05, 3.04), ("wide", 2, 0.05, 3.02),
        ("late", 0, 0.05, 3.00), ("late", 1, 0.11, 3.00), ("late", 2, 0.05, 3.00),
        ("never", 0, 0.05, 3.0), ("never", 1, math.nan, 3.0), ("never", 2, 0.05, 3.0),
        ("two", 0, 0.01, 3.00), ("two", 1, 0.01, 3.00),
    ]  # fmt: skip
    found = seeds.spreads(table(rows)).set_index("arm")
    assert found["passes"].to_dict() == {"good": True, "wide": False, "late": False, "never": False, "two": None}
    assert found["spread"]["good"] == pytest.approx(0.01)
    said = seeds.study_headline(found.reset_index())
    assert said == "1 of 4 arms copy early and spread at most 0.015 nats"
    assert seeds.study_headline(found.reset_index().tail(1)) == "No arm has finished three seeds"


def test_arms_that_move_together_over_seeds_are_correlated():
    rows = [(arm, seed, 0.1, sign * seed) for arm, sign in (("A", 1), ("B", 2), ("C", -1)) for seed in range(4)]
    assert seeds.correlation(table(rows)) == pytest.approx(-1 / 3)
    assert math.isnan(seeds.correlation(table(rows[:4]))) and math.isnan(seeds.correlation(table([])))


def test_the_study_trains_candidates_on_seeds_of_no_claim_and_at_the_shared_rate():
    specs = seeds.EXPERIMENT.specs("full", 2)
    assert {s.train.seed for s in specs} == {100, 101} and {s.train.tokens for s in specs} == {seeds.TOKENS}
    assert len({s.id for s in specs}) == len(specs)
    chosen = seeds.EXPERIMENT.specs("full", candidates=["smeared keys"])
    assert [s.label for s in chosen] == ["Dense, smeared keys", "MoE-32, smeared keys"]
    assert {(s.model.decoder.smeared_keys, s.train.lr) for s in chosen} == {(True, 8e-3)}
    with pytest.raises(ValueError, match=r"^seeds: unknown candidate '2\.7B'; allowed: smeared keys"):
        seeds.EXPERIMENT.specs("full", candidates=["2.7B"])
    assert all(s.train.tokens == settings.TRAINS["full"].tokens for s in seeds.recorded())


def test_a_run_is_read_and_its_heads_are_measured(trained):
    study = seeds.study(Runs([trained]))
    assert list(study["arm"]) == ["tiny"] and study["loss"][0] == trained.result["validation_loss"]
    assert study["new"][0] == trained.result["validation_by_pair"]["new"]["loss"]
    assert math.isnan(study["onset"][0]), "a few steps teach no copying"
    effects = seeds.heads(Runs([trained]))
    assert len(effects) == trained.spec.model.layers * trained.spec.model.heads and effects["new"].notna().all()
    counted = seeds.copying(study, effects)
    assert list(counted["copying heads"]) == [0] and seeds.heads_headline(counted) == "0 heads copy in the one run"
