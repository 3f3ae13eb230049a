"""The learning rate's sweep: its specs, and the rates that its results give."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from moelab.design import settings
from moelab.experiments import learning_rate

ROOT = Path(__file__).parents[2]


def test_the_sweep_is_the_regime_itself_on_a_seed_of_its_own():
    specs = learning_rate.EXPERIMENT.specs("cpu")
    assert {spec.train.seed for spec in specs} == {settings.SWEEP_SEED}
    for spec in specs:
        used = settings.spec(str(spec.model).removesuffix(" twin"), "cpu", settings.SWEEP_SEED)
        assert replace(spec.train, lr=used.train.lr, min_lr=used.train.min_lr) == used.train
        assert spec.model == used.model and spec.data == used.data
    assert set(learning_rate.used("350M", "cpu").values()) <= set(learning_rate.rates())


@pytest.mark.parametrize("scale", ["cpu", "full"])
def test_the_rates_in_use_are_the_lowest_of_the_published_sweep(scale):
    files = list((ROOT / "results" / "learning-rate" / scale).glob("*/summary.json"))
    assert files
    for file in files:
        base = json.loads(file.read_text())["parameters"]["base"]
        table = pd.read_json(file.with_name("loss-over-rate.jsonl"), lines=True)
        assert scale == "cpu" or not learning_rate.unbracketed(table)
        used = learning_rate.used(base, scale)
        for arm, part in table.groupby("arm"):
            means, rate = part.groupby("rate")["loss"].mean(), used[arm]
            assert len(means) > 1 and means.idxmin() == pytest.approx(rate), (base, arm)


def test_the_sweep_at_full_is_of_four_families_and_names_an_optimum_at_an_edge():
    specs = learning_rate.EXPERIMENT.specs("full", 2, peaks=[4e-3, 1e-3, 2e-3])
    assert {s.label for s in specs} == {"Dense", "MoE-128", "MoE-32", "PR-MoE"} == set(settings.FAMILIES)
    assert {s.train.lr for s in specs} == {1e-3, 2e-3, 4e-3} and {s.train.seed for s in specs} == {100, 101}
    assert all(s.train.min_lr < s.train.lr / 9 for s in specs)
    rates = {(s.label, s.train.lr) for s in learning_rate.EXPERIMENT.specs("full")}
    grid = {(arm, rate) for arm in settings.FAMILIES for rate in (4e-3, 8e-3, 16e-3)}
    assert rates == grid | {("Dense", 2e-3), ("Dense", 32e-3)}
    check = learning_rate.EXPERIMENT.specs("full", base="1.3B")
    kinds = ("", "+MoE-32", "+PR-MoE-32/64", "+MoE-128")
    assert {str(s.model) for s in check} == {f"1.3B{kind} twin" for kind in kinds}
    assert learning_rate.rates("6.7B", "full") == [0.0016, 0.0032]
    assert learning_rate.rates("1.3B", "full", arm="MoE-128") == [0.001333, 0.002667, 0.005333]
    assert learning_rate.rates("1.3B", "full") == [0.001333, 0.002667, 0.005333, 0.010667]
    assert learning_rate.rates("1.3B") == [0.002667, 0.005333, 0.010667]
    losses = {"A": (3.2, 3.1, 3.3), "B": (3.0, 3.1, 3.3), "C": (3.4, 3.3, 3.1)}
    rows = [[a, r, 100, v] for a, vs in losses.items() for r, v in zip((2e-3, 4e-3, 8e-3), vs, strict=True)]
    table = pd.DataFrame(rows, columns=["arm", "rate", "seed", "loss"])
    edges = ["B's lowest loss is at 0.002, the lowest rate", "C's lowest loss is at 0.008, the highest rate"]
    assert learning_rate.unbracketed(table) == edges
    line = learning_rate.leads(table, dict.fromkeys(losses, 4e-3))
    assert line.endswith(f" Not bracketed: {edges[0]}. Not bracketed: {edges[1]}.")
    said = learning_rate.headline(table, "350M")
    assert said == "Best rates on the 350M base: A 0.004, B 0.002, C 0.008 (some not bracketed)"
    other = learning_rate.leads(table, dict.fromkeys(losses, 16e-3))
    assert (
        "A ends lowest on average at rate 0.004, 0.100 nats below the next best, 0.002 (in use: 0.016, not among these)"
        in other
    )


def test_rates_are_compared_on_the_seeds_that_have_all_of_them():
    losses = {100: (3.0, 2.9, 3.0), 101: (3.6, 3.5, None)}  # the run at the highest rate diverged
    rows = [["A", r, s, v] for s, vs in losses.items() for r, v in zip((2e-3, 4e-3, 8e-3), vs, strict=True) if v]
    table = pd.DataFrame(rows, columns=["arm", "rate", "seed", "loss"])
    assert not learning_rate.unbracketed(table), "8e-3 is lowest on the easier seed alone"
    assert "A ends lowest on average at rate 0.004, 0.100 nats" in learning_rate.leads(table, {"A": 4e-3})
    as_moe = pd.concat([table.assign(arm=arm) for arm in ("Dense", "MoE-32", "PR-MoE")])
    assert learning_rate.headline(as_moe, "350M") == "Best rates on the 350M base: Dense 0.004, all MoE 0.004"
    assert learning_rate.unbracketed(table[table["seed"] == 101]) == ["A's lowest loss is at 0.004, the highest rate"]
    assert learning_rate.rates(chosen=[8e-3, 4e-3, 4e-3]) == [4e-3, 8e-3]


def test_larger_bases_train_at_less():
    names = ("350M", "1.3B", "1.3B+MoE-128", "6.7B")
    for scale in ("cpu", "gpu"):
        train = {name: settings.spec(name, scale).train for name in names}
        assert train["350M"].lr > train["1.3B"].lr > train["6.7B"].lr
        assert all(t.min_lr == pytest.approx(t.lr / 10, rel=1e-4) for t in train.values())
    # without a sweep in the proportion of the paper's dense rates
    assert train["1.3B"].lr == pytest.approx(train["350M"].lr * 2e-4 / 3e-4, rel=1e-3)
    assert train["6.7B"].lr == pytest.approx(train["350M"].lr * 1.2e-4 / 3e-4, rel=1e-3)
