"""The ladder of widths and its prediction."""

import numpy as np
import pandas as pd
import pytest

from moelab.design import laws
from moelab.experiments import ladder

SPECS = ladder.EXPERIMENT.specs("cpu", 1)
TRUNKS = [spec for spec in SPECS if spec.start is None]
DENSE = laws.Law(floor=1.9, a=0.8, alpha=0.4, b=0.7, beta=0.4, flops0=3e6, tokens0=4e6)


def made(widths, better=0.2, noise=0.004):
    """Points as `ladder.points` returns them: the MoEs lie below the dense law by a constant."""
    draw, rows = np.random.default_rng(0), []
    for spec in ladder.EXPERIMENT.specs("cpu", 3, larger=True):
        trunk = spec.start.run if spec.start else spec
        arm, width = trunk.label.split(",")[0], spec.model.hidden
        if width in widths:
            flops, tokens = spec.model.flops_per_token(context=128), spec.train.tokens
            loss = float(DENSE.loss(flops, tokens)) - better * (arm != "Dense") + draw.normal(0, noise)
            rows.append([arm, width, spec.train.seed, flops, tokens, flops * tokens, loss])
    return pd.DataFrame(rows, columns=["arm", "width", "seed", "flops", "tokens", "compute", "loss"])


@pytest.fixture(scope="module", autouse=True)
def _fewer_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laws, "DRAWS", 40)
        yield


@pytest.fixture(scope="module")
def table():
    return made((32, 64, 96, 128))


@pytest.fixture(scope="module")
def fits(table):
    return ladder.fits(table, "cpu")


def test_every_family_has_every_width_and_budget():
    assert [(spec.model.hidden, spec.label) for spec in TRUNKS] == [
        (width, f"{arm}, {width} wide") for width in (32, 64, 96) for arm in ("Dense", "PR-MoE", "MoE-128")
    ]
    assert len(SPECS) == 9 * 5 and len({spec.id for spec in SPECS}) == len(SPECS)
    assert {spec.train.dtype for spec in SPECS} == {"bf16"} and {spec.model.layers for spec in SPECS} == {8}
    larger = ladder.EXPERIMENT.specs("cpu", 1, larger=True)
    assert {spec.model.hidden for spec in larger[len(TRUNKS) :]} >= {128} and larger[: len(TRUNKS)] == TRUNKS


def test_every_width_has_the_rate_of_the_350m_twin_unless_another_is_given():
    assert {spec.train.lr for spec in ladder.EXPERIMENT.specs("cpu", 1, larger=True)} == {8e-3}
    assert ladder.EXPERIMENT.specs("cpu", 1, overrides={"train.lr": 1e-3})[0].train.lr == 1e-3


def test_settings_of_the_model_count_at_every_width_and_the_width_is_its_own():
    given = {"model.top_k": "2", "model.expert.ffn": 64}
    specs = ladder.EXPERIMENT.specs("cpu", 1, overrides=given, larger=True)
    assert {(spec.model.top_k, spec.model.expert.ffn) for spec in specs} == {(2, 64)}
    assert {spec.model.hidden for spec in specs} == {32, 64, 96, 128}


def test_the_larger_width_is_predicted_with_the_settings_of_the_runs(table, fits):
    plain = ladder.prediction(table, fits, "cpu", 3)
    half = ladder.prediction(table, fits, "cpu", 3, {"data.context": 64, "model.decoder.ffn": 64})
    larger = ladder.EXPERIMENT.specs("cpu", 1, overrides={"data.context": 64, "model.decoder.ffn": 64}, larger=True)
    (dense,) = (spec for spec in larger if spec.label == "Dense, 128 wide")
    last = half[half["arm"] == "Dense"].iloc[-1]
    assert last["compute"] == dense.model.flops_per_token(context=64) * last["tokens"]
    assert (half["compute"] < plain["compute"]).all()


@pytest.mark.slow
def test_laws_never_see_the_larger_width_nor_the_shorter_budgets(table, fits):
    below = ladder.fits(table[(table["width"] < 128) & (table["tokens"] > 4e6)], "cpu")
    assert {arm: fitted.law for arm, fitted in fits.items()} == {arm: fitted.law for arm, fitted in below.items()} != {}


def speeds_at(dense=1.0, moe=1.0):
    """Training tokens/s of every trunk; one FLOP takes every dense model the same time at 1.0."""
    specs = [spec for spec in ladder.EXPERIMENT.specs("cpu", 1, larger=True) if spec.start is None]
    rates = {True: dense, False: moe}
    return {s.label: [1e9 / s.model.flops_per_token(context=128) * rates["Dense" in s.label]] * 3 for s in specs}


def test_leverage_is_the_dense_models_compute_over_the_moes():
    table = made((32, 64, 96), noise=0.0)
    levers = ladder.summary(ladder.leverages(table, ladder.fits(table, "cpu"), speeds_at()))
    assert set(levers["arm"]) == {"PR-MoE", "MoE-128"} and len(levers) == 2 * 2 * 3 * 3
    for row in levers.itertuples():
        mine = table[(table["arm"] == row.arm) & (table["width"] == row.width) & (table["tokens"] == row.tokens)]
        assert row.value == pytest.approx(DENSE.compute(mine["loss"].mean()) / row.compute, rel=0.05)
        assert row.beyond == (row.value * row.compute > table.loc[table["arm"] == "Dense", "compute"].max())
    assert levers["beyond"].any() and not levers["beyond"].all()


