"""What `moelab power` and `Lab.power` read and say."""

import json
from dataclasses import asdict, replace

import pytest
from typer.testing import CliRunner

from moelab import paper, paths
from moelab.cli import app
from moelab.design import budgets, comparison, rates, settings
from moelab.design.judging import judge
from moelab.files import write_json
from moelab.lab import Lab
from moelab.report import planning
from moelab.report.summary import SUMMARY
from moelab.runs.collection import Runs
from moelab.runs.spec import Start
from moelab.runs.store import RunStore
from tests.experiments.helpers import final


def test_claims_and_arms_of_a_result(publish):
    results = paths.results()
    publish(results, "pr-moe", "cpu", claims={"moe128-beats-moe32": (-0.02, -0.03, -0.01), "pr-moe-size": (0.3,)})
    found = planning.needs("pr-moe", "cpu", results)
    (row,) = found.to_dict("records")
    assert row["comparison"] == "moe128-beats-moe32" and row["spread"] == pytest.approx(0.01)
    assert (row["seeds"], row["effect"], row["at most"]) == (3, 0.01, 12)
    assert planning.needs("4", "cpu", results).equals(found), "by the number of its notebook"
    assert json.loads(Lab().power("pr-moe").to_json(orient="records"))[0]["at most"] == 12
    found = planning.needs("pr-moe", "cpu", results, effect=0.05)
    assert list(found["comparison"]) == ["350M+MoE-128 − 350M"] and found["effect"][0] == 0.05
    publish(results, "what-survives", "cpu")
    assert len(planning.needs("what-survives", "cpu", results)) == 1, "an experiment without claims"


def test_branches_are_compared_but_for_budgets():
    """An upcycled run is an arm, though it begins as another one; a budget is that arm again, with fewer tokens."""
    runs = []
    for seed in (0, 1, 2):
        trunk = settings.spec("350M", "cpu", seed)  # its title is its model's name
        branch = replace(trunk, start=Start(trunk, 8_192_000), label="Upcycled")
        for spec in (*budgets.with_budgets(trunk, "cpu"), branch):
            numbers = {"validation_loss": 3.0 + 0.1 * seed * (spec is branch) + seed * 1e6 / spec.train.tokens}
            runs.append({"id": spec.id, "label": spec.title, "spec": spec.to_json(), "result": numbers})
    about = {"experiment": "upcycling", "scale": "cpu", "title": "t", "finished": "2026", "runs": runs}
    write_json(paths.results() / "upcycling" / "cpu" / "1" / SUMMARY, about)
    assert list(planning.needs("upcycling", "cpu", paths.results())["comparison"]) == ["Upcycled − 350M twin"]


def test_an_arm_at_several_peak_rates_is_an_arm_for_each():
    found = comparison.by_peak_rate(final({"a": [1.0, 2.0, 3.0, 4.0], "b": [1.0]}), [0.1, 0.1, 0.2, 0.2, 0.1])
    assert found["arm"].tolist() == ["a, lr 0.1", "a, lr 0.1", "a, lr 0.2", "a, lr 0.2", "b"]


def test_the_spread_is_of_the_papers_first_base_and_of_two_seeds_or_more():
    made = [("350M", (0, 1), 0.1), ("1.3B", (0, 1), 0.2), ("350M", (0,), 0.3), ("350M", (0, 1), 0.4)]
    for day, (base, seeds, spread) in enumerate(made):
        losses = [("Teacher", 3.0), ("L21", 3.1), ("Teacher, shared rate", 3.0)]
        runs = [
            {"id": arm, "label": arm, "spec": {"train": {"seed": s}}, "result": {"validation_loss": loss + add}}
            for s in seeds
            for arm, loss in losses
            for add in [spread * s * (arm == "L21")]
        ]
        about = {"experiment": "distillation", "scale": "full", "title": "t", "finished": f"2026-01-0{day + 1}"}
        about |= {"seeds": seeds, "runs": runs, "parameters": {"base": base}}
        about["parameters"] |= {"overrides": {"train.tokens": 4096}} if day == 3 else {}
        write_json(paths.results() / "distillation" / "full" / str(day) / SUMMARY, about)
    found = planning.needs("distillation", "full", paths.results())
    assert list(found["comparison"]) == ["L21 − Teacher"], "an arm that is one run at both rates is no pair"
    assert found["spread"][0] == pytest.approx(0.1 / 2**0.5)


def test_runs_at_hand():
    found = planning.needs_of(final({"a": [1.0, 1.003, 1.006], "b": [1.5, 1.504, 1.508], "c": [0.0]}))
    assert list(found["comparison"]) == ["b − a"] and found["spread"][0] == pytest.approx(0.005), "of both arms"
    several = final({"a": [1, 2], "b": [1, 3], "c": [2, 2], "c, shared rate": [2, 4], "a, shared rate": [1, 2]})
    for against, others in (("b", ["a − b", "c − b"]), ("a, shared rate", ["c, shared rate − a, shared rate"])):
        assert list(planning.needs_of(several, against=against)["comparison"]) == others, "a rate with itself"


