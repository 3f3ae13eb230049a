"""The zero-shot experiment's tables, verdicts and finding, from made-up scores."""

import json
import math
from importlib import metadata
from unittest.mock import Mock

import pandas as pd
import pytest

from moelab import paper
from moelab.design import rates
from moelab.design import verdicts as claims
from moelab.evaluation.zero_shot import Score, version
from moelab.experiments import distillation, pr_moe, scaling, zero_shot, zero_shot_reference


def scores(accuracies, stand_in=True):
    """Rows as `measure` makes them: {(arm, seed): {paper's column: accuracy}}."""
    guess = {"boolq": {"chance": 0.5, "majority": 0.62}, "piqa": {"chance": 0.5, "majority": 0.5}}

    def score(arm, seed, column, accuracy):
        about = {"arm": arm, "seed": seed, "paper": column, "task": f"packaged_{column}", "n": 100}
        found = {"accuracy": accuracy, "standard_error": math.sqrt(accuracy * (1 - accuracy) / 100)}
        found |= {"bits_per_byte": 3.0, "stand_in": stand_in and column == "webqs", "cut": 0, "requests": 100}
        found |= {"margin": 0.1, "margin_error": 0.01} if column in guess else {"margin": None, "margin_error": None}
        return about | found | guess.get(column, {"chance": 0.0, "majority": None})

    made = pd.DataFrame([score(*of, *found) for of, each in accuracies.items() for found in each.items()])
    return made.astype({"margin": float, "margin_error": float}) if len(made) else made


SIX = dict(lambada=0.0, piqa=0.52, boolq=0.62, race_h=0.0, triviaqa=0.0, webqs=0.0)
ARMS = ("Dense", "MoE-128", "PR-MoE-32/64")
BOTH = {(arm, seed): SIX for arm in ARMS for seed in (0, 1)}


def test_bits_of_right_answers_count_only_tasks_that_fit():
    rows = scores(BOTH).assign(cut=0, requests=10)
    rows.loc[rows["task"] == "packaged_boolq", "cut"] = 5
    gain = {"Dense": 0.0, "MoE-128": -0.2, "PR-MoE-32/64": -0.1}
    rows["bits_per_byte"] += rows["arm"].map(gain) + 0.02 * rows["seed"] * (rows["arm"] == "MoE-128")
    rows.loc[(rows["task"] == "packaged_boolq") & (rows["arm"] == "MoE-128"), "bits_per_byte"] += 9
    gaps = zero_shot.answer_bits(rows).set_index(["left", "right", "seed"])["gap"]
    assert gaps["MoE-128", "Dense", 0] == pytest.approx(-0.2) and gaps["MoE-128", "Dense", 1] == pytest.approx(-0.18)
    assert gaps["PR-MoE-32/64", "MoE-128", 1] == pytest.approx(0.08) and len(gaps) == 6
    assert zero_shot.tasks_that_fit(rows)["packaged_boolq"] == 0.5
    line = zero_shot.bits_headline(rows)
    of_larger = rows[rows["arm"] != "PR-MoE-32/64"].replace({"arm": {"Dense": "1.3B", "MoE-128": "1.3B+MoE-128"}})
    assert zero_shot.bits_headline(pd.concat([rows, of_larger])).startswith("1.3B+MoE-128's bits per byte"), "first"
    larger = pd.concat([rows, rows[rows["arm"] == "Dense"].assign(arm="1.3B")])
    assert zero_shot.bits_headline(larger) == line, "MoE-128 minus 1.3B is another pair"
    assert "-0.190 (95 % interval" in line and line.endswith("without boolq)")
    rows.loc[(rows["task"] == "packaged_piqa") & (rows["arm"] == "MoE-128"), "margin"] += 0.3
    margins = zero_shot.answer_bits(rows, "margin").set_index(["left", "right", "seed"])["gap"]
    assert margins["MoE-128", "Dense", 0] == pytest.approx(0.3), (
        "boolq, of the two tasks with wrong answers, does not fit"
    )
    assert "no task in common" in zero_shot.bits_headline(rows[rows["arm"] == "Dense"])


def test_guessing_is_called_guessing_and_knowing_knowing():
    table = zero_shot.over_chance(scores(BOTH))
    boolq = table[(table["arm"] == "Dense") & (table["task"] == "packaged_boolq")].iloc[0]
    assert boolq["reference"] == 0.62 and boolq["sigmas"] == 0 and boolq["n"] == 100
    said = zero_shot.headline(table)
    assert said == "None is 3 standard errors above a guess without knowledge"
    dense = {("Dense", seed): {**SIX, "lambada": accuracy} for seed, accuracy in enumerate((0.4, 0.3))}
    said = zero_shot.headline(zero_shot.over_chance(scores({**BOTH, **dense})))
    assert said == "1 of 18 scores are 3 standard errors above a guess"
    nothing = zero_shot.over_chance(scores({}).reindex(columns=scores(BOTH).columns))
    assert zero_shot.headline(nothing) == "no run has finished"


