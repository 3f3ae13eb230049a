import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from moelab import paper
from moelab.cli import app
from moelab.design import power
from moelab.design import verdicts as claims
from moelab.design.judging import MARGIN, agreed, judge, judge_timing
from moelab.design.simulated import judge_simulated
from moelab.files import write_json
from moelab.report import ledger
from moelab.report.summary import SUMMARY, parse, read_all
from moelab.statistics import benjamini_hochberg, holm
from tests.report.helpers import publish


def entries(results):
    return {entry.claim: entry for entry in ledger.ledger(results)}


ORDER = paper.claim("moe128-beats-moe32")
LOWER = judge(ORDER, [-0.1, -0.11, -0.12])
HIGHER = judge(ORDER, [0.1, 0.11, 0.12])


def test_without_results_every_claim_is_there_and_unjudged(tmp_path):
    found = entries(tmp_path)
    assert len(found) == len(paper.claims()) >= 60
    assert {e.verdict for e in found.values()} == {claims.CANNOT_TELL, claims.CANNOT_TEST}
    retention = found["mos-retention-350m"]
    assert retention.verdict == claims.CANNOT_TEST and "mos-350m-average" in retention.conflicts
    assert retention.why == "The paper gives its number twice and differently, and no result judges it."
    assert found["zero-shot-350m-pr-moe"].why == "It needs the scale paper."
    assert found["full-kd-hurts-late"].why == "It needs runs of 70% of the paper's training."
    order = found["moe128-beats-moe32"]
    assert order.verdict == claims.CANNOT_TELL and order.why == "No result says anything about it yet."
    assert {c.id for c in paper.conflicts()} >= ledger._DISPUTED


def test_the_newest_result_of_the_most_telling_scale_decides(tmp_path):
    publish(tmp_path, "pr-moe", "cpu", "2026-01-01", [LOWER])
    publish(tmp_path, "pr-moe", "cpu", "2026-01-02", [HIGHER])
    publish(tmp_path, "pr-moe", "cpu", "2026-01-03", [judge(ORDER)])
    entry = entries(tmp_path)["moe128-beats-moe32"]
    assert entry.verdict == claims.FAILS, "what did not test a claim hides nothing"
    assert entry.deciding.result == "pr-moe/cpu/2026-01-02"
    assert entry.deciding.figure == "pr-moe/cpu/2026-01-02/gaps.svg"
    publish(tmp_path, "pr-moe", "cpu", "2026-01-04", [judge(ORDER, [-0.5])])
    assert entries(tmp_path)["moe128-beats-moe32"] == entry, "nor what has too few seeds to judge it"
    publish(tmp_path, "pr-moe", "gpu", "2025-01-01", [judge(ORDER, [-0.2, -0.21, -0.22])])
    publish(tmp_path, "pr-moe", "planet", "2026-01-02", [HIGHER])
    file = tmp_path / "pr-moe" / "planet" / "2026-01-02" / SUMMARY
    write_json(file, {**json.loads(file.read_text()), "mood": "good"})
    entry = entries(tmp_path)["moe128-beats-moe32"]
    assert entry.verdict == claims.HOLDS
    assert [e.scale for e in entry.evidence] == ["gpu", "cpu", "planet"], "a scale and a field of a later version"


def test_what_a_larger_scale_waits_for_is_said(tmp_path):
    publish(tmp_path, "pr-moe", "cpu", "2026-01-01", [LOWER])
    publish(tmp_path, "pr-moe", "full", "2026-01-01", [judge(ORDER, [-0.2, -0.21, -0.22], decides_from=10)])
    entry = entries(tmp_path)["moe128-beats-moe32"]
    assert entry.verdict == claims.HOLDS and entry.deciding.scale == "cpu"
    assert entry.why == "At full: Seeds before 10 do not decide; they give -0.21 nats."


