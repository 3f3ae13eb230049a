"""Predictions of the models of Clark et al.: what is sealed, what the prediction was made from, how it is scored."""

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from moelab import cli, paper
from moelab.config import ModelConfig
from moelab.experiments import outside, prediction
from moelab.paper import clark


def test_sealed_settings_have_no_losses_and_the_first_prediction_is_of_those_that_were_opened():
    table = paper.routed_models()
    assert len(table) == 223
    losses = ("loss", "loss_c4", "loss_curation", "loss_lambada", "loss_pile", "loss_wikitext")
    for row in table:
        assert row.seal == clark.seal(row.router, row.experts, row.size, row.k, row.frequency, row.flop_increase)
        if row.seal == "sealed":
            assert {getattr(row, name) for name in losses} == {None}
        else:
            assert 1 < row.loss < 4
    counts = {seal: len(paper.routed_models(seal)) for seal in ("seen", "first", "sealed")}
    assert counts == {"seen": 34, "first": 59, "sealed": 130}
    first = outside.first()
    assert set(first["experts"]) == set(clark.FIRST_EXPERTS) and not first.isna()["gain"].any()
    assert (first.groupby(["twins", "law"]).size() == len(outside.cells("first"))).all()


def test_the_first_prediction_comes_from_twins_and_dense_models_alone(monkeypatch, tmp_path):
    """Made again without any loss of a routed model, it is the one that was committed."""
    dense = clark.Table(row for row in paper.routed_models() if row.router == "Dense")
    assert outside.dense_curve() == outside.fit_dense(
        *zip(*pd.DataFrame(dense).query("flop_increase == 1").groupby("parameters")["loss"].mean().items(), strict=True)
    )
    frame = paper.routed_models().frame()
    frame.loc[frame["router"] != "Dense", "loss"] = float("nan")
    monkeypatch.setattr(clark.Table, "frame", lambda self: frame)
    twins = outside.first_twins("full")
    at = outside.cells("first")
    again = outside.predict(twins, (outside.MAIN[1],), at, draws=2)
    first = outside.first()
    main = first[(first["twins"] == "full") & (first["law"] == "effective")]
    assert again["gain"].round(4).tolist() == pytest.approx(main["gain"].tolist(), abs=2e-4)
    simpler, theirs = outside.simpler(twins, at), first[first["twins"] == ""]
    assert simpler["gain"].round(4).tolist() == pytest.approx(theirs["gain"].tolist(), abs=2e-4)


def test_the_twins_of_the_first_prediction_are_among_the_published_runs():
    keys = ["twins", "width", "parameters", "experts", "seed"]
    now = outside.published_twins().groupby(keys)["loss"].agg(["min", "max"])
    then = outside.first_twins().set_index(keys)["loss"]
    found = now.loc[then.index]
    assert ((found["min"] - 1e-9 <= then) & (then <= found["max"] + 1e-9)).all()


@pytest.mark.slow
def test_the_first_prediction_is_made_again_by_its_code(tmp_path):
    outside.write_first(outside.first_twins(), path := tmp_path / "again.csv")
    pd.testing.assert_frame_equal(pd.read_csv(path), pd.read_csv(outside.FIRST), atol=2e-3, rtol=2e-2)


def test_scores_count_what_lies_inside_and_how_far_off_the_others_are():
    cells = {"router": "S-Base", "size": "15M", "parameters": 1.6e7, "seal": "first"}
    opened = pd.DataFrame(
        [cells | {"experts": e, "gain": g, "times": 2 * g} for e, g in ((2, 0.1), (8, 0.2), (16, 0.4))]
    )
    cell = {"size": "15M", "twins": "full", "law": "effective"}
    made = pd.DataFrame(
        [
            cell | {"experts": e, "gain": g, "low": g - 0.05, "high": g + 0.05, "times": 2 * g}
            for e, g in ((2, 0.12), (8, 0.2), (16, 0.3))
        ]
    )
    table = outside.compare(made, opened)
    main = outside.scores(table).iloc[0]
    assert (main["twins"], main["settings"]) == ("full", 3)
    assert main["inside"] == pytest.approx(2 / 3) and main["rank"] == pytest.approx(1)
    assert main["error"] == pytest.approx(0.02) and main["error_times"] == pytest.approx(1.2)


