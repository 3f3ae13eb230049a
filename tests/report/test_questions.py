"""The start page's answers and the line an experiment: computed from published data, with the paper's at an equal share."""

import csv
import io
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from moelab import paper
from moelab.design import settings
from moelab.design.verdicts import CANNOT_TELL, FAILS, HELD, HOLDS, LARGER, MEASURED
from moelab.experiments import EXPERIMENTS
from moelab.report import ledger
from moelab.report.site import charts, digest, hero, questions, sentences
from moelab.report.site.claims import ClaimRow, tally
from moelab.report.site.front import chapters
from moelab.report.site.results import strongest
from tests.report.helpers import result

ARMS = {"350M": 4.0, "350M+MoE-128": 3.7, "1.3B": 3.4}


def run(arm, seed, tokens=16_384_000):
    spec = settings.spec(arm, "cpu", seed).to_json()
    costs = {"seconds": 60.0 * (1 + (arm != "350M"))}
    result = {"validation_loss": ARMS[arm] + 0.01 * seed, "parameters": 171_000, "tokens": tokens, **costs}
    provenance = {"commit": "a" * 40, "hardware": {"cpu": "Test", "cores": 2}}
    return {"id": f"{arm}{seed}", "label": arm, "spec": spec, "result": result, "provenance": provenance}


@pytest.fixture
def scaling(tmp_path):
    folder = tmp_path / "scaling" / "cpu" / "1"
    folder.mkdir(parents=True)
    seeds = (0, 1, 2)
    costs = [
        {"at": at, "arm": "350M+MoE-128", "seed": s, "gap": gap + 0.01 * s}
        for at, gap in (("training tokens", -0.31), ("training FLOPs", -0.2), ("time", 0.0))
        for s in seeds
    ]
    final = [{"arm": arm, "seed": s, "validation_loss": loss} for arm, loss in ARMS.items() for s in seeds]
    pairs = [{"arm": "p", "left": "350M+MoE-128", "right": "1.3B", "seed": s, "gap": 0.3} for s in seeds]
    for name, rows in (("equal-cost", costs), ("final", final), ("against-dense", pairs)):
        pd.DataFrame(rows).to_json(folder / f"{name}.jsonl", orient="records", lines=True)
    runs = [run(arm, s) for arm in ARMS for s in seeds]
    return result(folder, "scaling", "cpu", seeds=list(seeds), runs=runs)


def test_equal_cost_says_where_the_interval_excludes_none(scaling):
    first, second = questions.answers([scaling], [])
    assert first.short.startswith("−0.300 nats [−0.325, −0.275] at equal tokens")
    assert "+0.010 nats" in first.short
    assert "−0.31 at its end" in first.paper and "16\u00a0% of its training" in first.paper
    assert first.line.startswith("−0.300 [−0.325, −0.275] (paper at 16")
    assert second.line.startswith("1.") and "× its base [" in second.line and second.line.endswith("×)")
    assert "+0.300 nats" in second.short and second.short.startswith(
        "350M+MoE-128 equals a dense model of a multiple of its base’s parameters (without embeddings): 1."
    )
    assert first.row()["verdict"] == "" and first.row()["link"].startswith("scaling/cpu/1/")
    assert questions.answers([], []) == []
    (scaling.folder / "equal-cost.jsonl").write_text("\n")  # as pandas writes an empty table: no budgets, at `full`
    first, second = questions.answers([scaling], [])
    assert (
        first.short == "−0.300 nats [−0.300, −0.300] at equal tokens."
        and "1.98 [1.98, 1.98] at equal tokens" in second.short
    )
    row = ClaimRow(
        paper.claim("moe128-350m-beats-own-base"), CANNOT_TELL, scaling, "cpu", -0.3, -0.5, -0.1, 3, decides=True
    )
    assert questions.answers([scaling], [row])[0].line.startswith("Cannot be told yet: −0.300 [−0.500, −0.100]"), (
        "the claim's interval, not one of the questions' own"
    )
    larger = replace(row, claim=paper.claim("moe128-1.3b-beats-own-base"), verdict=HOLDS, ours=-0.4)
    answer = questions.answers([scaling], [row, larger])[0]
    assert answer.line == "Yes, 1.3B base: −0.400 [−0.500, −0.100] (paper −0.215)"
    assert answer.claims == [larger, row] and "; 350M base (cannot tell yet): −0.300 nats" in answer.short
    held = replace(row, verdict=HOLDS)
    assert questions.answers([scaling], [held, larger])[0].claims == [larger, held], "a primary claim before others"
    (scaling.folder / "equal-cost.jsonl").write_text('{"at": "time", "seed": 0}\n')
    assert questions.answers([scaling], []) == [], "a column is missing"
    for text in ("\n", "torn"):
        (scaling.folder / "final.jsonl").write_text(text)
        assert questions.answers([scaling], []) == []