def test_runs_of_two_requests_without_their_budgets(tmp_path, result):
    specs = [settings.spec("350M", "cpu", seed, label=arm, overrides={"train.lr": lr}) for arm, lr, seed in _ARMS]
    runs = [RunStore(tmp_path).run(spec) for s in specs for spec in budgets.with_budgets(s, "cpu")]
    for run in runs:
        loss = 3.0 + run.spec.train.seed * (run.spec.title[0] == "b") / 10
        write_json(run.path / "result.json", result(validation_loss=loss))
    both = Runs(runs[:10]) + Runs(runs[10:])
    assert list(Lab().power(both)["comparison"]) == ["b − a"] and len(both.final()) == 20


_ARMS = [(arm, lr, seed) for arm, lr in (("a", 4e-3), ("b", 8e-3)) for seed in (0, 1)]


def test_of_two_rates_that_must_agree_the_one_that_takes_more_counts():
    claim = paper.claim("moe128-350m-beats-own-base")
    narrow, wide = (judge(claim, [-0.3 - s, -0.3, -0.3 + s], scale="full") for s in (0.01, 0.2))
    for own, other in ((narrow, wide), (wide, narrow)):
        about = {"experiment": "scaling", "scale": "full", "title": "t", "finished": "2026", "seeds": [0, 1, 2]}
        about["claims"] = [asdict(rates.agreed([own], [other])[0])]
        write_json(paths.results() / "scaling" / "full" / "1" / SUMMARY, about)
        (row,) = planning.needs("scaling", "full", paths.results()).to_dict("records")
        assert row["spread"] == pytest.approx(0.2) and row["at once"] > 9


def test_the_command_says_it_in_words_and_bad_input_is_one_line(publish):
    publish(paths.results(), "pr-moe", "cpu", claims={"moe128-beats-moe32": (-0.02, -0.3, 0.1)})
    text = " ".join(CliRunner().invoke(app, ["power", "pr-moe"], catch_exceptions=False).output.split())
    assert "moe128-beats-moe32 0.21 3 0.01, the smallest > 99 > 99 > 99" in text
    publish(paths.results(), "scaling", "cpu", claims={"moe-crossover-350m": (200, 210, 220)})
    crossing = CliRunner().invoke(app, ["power", "scaling"], catch_exceptions=False).output
    assert "moe-crossover-350m 10 3 31.9, from the middle of the range to its ends 4 6" in " ".join(crossing.split())
    assert "80 % probability if the effect is there" in text
    for arguments, part in (
        ("pr-moe --scale gpu", "no result of pr-moe at scale gpu to take a spread from; `moelab run pr-moe"),
        ("pr-moe --against MoE-7", "no arm 'MoE-7' in these runs; there are 350M, 350M+MoE-128"),
        ("pr-moe --effect -1", "effect must be a positive number of nats per token, got -1.0"),
        ("pr-moe --effect 0", "effect must be a positive number of nats per token, got 0.0"),
        ("pr-moe --effect nan", "effect must be a positive number of nats per token, got nan"),
    ):
        failed = CliRunner().invoke(app, ["power", *arguments.split()]).exception
        assert isinstance(failed, ValueError) and part in str(failed) and "\n" not in str(failed), arguments


def test_the_spread_of_a_run_is_that_of_published_runs_of_its_model_length_and_rate(publish):
    results = paths.results()
    assert planning.spread_of(settings.spec("350M+MoE-128", "cpu"), results) is None
    publish(results, "pr-moe", "cpu")
    (summary,) = (json.loads(file.read_text()) for file in results.glob("pr-moe/cpu/*/summary.json"))
    label = "350M+MoE-128"
    spec = settings.spec(label, "cpu")
    folder = results / "pr-moe" / "cpu" / "20990101-000000"
    losses = {0: 3.0, 1: 3.1, 2: 3.2}
    summary["runs"] = [
        {
            "id": f"run-{seed}-{lr:g}",
            "label": f"{label} at {lr:g}",
            "spec": {**spec.to_json(), "train": {**spec.to_json()["train"], "seed": seed, "lr": lr}},
            "result": {"tokens": spec.train.tokens, "validation_loss": loss * (1 if lr == spec.train.lr else 2)},
            "provenance": {},
        }
        for lr in (spec.train.lr, 1.0)
        for seed, loss in losses.items()
    ]
    write_json(folder / SUMMARY, summary)
    spread, seeds, where = planning.spread_of(spec, results)
    assert spread == pytest.approx(0.1) and (seeds, where) == (3, "pr-moe at cpu")
    assert planning.spread_of(settings.spec("350M", "cpu"), results) is None
    assert planning.spread_of(replace(spec, train=replace(spec.train, tokens=8_192_000)), results) is None