def test_a_real_models_scores_are_read_from_the_results_while_the_tasks_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path))
    nothing = zero_shot_reference.reference()
    assert not len(nothing) and "moelab eval smollm2" in zero_shot_reference.reference_headline(nothing)
    found = [
        Score("packaged_lambada", "acc", 0.34, 0.03, 0.0, None, 200, 0.8, 0, 200, False, version("packaged_lambada"), 1.0),
        Score("packaged_piqa", "acc", 0.64, 0.03, 0.5, 0.525, 200, 1.1, 0, 400, False, version("packaged_piqa"), 1.0),
        Score("packaged_boolq", "acc", 0.60, 0.03, 0.5, 0.6, 200, 1.1, 0, 400, False, "packaged_boolq 0.1, lm-eval 0", 1.0),
    ]  # fmt: skip
    zero_shot_reference.save(
        found, tmp_path / "benchmarks", "smollm2", {"limit": 200, "dtype": "fp32", "device": "cpu"}
    )
    monkeypatch.setattr(metadata, "version", Mock(side_effect=metadata.PackageNotFoundError))  # without lm-eval
    rows = zero_shot_reference.reference()
    assert list(rows["task"]) == ["packaged_lambada", "packaged_piqa"], "an older form of a task does not count"
    assert set(rows["arm"]) == {"SmolLM2-135M-Instruct"} and list(rows["paper"]) == ["lambada", "piqa"]
    assert zero_shot_reference.reference_headline(rows) == (
        "SmolLM2-135M-Instruct, a real model, is above knowing nothing on lambada 34.0 ± 3.0 %, piqa 64.0 ± 3.0 %"
    )
    table = pd.concat([zero_shot.over_chance(scores(BOTH)), zero_shot.over_chance(rows)])
    assert len(table) == 20 and zero_shot.our_table(rows).loc["SmolLM2-135M-Instruct", "piqa"] == pytest.approx(64)
    record = json.loads((tmp_path / "benchmarks" / "zero-shot-smollm2.provenance.json").read_text())
    assert record["versions"]["torch"] and record["title"].startswith("SmolLM2-135M-Instruct through our zero-shot")


def test_the_tables_are_the_papers_and_ours_in_its_columns():
    theirs, ours = zero_shot.paper_table(), zero_shot.our_table(scores(BOTH))
    assert list(theirs.columns) == list(ours.columns) == [*paper.TASKS, "average"]
    assert theirs.loc["1.3B", "lambada"] == 63.65
    assert theirs.loc["350M+MoE-128", "average"] == pytest.approx(42.517, abs=1e-3)
    assert "0.1B+MoE-64" not in theirs.index, "the paper's own models only"
    assert ours.loc["MoE-128", "average"] == pytest.approx((52 + 62) / 6)
    part = {("Dense", 0): {"piqa": 0.5}}
    assert math.isnan(zero_shot.our_table(scores(part)).loc["Dense", "average"]), "no average of some tasks"


def test_claims_are_shown_at_this_scale_and_judged_at_the_papers():
    better = {**BOTH, ("PR-MoE-32/64", 0): {**SIX, "piqa": 0.55}, ("PR-MoE-32/64", 1): {**SIX, "piqa": 0.58}}
    found = {v.claim: v for v in zero_shot.verdicts(scores(better), "cpu")}
    assert set(found) == {c.id for c in paper.claims("zero-shot")}
    pr = found["zero-shot-350m-pr-moe"]
    assert pr.ours == pytest.approx((3 + 6) / 2 / 6) and pr.samples == 2 and pr.verdict == claims.CANNOT_TEST
    assert "Stand-ins" in pr.note
    assert found["zero-shot-350m-moe128-vs-1.3b"].samples == 0
    three = {(arm, seed): {**SIX, "piqa": 0.8 + 0.01 * seed} for arm in ARMS for seed in (0, 1, 2)}
    at_paper = {v.claim: v for v in zero_shot.verdicts(scores(three, stand_in=False), "paper")}
    level = at_paper["zero-shot-350m-pr-moe"]
    assert level.verdict == claims.CANNOT_TELL, "it is about what 128 experts gain over 32, and MoE-32 is not here"
    assert "350M+MoE-128 over 350M+MoE-32" in level.why
    lost = {key: value if key != ("MoE-128", 1) else {"piqa": 0.5} for key, value in three.items()}
    level = next(v for v in zero_shot.verdicts(scores(lost, stand_in=False), "paper") if v.claim == level.claim)
    assert level.verdict == claims.CANNOT_TELL and level.why == "Without a value: seed 1 of 350M+MoE-128."
    incomplete = {key: {"piqa": 0.5} for key in BOTH}
    assert all(v.samples == 0 for v in zero_shot.verdicts(scores(incomplete), "cpu"))