def test_leverage_in_time_is_that_in_flops_by_the_speeds_of_both(table, fits):
    by_at = {
        moe: {lever.at: lever for lever in ladder.leverages(table, fits, speeds_at(moe=moe))} for moe in (1.0, 0.5)
    }
    assert by_at[1.0]["time"].value == pytest.approx(by_at[1.0]["training FLOPs"].value), "as many FLOPs/s"
    assert by_at[0.5]["time"].value == pytest.approx(by_at[1.0]["time"].value / 2)
    assert by_at[0.5]["training FLOPs"].value == by_at[1.0]["training FLOPs"].value


def test_the_interval_of_leverage_has_the_spread_of_the_moes_seeds(table, fits):
    """Moving the MoE's seeds apart, with their means as they were, makes its intervals wider and moves no value."""
    apart = table.assign(loss=table["loss"] + (table["arm"] == "MoE-128") * (table["seed"] - 1) * 0.1)
    width = {}
    for name, points in (("near", table), ("apart", apart)):
        levers = ladder.summary(ladder.leverages(points, ladder.fits(points, "cpu"), speeds_at()))
        width[name] = levers[levers["arm"] == "MoE-128"]
    assert width["apart"]["value"].tolist() == pytest.approx(width["near"]["value"].tolist())
    ratio = (width["apart"]["high"] / width["apart"]["low"]) / (width["near"]["high"] / width["near"]["low"])
    assert (ratio > 1.2).all()


def test_the_trend_is_the_slope_of_the_leverage_over_compute(table, fits):
    below = table[table["width"] < 128]
    found = ladder.leverages(below, fits, speeds_at())
    trends, levers = ladder.trend(found), ladder.summary(found)
    for row in trends.itertuples():
        mine = levers[(levers["arm"] == row.arm) & (levers["at"] == row.at)]
        mine = mine[mine["tokens"] == mine["tokens"].max()]
        slope = np.polyfit(np.log10(mine["compute"]), np.log10(mine["value"]), 1)[0]
        assert row.value == pytest.approx(10**slope) and row.low <= row.value <= row.high
    assert len(trends) == 4 and not len(ladder.trend([])) and ladder.leverages(table, {}, {}) == []
    far = table.assign(loss=table["loss"] - 3 * (table["arm"] == "MoE-128"))
    endless = ladder.trend(ladder.leverages(far, fits, speeds_at())).set_index("arm")["value"]
    assert (endless["MoE-128"] == np.inf).all() and (endless["PR-MoE"] < np.inf).all()


def test_the_prediction_says_how_far_it_missed(table, fits):
    came = ladder.prediction(table, fits, "cpu", 3)
    assert len(came) == 3 * 3 and set(came["seeds"]) == {3} and set(came["width"]) == {128}
    assert (came["miss"] == came["measured"] - came["value"]).all() and came["inside"].mean() > 0.7
    off = table.assign(loss=table["loss"] + 0.1 * (table["width"] == 128))
    assert not ladder.prediction(off, fits, "cpu", 3)["inside"].any()
    before = ladder.prediction(table[table["width"] < 128], fits, "cpu", 3)
    assert before["measured"].isna().all() and before["inside"].isna().all()
    assert list(before["value"]) == list(came["value"]) and list(before["low"]) == list(came["low"])


def test_headlines(table, fits):
    levers = ladder.summary(ladder.leverages(table, fits, speeds_at()))
    said = ladder.headline(levers)
    assert said.startswith("To reach MoE-128's loss at the largest rung, dense models need ")
    mine = levers[levers["arm"] == "MoE-128"]
    largest = mine[mine["compute"] == mine["compute"].max()].set_index("at")
    flops, time = (f"{largest.loc[at, 'value']:.1f} (" for at in ("training FLOPs", "time"))
    assert f" {flops}" in said and f") times its FLOPs and {time}" in said and said.endswith(") times its time")
    held = ladder.prediction_headline(ladder.prediction(table, fits, "cpu", 3))
    assert held.endswith(" of 9 losses of the larger rung inside the predicted intervals")
    last = levers[(levers["width"] == 128) & (levers["at"] == "training FLOPs")]
    last = last[last["tokens"] == last["tokens"].max()]["value"]
    span = f"{last.min():.1f} to {last.max():.1f} times an MoE's FLOPs"
    assert ladder.leverage_headline(levers) == f"Largest rung: dense takes {span}"
    below = table[table["width"] < 128]
    few = below[below["width"] < 96]
    assert ladder.fits(few, "cpu") == {} and ladder.constants({}).empty
    nothing = ladder.headline(ladder.summary([]))
    assert nothing == ladder.leverage_headline(ladder.summary([])) == "too few runs have finished to fit a law"
    assert ladder.prediction_headline(ladder.prediction(few, {}, "cpu", 3)) == "The larger rung is predicted, not run"