def test_a_scale_too_small_is_shown_and_not_judged(tmp_path):
    larger = paper.claim("moe128-350m-beats-1.3b")
    verdict = judge(larger, [0.1, 0.11, 0.12], scale="cpu", share=0.16)
    assert verdict.verdict == claims.CANNOT_TEST and verdict.ours == pytest.approx(0.11) and verdict.low < 0.11
    publish(tmp_path, "scaling", "cpu", "2026-01-01", [verdict])
    entry = entries(tmp_path)[larger.id]
    assert entry.verdict == claims.CANNOT_TEST and entry.deciding.ours == pytest.approx(0.11)
    assert entry.why == "" and "these runs reach 16%" in entry.deciding.note
    assert judge(larger, [0.1, 0.11, 0.12], scale="cpu", share=0.8).verdict == claims.FAILS
    publish(tmp_path, "scaling", "full", "2026-01-02", [judge(larger, scale="full", share=1.0)])
    assert entries(tmp_path)[larger.id].verdict == claims.CANNOT_TELL, "long enough, but an arm was left out"
    publish(tmp_path, "scaling", "full", "2026-01-03", [judge(larger, [0.3, 0.2], scale="full", share=1.0)])
    entry = entries(tmp_path)[larger.id]
    assert entry.verdict == claims.CANNOT_TELL and entry.deciding.scale == "full", "not the value of a shorter training"
    assert "There are 2 seeds; it takes 3." in entry.deciding.note


def test_kinds_are_counted_apart_and_a_shared_claim_once(tmp_path):
    serving = [judge_simulated(paper.claim(id), 7.2) for id in ("speedup-2t", "throughput-up-to-7.3x")]
    publish(tmp_path, "inference-large", "cpu", "2026-01-01", serving)
    fitted = judge_simulated(paper.claim("52b-superlinear"), 2.1, fitted=True)
    publish(tmp_path, "inference-scaling", "cpu", "2026-01-01", [fitted])
    size = judge(paper.claim("pr-moe-size"), [0.31], exact=True)
    publish(tmp_path, "pr-moe", "cpu", "2026-01-01", [size, LOWER])
    every = ledger.ledger(tmp_path)
    shared = {claim.id for claim in paper.claims() if claim.same_as}
    assert {"throughput-up-to-7.3x", "52b-superlinear", "cheaper-than-6.7b"} <= shared
    assert {claim.same_as for claim in paper.claims()} - {""} <= {claim.id for claim in paper.claims()} - shared
    found = ledger.counts(every)
    assert {kind: of for kind, of in found.items() if kind != ledger.OPEN} == {
        "measured": {"holds": 1},
        "counted": {"holds": 1},
        "simulated": {"holds": 1},
        "fitted": {"holds": 1},
    }, "52b-latency-falls has no result: the row that shares its claim counts"
    assert sum(n for of in found.values() for n in of.values()) == len(paper.claims()) - len(shared)


def test_of_rows_that_share_a_claim_the_named_one_counts_if_it_is_judged(tmp_path):
    ids = [f"residual-faster-than-top2{end}" for end in ("-4-ranks", "", "-2-ranks")]

    def counted():
        return [e for e in ledger.distinct(ledger.ledger(tmp_path)) if e.claim in ids]

    assert [e.claim for e in counted()] == ids[:1] and counted()[0].verdict == claims.CANNOT_TEST
    sessions = {1: [[1.2, 1.3]], 2: [[1.2], [1.21], [1.22]], 4: [[0.8], [0.81], [0.82]]}
    for number, (id, ranks) in enumerate(((ids[1], 1), (ids[2], 2), (ids[0], 4))):
        verdict = judge_timing(paper.claim(id), sessions[ranks])
        publish(tmp_path, "top2-vs-residual", "paper", f"2026-01-0{number + 1}", [verdict])
        (entry,) = counted()
        assert (entry.claim, entry.verdict) == (id, verdict.verdict)
    assert entry.verdict == claims.FAILS


def test_a_timing_on_one_machine_says_nothing_of_a_network(tmp_path):
    """It was in the family of tests, with a p-value that a machine without a network cannot make small."""
    verdict = judge_timing(paper.claim("residual-faster-than-top2"), [[1.0], [1.01], [1.02]])
    publish(tmp_path, "top2-vs-residual", "cpu", "2026-01-01", [replace(verdict, verdict="not reproduced")])
    entry = entries(tmp_path)["residual-faster-than-top2"]
    assert (entry.adjusted, entry.p) == (claims.CANNOT_TEST, None) and entry.deciding.ours == pytest.approx(1.01)
    assert "It needs the scale paper; this is scale cpu." in entry.deciding.note


PYRAMID, RESIDUAL = paper.claim("pyramid-shrinks-gap"), paper.claim("residual-shrinks-gap")