def test_the_dense_size_of_both_pairs_leads_where_it_is_judged(scaling):
    row = ClaimRow(paper.claim("dense-equivalent-4-5x"), CANNOT_TELL, scaling, "cpu", 4.37, 4.0, 4.74, 3, decides=True)
    answer = questions.answers([scaling], [row])[1]
    assert answer.line == "4.37× its base [4, 4.74] (paper 4–5×)" and answer.claims == [row]
    assert answer.short.startswith(
        "4.37× its base [4, 4.74], mean of two pairs. 350M+MoE-128 equals a dense model of a multiple of its base’s"
    )
    assert answer.paper.startswith("4 to 5×. 350M+MoE-128: ")
    assert (
        answer.row()["sentence"]
        == answer.sentence
        == (
            "An MoE matches a dense model with 4.4 times its base’s parameters, without embeddings "
            "(paper: 4 to 5): cannot tell yet."
        )
    )


def test_what_a_dense_model_of_equal_quality_costs(scaling):
    rows = [
        {"pair": f"{moe} − {dense}", "seed": seed, "at": at, "times": times + 0.1 * seed, "paper": paper}
        for moe, dense, at, times, paper in (
            ("350M+MoE-128", "350M", "training FLOPs", 4.0, 8.9),
            ("350M+MoE-128", "1.3B", "training FLOPs", 2.9, 4.5),
            ("350M+MoE-128", "1.3B", "time", 1.5, None),
            ("1.3B+MoE-128", "6.7B", "training FLOPs", 4.4, 5.7),
            ("1.3B+MoE-128", "6.7B", "time", 2.7, 6.2),
        )
        for seed in (0, 1, 2)
    ]
    pd.DataFrame(rows).to_json(scaling.folder / "equal-loss.jsonl", orient="records", lines=True)
    answer = questions.answers([scaling], [])[-1]
    assert answer.line == "6.7B: 2.8× 1.3B+MoE-128’s time [2.6, 3.1] (paper 6.2×)"
    assert answer.short.startswith(
        "To an equal loss 6.7B takes 4.5× the FLOPs [4.3, 4.8], 2.8× the time [2.6, 3.1] of 1.3B+MoE-128; 1.3B"
    )
    assert "350M takes" not in answer.short and answer.paper == "5.7× the FLOPs, 6.2× the time"
    assert questions.answers([scaling], [])[0].short.endswith(
        "; to an equal loss its base takes 4.1× the FLOPs [3.9, 4.4]."
    )
    pd.DataFrame(rows[:3]).to_json(scaling.folder / "equal-loss.jsonl", orient="records", lines=True)
    assert len(questions.answers([scaling], [])) == 2, "only against its base"


def test_the_dense_size_at_equal_tokens_is_interpolated_in_logarithms(scaling):
    sizes = questions.effective_sizes(scaling)
    assert list(sizes) == ["tokens", "FLOPs", "time"] and len(sizes["time"]) == 3
    small, large = (settings.spec(name, "cpu").model.non_embedding_parameters() for name in ("350M", "1.3B"))
    share = 0.31 / (ARMS["350M"] - ARMS["1.3B"])
    assert sizes["tokens"][0] == pytest.approx(math.exp(share * math.log(large / small)))
    assert sizes["time"][0] == pytest.approx(1.0)


def test_a_claim_is_quoted_with_its_interval(scaling):
    claim = paper.claim("pr-moe-matches-moe128")
    row = ClaimRow(claim, CANNOT_TELL, scaling, "cpu", 0.014, -0.002, 0.03, 5, decides=True)
    (answer,) = (a for a in questions.answers([scaling], [row]) if a.claims)
    assert answer.short == "PR-MoE-32/64 +0.014 nats/token [−0.002, +0.030] from MoE-128."
    assert answer.line == ("PR-MoE-32/64 +0.014 [−0.002, +0.030] from MoE-128 (paper +0.010)")
    assert answer.paper == "+0.010 nats/token" and answer.row()["verdict"] == CANNOT_TELL


