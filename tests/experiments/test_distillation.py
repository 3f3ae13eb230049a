"""Distillation: what students read and when, and what is said of them."""

import math

import pandas as pd
import pytest

from moelab import paper
from moelab.design import comparison, rates
from moelab.design import verdicts as claims
from moelab.experiments import distillation
from tests.experiments.helpers import final

STUDENTS = ("L21 alone", "L21 + KD", "L21 + staged KD")


def curves(losses, tokens=(0, 100, 200, 300)):
    rows = [(arm, 0, *at) for arm, values in losses.items() for at in zip(tokens, values, strict=True)]
    return pd.DataFrame(rows, columns=["arm", "seed", "tokens", "loss"])


def test_students_at_full_read_what_their_teacher_has_read_once():
    specs = {s.label: s for s in rates.at_own(distillation.EXPERIMENT.specs("full", base="1.3B"))}
    teacher, alone, taught, staged = (specs[arm] for arm in ("Teacher", *STUDENTS))
    assert set(specs) == {s.label for s in (teacher, alone, taught, staged)}
    assert {s.data.part for s in specs.values()} == {"whole"} and taught.teacher.id == teacher.id
    assert staged.start.run.id == taught.id and staged.start.tokens == 0.7 * staged.train.tokens
    assert staged.train == alone.train and staged.teacher is None


def test_the_papers_students_are_taught_as_published():
    specs = {spec.label: spec for spec in distillation.EXPERIMENT.specs("paper")}
    staged = specs["L21 + staged KD"]
    assert staged.teacher == specs["Teacher"] and staged.distill.stop == pytest.approx(400_000 * 256 * 2048, rel=0.002)
    s = paper.training_settings("350M+PR-MoE-32/64+L21+MoS")
    assert (staged.distill.weight, staged.distill.temperature) == (s.kd_beta, s.kd_temperature)
    assert specs["L21 alone"].distill is None and specs["L21 + KD"].distill.schedule == "constant"


def test_students_read_the_half_that_their_teacher_has_not_read():
    specs = {spec.label: spec for spec in distillation.EXPERIMENT.specs("cpu")}
    teacher, alone, taught, staged = (specs[arm] for arm in ("Teacher", *STUDENTS))
    assert teacher.data.part == "even blocks" and {s.data.part for s in (alone, taught, staged)} == {"odd blocks"}
    assert taught.teacher.id == teacher.id and staged.teacher is None
    assert staged.start.run.id == taught.id and staged.start.tokens in taught.train.keep_at
    assert staged.start.tokens == pytest.approx(0.7 * staged.train.tokens, rel=1e-3)
    longer = specs["L21 alone, equal cost"]
    assert longer.cost == pytest.approx(taught.cost, rel=1e-3) and longer.train.tokens > alone.train.tokens


def test_distillation_early_is_the_mean_of_the_first_half():
    lines = curves(dict(zip(STUDENTS, ((9, 6, 5, 4), (9, 5, 5, 5), (9, 5, 4, 3)), strict=True)))
    assert distillation.early(lines).set_index("arm")["gap"].to_dict() == {"L21 + KD": -1, "L21 + staged KD": -1}
    assert distillation.early(lines, 0.7).set_index("arm")["gap"].to_dict() == {"L21 + KD": -0.5, "L21 + staged KD": -1}
    longer = curves({"L21 alone, equal cost": (9, 6, 5, 4, 3, 2, 1)}, range(0, 700, 100))
    both = pd.concat([lines, longer])
    assert distillation.early(both).equals(distillation.early(lines))
    falls = distillation.late_training(both, pd.DataFrame(), until=1).iloc[0]
    assert set(falls.index) == {*STUDENTS, "L21 alone, equal cost"}
    rows = [("L21 + KD", seed, tokens, term) for seed in (0, 1) for tokens, term in ((1, 4 + seed), (2, 2 + seed))]
    training = pd.DataFrame(rows, columns=["arm", "seed", "tokens", "distill_loss"])
    terms = distillation.late_training(lines, training, until=1).loc[:, "L21 + KD"]
    assert terms.filter(like="term").to_list() == [4.5, 2.5], "means over seeds"


def test_distillation_early_does_not_wait_for_a_seed_after_the_last_planned_look():
    part = curves({"L21 alone": (9, 6, 5, 4), "L21 + KD": (9, 5, 5, 5)})
    lines = pd.concat([part.assign(seed=seed) for seed in range(3)])
    done = final({"L21 alone": [5.0] * 4, "L21 + KD": [5.0] * 3})

    def early(scale):
        return {v.claim: v for v in distillation.verdicts(done, lines, scale)}["full-kd-helps-early"]

    assert early("full").ours == -1 and early("full").missing == ()
    assert early("full").verdict == claims.HOLDS


