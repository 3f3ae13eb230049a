"""The states of a run: what the table allows happens, everything else is refused, and kills leave a state it knows."""

import ast
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

import moelab
from moelab import paths
from moelab.runs.states import EVENTS, STATES, TABLE, Status, after
from moelab.runs.store import Run, RunStore
from moelab.runs.supervisor import RunProcess
from tests.runs.conftest import wait_for_step


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", EVENTS)
def test_an_event_is_in_the_table_or_refused_and_writes_nothing(tiny_spec, state, event):
    run = RunStore().run(tiny_spec)
    before = Status(state, step=3, steps=24, loss=4.5)
    run.set_status(before)
    if state in TABLE[event].before:
        status = run.move(event, "why", before=before, step=4)
        assert (status.state, status.step, status.loss, status.reason) == (TABLE[event].after, 4, 4.5, "why")
        assert Status.read(run.path) == status
    else:
        with pytest.raises(ValueError, match=f"^{run.path}: a run that is {state} does not allow .*{event}") as error:
            run.move(event, "why", before=before, step=4)
        assert "\n" not in str(error.value) and Status.read(run.path) == before


def test_every_state_can_be_reached_and_left():
    assert TABLE.keys() == set(EVENTS)
    assert {move.after for move in TABLE.values()} == set(STATES) - {"new"}
    assert {state for move in TABLE.values() for state in move.before} == set(STATES)
    ends = {event for event in EVENTS if "finished" in TABLE[event].before}
    assert ends == {"reopen"}, "nothing but the loss of its result takes a run out of its end"
    assert {after(state, "start") for state in STATES if state != "finished"} == {"running"}, "all others go on"


def test_the_page_on_architecture_has_the_table():
    page = (paths.checkout() / "docs" / "architecture.md").read_text(encoding="utf-8")
    for event, move in TABLE.items():
        before = "all but finished" if len(move.before) > 1 else move.before[0]
        assert f"| `{event}` | {move.who} | {before} | {move.after} |" in page


def test_a_result_that_is_gone_reopens_the_run(tiny_spec):
    run = RunStore().run(tiny_spec)
    run.set_status(Status("finished", 24, 24))
    assert run.status == Status("stopped", 24, 24)


def test_only_the_store_writes_a_state_and_nobody_causes_an_event_of_another():
    """All others ask `Run.move`, which knows the table; only what trains a run moves it as its trainer."""
    writers, who = set(), defaultdict(set)
    for file in Path(moelab.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "set_status":
                writers.add(file.name)
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
                "move",
                "moved",
                "record_end",
            ):
                events = {a.value for a in node.args if isinstance(a, ast.Constant) and a.value in EVENTS}
                who[file.name] |= {TABLE[event].who for event in events}
    assert writers == {"store.py"}
    assert who.pop("execute.py") == {"trainer"}
    assert set().union(*who.values()) == {"user", "watcher"}


@pytest.mark.multiprocess
def test_a_kill_leaves_a_state_from_which_the_run_goes_on(tiny_spec):
    run: Run = RunStore().run(replace(tiny_spec, train=replace(tiny_spec.train, tokens=2000 * 128)))
    process = RunProcess(run)
    wait_for_step(run, 2)
    process.kill()
    process.wait(120)
    assert (run.recorded.state, run.status.state) == ("running", "stopped")
    assert after(run.recorded.state, "start") == "running"
