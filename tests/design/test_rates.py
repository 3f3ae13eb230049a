"""Comparisons at each arm's own rate and at a shared one, over the share of the training, and by kinds of targets."""

import math

import pandas as pd
import pytest

from moelab import paper
from moelab.design import comparison, overview, rates, settings, shares, targets
from moelab.design.judging import judge
from moelab.design.verdicts import CANNOT_TELL, HOLDS
from moelab.files import write_json
from moelab.plotting import figures
from moelab.runs.collection import Runs
from moelab.runs.spec import closure
from moelab.runs.store import RunStore


def built(rate):
    return [settings.spec("350M", "full", rate=rate, label="Dense")]


def test_a_run_that_is_both_is_one_run_and_is_shown_twice(tmp_path, monkeypatch):
    monkeypatch.setitem(settings.FULL_RATES, "350M", settings.Rates({"Dense": 4e-3}, 4e-3))
    specs = rates.at_both(built)
    assert [s.label for s in specs] == ["Dense", "Dense, shared rate"] and specs[0].id == specs[1].id
    assert [s.label for s in closure(specs).values()] == ["Dense"], "a plan names the arm"
    own, shared = rates.by_rate(Runs([RunStore(tmp_path).run(s) for s in specs]))
    assert [r.spec.label for r in (*own, *shared)] == ["Dense", "Dense"] and own[0].path == shared[0].path
    monkeypatch.setitem(settings.FULL_RATES, "350M", settings.Rates({"Dense": 8e-3}, 4e-3))
    specs = rates.at_both(built)
    assert [s.train.lr for s in specs] == [8e-3, 4e-3] and len(closure(specs)) == 2
    assert rates.at_own(specs) == specs[:1]


def test_runs_that_differ_under_one_label_are_named(tmp_path, result):
    specs = [settings.spec("350M", "smoke", overrides={"train.lr": rate}) for rate in (4e-3, 8e-3)]
    runs = Runs([RunStore(tmp_path).run(spec) for spec in specs])
    for run in runs:
        write_json(run.path / "result.json", result())
    for compare in (comparison.by_arm, lambda final: comparison.gaps(final, specs[0].title)):
        with pytest.raises(
            ValueError, match=r"^arm '350M twin' has several runs of seed 0; give each of their specs a"
        ):
            compare(runs.final())
    with pytest.raises(ValueError, match="several runs of seed 0"):
        overview.summary(runs)


def test_a_claim_is_decided_where_both_rates_agree():
    claim, faster = paper.claim("moe128-350m-beats-own-base"), paper.claim("kernels-6x")
    lower, higher = judge(claim, [-0.31, -0.30, -0.305]), judge(claim, [0.31, 0.30, 0.305])
    fast, slow = (judge(faster, [ratio, ratio + 0.01, ratio + 0.02]) for ratio in (6.2, 5.8))
    other, time = rates.agreed([lower, fast], [higher, slow])
    assert other.verdict == CANNOT_TELL and "At one shared rate: +0.305 nats/token, does not hold" in other.text
    assert time == fast and time.verdict == HOLDS, "times depend on no rate"
    assert rates.agreed([lower], []) == [lower]


def curves(losses):
    rows = [(*arm, 30 * i, loss) for arm, values in losses.items() for i, loss in enumerate(values)]
    return pd.DataFrame(rows, columns=["arm", "seed", "tokens", "loss"])


def test_crossings_by_share_of_the_training():
    losses = {("A", 0): (9, 5, 4, 2), ("B", 0): (9, 4, 3.5, 3), ("A", 1): (9, 5, 5, 5), ("B", 1): (9, 4, 4, 4)}
    table = shares.gaps(curves(losses), [("A", "B"), ("A", "C")])
    assert set(table["pair"]) == {"A − B"}
    assert list(table[table["seed"] == 0]["share"]) == pytest.approx([1 / 3, 2 / 3, 1])
    found = shares.crossings(table).set_index("seed")["share"]
    assert found[0] == pytest.approx(2 / 3 + 1 / 3 * 0.5 / 1.5) and pd.isna(found[1])
    assert shares.crossings(table[::-1]).equals(shares.crossings(table)), "by seed, in whatever order the runs are"
    assert shares.headline(table) == "No MoE stays below the dense model on every seed"
    assert shares.headline(table[table["seed"] == 0]) == "A stays below B from 78% of the training on"
    assert shares.crossing(pd.DataFrame({"share": [0.5, 1.0], "gap": [-1.0, -2.0]})) == 0.5, "from its first point on"
    assert not len(shares.gaps(curves({("A", 0): (9, 5)}), [("A", "B")]))