def test_a_figures_further_claims_are_tested_where_its_primary_one_holds(tmp_path):
    weak, open_ = judge(PYRAMID, [-0.1, -0.14, -0.07]), judge(RESIDUAL, [-0.1, 0.1, 0.0])
    kernels = judge_timing(paper.claim("kernels-6x"), [[6.3], [6.4], [6.6]])
    publish(tmp_path, "gating-kernels", "cpu", "2026-01-01", [kernels])
    publish(tmp_path, "pr-moe", "cpu", "2026-01-01", [LOWER, weak, open_])
    found = entries(tmp_path)
    primaries = sum(claim.role == paper.PRIMARY for claim in paper.claims())
    assert found[ORDER.id].p == pytest.approx(primaries * LOWER.p) and found[ORDER.id].adjusted == claims.HOLDS
    of_fig_4 = sum(claim.role == paper.SECONDARY and claim.family == "Fig 4" for claim in paper.claims())
    pyramid = found[PYRAMID.id]
    assert weak.p < 0.05 < pyramid.p == pytest.approx(of_fig_4 * weak.p)
    assert (pyramid.verdict, pyramid.adjusted) == (claims.HOLDS, claims.CANNOT_TELL)
    assert pyramid.why.endswith(
        f"adjusted for the {of_fig_4} further claims of Fig 4, {pyramid.p:.2g}; it must be below 0.05."
    )
    timed = found["kernels-6x"]
    assert timed.adjusted == kernels.verdict == claims.HOLDS and timed.p == kernels.p, "a machine's timing stands alone"
    tests = [LOWER.p, weak.p, open_.p, kernels.p]
    q_values = dict(zip((ORDER.id, PYRAMID.id, RESIDUAL.id, "kernels-6x"), benjamini_hochberg(tests), strict=True))
    assert {id: found[id].q for id in q_values} == pytest.approx(q_values)
    together = ledger.family(list(found.values()))
    assert together == ledger.Family(4, primaries, 1, 0, {PYRAMID.id: claims.HOLDS})
    assert str(together).startswith(
        f"4 tests of measured values. Of the {primaries} primary claims, one a figure, 1 hold "
    )

    publish(tmp_path, "pr-moe", "cpu", "2026-01-02", [HIGHER, judge(PYRAMID, [-0.1, -0.101, -0.1]), open_])
    found = entries(tmp_path)
    assert found[ORDER.id].adjusted == claims.FAILS
    pyramid = found[PYRAMID.id]
    assert (pyramid.verdict, pyramid.adjusted, pyramid.p) == (claims.HOLDS, claims.CANNOT_TELL, None)
    assert pyramid.why == f"It is tested only where the primary claim of Fig 4 holds: {ORDER.statement}"


def test_under_the_global_null_a_primary_claim_wrongly_holds_in_five_percent_at_most():
    """Arms without any difference, or, for an equality, with a difference at the margin of its gain."""
    primaries = [claim for claim in paper.claims() if claim.role == paper.PRIMARY]
    random, wrong, experiments = np.random.default_rng(0), 0, 300
    for _ in range(experiments):
        verdicts = []
        for claim in primaries:
            arms = {claim.left: 3.0, claim.right: 3.0}
            if claim.direction == "equal":  # the better arm of the gain is the right side
                arms |= {claim.gain_over: 3.4, claim.left: 3.0 + MARGIN * 0.4}
            drawn = {arm: dict(enumerate(random.normal(mean, 0.02, 6))) for arm, mean in arms.items()}
            verdicts.append(judge(claim, arms=drawn))
        p_values = holm([verdict.p for verdict in verdicts])
        wrong += any(v.verdict in claims.HELD and p < 0.05 for v, p in zip(verdicts, p_values, strict=True))
    assert wrong / experiments <= 0.05


def test_families_are_fixed_in_the_table_of_claims():
    primaries = [claim for claim in paper.claims() if claim.role == paper.PRIMARY]
    figures = [claim.family for claim in primaries]
    assert len(set(figures)) == len(figures) <= power.PRIMARIES
    assert set(figures) <= {f"Fig {n}" for n in ("1", "2 left", "2 right", "4", "5", "6")} | {
        "Table 2",
        "Table 4",
        "Table 5",
    }
    assert {claim.family for claim in paper.claims() if claim.role == paper.SECONDARY} <= set(figures)
    assert {claim.role for claim in paper.claims()} == {"", paper.PRIMARY, paper.SECONDARY}
    assert not [claim.id for claim in paper.claims() if claim.role and (claim.timed or claim.same_as)]


