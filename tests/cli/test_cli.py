"""The command as users run it, in processes of its own."""

import json
import os
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]


def moelab(*arguments, env=None, **options):
    return subprocess.run(
        [sys.executable, "-m", "moelab.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        **options,
    )


def test_help_answers_at_once_and_loads_nothing_heavy():
    before = os.times()
    assert "Reproduce, question and extend" in moelab("--help").stdout
    after = os.times()
    # Seconds of the processor, not of the clock: the machine may be busy. A quarter of a second when it is not.
    assert (after.children_user - before.children_user) + (after.children_system - before.children_system) < 1.5
    code = "import sys, moelab, moelab.cli, moelab.experiments; print(*sorted({'torch', 'pandas', 'numpy'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert loaded == [], "and so does `moelab list`"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("run", "pr-mo"), "did you mean pr-moe?"),
        (("run", "pr-moe", "-p", "seed=3"), "no parameter 'seed'; allowed: scale: str = 'cpu', seeds: int = 1"),
        (("run", "pr-moe", "-p", "seeds=many"), "parameter seeds must be int, got 'many'"),
        (("run", "pr-moe", "-p", "seeds"), "expected NAME=VALUE"),
        (("run", "throughput", "-p", "again=maybe"), "parameter again must be bool"),
        (
            ("run", "pr-moe", "-p", "train.tokenz=5"),
            "no setting 'train.tokenz'; allowed: train.tokens, train.batch_size",
        ),
        (("run", "pr-moe", "-p", "model.routing.drop_tokens=maybe"), "model.routing.drop_tokens: expected bool"),
        (("run", "pr-moe", "-p", "arms=MoE-7"), "pr-moe: unknown arm 'MoE-7'; allowed: Dense"),
        (("run", "scaling", "-p", "distill.weight=2"), "need a run that has a teacher"),
        (("run", "throughput", "-p", "train.tokens=5"), "no parameter 'train.tokens'"),
        (("run", "pr-moe", "--scale", "huge"), "no scale 'huge'; allowed: smoke, cpu, gpu"),
        (("run", "pr-moe", "-p", "seeds=0"), "pr-moe: seeds must be at least 1, got 0"),
        (("run", "pr-moe", "-p", 'arms=["foo"]'), "pr-moe: unknown arm 'foo'; allowed: Dense"),
        (("run", "pr-moe", "-p", "data.corpus=mix6"), "data: unknown corpus 'mix6'; known are 'sotu', 'mix5'"),
        (("run", "pr-moe", "-p", "data.corpus=folder:/nowhere"), "data: corpus 'folder:/nowhere' is no folder"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(arguments, part, tmp_path):
    done = moelab(*arguments, env={"MOELAB_HOME": str(tmp_path), "MOELAB_RESULTS": str(tmp_path)})
    assert done.returncode == 2 and part in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_what_the_system_refuses_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for arguments in (("run", "pr-moe", "--scale", "smoke"), ("browse", "--no-serve"), ("status",)):
        place = str(tmp_path / "file" / "below")
        done = moelab(*arguments, env={"MOELAB_HOME": place, "MOELAB_RESULTS": place})
        assert len(done.stderr.strip().splitlines()) <= 1 and "Traceback" not in done.stdout, done.stderr
        assert (done.returncode == 0) == (not done.stderr), arguments


def test_an_error_of_the_system_names_what_and_where(monkeypatch, capsys):
    from moelab import cli

    def refused() -> None:
        raise OSError(30, "Read-only file system", "/shared/results")

    monkeypatch.setattr(cli, "app", refused)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1 and capsys.readouterr().err == "moelab: Read-only file system: /shared/results\n"


def test_a_benchmark_leaves_numbers_figure_and_provenance(tmp_path):
    size = ("--tokens", "64", "--experts", "4", "--rounds", "3", "--threads", "1")
    done = moelab("bench", "layer", *size, "--hidden", "16", "--ffn", "32", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {
        "layer.jsonl",
        "layer.png",
        "layer.svg",
        "layer-dark.svg",
        "layer.provenance.json",
    }
    record = json.loads((tmp_path / "layer.provenance.json").read_text())
    assert record["versions"]["torch"] and "cpu" in record["hardware"]
    bad = moelab("bench", "gate", "--device", "tpu")
    assert bad.returncode == 2 and "--device must be cpu or cuda" in bad.stderr


def test_list_shows_every_experiment_and_scale():
    out = moelab("list", env={"COLUMNS": "200"}).stdout
    assert "pr-moe" in out and "smoke" in out and "gpu" in out


def test_doctor_finds_this_installation_sound():
    done = moelab("doctor", env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stdout
    assert "embedded corpus" in done.stdout and "Jupyter kernel" in done.stdout


PR_MOE = ("run", "pr-moe", "--scale", "smoke", "-p", "seeds=2", "-p", 'arms=["MoE-128","PR-MoE-32/64"]')


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The PR-MoE notebook at smoke scale, two arms with two seeds, through the command that users take."""
    root = tmp_path_factory.mktemp("published")
    env = {"MOELAB_HOME": str(root / "home"), "MOELAB_RESULTS": str(root / "results"), "COLUMNS": "200"}
    done = moelab(*PR_MOE, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "home" / "results", env, done.stdout


@pytest.mark.notebook
@pytest.mark.slow
class TestPrMoeNotebook:
    def test_publishes_a_complete_result(self, published):
        results, _, out = published
        (folder,) = (results / "pr-moe" / "smoke").iterdir()
        names = {p.name for p in folder.iterdir()}
        for figure in ("loss-curves", "gap-to-moe128", "expert-load"):
            assert {f"{figure}.png", f"{figure}.svg", f"{figure}.jsonl"} <= names
        summary = json.loads((folder / "summary.json").read_text())
        assert len(summary["runs"]) == 4 and not summary["missing"] and summary["seeds"] == [0, 1]
        assert summary["runs"][0]["provenance"]["versions"]["torch"] and summary["hardware"]["cores"]
        assert {c["claim"] for c in summary["claims"]} >= {"pr-moe-matches-moe128", "pr-moe-size"}
        for line in ("notebook", "figure", "page"):
            assert line in out
        notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
        assert [c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])]
        for claim in summary["claims"]:
            assert claim["verdict"]
        places = str(results.parents[1])
        assert not [
            p.name for p in folder.iterdir() if p.suffix in (".ipynb", ".json", ".html") and places in p.read_text()
        ]

    def test_again_is_read_back_and_overwrites_nothing(self, published):
        results, env, _ = published
        before = {f: f.stat().st_mtime_ns for f in (results.parent / "runs").glob("*/result.json")}
        assert moelab(*PR_MOE, env=env).returncode == 0
        assert {f: f.stat().st_mtime_ns for f in before} == before and len(before) == 4
        folders = sorted((results / "pr-moe" / "smoke").iterdir())
        assert len(folders) >= 2
        first, last = (json.loads((f / "summary.json").read_text())["runs"] for f in (folders[0], folders[-1]))
        assert [r["result"] for r in first] == [r["result"] for r in last]

    def test_the_pages_are_there(self, published):
        """What they say and where they lead: test_site.py and tests/browser."""
        results, _, _ = published
        for folder in (results / "pr-moe" / "smoke").iterdir():
            assert f"pr-moe/smoke/{folder.name}/index.html" in (results.parent / "pages" / "index.html").read_text()
            pages = results.parent / "pages" / "pr-moe" / "smoke" / folder.name
            assert (pages / "index.html").exists() and (pages / "notebook.html").exists()

    def test_a_failing_notebook_publishes_nothing_and_says_where(self, published):
        results, env, _ = published
        before = sorted((results / "pr-moe" / "smoke").iterdir())
        done = moelab("run", "pr-moe", "--scale", "smoke", env={**env, "MOELAB_EXECUTOR": "nobody"})
        assert done.returncode == 1
        assert "executor must be one of auto, inline" in done.stdout and "executed copy" in done.stdout
        assert sorted((results / "pr-moe" / "smoke").iterdir()) == before

    def test_browse_serves_the_page(self, published):
        _, env, _ = published
        process = subprocess.Popen(
            [sys.executable, "-m", "moelab.cli", "browse", "--port", "0"],
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            address = process.stdout.readline().split(" at ")[1].split()[0]
            with urllib.request.urlopen(address) as response:
                assert b"moelab results" in response.read()
        finally:
            process.terminate()


def test_notebooks_are_committed_without_outputs_and_with_typed_commented_parameters():
    from moelab.experiments import EXPERIMENTS
    from moelab.notebook.execute import parameters

    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert all(not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code"), path
        assert all(part in notebook.cells[0].source for part in ("**Question", "**The paper's answer", "**Ours")), path
    for experiment in EXPERIMENTS.values():
        for p in parameters(experiment).values():
            assert p.type not in ("None", "") and p.help, f"{experiment.name}: {p.name} needs a type and a comment"


def test_packaging_lists_every_package():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "moelab").rglob("__init__.py")}
    found |= {".".join(("moelab", *p.parent.relative_to(ROOT).parts)) for p in (ROOT / "kernels").rglob("__init__.py")}
    assert listed == found | {"moelab.notebooks"}


@pytest.mark.slow
def test_a_wheel_brings_notebooks_and_paper(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(place)
    code = """
import sys, moelab, moelab.kernels
from pathlib import Path
from moelab import paper, simulate
from moelab import paths
from moelab.report import site
from moelab.experiments import EXPERIMENTS
from moelab.notebook.execute import parameters
assert paths.checkout() is None and moelab.__file__.startswith(sys.argv[1])
site.build(Path("results"))
assert simulate.plan("350M+MoE-32", 8, "h100").best.fits, "clusters and calibration come along"
print(len(paper.models()), len(paper.claims()), *parameters(EXPERIMENTS["pr-moe"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)],
        env={**os.environ, "PYTHONPATH": str(place)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "seeds" in done.stdout