def test_a_line_an_experiment_has_the_costs_of_both_sides(scaling):
    claim = paper.claim("moe128-350m-beats-own-base")
    row = ClaimRow(claim, CANNOT_TELL, scaling, "cpu", -0.3, -0.35, -0.25, 3, decides=True)
    (line,) = digest.digest(chapters([scaling]), [row])
    assert (line.experiment, line.seeds, line.verdict, line.time) == ("scaling", 3, CANNOT_TELL, 2.0)
    assert line.flops == settings.spec("350M+MoE-128", "cpu").cost / settings.spec("350M", "cpu").cost
    assert line.effect.startswith("−0.300 nats/token (−0.350 to −0.250), 350M+MoE-128 against 350M")
    (read,) = csv.DictReader(io.StringIO(digest.to_csv([vars(line)])))
    assert read["outcome"] == "t" and float(read["flops"]) == line.flops
    trained = (3 * 60 + 6 * 120) / 3600
    assert digest.hours([scaling, scaling]) == pytest.approx(trained), "a run counts once"
    waited = replace(scaling, summary=replace(scaling.summary, training_seconds=900.0, notebook_seconds=950.0))
    assert digest.hours([waited]) == pytest.approx(trained), "and not once more as the notebook's time"
    earlier = {"id": "m", "measured": "2026-01-01 00:00", "seconds": 2700.0, "read_back": True}
    timed = result(experiment="gating-kernels", notebook_seconds=900.0, measurements=[earlier])
    assert digest.digest(chapters([timed]), [])[0].hours == 1, "what was measured earlier counts"


def test_the_costs_of_a_student_are_those_of_how_it_is_distilled_at_its_own_rate():
    seconds = {"Teacher": 100.0, "L21 alone": 90.0, "L21 + KD": 200.0, "L21 + staged KD": 150.0}
    runs = [
        {
            "id": spec.id,
            "label": spec.label,
            "spec": spec.to_json(),
            "result": {"seconds": seconds.get(spec.label, 900.0)},
        }
        for spec in EXPERIMENTS["distillation"].specs("full")
    ]
    students = result(experiment="distillation", scale="full", seeds=[0], runs=runs)
    assert "L21 + staged KD" in charts.models_of(students), "a branch that is no budget is an arm"
    row = ClaimRow(paper.claim("staged-kd-matches-teacher-350m"), CANNOT_TELL, students, "full", 0.01)
    (line,) = digest.digest(chapters([students]), [row])
    assert line.time == 1.5
    alone, teacher = (settings.spec(f"350M+PR-MoE-32/64{more}", "full") for more in ("+L21", ""))
    forward = teacher.model.flops_per_token(training=False, context=128) * 0.7 * teacher.train.tokens
    assert line.flops == pytest.approx((alone.cost + forward) / teacher.cost, rel=1e-4), "with its teacher's passes"


def test_results_of_two_bases_stand_beside_each_other_and_the_line_is_of_the_papers_first():
    def of(base, scale):
        return result(experiment="distillation", scale=scale, seeds=[0, 1, 2], parameters={"base": base}, title=base)

    newest_first = [of("1.3B", "full"), of("350M", "full"), of("1.3B", "full"), of("1.3B", "cpu")]
    (chapter,) = (c for c in chapters(newest_first) if c.results)
    assert chapter.results == [newest_first[1], newest_first[0], newest_first[3]]
    (line,) = digest.digest([chapter], [])
    assert line.outcome == "350M" and strongest(newest_first, "distillation") is newest_first[1]


def test_the_papers_points_stand_at_the_share_of_its_training():
    points = charts.fig_1("350M+MoE-128")
    assert points[-1][0] == pytest.approx(1, abs=0.05) and charts.fig_1("nobody") == []
    gap = charts.gap_of_fig_1("350M+MoE-128", "350M")
    assert gap[-1][1] == pytest.approx(-0.307, abs=0.01) and gap[-1][2] > 0
    assert charts.whole_training("350M", "cpu") > 50e6
    assert charts.whole_training("350M", "full") == pytest.approx(101.6e6, rel=0.01)
    assert charts.whole_training("nobody", "cpu") == 0


def test_of_results_the_strongest_is_one_of_the_plan_with_most_seeds():
    few, full = result(experiment="pr-moe", scale="full", seeds=[0]), {"experiment": "pr-moe", "scale": "full"}
    found = result(experiment="pr-moe", scale="cpu", seeds=[0, 1, 2])
    others = result(**full, seeds=[1, 2, 3], parameters={"first_seed": 1})
    assert strongest([few, others, found], "pr-moe") is found, "no verdict, or not of the plan"
    two = result(**full, seeds=[0, 1])
    assert strongest([others, few, two], "pr-moe") is two, "of results without a verdict the one of more seeds"