def test_what_is_not_judged_is_no_test(tmp_path):
    few = agreed(LOWER, judge(ORDER, [-0.1, -0.14], note="At one shared rate"))
    weak = agreed(judge(ORDER, [-0.1, 0.1, 0.0]), judge(ORDER, [-0.1, -0.14], note="At one shared rate"))
    for date, verdict in enumerate((few, weak)):
        publish(tmp_path, "pr-moe", "cpu", f"2026-01-0{date + 1}", [verdict])
        found = ledger.ledger(tmp_path)
        (entry,) = (e for e in found if e.claim == ORDER.id)
        assert (entry.verdict, entry.adjusted) == (claims.CANNOT_TELL, claims.CANNOT_TELL)
        assert entry.p is None and ledger.family(found).tests == 0


@pytest.mark.parametrize("changed", [{"first_seed": 40}, {"overrides": {"train.lr": 0.1}}, {"stop": 0.5}])
def test_at_full_length_only_the_planned_settings_and_seeds_decide(changed, tmp_path):
    publish(tmp_path, "pr-moe", "full", "2026-01-01", [LOWER], first_seed=0, overrides={}, seeds=3)
    publish(tmp_path, "pr-moe", "full", "2026-01-02", [HIGHER], **changed)
    assert entries(tmp_path)["moe128-beats-moe32"].deciding.result == "pr-moe/full/2026-01-01"
    publish(tmp_path, "pr-moe", "full", "2026-01-03", [HIGHER], first_seed=0)
    assert entries(tmp_path)["moe128-beats-moe32"].deciding.result == "pr-moe/full/2026-01-03"


def test_the_seeds_that_decide_on_the_wider_base_count_at_full_length(tmp_path):
    publish(tmp_path, "pr-moe", "full", "2026-01-01", [LOWER], first_seed=0)
    publish(tmp_path, "pr-moe", "full", "2026-01-02", [HIGHER], first_seed=10)
    assert entries(tmp_path)["moe128-beats-moe32"].deciding.result == "pr-moe/full/2026-01-01"
    publish(tmp_path, "pr-moe", "full", "2026-01-03", [HIGHER], first_seed=10, base="1.3B")
    assert entries(tmp_path)["moe128-beats-moe32"].deciding.result == "pr-moe/full/2026-01-03"


@pytest.mark.parametrize(("setting", "decides"), [("model.hidden", False), ("train.tokens", True)])
def test_another_model_than_the_papers_says_nothing_about_its_claims(setting, decides, tmp_path):
    publish(tmp_path, "pr-moe", "cpu", "2026-01-01", [LOWER])
    publish(tmp_path, "pr-moe", "cpu", "2026-01-02", [HIGHER], overrides={setting: 64})
    newest = "pr-moe/cpu/2026-01-02" if decides else "pr-moe/cpu/2026-01-01"
    assert entries(tmp_path)["moe128-beats-moe32"].deciding.result == newest


def test_a_result_is_shown_by_todays_rule(tmp_path):
    stored = replace(LOWER, verdict="undecided", p=0.5)
    publish(tmp_path, "pr-moe", "cpu", "2026-01-01", [stored])
    found = entries(tmp_path)[ORDER.id]
    assert (found.verdict, found.kind) == (claims.HOLDS, claims.MEASURED) and found.tested


def test_the_command_prints_table_and_json(tmp_path):
    publish(tmp_path / "results", "pr-moe", "cpu", "2026-01-01", [LOWER])

    def moelab(*arguments):
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "220"}, catch_exceptions=False).stdout

    out = moelab("claims")
    assert out.index("measured: 1 holds") < out.index(ORDER.statement), "the tally comes first"
    one = moelab("claims", ORDER.id)
    assert ORDER.statement in one and one.count("paper ") == 1
    rows = len(paper.claims())
    assert f"claims in {rows} rows" in out and "measured: 1 holds" in out and "-0.11 (-0.1" in out
    assert "1 tests of measured values. Of the" in " ".join(out.split())
    found = json.loads(moelab("claims", "--json"))
    assert len(found["claims"]) == rows and found["counts"]["measured"] == {"holds": 1}
    assert found["family"]["tests"] == found["family"]["held"] == 1
    (record,) = [r for r in found["claims"] if r["claim"] == ORDER.id]
    assert [record[key] for key in ("kind", "adjusted", "verdict")] == ["measured", "holds", "holds"]
    assert record["evidence"][0]["samples"] == 3


