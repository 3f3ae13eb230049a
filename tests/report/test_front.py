"""Verdicts as pages count them, axes that rows share, sizes, commands, explained words."""

import math

import pytest

from moelab import paper
from moelab.design import verdicts as v
from moelab.design.judging import judge
from moelab.experiments import EXPERIMENTS
from moelab.plotting import axis
from moelab.report import ledger
from moelab.report.site import front, plot
from moelab.report.site.claims import ClaimRow, all_claims, tally
from moelab.report.site.glossary import TERMS, explain
from moelab.report.site.results import read_results
from tests.report.helpers import publish, result


def row(claim: str, verdict: str, ours: float | None = None, low=None, high=None, kind: str = "measured") -> ClaimRow:
    where = result() if ours is not None else None
    return ClaimRow(paper.claim(claim), verdict, where, "cpu", ours, low, high, 3, decides=True, kind=kind)


def test_verdicts_are_counted_as_they_stand_after_holms_adjustment(tmp_path):
    weak = judge(paper.claim("pyramid-shrinks-gap"), [-0.1, -0.14, -0.07])
    others = [judge(paper.claim(id), [-0.1, 0.1, 0.0]) for id in ("residual-shrinks-gap", "moe128-beats-moe32")]
    publish(tmp_path, "pr-moe", "cpu", "2026-01-01", [weak, *others], figures=())
    assert weak.verdict == v.HOLDS and weak.p < 0.05
    entries = ledger.ledger(tmp_path)
    rows = all_claims(read_results(tmp_path)[0], entries)
    (shown,) = (r for r in rows if r.claim.id == "pyramid-shrinks-gap")
    assert (shown.verdict, shown.alone, shown.key) == (v.CANNOT_TELL, v.HOLDS, "trained: cannot tell yet")
    assert "It is tested only where the primary claim of Fig 4 holds" in shown.note
    assert shown.tests == f"p = {weak.p:.2g}, q = {3 * weak.p:.2g}".replace(
        " = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"
    )
    assert [(item.verdict, item.claims) for item in tally(entries)["trained"]] == [(v.CANNOT_TELL, 3)]
    assert ledger.counts(entries)["measured"] == {v.CANNOT_TELL: 3}


def test_a_claim_that_lacks_every_seeds_value_names_the_seeds(tmp_path):
    lost = judge(paper.claim("moe-crossover-350m"), {0: math.nan}, lost={0: "never"}, scale="full", share=1.0)
    publish(tmp_path, "scaling", "full", "2026-01-01", [lost], figures=())
    entries = ledger.ledger(tmp_path)
    (shown,) = (r for r in all_claims(read_results(tmp_path)[0], entries) if r.claim.id == lost.claim)
    assert shown.decides and shown.verdict == v.CANNOT_TELL and "seed 0: never" in shown.note


def test_rows_share_an_axis_by_what_they_show():
    loss = [
        row("moe128-beats-moe32", v.HOLDS, -0.02, -0.03, -0.01),
        row("moe128-350m-beats-own-base", v.HOLDS, -0.05),
    ]
    ratio = [row("pr-moe-size", v.HOLDS, 0.31), row("kernels-6x", v.CANNOT_TELL, 2.0)]
    (first, losses), (second, ratios) = plot.axes([*loss, *ratio])
    assert (losses, ratios) == (loss, ratio)
    assert first.name == "difference in nats per token" and not first.relative and first.neutral == 0
    assert first.low < -0.329 and first.high > 0 and 0 in first.ticks, "the paper's range and no difference fit"
    assert second.relative and second.low < 2 / 6 and 1.0 in second.ticks
    assert axis.EDGE <= first.percent(-0.329) < first.percent(0) <= 100 - axis.EDGE
    assert first.percent(-9) == axis.EDGE, "beyond the end is the end"
    drawn = plot.row_plot(loss[0], first)
    assert f'x1="{first.percent(-0.03):.2f}%"' in drawn and "circle" in drawn
    assert "M-4.2" in plot.row_plot(row("full-kd-hurts-late", v.FAILS, -0.05), first), "a square contradicts"
    assert plot.axes([row("dispatch-cost-factor-e", v.HOLDS, 512.0)])[0][0] is None, "the paper has no number"


@pytest.mark.parametrize("values", [(-0.3, 0.1), (1e-5, 2e-5), (-3000.0, 10.0), (0.0, 0.0)])
def test_an_axis_has_a_few_ticks_inside(values):
    found = axis.Axis.of_differences("difference in ms", values)
    assert 2 <= len(found.ticks) <= 5 and all(found.low <= t <= found.high for t in found.ticks)
    assert found.ruler().count("<text") == len(found.ticks)


def test_the_command_has_the_parameters_that_are_not_defaults():
    command = "moelab run half-moe --scale cpu -p "
    overrides = {"train.tokens": 7, "data.corpus": "mix5"}
    given = {"scale": "cpu", "seeds": 8, "arms": list(EXPERIMENTS["half-moe"].arms), "of_another_version": 1}
    shown = front.command(result(experiment="half-moe", parameters=given | {"overrides": overrides}))
    assert shown == command + "seeds=8 -p train.tokens=7 -p data.corpus=mix5"
    few = result(experiment="half-moe", parameters={"arms": ["a", "b"]})
    assert front.command(few) == command + """'arms=["a", "b"]'"""
    assert front.command(result(experiment="half-moe", parameters={"arms": [["a"]]})).endswith("""'arms=[["a"]]'""")
    assert front.command(result(experiment="mine")) == ""


def test_sizes_come_from_the_specs():
    def run(name, layers, parameters, tokens):
        model = {"name": f"{name} twin", "layers": layers, "hidden": 32}
        spec = {"model": model, "train": {"tokens": tokens}, "data": {"corpus": "mix5"}}
        return {"id": name, "label": name, "spec": spec, "result": {"parameters": parameters}}

    runs = [run("350M", 7, 171_328, 1_024_000), run("1.3B+MoE-128", 8, 2_528_640, 16_400_000)]
    sizes = front.sizes([result(runs=runs, seeds=[0, 1, 2])])
    assert list(sizes) == ["cpu"] and sizes["cpu"] == (
        "The twins have 171 thousand to 2.5 million parameters in 7 to 8 layers of 32 and are trained on 1.0 to "
        "16 million tokens of mix5, 3 seeds each (2 runs). The paper’s models of these names have 356 million to 52 billion "
        "parameters and 300 billion tokens."
    )
    assert front.sizes([result(), result(runs=[{"id": "x", "label": "x"}])]) == {}


def test_words_are_explained_where_they_first_stand():
    text = explain("twins & KD: twins, MoE-128's arms <b> in L21+KD; PR-MoE-32/64")
    assert text.startswith(f'<abbr title="{TERMS["twin"]}">twins</abbr> &amp; <abbr')
    assert text.count("twins") == 2 and "&lt;b&gt;" in text
    assert "L21+KD" in text and "PR-MoE-32/64" in text, "names of models stay whole"
