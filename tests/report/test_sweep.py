"""The comparison of a sweep's points: one table, one figure, one result."""

import json
import math
from pathlib import Path

import pytest

from moelab import paths
from moelab.design.parameters import resolve
from moelab.experiments import distillation, experiment
from moelab.files import write_json
from moelab.lab import Lab
from moelab.report import site, sweep
from moelab.report.publication import Publication
from moelab.report.site import front
from moelab.report.site.results import read_results
from moelab.runs.store import RunStore

HALF = experiment("half-moe")


def points(name: str, grid: list[dict[str, str]], **given: str) -> sweep.Sweep:
    chosen = experiment(name)
    values = [resolve(chosen, {"scale": "smoke", **given, **point}).values for point in grid]
    return sweep.Sweep(tuple(grid[0]), tuple(values))


def finish(result, asked: sweep.Sweep, loss) -> None:
    """Make up a result for every run of a sweep of `half-moe`; `loss` is a function of the spec, None leaves it out."""
    for point in asked.points:
        for spec in HALF.specs_of(point):
            if (value := loss(spec)) is not None:
                write_json(RunStore().run(spec).path / "result.json", result(value))


@pytest.fixture
def two(result):
    """Two points, two arms, two seeds: the loss falls with the tokens, the second half is 0.1 lower."""

    def loss(spec):
        return 6 - spec.train.tokens / 2048 + spec.train.seed / 8 - 0.1 * (spec.label == "Second half")

    grid = [{"train.tokens": "1024"}, {"train.tokens": "2048"}]
    asked = points("half-moe", grid, seeds="2", arms='["Dense","Second half"]')
    finish(result, asked, loss)
    return asked


def test_a_row_for_each_point_and_arm_with_intervals_over_seeds(two):
    found = sweep.compare(HALF, two, [None, None], RunStore())
    rows = found.table[["train.tokens", "arm", "runs"]].values.tolist()
    assert rows == [[tokens, arm, 2] for tokens in (1024, 2048) for arm in ("Dense", "Second half")]
    first, second = found.table.iloc[0], found.table.iloc[3]
    assert (first["loss"], second["loss"]) == pytest.approx((5.5625, 4.9625))
    assert first["loss_low"] < first["loss"] < first["loss_high"] and math.isnan(first["difference"])
    assert second["difference"] == pytest.approx(-0.1) and second["difference_high"] == pytest.approx(-0.1)
    assert len(found.runs) == 8 and found.lacking == ()


def test_nothing_takes_the_place_of_a_first_arm_without_a_result(result):
    asked = points("half-moe", [{"train.tokens": "1024"}], seeds="2")
    finish(result, asked, lambda spec: None if spec.label == "Dense" else 3.0)
    found = sweep.compare(HALF, asked, [None], RunStore())
    assert list(found.table["arm"]) == ["First half", "Second half", "MoE-32"]
    assert found.table["difference"].isna().all(), "it would be called the difference to the first arm"


def test_the_first_arm_stays_the_first_without_its_first_seed(result):
    asked = points("half-moe", [{"train.tokens": "1024"}], seeds="2", arms='["Dense","Second half"]')
    lost = ("Dense", 0)
    finish(result, asked, lambda s: None if (s.label, s.train.seed) == lost else 3.0 + (s.label == "Dense"))
    found = sweep.compare(HALF, asked, [None], RunStore())
    differences = found.table.set_index("arm")["difference"]
    assert math.isnan(differences["Dense"]) and differences["Second half"] == -1.0
    assert sweep.headline(HALF, asked, found).endswith("at train.tokens=1024; points have 1 to 2 seeds")


def test_one_result_with_a_figure_and_a_table_on_the_page(two):
    found = sweep.compare(HALF, two, [None, None], RunStore())
    folder = sweep.publish(HALF, two, found)
    assert folder.parent == paths.own_results() / "half-moe" / "smoke-sweep"
    summary = json.loads((folder / "summary.json").read_text())
    lowest = "Over train.tokens, the lowest mean loss is 4.963 nats, of Second half at train.tokens=2048"
    assert summary["title"] == lowest
    assert summary["parameters"]["sweep"] == {"train.tokens": [1024, 2048]} and "overrides" not in summary["parameters"]
    assert len(summary["runs"]) == 8 and summary["seeds"] == [0, 1] and (folder / "points.svg").exists()
    assert sweep.publish(HALF, two, found) == folder, "the same comparison is not published twice"
    page = Path(site.update().index).parent / folder.relative_to(paths.own_results()) / "index.html"
    text = page.read_text()
    assert "All points of the sweep" in text and "points.svg" in text
    (shown,), _ = read_results(paths.own_results())
    command = "moelab sweep half-moe --scale smoke -g train.tokens=1024,2048 -p seeds=2 -p "
    assert front.command(shown) == command + """'arms=["Dense", "Second half"]'"""


