"""Token budgets: which runs they are, and the measures that compare arms over them, by hand."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from moelab import paper
from moelab.design import budgets, comparison, settings, titles
from moelab.experiments import experiment, scaling
from moelab.files import write_json
from moelab.runs.collection import Runs
from moelab.runs.store import RunStore


def table(losses, tokens=(100, 200, 400)):
    points = [(*arm, n, n / 10, loss) for arm, values in losses.items() for n, loss in zip(tokens, values, strict=True)]
    return pd.DataFrame(points, columns=budgets.COLUMNS)


def test_budgets_branch_off_a_run_that_keeps_their_checkpoints():
    trunk = settings.spec("350M+MoE-128", "cpu", label="MoE-128")
    whole, *branches = budgets.with_budgets(trunk, "cpu")
    assert whole.id == trunk.id and whole.train.keep_at == tuple(b.start.tokens for b in branches)
    assert [b.train.tokens for b in branches] == list(budgets.BUDGETS["cpu"])
    assert branches[0].title == "MoE-128, 1.0 M tokens"
    for branch in branches:
        assert branch.start.run.id == trunk.id
        assert branch.train.cooldown_tokens * 5 == branch.train.tokens, "the decay takes the same share"


def test_the_quick_scale_is_a_budget_of_the_cpu_scale():
    quick = settings.spec("350M", "quick")
    whole, *branches = budgets.with_budgets(settings.spec("350M", "cpu"), "cpu")
    (same,) = [b for b in branches if b.train.tokens == quick.train.tokens]
    assert replace(same.train, eval_every=1, log_every=1) == replace(quick.train, eval_every=1, log_every=1)
    assert same.model == quick.model and same.data == quick.data


@pytest.mark.parametrize(
    ("overrides", "left"), [({"train.tokens": 4_096_000}, 2), ({"train.cooldown_tokens": 0}, 0), ({}, 4)]
)
def test_budgets_that_do_not_fit_the_schedule_are_left_out(overrides, left):
    trunk = settings.spec("350M", "cpu", overrides=overrides)
    assert len(budgets.with_budgets(trunk, "cpu")) == 1 + left


def test_fewer_tokens_keep_the_shares_of_warm_up_and_decay():
    train = settings.spec("350M", "cpu", overrides={"train.tokens": 1_638_400}).train
    assert (train.warmup_tokens, train.cooldown_tokens) == (40_960, 327_680)
    more = settings.spec("350M", "cpu", overrides={"train.tokens": 32_768_000}).train
    assert (more.warmup_tokens, more.cooldown_tokens) == (409_600, 6_553_600), "the warm-up does not grow"


def test_losses_of_trunks_and_budgets_stand_under_one_arm(tmp_path, result):
    store = RunStore(tmp_path)
    specs = budgets.with_budgets(settings.spec("350M+MoE-128", "cpu", 3, label="MoE-128"), "cpu")
    for i, spec in enumerate(specs):
        write_json(store.run(spec).path / "result.json", result(5.0 - i, tokens=spec.train.tokens))
    runs = Runs([store.run(spec) for spec in specs])
    found = budgets.losses(runs)
    assert list(found["arm"].unique()) == ["MoE-128"] and list(found["seed"].unique()) == [3]
    assert list(found["loss"]) == [4.0, 3.0, 2.0, 1.0, 5.0], "by tokens"
    assert found["per_parameter"].iloc[-1] == pytest.approx(16_384_000 / 101_696), "of the dense base"
    assert [run.spec.title for run in budgets.trunks(runs)] == ["MoE-128"]
    branch = replace(specs[1], label="MoE-128, other decay")
    write_json(store.run(branch).path / "result.json", result(0.5, tokens=branch.train.tokens))
    other = budgets.losses(Runs([*runs, store.run(branch)]))
    assert list(other["arm"].unique()) == ["MoE-128", branch.title], "a branch that is no budget is an arm"


def test_losses_of_the_papers_top2_have_the_tokens_a_parameter_of_its_base(tmp_path, result):
    store = RunStore(tmp_path)
    specs = experiment("pr-moe").specs("paper", arms=["Dense", "Top2-MoE-128"])
    for spec in specs:
        write_json(store.run(spec).path / "result.json", result(2.5, tokens=300_000_000_000))
    found = budgets.losses(Runs([store.run(spec) for spec in specs]))
    assert list(found["arm"]) == ["Dense", "Top2-MoE-128"] and found["per_parameter"].nunique() == 1


def test_gaps_pair_seed_and_budget():
    losses = table({("Dense", 0): (6, 5, 4), ("MoE", 0): (5.9, 4.8, 3.7), ("MoE", 1): (1, 1, 1)})
    found = budgets.gaps(losses, "Dense")
    assert list(found["gap"]) == pytest.approx([-0.1, -0.2, -0.3]) and set(found["seed"]) == {0}


def test_efficiency_interpolates_over_the_logarithm_of_the_tokens():
    dense, moe = (6, 5, 4), (5.5, 4.5, 3.5)
    found = budgets.efficiency(table({("Dense", 0): dense, ("MoE", 0): moe}), "MoE", "Dense").set_index("tokens")
    assert list(found.index) == [200, 400], "the MoE's smallest budget is better already"
    assert list(found["times"]) == pytest.approx([200 / (100 * math.sqrt(2)), math.sqrt(2)])
    assert not len(budgets.efficiency(table({("Dense", 0): dense, ("MoE", 0): (9, 8, 7)}), "MoE", "Dense"))
    apart = table({("Dense", 0): dense, ("MoE", 0): moe}, tokens=(100, 200, 1600))
    assert list(budgets.efficiency(apart, "MoE", "Dense")["tokens"]) == [200], "nothing is made up between 200 and 1600"
    curve = apart[apart["arm"] == "MoE"]
    assert budgets.loss_at(curve, 800) is None and budgets.loss_at(curve, 200) == 4.5


def test_equal_cost_gives_the_dearer_model_fewer_tokens():
    losses = table({("Dense", 0): (6, 5, 4), ("MoE", 0): (5.5, 4.5, 3.5)})
    found = budgets.at_equal_cost(losses, {"time": {"Dense": 1.0, "MoE": 2.0}}, "Dense").set_index("at")["gap"]
    assert found.to_dict() == pytest.approx({"training tokens": 3.5 - 4, "time": 4.5 - 4})
    dear = budgets.at_equal_cost(losses, {"time": {"Dense": 1.0, "MoE": 8.0}}, "Dense")
    assert not len(dear), "50 tokens are below the MoE's budgets, so the seed counts for no cost"


def test_effective_size_is_between_the_dense_models():
    arms = ["350M", "M", "1.3B"]
    found = []
    for losses in ([4.0, 4.0, 3.0], [4.0, 3.0, 3.0], [4.0, 3.9, 4.1]):
        final = pd.DataFrame({"arm": arms, "seed": 0, "validation_loss": losses})
        found.append(list(budgets.effective_size(final, "M", "350M", "1.3B", "cpu")["times"]))
    assert found[:2] == [[pytest.approx(1.0)], [pytest.approx(400_000 / 101_696)]]
    assert found[2] == [], "where the larger dense model ends above its base no size equals"
    early, late = (budgets.paper_effective_size("350M+MoE-128", "350M", "1.3B", n) for n in (161, 975))
    assert 2 < early < late < 7, "the paper's MoE equals a larger model as training goes on"
    pairs = (("350M+MoE-128", "350M", "1.3B"), ("1.3B+MoE-128", "1.3B", "6.7B"))
    ends = [budgets.paper_effective_size(*pair, comparison.tokens_a_parameter(pair[1])) for pair in pairs]
    assert "Fig 1 ends at {:.1f} and {:.1f}".format(*ends) in paper.conflict("dense-equivalent-ratio").check
    before = budgets.paper_effective_size("350M+MoE-128", "350M", "1.3B", 30)
    assert before is None, "its first reading is at 33 tokens a parameter"


def test_headlines_name_the_first_and_the_last_budget():
    arms = {("350M", 0): (6, 5, 4), ("350M+MoE-128", 0): (5.8, 4.95, 3.6)}
    losses = table(arms, tokens=(10**6, 2 * 10**6, 4 * 10**6))
    line = scaling.gap_headline(budgets.gaps(losses, "350M"))
    assert line == "350M+MoE-128's gap: -0.200 nats after 1.0 M tokens, -0.400 after 4.0 M"
    costs = budgets.at_equal_cost(losses, {"time": {"350M": 1.0, "350M+MoE-128": 1.0}}, "350M")
    assert scaling.cost_headline(costs).endswith("-0.400 at equal time (nats; 1 seed)")
    one = budgets.efficiency(losses.groupby("arm").tail(1), "350M+MoE-128", "350M")
    assert not len(one) and "nothing to interpolate" in scaling.efficiency_headline(one)
    said = scaling.efficiency_headline(budgets.efficiency(losses, "350M+MoE-128", "350M"))
    assert "times fewer tokens than its base (paper: " in said and len(said.split()) <= titles.WORDS


def test_the_papers_gap_at_equal_tokens_a_parameter():
    theirs = budgets.paper_gaps("350M+MoE-128", "350M")
    assert theirs["gap"].iloc[0] == pytest.approx(-0.155, abs=0.01) and theirs["gap"].iloc[-1] < -0.3
    assert theirs["per_parameter"].between(30, 1000).all() and (theirs["low"] < theirs["high"]).all()


def test_an_arm_comes_with_its_budgets():
    specs = experiment("scaling").specs("cpu", arms=["350M"])
    assert {spec.label for spec in specs if not spec.start} == {"350M"} and len(specs) == 5
    (one,) = experiment("scaling").specs("cpu", arms=["350M, 4.1 M tokens"])
    assert one.train.tokens == 4_096_000