def test_the_figure_of_the_start_page_has_a_row_for_each_pair_and_their_mean(scaling, tmp_path):
    claim = paper.claim("dense-equivalent-4-5x")
    row = ClaimRow(claim, CANNOT_TELL, scaling, "cpu", 4.37, 4.0, 4.74, 3, decides=True)
    pair, mean = hero.rows(scaling, [row])
    assert pair.name == "350M with 128 experts" and pair.low <= pair.ours <= pair.high and pair.ours < 4
    assert pair.paper == (pytest.approx(5.3, abs=0.05),) and mean.paper == (4, 5) and mean.ours == 4.37
    quick = replace(scaling, summary=replace(scaling.summary, scale="quick"))
    shown, written = hero.write([quick, scaling], tmp_path, [row])
    assert shown is scaling and written and not hero.write([quick, scaling], tmp_path, [row])[1], "drawn once"
    assert "a dense model 4.4× its base" in (tmp_path / hero.FILE).read_text()
    assert "twins of 0.2 to 0.2 million parameters" in hero.caption(shown)
    nan = float("nan")
    for ours, high in ((3.5, nan), (4e6, nan), (4e6, 5e9), (-20.0, nan)):  # one seed; runs too short to tell anything
        hero._write(
            [hero.Row("350M with 128 experts", ours, nan if high != high else 1.0, high, (5.3,))], tmp_path / "h.svg"
        )
        assert (tmp_path / "h.svg").read_text().count("<svg") == 1
    for text in ("\n", '{"arm": "350M"}\n', "torn"):
        (scaling.folder / hero.DATA).write_text(text)
        assert hero.write([scaling], tmp_path) == (None, False)


def test_a_sentence_has_our_number_the_papers_and_the_verdict(scaling):
    row = ClaimRow(
        *(paper.claim("moe128-1.3b-beats-own-base"), LARGER, scaling, "full", -0.425, -0.44, -0.41, 3),
        kind=MEASURED,
    )
    assert sentences.gain(row) == (
        "128 experts lower the 1.3B twin’s loss by 0.425 nats per token at nearly the same computation "
        "(paper: 0.215): holds, but larger (3 seeds)."
    )
    rows = [{"arm": arm, "flops_per_token": flops} for arm, flops in (("1.3B", 2.0), ("1.3B+MoE-128", 3.0))]
    (scaling.folder / "final.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [{}, *rows]))
    worse = replace(row, ours=0.1, verdict=FAILS)
    assert "raise the 1.3B twin’s loss by 0.1 nats per token at 1.5 times the computation" in sentences.gain(worse)
    assert sentences.gain(replace(row, claim=paper.claim("moe128-beats-moe32"))) == "", "the paper has no number"


def test_the_score_counts_as_the_ledger_and_names_the_main_reason():
    published = Path(__file__).parents[2] / "results"
    said = sentences.score(csv.DictReader(io.StringIO((published / "claims.csv").read_text())))
    counted = Counter()
    for items in tally(ledger.ledger(published)).values():
        counted.update({item.verdict: item.claims for item in items})
    assert said.startswith(f"Of the paper’s {counted.total()} claims {sum(counted[v] for v in HELD)} hold")
    assert f"{counted[CANNOT_TELL] + counted['cannot be tested here']} are open" in said
    row = {"claim": "moe128-beats-moe32", "same_as": "", "adjusted": HOLDS, "kind": MEASURED}
    open_ = row | {"claim": "pyramid-shrinks-gap", "adjusted": CANNOT_TELL}
    assert sentences.score([row]) == "Of the paper’s 1 claims 1 hold, and 0 do not."
    assert sentences.score([row, open_]).endswith("1 are open, mostly because seeds are too few.")


def test_the_ratios_of_cost_say_what_is_divided_by_what(scaling, tmp_path):
    rows = [
        {"pair": "1.3B+MoE-128 − 6.7B", "seed": seed, "at": "time", "times": 3.0 + seed / 10, "paper": 6.2}
        for seed in (0, 1)
    ]
    pd.DataFrame(rows).to_json(scaling.folder / "equal-loss.jsonl", orient="records", lines=True)
    throughput = result(tmp_path, "throughput", "cpu")
    compared = {"1.3B+MoE-128 over 6.7B": "training speed", "twins": 3.8, "paper's models": 5.3}
    (tmp_path / "compared.jsonl").write_text(json.dumps(compared) + "\n")
    speed, time = sentences.costs(scaling, throughput)
    assert (speed["ratio"], speed["ours"], speed["paper"]) == ("1.3B+MoE-128’s tokens per second over 6.7B’s", 3.8, 5.3)
    assert time["ratio"] == "6.7B’s over 1.3B+MoE-128’s" and time["low"] < time["ours"] < time["high"]
    assert sentences.costs(None, None) == []
