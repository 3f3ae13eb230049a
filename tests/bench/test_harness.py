"""The harness: turns, fresh inputs, rows, the table's and file's form."""

import json
from pathlib import Path

import pytest
import torch

from moelab.bench import exchange, harness, inputs
from moelab.bench.harness import Timing
from moelab.plotting import benchmarks


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time as the harness sees it, which only moves where a test moves it."""
    found = [0.0]
    monkeypatch.setattr(harness.time, "monotonic", lambda: found[0])
    return found


def test_candidates_take_turns_on_the_same_inputs_and_new_ones_each_round():
    seen = []
    calls = {name: lambda given, name=name: seen.append((name, given)) for name in "ab"}
    times = harness.in_turns(calls, lambda i: f"inputs {i}", Timing(rounds=3, warm_up=1))
    assert seen == [(name, f"inputs {i}") for i in range(4) for name in ("ab" if i % 2 == 0 else "ba")]
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_a_spent_budget_ends_after_three_rounds():
    times = harness.in_turns({"a": lambda _: None}, lambda i: i, Timing(rounds=9, budget_s=0))
    assert len(times["a"]) == 3


def test_a_candidate_far_slower_than_the_first_is_left_out_and_named(now, capsys):
    def slow(_) -> None:
        now[0] += 1

    calls = {"a": lambda _: None, "slow": slow, "b": lambda _: None}
    times = harness.in_turns(calls, lambda i: i, Timing(rounds=2, warm_up=2, longest_s=0.5))
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}
    assert "left out: slow takes 1 s a turn, a " in capsys.readouterr().out
    assert len(harness.in_turns(calls, lambda i: i, Timing(rounds=1, warm_up=1))) == 3


def test_where_all_are_slow_none_is_left_out(now):
    def slow(_) -> None:
        now[0] += 1

    times = harness.in_turns({"a": slow, "b": slow}, lambda i: i, Timing(rounds=1, warm_up=2, longest_s=0.1))
    assert list(times) == ["a", "b"], "the candidate that ratios refer to is there"


def test_long_rounds_are_announced_before_they_begin(now, monkeypatch, capsys):
    said = []

    def turn(_) -> None:
        said.append(capsys.readouterr().out)
        now[0] += 20

    harness.in_turns({"a": turn, "b": turn}, lambda i: i, Timing(rounds=3, warm_up=1, budget_s=1000))
    assert said == ["", "", "  2 candidates in turns, up to 3 rounds: about 2 min 00 s\n", "", "", "", "", ""]
    monkeypatch.setattr(harness, "LONG_S", 1000.0)
    harness.in_turns({"a": turn, "b": turn}, lambda i: i, Timing(rounds=3, warm_up=1))
    assert not any(said[8:])


def test_a_candidate_may_measure_itself():
    found = harness.in_turns({"a": lambda i: [i, i]}, lambda i: i, Timing(2, warm_up=1), lambda call, i: call(i))
    assert found == {"a": [[1, 1], [2, 2]]}


def test_ratios_are_taken_round_by_round(tmp_path):
    seconds = {"slow": [2.0, 40.0, 6.0], "fast": [1.0, 10.0, 6.0]}
    slow, fast = harness.rows(
        {"tokens": 7}, seconds, against="fast", floor_s=0.5, timing=Timing(3), inputs="none", numbers={"slow": {"x": 1}}
    )
    assert (slow.ratio, slow.ratio_min, slow.ratio_max) == (2, 1, 4) and fast.ratio == fast.ratio_max == 1
    assert (slow.median_ms, slow.min_ms, slow.max_ms, slow.floor_ratio) == (6000, 2000, 40000, 12)
    (written,) = harness.write([slow], tmp_path / "x.jsonl")
    assert json.loads((tmp_path / "x.jsonl").read_text()) == written
    assert written["tokens"] == 7 and written["x"] == 1 and written["rounds_ms"] == [2000, 40000, 6000]
    assert not {"case", "numbers"} & set(written)
    columns = {  # as results pages, notebooks and people know them from results/benchmarks
        "candidate", "median_ms", "min_ms", "max_ms", "rounds", "against", "ratio", "ratio_min", "ratio_max",
        "floor_ms", "floor_ratio", "device",
    }  # fmt: skip
    assert columns <= set(written)


@pytest.mark.parametrize("name", ["layer", "gate", "exchange"])
def test_published_rows_are_drawn(name, tmp_path):
    file = Path(__file__).parents[2] / "results" / "benchmarks" / f"{name}.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    figure = exchange.figure(found) if name == "exchange" else benchmarks.ratios(found, title=name)
    series = {text.get_text() for text in figure.axes[-1].get_legend().get_texts()}
    kinds = {row["candidate"].replace(",", " ").split()[0] if name == "exchange" else row["candidate"] for row in found}
    assert len(series) == len(kinds) - 1, "all but the one that ratios refer to"
    benchmarks.save(figure, tmp_path / name)
    assert (tmp_path / f"{name}.svg").stat().st_size > 10_000


@pytest.mark.parametrize(("low", "high"), [(0.98, 1.02), (0.55, 1.8), (0.6, 9.0), (0.9, 150.0)])
def test_an_axis_has_labels_to_read_it_by(low, high):
    rows = [
        {"candidate": name, "against": "a", "experts": 8, "ratio": r, "ratio_min": r, "ratio_max": r, "device": "cpu"}
        | {"rounds": 1, "inputs": "none"}
        for name, r in (("a", 1.0), ("b", low), ("c", high))
    ]
    (ax,) = benchmarks.ratios(rows, title="").axes
    bottom, top = ax.get_ylim()
    ticks = zip(ax.get_yticks(minor=True), ax.get_yticklabels(minor=True), strict=True)
    ticks = [*ticks, *zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)]
    assert sum(bottom <= y <= top and label.get_text() != "" for y, label in ticks) >= 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Timing(rounds=0), "rounds must be at least 1"),
        (lambda: Timing(device="cuda", clock="cpu"), "processor time does not measure cuda"),
        (lambda: Timing(clock="cpu").check_threads(2), "processor time needs 1 thread, got 2"),
        (lambda: Timing().check_threads(0), "threads must be at least 1"),
        (lambda: inputs.HiddenStates(0, 32, 4), "bench: tokens must be at least 1, got 0"),
        (lambda: inputs.HiddenStates(8, 0, 4), "bench: hidden must be at least 1, got 0"),
        (lambda: inputs.HiddenStates(8, 32, 0), "bench: experts must be at least 1, got 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_hidden_states_are_new_each_round_and_the_same_again():
    states = inputs.HiddenStates(150, 32, 8)
    first, second = states(0), states(1)
    assert first.x_SM.shape == (150, 32) and first.logits_SE.shape == (150, 8)
    assert not torch.equal(first.load_E, second.load_E) and int(first.load_E.sum()) == 150
    again = inputs.HiddenStates(150, 32, 8)
    assert torch.equal(again.gate_EM, states.gate_EM) and torch.equal(again(1).x_SM, second.x_SM)
    torch.testing.assert_close(first.logits_SE, first.x_SM @ states.gate_EM.T)
    assert states.measured()["used_experts"] <= 8


def test_the_gate_is_uneven_but_not_degenerate():
    """As a trained twin's: more than chance alone, far from one expert for everything."""
    states = inputs.HiddenStates(1024, 64, 8)
    assert all(1.1 < states(i).busiest < 3 and states(i).used == 8 for i in range(3))


def test_prompts_are_new_each_round_and_fit_the_vocabulary():
    first, second = (inputs.prompts(i, 3, 7, 100) for i in range(2))
    assert first != second and [len(p) for p in first] == [7, 7, 7] and max(map(max, first)) < 100


def test_the_rates_of_this_machine_are_positive():
    timing = Timing()
    assert min(harness.reader(timing, 1 << 24)(), harness.copy_rate(timing, 1 << 20)) > 1e7
    assert harness.product_rate(torch.float32, timing, 256) > 1e7