TEACHER = "1.3B+PR-MoE-64/128"
ANSWERS = {
    "1.3B": 3.0,
    "1.3B+MoE-128": 2.82,
    "6.7B": 2.8,
    TEACHER: 2.81,
    "1.3B L21 alone": 2.9,
    "1.3B L21 + staged KD": 2.81,
}


def answering(bits, seeds=3):
    """Scores of arms whose bits per byte are these, with a little noise that a seed's arms do not share."""
    rows = scores({(arm, seed): SIX for arm in bits for seed in range(seeds)})
    noise = [0.002 * ((7 * i + 3 * seed) % 5 - 2) for i, seed in enumerate(rows["seed"])]
    return rows.assign(bits_per_byte=rows["arm"].map(bits) + noise)


def test_bits_are_judged_like_losses():
    found = {v.claim: v for v in zero_shot.verdicts(answering(ANSWERS), "full")}
    names = ("bits-1.3b-moe128-vs-6.7b", "bits-pr-moe-vs-moe128", "bits-mos-vs-teacher")
    assert [found[name].verdict for name in names] == [claims.HOLDS] * 3
    first = found[names[0]]
    assert first.ours == pytest.approx(0.02, abs=0.003) and set(first.arms) == {"1.3B", "1.3B+MoE-128", "6.7B"}
    assert found["zero-shot-1.3b-moe128-vs-6.7b"].verdict == claims.CANNOT_TEST
    worse = answering({**ANSWERS, "1.3B+MoE-128": 2.95, "1.3B L21 + staged KD": 2.9})
    found = {v.claim: v for v in zero_shot.verdicts(worse, "full")}
    assert found[names[0]].verdict == found[names[2]].verdict == claims.FAILS, "a quarter of the gain is kept"
    lost = worse[(worse["arm"] != "6.7B") | (worse["seed"] != 1)]
    (verdict,) = (v for v in zero_shot.verdicts(lost, "full") if v.claim == names[0])
    assert verdict.verdict == claims.CANNOT_TELL and "seed 1 of 6.7B" in verdict.why
    cut = worse.assign(cut=100 * (worse["task"] == "packaged_boolq"))
    cut.loc[cut["task"] == "packaged_boolq", "bits_per_byte"] = 99.0
    (verdict,) = (v for v in zero_shot.verdicts(cut, "full") if v.claim == names[0])
    assert verdict.ours == pytest.approx(0.15, abs=0.01), "only tasks whose requests fit the context"


def test_stored_scores_of_another_scoring_are_not_asked_for(monkeypatch):
    from moelab.evaluation import zero_shot as scoring

    before = zero_shot._versions()
    monkeypatch.setattr(scoring, "SCORING", scoring.SCORING + 1)
    assert all(now != before[task] for task, now in zero_shot._versions().items())


def test_the_new_claims_name_arms_of_the_experiment():
    named = [c for c in paper.claims("zero-shot") if c.quantity == zero_shot.BITS]
    assert len(named) == 3 and all(c.testable_at == "cpu" and c.direction == "equal" for c in named)
    arms = {zero_shot.NAMES[arm] for arm in zero_shot.arms("full")}
    assert {name for c in named for name in (c.left, c.right, c.gain_of, c.gain_over)} <= arms
    assert {arm for pair in zero_shot.PAIRS for arm in pair} <= set(zero_shot.arms("full"))


def test_recall_is_told_in_a_line():
    def row(arm, seed, kind, accuracy):
        about = {"arm": arm, "seed": seed, "kind": kind, "accuracy": accuracy, "n": 2000, "items": "abc"}
        return about | dict.fromkeys(("standard_error", "margin", "margin_error", "bits", "exact", "seconds"), 0.1)

    shares = {
        ("Dense", "memory"): 0.8,
        ("Dense", "copying"): 0.81,
        ("MoE-128", "memory"): 0.9,
        ("MoE-128", "copying"): 0.79,
    }
    table = zero_shot.pairs_table(
        [row(arm, s, kind, a + 0.02 * s) for (arm, kind), a in shares.items() for s in (0, 1)]
    )
    assert len(table) == 4 and table.set_index(["kind", "arm"])["accuracy"]["memory", "MoE-128"] == pytest.approx(0.91)
    assert zero_shot.pairs_headline(table) == (
        "Facts recalled from memory: Dense 81%, MoE-128 91%; from context: Dense 82%, MoE-128 80%"
    )
    assert "No two arms" in zero_shot.pairs_headline(zero_shot.pairs_table([]))


@pytest.mark.parametrize("scale", ["cpu", "full"])
def test_runs_are_those_of_the_other_experiments(scale):
    others = {s.id for module in (scaling, pr_moe, distillation) for s in module.EXPERIMENT.specs(scale, 1)}
    others |= {s.id for s in distillation.EXPERIMENT.specs(scale, 1, base="1.3B")}
    specs = zero_shot.EXPERIMENT.specs(scale, 1)
    assert {s.id for s in specs} <= others
    assert {rates.arm(s.label) for s in specs} == set(zero_shot.arms(scale))
