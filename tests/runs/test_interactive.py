"""A notebook's own process: interrupted imports, random numbers, and lists that are none."""

import signal
import sys

import pytest
import torch

import moelab.training.loop
from moelab import lab, paths
from moelab.lab import Lab
from moelab.lazy import whole_imports
from moelab.runs.collection import NoResult
from moelab.runs.execute import execute
from moelab.runs.spec import closure
from moelab.runs.store import RunStore


def test_ctrl_c_waits_for_the_end_of_an_import():
    done = []
    with pytest.raises(KeyboardInterrupt), whole_imports():
        signal.raise_signal(signal.SIGINT)
        done.append("imported")
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_is_interrupted_while_torch_is_imported_leaves_no_half_of_it(tiny_spec, monkeypatch):
    name = "moelab.training.loop"
    monkeypatch.setattr(moelab.training, "loop", sys.modules[name])  # both are as they were after the test
    monkeypatch.delitem(sys.modules, name)

    class Interrupts:
        def find_spec(self, asked, path=None, target=None):
            if asked == name:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    run = RunStore().run(tiny_spec)
    with pytest.raises(KeyboardInterrupt):
        execute(run)
    assert name in sys.modules and run.status.state == "new" and not run.locked


def test_a_run_in_this_process_leaves_the_notebooks_random_numbers_alone(tiny_spec):
    drawn = []
    for _ in ("trained", "read back"):
        torch.manual_seed(5)
        Lab().run([tiny_spec], executor="inline")
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]


def test_the_log_that_a_failure_names_has_the_traceback(tiny_spec, monkeypatch):
    def wrong(*_):
        raise ZeroDivisionError("division by zero in my router")

    monkeypatch.setattr("moelab.data.preparation.prepare", wrong)
    with pytest.raises(NoResult, match=r"^1 of 1 runs: division by zero in my router \(.*log\.txt\)$") as error:
        Lab().run([tiny_spec], executor="inline")
    (run,) = error.value.runs
    log = (run.path / "log.txt").read_text()
    assert "in wrong\n" in log and log.endswith("ZeroDivisionError: division by zero in my router\n")


@pytest.mark.parametrize(
    ("name", "scale", "parameters", "why"),
    [
        ("zero-shot", "smoke", {"scale": "smoke", "limit": 1}, "limit must be 0"),
        ("what-if", "smoke", {"scale": "smoke", "cached": 0}, "cached must be at least 1"),
        ("what-if", "quik", {"scale": "quik"}, "no scale 'quik'; allowed: smoke, cpu"),
    ],
)
def test_what_a_notebook_could_not_use_after_its_runs_is_refused_before(name, scale, parameters, why):
    with pytest.raises(ValueError, match=why):
        Lab().publish(name, scale, parameters)
    assert not (paths.home() / "drafts").exists()
    assert Lab().publish("mine", scale, parameters).interactive, "a notebook of one's own has any"


def test_a_text_that_is_prepared_in_the_notebook_says_so(tiny_spec, capsys):
    lab._fingerprint(tiny_spec.data)
    said = capsys.readouterr().out
    assert "encoding" in said and "training tokens in" in said
    lab._fingerprint(tiny_spec.data)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("wrap", [lambda spec: spec, lambda spec: (one for one in [spec]), lambda spec: [spec.model]])
def test_what_is_no_list_of_specs_is_refused_in_one_line(tiny_spec, wrap):
    with pytest.raises(ValueError, match=r"^runs: expected a list of specs, got [A-Za-z]+$"):
        Lab().run(wrap(tiny_spec))
    assert list(closure((tiny_spec,))) == [tiny_spec.id], "a tuple is one, too"
