"""Scaling: the pairs at equal tokens, and the pair on another text."""

from dataclasses import replace

import pandas as pd
import pytest

from moelab import paper
from moelab.design import budgets, comparison, rates
from moelab.design import verdicts as claims
from moelab.experiments import scaling
from tests.experiments.helpers import final


def test_the_pair_on_another_text_is_the_same_training():
    specs = {s.label: s for s in rates.at_own(scaling.EXPERIMENT.specs("full"))}
    for arm in scaling.BUDGETED:
        there, other = specs[arm], specs[scaling.on_other_text(arm)]
        assert other.data == replace(there.data, corpus="mix5")
        assert (other.model, other.train) == (there.model, there.train)
    here = {"350M": [4.0], "350M+MoE-128": [3.6]}
    table = final({**here, "350M on mix5": [4.0, 4.0], "350M+MoE-128 on mix5": [3.7, 3.8]})
    gaps = scaling.over_texts(table).groupby("text")["gap"].mean()
    assert gaps.to_dict() == {"mix15": pytest.approx(-0.4), "mix5": pytest.approx(-0.25)}
    assert not len(scaling.over_texts(final(here)))
    labels = {s.label for s in scaling.EXPERIMENT.specs("full", overrides={"data.corpus": "mix5"})}
    assert not labels & {scaling.on_other_text(arm) for arm in scaling.BUDGETED}, "the text is the user's"


def test_equal_tokens_pairs_each_moe_with_both_dense_models():
    table = final({"350M": [4], "350M+MoE-128": [2], "1.3B": [1]})
    pairs = comparison.pairs(table, scaling.AGAINST)
    assert dict(zip(pairs["right"], pairs["gap"], strict=True)) == {"350M": -2, "1.3B": 1}
    assert set(scaling.paper_pairs()) >= set(pairs["arm"])


TOKENS = 101_621_760
LOSSES = {
    "350M": [4.0, 4.1, 4.0],
    "1.3B": [3.6, 3.7, 3.61],
    "6.7B": [3.2, 3.31, 3.2],
    "350M+MoE-128": [3.58, 3.69, 3.6],
    "1.3B+MoE-128": [3.2, 3.3, 3.2],
}


def curves(crossed):
    """Curves on which 350M+MoE-128 comes below 1.3B at a share of the training, by seed; None: never."""
    rows = []
    for seed, at in enumerate(crossed):
        for share in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
            ahead = at is not None and share > at
            losses = {"1.3B": 3.0, "350M+MoE-128": 2.9 if ahead else 3.1}
            rows += [[arm, seed, share * TOKENS, loss] for arm, loss in losses.items()]
    return pd.DataFrame(rows, columns=["arm", "seed", "tokens", "loss"])


def values(verdict):
    return list(verdict.arms["value"].values())


def judged(losses, lines):
    found = scaling.verdicts(final(losses).assign(tokens=TOKENS), lines, "full")
    return {v.claim: v for v in found}


def test_a_crossing_is_judged_by_its_share_of_the_papers_tokens():
    late = judged(LOSSES, curves([0.69, 0.69, 0.71]))["moe-crossover-350m"]
    assert values(late) == pytest.approx([180, 180, 240]) and late.verdict == claims.CANNOT_TELL
    assert values(judged(LOSSES, curves([0.65, 0.6, 0.69]))["moe-crossover-350m"]) == pytest.approx([180] * 3)
    early = judged(LOSSES, curves([0.1, 0.1, 0.1]))["moe-crossover-350m"]
    assert early.verdict == claims.FAILS
    never = judged(LOSSES, curves([0.65, None, 0.65]))["moe-crossover-350m"]
    assert never.verdict == claims.CANNOT_TELL and never.censored == (1,) and not never.missing
    assert "does not end below 1.3B in seed 1, which counts as a crossing at the end" in never.note
    assert values(never) == pytest.approx([180, 300, 180])
    none = judged(LOSSES, curves([0.95, None, None]))["moe-crossover-350m"]
    assert none.verdict == claims.CANNOT_TELL and none.p == pytest.approx(0.25), "three seeds may be chance"
    half = curves([0.65, 0.65, 0.65]).query("arm != '1.3B' or seed != 2")
    assert judged(LOSSES, half)["moe-crossover-350m"].missing == ("seed 2: one arm did not finish",)
    shorter = final(LOSSES).assign(tokens=0.8 * TOKENS)
    of_shorter = {v.claim: v for v in scaling.verdicts(shorter, curves([0.65] * 3), "full")}["moe-crossover-350m"]
    assert values(of_shorter) == pytest.approx([0.8 * 180] * 3, rel=0.01), "of the paper's training, not of the run's"
    alone = {"350M": [4.0], "350M+MoE-128": [3.6]}
    assert judged(alone, curves([0.65]).query("arm != '1.3B'"))["moe-crossover-350m"].ours is None


