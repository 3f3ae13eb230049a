"""The example of docs/extend.md, followed to the letter on a copy of the checkout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"


def test_an_experiment_takes_less_than_sixty_lines():
    cells = nbformat.read(EXAMPLES / "30_balance_loss.ipynb", as_version=4).cells
    text = (EXAMPLES / "balance_loss.py").read_text() + "\n".join(c.source for c in cells if c.cell_type == "code")
    assert len([line for line in text.splitlines() if line.strip()]) < 60


@pytest.mark.notebook
@pytest.mark.slow
def test_the_example_runs_and_is_published(tmp_path):
    for name in ("moelab", "kernels", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(EXAMPLES / "balance_loss.py", tmp_path / "moelab" / "experiments")
    shutil.copy(EXAMPLES / "30_balance_loss.ipynb", tmp_path / "notebooks")
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "MOELAB_HOME": str(tmp_path / "home"),
        "MOELAB_RESULTS": str(tmp_path / "results"),
        "MOELAB_EXECUTOR": "inline",  # six short runs: a process for each would take longer than they do
    }
    # A checkout maps kernels/ to moelab.kernels when it is installed; here a link does.
    (tmp_path / "moelab" / "kernels").symlink_to(tmp_path / "kernels")
    done = subprocess.run(
        [sys.executable, "-m", "moelab.cli", "run", "balance-loss", "--scale", "smoke", "-p", "seeds=2"],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (summary,) = (tmp_path / "results" / "balance-loss" / "smoke").glob("*/summary.json")
    published = json.loads(summary.read_text())
    assert len(published["runs"]) == 6 and published["title"].startswith("weight 0 ends ")
    assert (summary.parent / "balance-dark.svg").exists()
    assert "How much balance the gate needs" in (tmp_path / "results" / "index.html").read_text()


def test_links_lead_to_files():
    import re

    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", ["explore.md", "browse.md"])
def test_code_of_the_pages_runs(page, tmp_path, monkeypatch):
    """All of it but the trainings, which are asked for and not made."""
    import re

    from moelab.lab import Lab
    from moelab.runs.collection import Runs
    from moelab.runs.store import Run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    asked, prompts = [], []

    def run(self, specs):
        asked.extend(specs)
        return Runs([Run(spec, tmp_path / spec.id) for spec in specs])

    monkeypatch.setattr(Lab, "run", run)
    monkeypatch.setattr(Lab, "generate", lambda self, run, prompt, **options: prompts.append(prompt))
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S))
    names: dict = {}
    exec(code, names)
    if page == "explore.md":
        assert len({spec.id for spec in asked}) == 6 and len(prompts) == 2
    else:
        assert (tmp_path / "curve-dark.svg").exists()


@pytest.mark.slow
def test_the_reference_has_all_modules_and_asks_for_nothing_outside(tmp_path):
    import re

    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "api.py"), str(tmp_path), "moelab.config", "moelab.plotting.figures"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "moelab" / "plotting" / "figures.html").read_text()
    assert "paper_points" in page and "hollow diamonds" in page
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.https?:", page)
    names = subprocess.run(
        [sys.executable, "-c", "import api; print(*api.modules())"], capture_output=True, text=True, cwd=ROOT / "docs"
    ).stdout.split()
    assert {"moelab.config", "moelab.kernels.gating", "moelab.engine.exchange", "moelab.report.site.pages"} <= set(
        names
    )