WHOLE = {"experiment": "e", "scale": "cpu", "title": "t", "finished": "2026"}
RUN = {"id": "a", "label": "a"}
WRONG = (
    ({"experiment": 1}, "experiment"),
    ({"claims": [{"claim": ORDER.id}]}, "claims.0"),
    ({"claims": {"a": 1}}, "claims"),
    ({"runs": [{**RUN, "result": {"tokens": None}}]}, "tokens must be a number, got None"),
    ({"runs": [{**RUN, "result": {"validation_tokens": {}}}]}, "validation_tokens must be a number, got {}"),
    ({"runs": [{**RUN, "spec": {"model": {"layers": "8"}}}]}, "layers must be a number, got 8"),
    ({"runs": [{**RUN, "spec": {"start": {"run": "a"}}}]}, "start.run must be an object, got a"),
    ({"runs": [{**RUN, "spec": {"start": {"run": {"model": "a"}}}}]}, "start.run.model must be an object, got a"),
    ({"runs": [{**RUN, "provenance": {"sessions": [7]}}]}, "summary.runs.0.provenance.sessions"),
)
NO_JSON = ("", '{"experiment": "pr-moe"', "\udcff", "[" * 100_000)
NO_SUMMARY = ("[]", "7", '{"scale": "cpu"}')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((text, "not valid JSON") for text in NO_JSON),
        *((text, "summary") for text in NO_SUMMARY),
        *((json.dumps(WHOLE | wrong), said) for wrong, said in WRONG),
    ],
)
def test_a_malformed_summary_is_named_and_the_others_count(text, said, tmp_path):
    publish(tmp_path, "pr-moe", "cpu", "2026-01-01", [LOWER])
    folder = tmp_path / "pr-moe" / "cpu" / "2026-01-02"
    folder.mkdir()
    (folder / SUMMARY).write_bytes(text.encode(errors="surrogateescape"))
    assert entries(tmp_path)["moe128-beats-moe32"].verdict == claims.HOLDS
    found, (line,) = read_all(tmp_path)
    assert len(found) == 1 and line.startswith("pr-moe/cpu/2026-01-02/summary.json: ") and "\n" not in line
    assert said in line.partition(": ")[2]


def test_only_names_of_files_in_the_folder_are_links():
    assert parse({**WHOLE, "figures": [{"name": "a b-1.5", "data": "a.jsonl"}]}).figures[0].data == "a.jsonl"
    for name in ("javascript:alert(1)", "https://example.org/a", "../a.jsonl", "/etc/passwd", "a\\b", ".a", ""):
        wrong = [{"figures": [{"name": name}]}, {"tables": [{"name": "a", "data": name}]}]
        wrong += [{"figures": [{"name": "a", "data": name}]}] * bool(name)
        for rows in wrong:
            with pytest.raises(ValueError, match="expected the name of a file"):
                parse({**WHOLE, **rows})


def test_a_simulation_ranks_below_a_measurement_whatever_scale_it_ran_at(tmp_path):
    claim = paper.claim("52b-speedup-8-gpus")
    publish(tmp_path, "inference-scaling", "cpu", "20260102-000000", [judge_simulated(claim, 2.05)])
    entry = entries(tmp_path)[claim.id]
    assert (entry.verdict, entry.kind, entry.deciding.scale) == (claims.HOLDS, "simulated", "simulated")
    publish(tmp_path, "inference-scaling", "cpu", "20260101-000000", [judge(claim, [1.4, 1.5, 1.6])])
    entry = entries(tmp_path)[claim.id]
    assert entry.verdict == claims.SMALLER and [e.scale for e in entry.evidence] == ["cpu", "simulated"]


@pytest.mark.parametrize("width", [80, 220])
def test_the_listing_fits_and_names_and_states_each_claim(width, tmp_path):
    publish(tmp_path, "pr-moe", "cpu", "2026-01-01", [LOWER])
    console = Console(width=width)
    with console.capture() as printed:
        console.print(ledger.listing(ledger.ledger(tmp_path)))
    lines = printed.get().splitlines()
    assert max(map(len, lines)) <= width
    assert {claim.id for claim in paper.claims()} <= {line.split()[0] for line in lines if line.split()}
    text = " ".join(printed.get().split())
    assert all(" ".join(claim.statement.split()) in text for claim in paper.claims())
    assert "paper lower · ours -0.11 (-0.135 to -0.0852) · holds" in text
    assert text.index("measured") < text.index(ORDER.statement) < text.index("open")
