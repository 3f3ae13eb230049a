"""Tables of tile sizes: where they come from, that they reach the launches, how they are measured."""

import itertools
import json
import math
import time
from dataclasses import replace

import pytest
import torch
from moelab.kernels import expert_ffn, tuning


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDERS", [tmp_path])
    monkeypatch.setattr(tuning, "_tables", {})
    return tmp_path


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
    ],
)
def test_cards_of_one_kind_share_a_table(name, card):
    assert tuning.card(name) == card


def test_a_table_changes_only_its_shape_class(folder, monkeypatch):
    entry = {"product1 bf16 BM128 N1024 K2048": {"BN": 256}}
    (folder / "h100.json").write_text(json.dumps({"tiles": entry}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")

    class OnDevice:
        is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)

    own = {"BN": 128, "BK": 64}
    assert tuning.tile("product1", own, OnDevice, BM=128, N=768, K=2048) == {"BN": 256, "BK": 64}, (
        "768 is of class 1024"
    )
    assert tuning.tile("product1", own, OnDevice, BM=64, N=768, K=2048) == own
    assert tuning.tile("product0", own, OnDevice, BM=128, N=768, K=2048) == own
    assert tuning.tile("product1", own, torch.zeros(1, dtype=torch.bfloat16), BM=128, N=768, K=2048) == own, "a CPU"


def test_a_later_folder_comes_first_and_a_broken_table_is_named(folder, monkeypatch):
    other = folder / "home"
    other.mkdir()
    monkeypatch.setattr(tuning, "FOLDERS", [folder, other, folder / "missing"])
    for place, size in ((folder, 1), (other, 2)):
        (place / "a100.json").write_text(json.dumps({"tiles": {"sum bf16 rows64 M64": {"tile": size}}}))
    assert tuning.load("a100") == {"sum bf16 rows64 M64": {"tile": 2}} and tuning.load("h100") == {}
    (other / "a100.json").write_text('{"tiles": {"x": 1}}')
    with pytest.raises(ValueError, match=r"home/a100.json is no table of tile sizes .*; remove it"):
        tuning.load("a100")


def test_shipped_tables_name_known_ops_and_settings():
    settings = {"BM", "BN", "BK", "BR", "tile", "num_warps", "num_stages", "programs_per_sm"}
    for path in tuning.FOLDERS[0].glob("*.json"):
        tiles = tuning.load(path.stem)
        assert tiles and all(set(entry) <= settings for entry in tiles.values())


def test_a_tile_reaches_the_launch_and_changes_no_result(interpreted, monkeypatch):
    from moelab.kernels import _experts_triton as experts

    x, w = torch.randn(70, 16), torch.randn(2, 16, 16)
    args = (x, torch.tensor([0, 30, 70], dtype=torch.int32), w, None, w, None)
    want = expert_ffn(*args, backend="reference")
    heights, plan = [], experts._plan
    monkeypatch.setattr(experts, "_plan", lambda *args: heights.append(plan(*args).BM) or plan(*args))
    for changes in ({}, {"BM": 16}):
        with tuning.trial("rows", changes), tuning.trial("product1", {"BN": 32, "BK": 16}):
            torch.testing.assert_close(expert_ffn(*args, backend="triton"), want, rtol=2e-5, atol=2e-5)
    assert heights == [64, 16]

    # A table's entry makes a product persistent; without one there is a program for each place.
    grids, grid = [], experts._grid
    monkeypatch.setattr(experts, "_grid", lambda *args: grids.append(grid(*args)) or grids[-1])
    for programs, want_grid in ((None, 4), (1, 2)):
        with tuning.trial("product1", {} if programs is None else {"programs_per_sm": programs}):
            torch.testing.assert_close(expert_ffn(*args, backend="triton"), want, rtol=2e-5, atol=2e-5)
        (launched,), config = grids[-2]
        assert launched == want_grid and config["PERSISTENT"] is (programs is not None)


def test_a_table_holds_what_was_measured_with_the_versions_that_it_names(folder):
    tune = pytest.importorskip("moelab.kernels.tools.tune", exc_type=ImportError)
    path = folder / "x.json"

    def measured(key, best):
        return tune.Tuned(key, best, 2.0, 1.0, 1, 0, 0)

    tune.write([measured("a", {"BM": 32}), measured("b", {"BM": 16})], path, "X")
    tune.write([measured("b", {}), measured("c", {"BM": 64})], path, "X")
    assert tuning.load("x") == {"a": {"BM": 32}, "c": {"BM": 64}}
    for name in ("card", "torch", "triton"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: "another"}))
        tune.write([measured("d", {"BM": 16})], path, "X")
        assert tuning.load("x") == {"d": {"BM": 16}}, (
            "no entry is said to be of versions with which it was not measured"
        )


def test_the_most_valuable_ops_are_tuned_first(interpreted):
    from moelab.kernels.tools import tune

    found = {}
    for target in itertools.islice(tune.targets("cpu", tiny=True), 4):
        choices = {name: target.choices[name][:2] for name in list(target.choices)[:1]}
        choices |= {"programs_per_sm": (0, 1)} if "programs_per_sm" in target.choices else {}
        target = replace(target, choices=choices)
        one = tune.tune(target, math.inf, lambda call, op=target.op: 0.5 if tuning._trial.get(op) else 1.0)
        assert one.wrong == 0 and one.tried >= 2 and one.best
        found[target.op] = one
    assert list(found) == ["rows", "product1", "product0", "weight"]
    assert found["product1"].key == "product1 bf16 BM16 N32 K16"
    assert tune.tune(next(tune.targets("cpu", tiny=True)), time.monotonic() - 1) is None
    assert tune.search("cpu", time.monotonic() - 1, tiny=True) == []


def test_the_search_finds_the_fastest_tile_that_runs(interpreted, folder):
    """On known times; what is found is the table's entry."""
    from moelab.kernels.tools import tune

    first = next(tune.targets("cpu", tiny=True))

    def tile():
        return tuning._trial.get("rows", {}).get("BM", 16)

    def timer(call):
        call()
        return {16: 1.0, 32: 0.5, 64: 0.1, 128: 0.7}[tile()]

    def call():
        if tile() == 64:
            raise RuntimeError("out of resources")
        return first.call()

    routed = replace(first, call=lambda: (first.call(), [torch.tensor([100 + 2 * (tile() != 16)])])[1])
    wrong = tune.tune(routed, math.inf, lambda call: 0.5 if tile() == 16 else 0.1)
    assert wrong.wrong > 0 and not wrong.best, "numbers of experts and slots are equal or wrong"
    one = tune.tune(replace(first, call=call), math.inf, timer)
    assert (one.best, one.refused, one.own_ms, one.best_ms) == ({"BM": 32}, 1, 1000.0, 500.0)
    tune.write([one], folder / "x.json", "X")
    assert tuning.load("x") == {one.key: {"BM": 32}}
