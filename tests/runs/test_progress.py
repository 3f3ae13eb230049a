"""What a progress display says of runs: the share that is done, what is left, and what failed."""

from dataclasses import replace

import pytest
from rich.console import Console

from moelab.runs.progress import Estimate, Snapshot, table
from moelab.runs.states import Status
from moelab.runs.store import RunStore


@pytest.fixture
def runs(tiny_spec, tmp_path, monkeypatch):
    store = RunStore(tmp_path)
    specs = [replace(tiny_spec, train=replace(tiny_spec.train, seed=seed)) for seed in range(4)]
    found = [store.run(spec) for spec in specs]
    monkeypatch.setattr(type(found[0]), "locked", property(lambda run: True))
    return found


def describe(runs, *states, left=None):
    for run, (state, step) in zip(runs, states, strict=True):
        (run.path / "result.json").unlink(missing_ok=True)
        if state == "finished":
            (run.path / "result.json").write_text("{}")
        run.set_status(Status(state, step, 24))
    return Snapshot.of(runs), Snapshot.of(runs).describe(left)


def test_failed_runs_are_neither_done_nor_left(runs):
    now, words = describe(runs, *[("failed", 0)] * 4)
    assert (now.done, now.left, words) == (0.0, 0.0, "0 of 4 runs finished, 4 failed")
    now, words = describe(runs, ("finished", 24), ("failed", 12), ("running", 12), ("new", 0), left=90)
    assert (now.done, now.left) == (0.5, 0.375)
    assert words == "1 of 4 runs finished, 1 failed, 50% done, 1 min 30 s left"
    assert table(runs, now, 90).title == words
    now, words = describe(runs, *[("finished", 24)] * 4)
    assert (now.done, now.left, words) == (1.0, 0.0, "4 of 4 runs finished")


def test_of_many_runs_a_terminal_shows_those_under_way_or_failed(runs):
    now, _ = describe(runs, ("finished", 24), ("failed", 12), ("running", 12), ("new", 0))
    shown = [list(table(runs, now, None, most=most).columns[0].cells) for most in (4, 3)]
    assert [[str(cell)[-1] for cell in cells] for cells in shown] == [["0", "1", "2", "3"], ["1", "2"]]


def test_brackets_of_a_reason_are_no_markup(runs):
    reasons = ["[/pytorch/gloo/pair.cc:544] Connection closed", "[enforce fail at alloc_cpu.cpp:121]"]
    for run, reason in zip(runs, reasons, strict=False):
        run.set_status(Status("failed", reason=reason))
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table(runs, Snapshot.of(runs), None))
    assert all(reason in shown.get() for reason in reasons)


def test_a_failure_shortens_the_time_left(runs, monkeypatch):
    clock = iter((0.0, 10.0, 10.0))
    monkeypatch.setattr("moelab.runs.progress.time.monotonic", lambda: next(clock))
    estimate = Estimate(describe(runs, *[("running", 0)] * 4)[0])
    for failed, left in ((0, 30), (1, 20)):
        now, _ = describe(runs, ("finished", 24), *[("failed", 0)] * failed, *[("running", 0)] * (3 - failed))
        assert estimate.seconds_left(now) == pytest.approx(left)