def test_the_dense_model_of_equal_quality_is_a_mean_over_both_pairs():
    equal = judged(LOSSES, curves([0.65] * 3))["dense-equivalent-4-5x"]
    assert equal.verdict == claims.HOLDS and 4 < equal.ours < 5
    first = {**LOSSES, "1.3B+MoE-128": LOSSES["1.3B"]}  # the other pair's MoE equals its base
    of_one = judged(first, curves([0.65] * 3))["dense-equivalent-4-5x"]
    assert values(of_one)[0] == pytest.approx(4 ** (0.42 / 0.40 / 2), rel=0.01)
    exact = {**LOSSES, "350M+MoE-128": LOSSES["1.3B"], "1.3B+MoE-128": LOSSES["6.7B"]}
    assert judged(exact, curves([0.65] * 3))["dense-equivalent-4-5x"].ours == pytest.approx((4 * 5.33) ** 0.5, rel=0.01)
    reverse = {**LOSSES, "1.3B": [3.6, 4.2, 3.61]}
    found = judged(reverse, curves([0.65] * 3))["dense-equivalent-4-5x"]
    assert found.verdict == claims.CANNOT_TELL and found.missing == ("seed 1: 1.3B does not end below 350M",)
    for odd in ([3.6, 4.2, 3.61], [3.6, 4.0999999999, 3.61]):  # a run that is missing too, a base that ends alike
        table = final({**LOSSES, "1.3B": odd}).query("arm != '350M+MoE-128' or seed != 1").assign(tokens=TOKENS)
        lost = {v.claim: v for v in scaling.verdicts(table, curves([0.65] * 3), "full")}["dense-equivalent-4-5x"]
        assert lost.verdict == claims.CANNOT_TELL and lost.missing[0].startswith("seed 1: ")
    without = {arm: losses for arm, losses in LOSSES.items() if arm != "6.7B"}
    assert judged(without, curves([0.65] * 3))["dense-equivalent-4-5x"].ours is None


def test_seeds_after_the_last_planned_look_wait_also_where_one_lacks_a_value():
    losses = {arm: [*values, values[0]] for arm, values in LOSSES.items()}
    known = judged(LOSSES, curves([0.69, 0.69, 0.71]))
    lacking = final({**losses, "350M+MoE-128": LOSSES["350M+MoE-128"]}).assign(tokens=TOKENS)
    lines = curves([0.69, 0.69, 0.71, 0.71]).query("arm != '350M+MoE-128' or seed < 3")
    found = {v.claim: v for v in scaling.verdicts(lacking, lines, "full")}
    for id in ("moe-crossover-350m", "dense-equivalent-4-5x", "moe128-350m-beats-1.3b"):
        assert (found[id].ours, found[id].verdict) == (known[id].ours, known[id].verdict) and not found[id].missing
    never = judged(losses, curves([0.69, 0.69, 0.71, None]))["moe-crossover-350m"]
    assert never.ours == known["moe-crossover-350m"].ours and never.verdict == known["moe-crossover-350m"].verdict


def test_a_seed_that_has_neither_curve_is_missing_where_other_arms_have_it():
    lines = curves([0.69, 0.69, 0.71])
    others = lines.query("arm == '1.3B' and seed == 1").assign(arm="350M")
    part = pd.concat([lines.query("seed != 1"), others])
    assert judged(LOSSES, part)["moe-crossover-350m"].missing == ("seed 1: both arms did not finish",)


def test_the_papers_points_are_interpolated_as_ours():
    curve, goal = paper.loss_curve("350M+MoE-128"), paper.loss_curve("350M").loss[-1]
    reached = budgets.tokens_at(pd.DataFrame({"tokens": curve.tokens_B, "loss": curve.loss}), goal)
    assert 30 < reached < 60
    assert scaling.paper_efficiency()["350M+MoE-128"] == pytest.approx(paper.loss_curve("350M").tokens_B[-1] / reached)


def test_a_dense_models_cost_to_equal_loss_beside_the_papers():
    """The paper's: Table 3's ratio of speeds, times the share of 1.3B+MoE-128's tokens to 6.7B's loss in Fig 1."""
    fig_1 = pd.concat([paper.loss_curve(arm).frame().assign(arm=arm, seed=0) for arm in scaling.ARMS])
    ours = fig_1.rename(columns={"tokens_B": "tokens"})
    found = scaling.costs_to_equal_loss(ours, {"time": dict.fromkeys(scaling.ARMS, 1.0)}).set_index(["pair", "at"])
    theirs = found["paper"]
    assert set(found.index.get_level_values(0)) == {f"{moe} − {dense}" for moe, dense in scaling.AGAINST}
    of_tokens = found.xs("training tokens", level="at")
    assert of_tokens["times"].tolist() == of_tokens["paper"].tolist(), "of its own curves"
    times = theirs["1.3B+MoE-128 − 6.7B"]
    assert times["time"] / times["training tokens"] == pytest.approx(372 / 70)
    assert 1.1 < times["training tokens"] < 1.2
    against_base = scaling.paper_efficiency()["350M+MoE-128"]
    assert theirs["350M+MoE-128 − 350M"]["training tokens"] == pytest.approx(against_base, rel=0.01)
    assert pd.isna(theirs["350M+MoE-128 − 350M"]["time"]), "Table 3 lacks the pair"
    rows = [["1.3B+MoE-128 − 6.7B", seed, "time", 2 + seed, 6.15] for seed in (0, 1)]
    times = pd.DataFrame(rows, columns=["pair", "seed", "at", "times", "paper"])
    said = scaling.equal_loss_headline(times)
    assert said == "6.7B over 1.3B+MoE-128, cost to equal loss: 2.4 in time (paper 6.2) (2 seeds)"
    said = scaling.flops_headline(times.assign(at="training FLOPs"))
    assert said == "For equal loss, 6.7B needs 2.4 times 1.3B+MoE-128's FLOPs (paper 6.2)"


def test_claims_on_a_model_whose_rate_is_not_swept_say_so():
    said = {claim: verdict.note for claim, verdict in judged(LOSSES, curves([0.7, 0.7, 0.7])).items()}
    assert {claim for claim, note in said.items() if scaling.NOT_SWEPT in note} == {
        "moe128-1.3b-matches-6.7b",
        "dense-equivalent-4-5x",
    }
