"""The command as users run it, in processes of its own."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from typer.testing import CliRunner

import moelab as moelab_package
from moelab import cli
from moelab.bench import train
from moelab.cli import bench, doctor, experiments, models
from moelab.data.packages import CorpusUnavailable
from moelab.engine.checkpoint import CheckpointError
from moelab.experiments import EXPERIMENTS
from moelab.inference.modes import MODES
from moelab.notebook import batch, watch
from moelab.notebook import execute as notebooks
from moelab.runs import preflight

ROOT = Path(__file__).resolve().parents[2]


def moelab(*arguments, env=None):
    command = [sys.executable, "-m", "moelab.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})


EACH = """
import contextlib, io, json, os, sys
from moelab.cli import main
ends, heavy = [], ("torch", "numpy", "pandas", "matplotlib", "papermill", "nbformat")
for words, environment in json.loads(sys.argv[1]):
    sys.argv[:], out, err, code = ["moelab", *words], io.StringIO(), io.StringIO(), 0
    os.environ.update(environment)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    loaded = [name for name in heavy if name in sys.modules]
    ends.append({"code": code, "stdout": out.getvalue(), "stderr": err.getvalue(), "loaded": loaded})
print(json.dumps(ends))
"""


def moelab_of_each(*commands: str | tuple[str, ...], env=None, more=()) -> list[SimpleNamespace]:
    """What each command prints, one after the other in one process, and which heavy modules are loaded by then.

    `more` has variables of the environment for each command.
    """
    words = [command.split() if isinstance(command, str) else command for command in commands]
    given = json.dumps([*zip(words, more or [{}] * len(words), strict=True)])
    command = [sys.executable, "-c", EACH, given]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [SimpleNamespace(**end) for end in json.loads(done.stdout)]


def test_help_answers_at_once_in_the_order_of_use_and_loads_nothing_heavy():
    before = os.times()
    shown, version = moelab_of_each("--help", "--version", env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    after = os.times()
    out = shown.stdout
    assert "Reproduce, question and extend" in out and max(map(len, out.splitlines())) <= 80
    assert version.stdout == f"moelab {moelab_package.__version__}\n" and version.loaded == []
    groups = ("Experiments and their results", "Runs and models", "A cluster", "The simulator", "Benchmarks")
    commands = ("list ", "run ", "claims ", "generate ", "submit ", "status ", "plan ", "bench ")
    for order in (groups, [f"│ {name}" for name in commands]):
        assert sorted(order, key=out.index) == list(order)
    # Seconds of the processor, not of the clock: the machine may be busy. A quarter of a second when it is not.
    assert (after.children_user - before.children_user) + (after.children_system - before.children_system) < 1.5


def test_bad_input_is_one_line_and_starts_nothing_and_wrong_arguments_load_nothing_heavy(tmp_path):
    at_once = [  # which modules a process has loaded says more than the time it takes on a busy machine
        (("list", "nosuch"), "no experiment 'nosuch'"),
        (("generate", "nosuch"), "run 'nosuch': no such run or directory"),
        (("generate", "nosuch", "--device", "cuda"), "no CUDA device is available"),
        (("generate", ".", "--dtype", "fp64"), "--dtype must be fp32 or bf16, got 'fp64'"),
        (("generate", ".", "--mode", "fast"), "--mode must be optimised or baseline, got 'fast'"),
        (("eval", "nosuch"), "run 'nosuch': no such run or directory"),
        (("export", "nosuch", "new"), "run 'nosuch': no such run or directory"),
        (("export", ".", "."), "export: . exists; choose a new directory"),
        (("import", "nosuch", "new"), "there is no folder 'nosuch'; a published model is named as OWNER/NAME"),
        (("import", "docs", "."), "import: . exists; choose a new directory"),
        (("check-cluster", "--device", "tpu"), "--device must be cpu or cuda"),
        (("run", "pr-moe", "-p", "parallel.data=3"), "parallel.data must divide the batch"),
        (("run", "pr-moe", "-p", "data.corpus=folder:/nowhere"), "corpus 'folder:/nowhere' is no folder"),
        (("run", "pr-moe", "-p", "data.tokenizer=gpt2"), "tokenizer gpt2 has 50257 entries"),
        (("run", "pr-moe", "--scale", "gpu"), "no CUDA device is available here"),
        (("submit", "nosuch", "--profile", "local"), "no experiment 'nosuch'"),
        (("sweep", "pr-moe", "-g", "x=1", "--profile", "local"), "no parameter 'x'"),
        (("bench", "gate", "--device", "tpu"), "--device must be cpu or cuda, got 'tpu'"),
        (("bench", "train", "--family", "x"), "--family must be dense or MoE-128"),
        (("bench", "layer", "--dtype", "x"), "--dtype must be fp32 or bf16"),
        (("bench", "decode", "--model", "nosuch"), "model name 'nosuch' is not understood"),
        (("kernels", "compile", "--arch", "sm_1"), "--arch must be sm_80 or sm_90"),
        (("claims", "nosuch"), "claims: no experiment 'nosuch'"),
    ]
    others = [
        (("run", "pr-mo"), "did you mean pr-moe?"),
        (("run", "pr-moe", "-p", "seed=3"), "no parameter 'seed'; did you mean seeds? allowed: scale: str = 'cpu', "),
        (("run", "pr-moe", "-p", "seeds=many"), "parameter seeds must be a whole number, got 'many'"),
        (("run", "pr-moe", "-p", "seeds"), "expected NAME=VALUE"),
        (("run", "pr-moe", "-p", "model.routing.drop_tokens=maybe"), "drop_tokens must be true or false, got"),
        (("run", "pr-moe", "-p", "arms=MoE-7"), "pr-moe: unknown arm 'MoE-7'; allowed: Dense"),
        (("run", "throughput", "-p", "train.tokens=5"), "no parameter 'train.tokens'"),
        (("run", "pr-moe", "--scale", "quick", "-p", "scale=cpu"), "-p scale=cpu and --scale quick are two scales"),
        (
            ("sweep", "pr-moe", "-g", "seeds=1", "-g", "seeds=2"),
            "-g seeds=2: seeds is given twice; put all of its values",
        ),
        (("prepare", "pr-moe", "--scale", "paper", "-p", "data.max_bytes=0"), "is streamed and needs a bound"),
        (("run", "pr-moe", "--scale", "huge"), "no scale 'huge'; allowed: smoke, quick, cpu, full, gpu"),
        (("run", "pr-moe", "--seeds", "3"), "moelab: run: no option --seeds; parameters are given as -p seeds=3\n"),
        (("submit", "pr-moe", "--first-seed=3"), "no option --first-seed; parameters are given as -p first_seed=3\n"),
        (("sweep", "pr-moe", "--train.lr", "-g", "x=1"), "--train.lr; parameters are given as -p train.lr=VALUE\n"),
        (("run", "pr-moe", "--sclae", "cpu"), "moelab: run: no option --sclae; did you mean --scale?\n"),
        (("run", "pr-moe", "-y", "seeds=3"), "moelab: run: no option -y; parameters are given as -p seeds=3\n"),
        (("run", "pr-moe", "-y"), "moelab: run: no option -y; parameters are given as -p NAME=VALUE\n"),
        (("run", "pr-moe", "-p", "seeds", "x"), "-p seeds: expected NAME=VALUE, such as -p seeds=3\n"),
        (("run", "pr-moe", "seeds=3"), "(seeds=3); parameters are given as -p seeds=3\n"),
        (("submit", "pr-moe", "seeds=3"), "(seeds=3); parameters are given as -p seeds=3\n"),
        (("status", "--nosuch"), "moelab: status: no option --nosuch; see `moelab status --help`\n"),
        (("simulate", "decode", "--nosuch"), "no option --nosuch; see `moelab simulate decode --help`\n"),
        (("rnu", "pr-moe"), "moelab: no such command 'rnu'"),
        (("train", "pr-moe"), "moelab: no such command 'train'; did you mean run? see `moelab --help`\n"),
        (("run", "pr-moe", "-scale", "smoke"), "moelab: run: no option -scale; did you mean --scale?\n"),
        (("run", "pr-moe", "-p", "train.learning_rate=1"), "rate'; did you mean train.lr? allowed: train.tokens, "),
        (("plan", "24B+MoE128", "--gpus", "8"), "not understood; did you mean 24B+MoE-128? allowed: BASE"),
        (("plan", "24B+MoE-128", "--gpus", "8"), "it needs 64"),
        (("plan", "350M", "--gpus", "8", "--figure", "x.pdf"), "must end in .png or .svg"),
        (("simulate", "decode", "350M", "--gpus", "8", "--tensor", "3"), "does not divide"),
        (("simulate", "decode", "350M", "--gpus", "9"), "do not fill nodes of 8"),
        (("run", "99"), "no experiment '99'; allowed: start, scaling"),
        (("run", ""), "no experiment ''; allowed: start, scaling"),
        (("submit",), "moelab: submit: missing argument 'NAME...'; see `moelab submit --help`\n"),
        (("run", "pr-moe", "--scale"), "moelab: option '--scale' requires an argument"),
        (("logs", "x", "-n", "many"), "moelab: logs: invalid value for '-n': "),
    ]
    cases, env = at_once + others, dict.fromkeys(("MOELAB_HOME", "MOELAB_RESULTS"), str(tmp_path / "home"))
    ends = moelab_of_each(*(words for words, _ in cases), env=env)
    for (words, part), end in zip(cases, ends, strict=True):
        assert end.code == 2 and part in end.stderr and end.stdout == "", words
        assert len(end.stderr.strip().splitlines()) == 1, words
    assert not {"torch", "pandas", "papermill", "nbformat"} & set(ends[len(at_once) - 1].loaded)
    assert not (tmp_path / "home").exists()
    done = moelab("run", "pr-moe", "-p", "seeds=0")
    assert done.returncode == 2 and done.stderr.startswith("moelab: pr-moe: seeds must be 1 to 1000"), "as a command"


def test_what_stands_in_the_commands_is_what_the_heavy_modules_have():
    assert tuple(train.FAMILIES) == bench.FAMILIES and models.MODES == MODES


def test_what_the_system_refuses_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    env = dict.fromkeys(("MOELAB_HOME", "MOELAB_RESULTS"), str(tmp_path / "file" / "below"))
    for end in moelab_of_each("run pr-moe --scale smoke", "browse --no-serve", "status", env=env):
        assert len(end.stderr.strip().splitlines()) <= 1 and "Traceback" not in end.stdout, end.stderr
        assert (end.code == 0) == (not end.stderr)


@pytest.mark.parametrize(
    ("number", "file", "help"),
    [
        (1, "home/runs/x", "; MOELAB_HOME names another folder"),
        (30, "home", "; MOELAB_HOME names another folder"),
        (13, "results/runs", "; MOELAB_RESULTS names another folder"),
        (13, "elsewhere", ""),
        (28, "home/runs/x", ""),
    ],
)
def test_what_the_system_refuses_names_what_and_where(tmp_path, monkeypatch, capsys, number, file, help):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(cli, "app", lambda **_: (_ for _ in ()).throw(OSError(number, "No", str(tmp_path / file))))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1 and capsys.readouterr().err == f"moelab: No: {tmp_path / file}{help}\n"


@pytest.mark.parametrize("error", [CorpusUnavailable, CheckpointError, ValueError])
def test_a_text_or_checkpoint_that_cannot_be_had_is_one_line_in_every_command(monkeypatch, capsys, error):
    monkeypatch.setattr(cli, "app", lambda **_: (_ for _ in ()).throw(error("why not")))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and capsys.readouterr().err == "moelab: why not\n"


def test_a_mistake_in_the_code_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda **_: {}["key"])
    with pytest.raises(KeyError):
        cli.main()


def test_names_are_completed(tmp_path):
    expected = {
        "run pr-": {"pr-moe"},
        "submit sca": {"scaling"},
        "submit pr-moe --profile loc": {"local"},
        "generate tiny": {"tiny-s0-1", "tiny-s1-2"},
        "logs tiny-s1": {"tiny-s1-2"},
    }
    for run in ("tiny-s0-1", "tiny-s1-2"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "spec.json").touch()
    env = {"_MOELAB_COMPLETE": "complete_bash", "MOELAB_HOME": str(tmp_path)}
    asked = [{"COMP_WORDS": f"moelab {line}", "COMP_CWORD": str(len(line.split()))} for line in expected]
    ends = moelab_of_each(*[()] * len(expected), env=env, more=asked)
    assert dict(zip(expected, (set(end.stdout.split()) for end in ends), strict=True)) == expected


def test_what_a_command_shows_it_also_gives_as_json_and_doctor_finds_this_installation_sound(tmp_path):
    keys = {
        "list": 0, "list pr-moe": 0, "status": "rows", "plan 350M+MoE-32 --gpus 4": "best",
        "simulate decode 350M": "latency_ms", "simulate train 350M": "days", "simulate clusters": "a100-40gb",
        "simulate score": 0, "doctor": 0, "claims pr-moe": "claims",
    }  # fmt: skip
    # Nothing is compiled here: what `doctor` says of that.
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler", "COLUMNS": "200"}
    *ends, doctor = moelab_of_each(*(f"{command} --json" for command in keys), "doctor", env=env)
    assert doctor.code == 0, doctor.stdout
    for part in ("embedded corpus", "Jupyter kernel", "CPU kernels: there is no C++ compiler"):
        assert part in doctor.stdout
    for (command, key), end in zip(keys.items(), ends, strict=True):
        assert end.code == 0, end.stderr
        assert json.loads(end.stdout)[key] if command != "status" else "rows" in json.loads(end.stdout)


@pytest.mark.slow
def test_a_benchmark_leaves_numbers_figure_and_provenance(tmp_path):
    size = ("--tokens", "64", "--experts", "4", "--rounds", "3", "--threads", "1")
    done = CliRunner().invoke(cli.app, ["bench", "gate", *size, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert {p.name for p in tmp_path.iterdir()} == {f"gate.{end}" for end in ("jsonl", "svg", "provenance.json")}
    record = json.loads((tmp_path / "gate.provenance.json").read_text())
    assert record["versions"]["torch"] and "cpu" in record["hardware"]


def test_list_is_short_and_says_more_of_one():
    every, *named, near = moelab_of_each("list", "list pr-moe", "list 04", "list 4", "list pr-mo")
    lines = every.stdout.splitlines()
    assert {line.split()[0] for line in lines if line.split()} >= set(EXPERIMENTS)
    assert len(lines) < len(EXPERIMENTS) + 10 and any("Fig 4, Table 4" in line for line in lines)
    (out,) = {end.stdout for end in named}
    for part in ("smoke", "gpu", "Can fewer experts", "Residual-MoE-32", "notebooks/04_pr_moe.ipynb"):
        assert part in out
    assert "did you mean pr-moe" in near.stderr and every.loaded == []


@pytest.mark.parametrize(
    "command",
    [
        "list",
        "list pr-moe",
        "claims",
        "power pr-moe",
        "run pr-moe --dry-run -p seeds=3",
        "run scaling --dry-run --scale paper",
        "plan 24B+MoE-128 --gpus 256 --objective throughput",
    ],
)
def test_what_commands_print_fits_a_terminal_of_80_columns(command, tmp_path, monkeypatch, capsys):
    for name, value in {"MOELAB_HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert not cli.app(command.split(), standalone_mode=False)
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)  # without colours
    assert max(map(len, out.splitlines())) <= 80, out
    if command.startswith("run pr-moe"):
        assert "PR-MoE-32/64 (sum) ·" in out and "seeds 0-2" in out


def test_a_reader_that_ends_early_is_no_error():
    for command in ("list", "list --json", "list nosuch", "--help"):
        reads, writes = os.pipe()
        os.close(reads)
        called = [sys.executable, "-m", "moelab", *command.split()]
        done = subprocess.run(called, stdout=writes, stderr=subprocess.PIPE, text=True)
        os.close(writes)
        wrong = command == "list nosuch"
        assert done.returncode == (2 if wrong else 141) and bool(done.stderr.strip()) == wrong, (command, done.stderr)


def test_an_error_while_text_is_printed_has_a_line_of_its_own(tmp_path, monkeypatch, capsys):
    from moelab.inference import text

    def stream(*_):
        yield 0, "Once upon"
        raise ValueError("the context is full")

    generator = SimpleNamespace(why_plain="its experts drop tokens")
    monkeypatch.setattr(text, "open_text", lambda *_, **__: SimpleNamespace(stream=stream, generator=generator))
    monkeypatch.setattr(text, "join_ranks", lambda *_, **__: None)
    monkeypatch.setattr(models.RunStore, "find", lambda *_: tmp_path)
    monkeypatch.setattr(sys, "argv", ["moelab", "generate", "x"])
    with pytest.raises(SystemExit):
        cli.main()
    out, err = capsys.readouterr()
    why, refused = err.splitlines()
    assert (out, refused) == ("Once upon\n", "moelab: the context is full") and why.endswith("its experts drop tokens")


def test_doctor_goes_on_where_an_instruction_set_is_none_of_this_processor(monkeypatch):
    monkeypatch.setenv("MOELAB_INSTRUCTIONS", "sse9")
    found = list(doctor.checks())
    (kernels,) = ((ok, text) for ok, text in found if text.startswith("CPU kernels: "))
    assert kernels[0] is False and "MOELAB_INSTRUCTIONS must be one of" in kernels[1] and found[-1] != kernels


def test_doctor_loads_the_cpu_kernels_and_says_why_that_fails(monkeypatch):
    from moelab.kernels import _cpp

    def refused():
        raise RuntimeError("the compiled code cannot be kept in /x (Operation not permitted)")

    monkeypatch.setattr(_cpp, "operations", refused)
    (kernels,) = ((ok, text) for ok, text in doctor.checks() if text.startswith("CPU kernels: "))
    assert kernels[0] is None and "cannot be kept in /x (Operation not permitted); plain PyTorch" in kernels[1]


def test_doctor_says_that_a_workspace_is_not_writable_and_that_git_names_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "mine"))
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path / "theirs"))
    monkeypatch.setattr(doctor.os, "access", lambda folder, mode: folder != tmp_path)
    monkeypatch.setattr(doctor, "commit", lambda: {"commit": None})  # of a checkout of another user, to git
    found = list(doctor.checks())
    places = [(ok, text.endswith("GiB free, not writable")) for ok, text in found if str(tmp_path) in text]
    assert places == [(False, True), (None, True)]
    assert [ok for ok, text in found if text.startswith("git names no commit")] == [None]


def test_doctor_names_the_extras_to_install(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "checks", lambda rates: iter([(None, "extra hf (datasets): pip install -e '.[hf]'")]))
    assert doctor.report() and "pip install -e '.[hf]'" in capsys.readouterr().out


def test_a_run_says_first_how_long_it_takes_and_what_is_published(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    monkeypatch.setattr(preflight, "check", lambda *_, **__: None)
    monkeypatch.setattr(watch, "execute_watched", lambda *_, **__: print("executes") is None)
    experiments.run(["pr-moe"], scale="quick", parameter=["seeds=3"])
    took, published, executes = capsys.readouterr().out.splitlines()
    assert took.startswith("about ") and "on one core" in took and executes == "executes"
    assert "are published (Dense, PR-MoE-32/64, MoE-128): `moelab runs import`" in published


def test_several_experiments_are_one_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    monkeypatch.setattr(preflight, "check", lambda *_, **__: None)
    asked = []
    monkeypatch.setattr(batch, "run_all", lambda wanted, *_, publish: asked.extend(wanted) is None)
    experiments.run(["half-moe", "top2-vs-residual", "half-moe"], scale="smoke", parameter=["seeds=2"])
    assert [(request.experiment.name, len(request.specs)) for request in asked] == [
        ("half-moe", 8),
        ("top2-vs-residual", 6),
    ]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "run_all", interrupted)
    monkeypatch.setattr(notebooks, "execute", interrupted)
    for names in (["half-moe", "top2-vs-residual"], ["half-moe"]):
        monkeypatch.setattr(sys, "argv", ["moelab", "run", *names, "--scale", "smoke"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 130 and capsys.readouterr().out.splitlines()[-1] == watch.GO_ON
    with pytest.raises(ValueError, match=r"^run: give experiments' names or --all"):
        experiments.run(["half-moe"], all_=True)


def test_a_failed_notebook_is_exit_code_1_and_brackets_of_its_reason_are_no_markup(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    why = "RuntimeError: [/pytorch/gloo/pair.cc:544] closed; folder:/texts/[draft] is no folder"

    def fail(*_, **__):
        raise notebooks.NotebookFailed(why)

    monkeypatch.setattr(notebooks, "execute", fail)
    done = CliRunner().invoke(cli.app, ["run", "pr-moe", "--scale", "smoke"])
    assert done.exit_code == 1 and f"failed: {why}\n" in done.output


@pytest.mark.notebook
@pytest.mark.slow
def test_a_notebook_publishes_a_complete_result(tmp_path):
    """Two arms on two ranks: expert parallelism per layer. Its figures and verdicts: tests/notebook; seeds: tests/docs.

    That it publishes again what is stored: test_all_notebooks.py.
    """
    parameters = ("seeds=1", 'arms=["MoE-128","PR-MoE-32/64"]', "parallel.data=2")
    command = ("run", "pr-moe", "--scale", "smoke", *(word for given in parameters for word in ("-p", given)))
    env = {"MOELAB_HOME": str(tmp_path / "home"), "MOELAB_RESULTS": str(tmp_path / "results"), "COLUMNS": "200"}
    done = moelab(*command, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "results").exists(), "publishing is asked for"
    results = tmp_path / "home" / "results" / "pr-moe" / "smoke"
    (folder,) = results.iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["runs"]) == 2 and not summary["missing"] and summary["seeds"] == [0]
    records = [run["provenance"] for run in summary["runs"]]
    assert [record["parallel"]["data"] for record in records] == [2] * 2
    assert records[0]["versions"]["torch"] and summary["hardware"]["cores"]
    said = re.findall(r"^ +(notebook|figure|page) +(.+)$", done.stdout, re.M)
    assert [kind for kind, _ in said] == ["notebook", *["figure"] * len(summary["figures"]), "page"]
    assert all(Path(path).exists() for _, path in said)
    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    assert [c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])]
    written = [p for p in folder.iterdir() if p.suffix in (".ipynb", ".json", ".html")]
    assert not [p.name for p in written if str(tmp_path) in p.read_text()], "no places of this machine"


def test_packaging_lists_every_package():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "moelab").rglob("__init__.py")}
    found |= {".".join(("moelab", *p.parent.relative_to(ROOT).parts)) for p in (ROOT / "kernels").rglob("__init__.py")}
    assert listed == found | {"moelab.notebooks"}