def test_points_without_a_value_are_named_and_their_runs_missing(two, result, capsys):
    more = sweep.Sweep(two.varied, (*two.points, {**two.points[0], "overrides": {"train.tokens": 4096}}))
    found = sweep.compare(HALF, more, [None] * 3, RunStore())
    assert found.lacking == ("train.tokens=4096",) and len(found.runs.missing) == 4
    folder = sweep.publish(HALF, more, found)
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["missing"]) == 4 and "train.tokens=4096" in summary["figures"][0]["caption"]
    sweep.show(more, found)
    out = capsys.readouterr().out
    assert "no value at train.tokens=4096" in out and out.count("Second half") == 2
    finish(result, more, lambda spec: 3.0)
    again = sweep.compare(HALF, more, [None] * 3, RunStore())
    assert sweep.publish(HALF, more, again) != folder and not again.lacking


def test_nothing_is_published_where_no_point_has_a_value():
    asked = points("half-moe", [{"train.tokens": "1024"}])
    found = sweep.compare(HALF, asked, [None], RunStore())
    assert sweep.publish(HALF, asked, found) is None and not paths.own_results().exists()


def test_without_training_the_claims_are_compared(publish, tmp_path):
    chosen = experiment("inference-scaling")
    asked = points(chosen.name, [{"again": "true"}, {"again": "false"}])
    folders = [
        publish(tmp_path / "made", chosen.name, "smoke", f"2026010{i}-000000", claims={"pr-moe-size": (value,)})
        for i, value in enumerate((0.3, 0.4))
    ]
    found = sweep.compare(chosen, asked, folders, RunStore())
    assert found.series == "claim" and list(found.table["value"]) == [0.3, 0.4]
    assert found.table["again"].tolist() == [True, False] and not found.runs
    folder = sweep.publish(chosen, asked, found)
    assert (folder / "points.svg").exists() and json.loads((folder / "summary.json").read_text())["runs"] == []
    sweep.show(asked, found)


@pytest.mark.parametrize(
    ("name", "arms"), [("pr-moe", ["Dense", "MoE-128"]), ("distillation", list(distillation.ARMS))]
)
def test_branches_are_arms_of_a_sweep_but_for_budgets(name, arms, result):
    chosen = experiment(name)
    asked = points(name, [{"seeds": "1"}], scale="cpu", arms=json.dumps(arms))
    for spec in chosen.specs_of(asked.points[0]):
        write_json(RunStore().run(spec).path / "result.json", result(3.0))
    found = sweep.compare(chosen, asked, [None], RunStore())
    assert sorted(found.table["arm"]) == sorted(arms)
    assert len(found.runs) > len(arms) or name == "distillation", "budgets are among the runs"


def test_an_arm_at_several_peak_rates_is_an_arm_for_each(result):
    chosen = experiment("learning-rate")
    asked = points("learning-rate", [{"seeds": "2"}])
    specs = chosen.specs_of(asked.points[0])
    for spec in specs:
        loss = 3.0 + spec.model.is_moe + spec.train.lr * spec.train.seed
        write_json(RunStore().run(spec).path / "result.json", result(loss))
    found = sweep.compare(chosen, asked, [None], RunStore())
    arms = [f"{arm}, lr {rate}" for arm in ("Dense", "MoE-128") for rate in ("0.004", "0.008", "0.016")]
    assert found.table["arm"].tolist() == arms and set(found.table["runs"]) == {2}
    planned = Lab().power(Lab().run(specs, executor="read"))
    assert planned["comparison"].tolist() == [f"{arm} − {arms[0]}" for arm in arms[1:]]


def test_a_table_that_cannot_be_written_is_no_result(two, monkeypatch):
    found = sweep.compare(HALF, two, [None, None], RunStore())
    monkeypatch.setattr(Publication, "table", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        sweep.publish(HALF, two, found, name="20260101-000000")
    assert not list(paths.own_results().rglob("*.json*"))