def test_costs_to_the_higher_of_two_final_losses():
    """B reaches A's end between its second and third point, A reaches C's at its first; one seed lacks C."""
    lines = curves({("A", 0): (9, 5, 4, 3), ("B", 0): (9, 4, 2, 2), ("C", 0): (9, 9, 9, 9), ("A", 1): (9, 5, 4, 3)})
    pairs = [("A", "B"), ("C", "A")]
    untrained = shares.costs_to_equal_loss(lines, pairs, {})
    assert set(untrained["pair"]) == {"A − B"}, "A is at C's end before its training"
    lines["tokens"] += 10
    found = shares.costs_to_equal_loss(lines, pairs, {"time": {"A": 1, "B": 3}})
    assert list(found["at"]) == ["training tokens", "time", "training tokens"] and set(found["seed"]) == {0}
    between = (40 * 70) ** 0.5
    assert list(found["times"]) == pytest.approx([between / 100, 3 * between / 100, 10 / 100])


def test_the_papers_curves_cross_where_its_claims_say():
    """moe-ahead-late: behind the larger dense model until late, after 212 and 234 of 300 B tokens."""
    for claim in (paper.claim("moe-crossover-350m"), paper.claim("moe-crossover-1.3b")):
        (theirs,) = shares.paper_gaps([(claim.left, claim.right)]).values()
        at = 300 * shares.crossing(theirs)
        assert at == pytest.approx(claim.value, abs=1) and claim.value_low <= at <= claim.value_high
        assert (theirs["gap"][theirs["share"] * 300 < at] > 0).all()
    assert not shares.paper_gaps([("350M+MoE-32", "350M")]), "Fig 1 has no such pair"


def test_parts_sum_to_the_difference(tmp_path, result):
    """The parts of arms that are both there, by seed; a result without parts is left out."""
    losses = {("A", seed): (2.0, 4.0) for seed in range(3)}
    losses |= {("B", 0): (3.0, 4.4), ("B", 1): (5.0, 4.0), ("B", 2): None}
    runs = []
    for (arm, seed), values in sorted(losses.items(), key=lambda item: item[0][1]):
        rate = {"train.lr": ord(arm) / 1e4}
        run = RunStore(tmp_path).run(settings.spec("350M", "smoke", seed, label=arm, overrides=rate))
        by_pair = zip(("repeated", "new"), (0.25, 0.75), values or (), strict=False)
        more = {"validation_by_pair": {kind: {"loss": loss, "share": share} for kind, share, loss in by_pair}}
        write_json(run.path / "result.json", result(**(more if values else {})))
        runs.append(run)
    table = targets.gaps(Runs(runs), [("A", "B"), ("A", "C")])
    assert set(table["pair"]) == {"A − B"} and list(table["seed"]) == [0, 0, 1, 1]
    assert list(table["part"]) == pytest.approx([-0.25, -0.3, -0.75, 0.0])
    means = targets.summary(table)
    assert means.loc["A − B"].to_dict() == pytest.approx({"copyable": -0.5, "new": -0.15, "all": -0.65})
    differences = comparison.pairs(Runs(runs).final(), [("A", "B")])
    assert list(differences["unrepeated"][:2]) == pytest.approx([-0.4, 0.0]) and math.isnan(
        differences["unrepeated"][2]
    )
    said = targets.headline(differences[:2], "A", "B")
    assert (
        said.startswith("A minus B: -0.200 on tokens that cannot be copied (95 % interval") and "on all tokens" in said
    )
    assert "copied" not in targets.headline(differences, "A", "B"), "a seed says nothing of them"
    assert targets.headline(differences, "A", "C") == "A and C have no seed in common"
    assert not len(targets.gaps(Runs(runs[-2:]), [("A", "B")]))


def test_differences_by_domain_are_paired_by_seed_and_a_text_of_one_domain_has_none(tmp_path, result):
    losses = {"A": [(2.0, 4.0), (2.5, 5.0)], "B": [(3.0, 3.5), (3.0, 4.5)], "C": [(1.0,)]}
    runs = []
    for arm, by_seed in losses.items():
        for seed, values in enumerate(by_seed):
            run = RunStore(tmp_path).run(
                settings.spec("350M", "smoke", seed, label=arm, overrides={"train.lr": ord(arm) / 1e4})
            )
            by_domain = {name: {"loss": loss} for name, loss in zip(("sea", "field"), values, strict=False)}
            write_json(run.path / "result.json", result(validation_by_domain=by_domain))
            runs.append(run)
    table = targets.by_domain(Runs(runs), [("A", "B"), ("B", "A"), ("A", "C")])
    assert list(table["pair"].unique()) == ["A − B", "B − A"] and list(table["arm"][:4]) == ["sea"] * 2 + ["field"] * 2
    assert list(table["gap"][:4]) == pytest.approx([-1.0, -0.5, 0.5, 0.5])
    first = table[table["pair"] == "A − B"]
    assert targets.domain_headline(first) == "A beats B in 1/2 domains"
    assert targets.domain_headline(table) == "A beats B in 1/2 domains, B beats A in 1/2"
    drawn = figures.in_panels(table)
    rows = [[label.get_text() for label in ax.get_yticklabels()] for ax in drawn.axes]
    assert rows == [["sea", "field"], ["field", "sea"]] and [
        a.get_title() + a.get_title(loc="left") for a in drawn.axes
    ] == [
        "A − B",
        "B − A",
    ]
    assert not len(targets.by_domain(Runs(runs), [("A", "C")])) and targets.domain_headline(table[:0]) == ""