def test_what_the_page_says_of_the_main_prediction():
    compared = outside.compare(outside.first(), outside.measured("first"))
    assert "(30 of 36 inside the 95 % intervals) but not with 256 and 512 (3 of 23)" in outside.headline(compared)
    assert outside.title(compared) == "83% of predictions hold for up to 16 experts, 13% for more"
    main = compared[(compared["twins"] == "full") & (compared["law"] == "effective")]
    smaller = main[(main["experts"] <= 16) & (main["size"] != "1.3B")]
    assert (smaller["inside"].sum(), len(smaller)) == (27, 30)
    assert outside.scores(compared)["error"].iloc[0] == pytest.approx(0.021, abs=5e-4)


def test_the_designed_twins_differ_in_one_thing_at_a_time():
    specs = {spec.label: spec for spec in prediction.EXPERIMENT.specs("full", 1)}
    assert len(specs) == 2 * 9 + 3 + 2 * 3 and {spec.train.tokens for spec in specs.values()} == {49_152_000}
    assert specs["2 experts, 64 wide"].model.experts == (0, 2) * 4
    assert specs["32 experts, 64 wide, every layer"].model.experts == (32,) * 8
    assert specs["32 experts, 64 wide, every fourth layer"].model.experts == (0, 0, 0, 32) * 2
    assert specs["32 experts, 64 wide, two experts a token"].model.top_k == 2
    assert {spec.model.decoder.smeared_keys for spec in specs.values()} == {True}
    assert {s.train.lr for s in specs.values() if "128 wide" in s.label} == {2e-3}
    assert {max(1, *s.model.experts) for s in specs.values() if "128 wide" in s.label} == {1, 8, 64}
    assert len(prediction.EXPERIMENT.specs("full", 2)) == 27 + 24, "the widest twins have one seed"
    with pytest.raises(ValueError, match=r"model\.hidden is what its runs differ in"):
        prediction.EXPERIMENT.specs("full", 1, overrides={"model.hidden": 32})


def test_the_law_answers_where_it_was_shown_to_hold_and_names_what_was_measured_elsewhere():
    assert outside.parse("350m+moe-16") == (outside.dense_parameters(ModelConfig.parse("350M")), 16)
    assert outside.parse("130M+MoE-8") == (130e6, 8) and outside.parse("0.1B+MoE-2") == (1e8, 2)
    committed = outside.first().query("twins == 'full' and law == 'effective' and size == '370M' and experts == 16")
    size = outside.measured("first").query("size == '370M'")["parameters"].iloc[0]
    again = outside.predict_one(size, 16)
    for name in ("gain", "times", "times_low", "times_high"):
        assert again[name] == pytest.approx(float(committed[name].iloc[0]), rel=0.03), name
    few = outside.predict_one(1.3e8, 2)
    assert few["times"] < again["times"] and few["times_low"] < few["times"] < few["times_high"]
    assert outside.shown().startswith("2 to 16 experts over 17 to 370 M parameters") and "27 of 30" in outside.shown()
    near = outside.nearest(size, 16)
    assert set(near["size"][:2]) == {"370M"} and set(near["experts"][:2]) == {16}
    for parameters, experts in ((size, 32), (1.3e9, 8), (1e6, 8), (size, 1)):
        with pytest.raises(ValueError, match=r"no prediction; shown to hold for .*; nearest measured: ") as refused:
            outside.predict_one(parameters, experts)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="one number of experts"):
        outside.parse("350M+PR-MoE-32/64")
    with pytest.raises(ValueError, match="is not understood"):
        outside.parse("350M+MoE-x")


def test_the_command_prints_the_prediction_and_the_nearest_models():
    found = CliRunner().invoke(cli.app, ["predict", "350M+MoE-16"])
    assert found.exit_code == 0 and "worth 2.40 times the parameters" in found.output and "370M" in found.output
    as_json = json.loads(CliRunner().invoke(cli.app, ["predict", "130M+MoE-4", "--json"]).output)
    assert as_json["low"] < as_json["gain"] < as_json["high"] and len(as_json["nearest"]) == 3
