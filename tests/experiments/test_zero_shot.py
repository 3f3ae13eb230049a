"""The zero-shot experiment's tables, verdicts and finding, from made-up scores."""

import json
import math
from importlib import metadata
from unittest.mock import Mock

import pandas as pd
import pytest

from moelab import paper
from moelab.design import verdicts as claims
from moelab.evaluation.zero_shot import Score, version
from moelab.experiments import distillation, pr_moe, scaling, zero_shot


def scores(accuracies, stand_in=True):
    """Rows as `measure` makes them: {(arm, seed): {paper's column: accuracy}}."""
    guess = {"boolq": {"chance": 0.5, "majority": 0.62}, "piqa": {"chance": 0.5, "majority": 0.5}}

    def score(arm, seed, column, accuracy):
        about = {"arm": arm, "seed": seed, "paper": column, "task": f"packaged_{column}", "n": 100}
        found = {"accuracy": accuracy, "standard_error": math.sqrt(accuracy * (1 - accuracy) / 100)}
        found |= {"bits_per_byte": 3.0, "stand_in": stand_in and column == "webqs"}
        return about | found | guess.get(column, {"chance": 0.0, "majority": None})

    return pd.DataFrame([score(*of, *found) for of, each in accuracies.items() for found in each.items()])


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
    larger = pd.concat([rows, rows[rows["arm"] == "Dense"].assign(arm="1.3B")])
    assert zero_shot.bits_headline(larger) == line, "MoE-128 minus 1.3B is another pair"
    assert "-0.190 (95 % interval" in line and "without boolq, which do not fit" in line
    assert "no task in common" in zero_shot.bits_headline(rows[rows["arm"] == "Dense"])


def test_guessing_is_called_guessing_and_knowing_knowing():
    table = zero_shot.over_chance(scores(BOTH))
    boolq = table[(table["arm"] == "Dense") & (table["task"] == "packaged_boolq")].iloc[0]
    assert boolq["reference"] == 0.62 and boolq["sigmas"] == 0 and boolq["n"] == 100
    said = zero_shot.headline(table)
    assert "None is 3 standard errors above a guess" in said and "3 twins on 6 tasks, up to 100 items" in said
    dense = {("Dense", seed): {**SIX, "lambada": accuracy} for seed, accuracy in enumerate((0.4, 0.3))}
    said = zero_shot.headline(zero_shot.over_chance(scores({**BOTH, **dense})))
    assert said.startswith("Above a guess without knowledge by 3 standard errors: Dense on packaged_lambada (")
    nothing = zero_shot.over_chance(scores({}).reindex(columns=scores(BOTH).columns))
    assert zero_shot.headline(nothing) == "no run has finished"


def test_a_real_models_scores_are_read_from_the_results_while_the_tasks_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path))
    nothing = zero_shot.reference()
    assert not len(nothing) and "moelab eval smollm2" in zero_shot.reference_headline(nothing)
    found = [
        Score("packaged_lambada", "acc", 0.34, 0.03, 0.0, None, 200, 0.8, 0, 200, False, version("packaged_lambada"), 1.0),
        Score("packaged_piqa", "acc", 0.64, 0.03, 0.5, 0.525, 200, 1.1, 0, 400, False, version("packaged_piqa"), 1.0),
        Score("packaged_boolq", "acc", 0.60, 0.03, 0.5, 0.6, 200, 1.1, 0, 400, False, "packaged_boolq 0.1, lm-eval 0", 1.0),
    ]  # fmt: skip
    zero_shot.save(found, tmp_path / "benchmarks", "smollm2", {"limit": 200, "dtype": "fp32", "device": "cpu"})
    monkeypatch.setattr(metadata, "version", Mock(side_effect=metadata.PackageNotFoundError))  # without lm-eval
    rows = zero_shot.reference()
    assert list(rows["task"]) == ["packaged_lambada", "packaged_piqa"], "an older form of a task does not count"
    assert set(rows["arm"]) == {"SmolLM2-135M-Instruct"} and list(rows["paper"]) == ["lambada", "piqa"]
    assert zero_shot.reference_headline(rows) == (
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


@pytest.mark.parametrize("scale", ["cpu", "full"])
def test_runs_are_those_of_the_other_experiments(scale):
    others = {s.id for module in (scaling, pr_moe, distillation) for s in module.EXPERIMENT.specs(scale, 1)}
    assert {s.id for s in zero_shot.EXPERIMENT.specs(scale, 1)} <= others
