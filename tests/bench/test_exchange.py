"""`moelab bench exchange`: honest numbers, refusals, a figure."""

import json
import sys

import pytest

from moelab.bench import exchange as bench
from moelab.config.parallel import EXCHANGES
from moelab.engine.launch.launcher import launch
from moelab.experiments import all_to_all
from moelab.lab import Lab


@pytest.mark.multiprocess
def test_measures_every_way_side_by_side(tmp_path):
    bench.main(ranks=[8], sizes=[1024, 65536], rounds=2, device="cpu", out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "exchange.jsonl").read_text().splitlines()]
    assert [(r["bytes_per_rank"], r["candidate"]) for r in rows] == [
        (size, name) for size in (1024, 65536) for name in [*bench.layouts(8), bench.BARE]
    ]
    for row in rows:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"] and row["rounds"] == 2
        messages = row["near_messages"] + row["far_messages"]
        floor = messages * row["alpha_ms"] + row["sent_bytes"] / (1 << 20) * row["beta_ms_per_mib"]
        floor *= row["ranks_per_core"]
        assert row["floor_ms"] == pytest.approx(floor) and row["floor_ratio"] == pytest.approx(row["median_ms"] / floor)
        assert row["alpha_ms"] > 0 and (row["ratio"] == 1 or row["candidate"] != "flat")
        assert row["device"].endswith(", 1 thread a rank"), "not the threads of the process that started them"
    # counts, dispatch, combine: 3 x 7; 3 x (3 + 1); 3 x 1 and the gather's 3; 3 x (1 + 1) and 1. Coordinated exchanges
    # also check that the ranks along `tensor` have routed alike: 3 and 1 messages.
    assert [r["near_messages"] + r["far_messages"] for r in rows[:5]] == [21, 12, 9, 8, 14]
    assert (rows[0]["far_messages"], rows[4]["far_messages"]) == (3 * 4, 2 * 4), "a node has four ranks"
    assert (tmp_path / "exchange.svg").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_command_on_ranks(tmp_path):
    """What `srun moelab bench exchange` does, started by our own launcher: rank 0 writes, of as many ranks as there are."""
    command = [sys.executable, "-m", "moelab.cli", "bench", "exchange", "--bytes", "1024", "--rounds", "1"]
    launch([*command, "--out", str(tmp_path / "out")], 4, logs=tmp_path)
    rows = all_to_all.measured_times(Lab(), "paper", file=str(tmp_path / "out" / "exchange.jsonl"))
    assert [r["candidate"] for r in rows] == [*bench.layouts(4), bench.BARE] and {r["ranks"] for r in rows} == {4}
    assert bench.headline(rows).startswith("At 1 KiB")
    assert (tmp_path / "out" / "exchange.provenance.json").exists()
    assert "time / flat" in (tmp_path / "rank-00000.txt").read_text()
    assert "time / flat" not in (tmp_path / "rank-00003.txt").read_text()


def test_layouts_follow_the_nodes_there_are_and_cover_every_way():
    assert bench.layouts(128, 8)["flat"].gpus_per_node == 8 and "hierarchical 16x8" in bench.layouts(128, 8)
    assert bench.layouts(16, 16) == bench.layouts(16), "one node alone is cut as ranks of one machine are"
    for ranks in (8, 16, 32):
        assert {config.exchange for config in bench.layouts(ranks).values()} == set(EXCHANGES)
        assert {config.ranks for config in bench.layouts(ranks).values()} == {ranks}


def test_fewer_gpus_than_it_takes_are_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"^bench exchange: it takes 4 ranks, so 4 GPUs, and here are 1$"):
        bench.main(ranks=None, sizes=[1024], rounds=1, device="cuda", out=None)


@pytest.mark.parametrize(
    ("wrong", "words"), [({"ranks": [6]}, "--ranks"), ({"sizes": [8]}, "--bytes"), ({"rounds": 0}, "--rounds")]
)
def test_refuses_what_it_cannot_measure(wrong, words):
    with pytest.raises(ValueError, match=words):
        bench.main(**{"ranks": [4], "sizes": [1024], "rounds": 1, "device": "cpu", "out": None, **wrong})