def test_distillation_late_is_before_the_decay():
    assert distillation.decay_begins(distillation.EXPERIMENT.specs("cpu")) == pytest.approx(0.8, abs=0.001)
    assert distillation.decay_begins(distillation.EXPERIMENT.specs("paper")) == 1

    def fall(losses, until):
        lines = curves({"L21 alone": losses}, range(0, 100 * len(losses), 100))
        return distillation.late_training(lines, pd.DataFrame(), until=until).iloc[0]["L21 alone"]

    few = (9, 8, 7, 6, 5.5, 3)  # one evaluation, at 60 % of the tokens
    assert math.isnan(fall(few, 0.75)) and math.isnan(fall(few, 0.81)), "one evaluation shows no fall"
    assert fall(range(20, -1, -1), 0.8) == 3


def test_the_difference_at_the_stop_says_where_it_was_evaluated():
    lines = curves({"L21 alone": (9, 8, 7, 6, 5, 4), "L21 + KD": (9, 7, 6.5, 5.75, 5, 4.25)}, range(0, 600, 100))
    line = distillation.over_training_headline(comparison.over_training(lines, ["L21 + KD"], "L21 alone"), 0.7)
    assert line == "KD minus alone: -0.250 nats after 60%, +0.250 after 100% of training"


def test_a_student_is_held_against_its_teacher_only_where_the_teacher_is_the_better_model():
    def judged(alone):
        losses = {"Teacher": [5.0, 5.001, 5.0], "L21 alone": alone, "L21 + staged KD": [5.001, 5.0, 5.0]}
        return {v.claim: v.verdict for v in distillation.verdicts(final(losses), curves({}), "cpu")}

    found = judged([5.2, 5.21, 5.2])
    assert found["student-alone-behind-teacher"] == claims.HOLDS
    assert found["staged-kd-matches-teacher-350m"] == claims.HOLDS
    found = judged([4.9, 4.91, 4.9])
    assert found["student-alone-behind-teacher"] == claims.FAILS
    assert found["staged-kd-matches-teacher-350m"] == claims.CANNOT_TELL


def test_a_verdict_on_teacher_and_student_says_that_they_read_different_halves():
    losses = {"Teacher": [5.0, 5.1], "L21 alone": [5.2, 5.3], "L21 + KD": [5.1, 5.2], "L21 + staged KD": [5.0, 5.1]}
    with_teacher = {"student-alone-behind-teacher", "staged-kd-matches-teacher-350m"}
    for scale, expected in (("cpu", with_teacher), ("paper", set())):
        judged = distillation.verdicts(final(losses), curves({}), scale)
        assert {v.claim for v in judged if "read different halves of the text" in v.note} == expected


def test_where_distillation_turns_is_judged_in_the_papers_steps():
    tokens = 101_621_760
    shares = [tokens * s for s in (0, 0.5, 0.7, 0.9, 1)]
    taught = ((3.9, 3.9, 3.9, 4.1, 4.1), (3.9, 3.9, 4.1, 4.1, 4.1), (3.9, 3.9, 3.9, 4.1, 4.1))
    lines = [curves({"L21 alone": [4] * 5, "L21 + KD": t}, shares).assign(seed=i) for i, t in enumerate(taught)]
    done = final({key: [5.0, 5.1, 5.2] for key in STUDENTS}).assign(tokens=tokens)

    def judged(base):
        return {v.claim: v for v in distillation.verdicts(done, pd.concat(lines), "full", base)}

    turned = judged("350M")["full-kd-turns-at-400k"]
    assert list(turned.arms["value"].values()) == pytest.approx([572_205 * share for share in (0.8, 0.6, 0.8)])
    assert turned.verdict == claims.CANNOT_TELL
    one, other = (set(judged(base)) for base in ("350M", "1.3B"))
    assert one | other == {claim.id for claim in paper.claims("distillation")}
    assert one & other == set(distillation.ON_350M_ALONE), "which the paper shows on one base alone"
    assert "staged-kd-matches-teacher-1.3b" in other - one and "staged-kd-matches-teacher-350m" in one - other


def test_a_branch_is_compared_with_its_trunk_seed_by_seed():
    """Staged and full distillation are one run until distillation stops: a seed's luck is in both."""
    losses = {"L21 + KD": [5.0, 5.2, 5.4], "L21 + staged KD": [4.98, 5.185, 5.378]}
    done = final(losses).assign(tokens=101_621_760)

    def judged(table):
        found = {v.claim: v for v in distillation.verdicts(table, curves({}), "full")}
        return found["staged-kd-beats-full-kd"]

    found = judged(done)
    assert found.verdict == claims.HOLDS and found.note == distillation.BRANCH
    assert list(found.arms["value"].values()) == pytest.approx([-0.02, -0.015, -0.022])
    assert judged(done[(done["arm"] != "L21 + KD") | (done["seed"] != 1)]).why == "Without a value: seed 1."
    assert judged(done[done["arm"] == "L21 + KD"]).ours is None
