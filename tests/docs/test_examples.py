"""The pages of docs/: the example of extend.md is followed on a copy of the checkout; links, commands and code are checked."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import typer
from typer.testing import CliRunner

from moelab.cli import app
from moelab.data.corpus import open_corpus
from moelab.experiments import experiment
from moelab.lab import Lab
from moelab.runs.collection import Runs
from moelab.runs.store import Run

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"


def test_an_experiment_takes_less_than_sixty_lines():
    cells = nbformat.read(EXAMPLES / "30_balance_loss.ipynb", as_version=4).cells
    text = (EXAMPLES / "balance_loss.py").read_text() + "\n".join(c.source for c in cells if c.cell_type == "code")
    assert len([line for line in text.splitlines() if line.strip()]) < 60


def test_the_arms_of_the_page_are_understood():
    (code,) = re.findall(r"```python\n( +ARMS = .*?)```", (EXAMPLES.parent / "extend.md").read_text(), re.S)
    names: dict = {}
    exec(textwrap.dedent(code), names)
    plain, changed = replace(experiment("half-moe"), arms=names["ARMS"], build=None).specs("smoke")
    assert (changed.model.top_k, changed.model.expert.ffn) == (2, 32)
    assert changed.model.routing == plain.model.routing and changed.train == plain.train


@pytest.fixture
def python(tmp_path):
    """Makes a copy of the checkout in `tmp_path`; `python(…)` runs Python with these arguments on it."""
    for name in ("moelab", "kernels", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    places = {"PYTHONPATH": tmp_path, "MOELAB_HOME": tmp_path / "home", "MOELAB_RESULTS": tmp_path / "results"}
    environment = os.environ | {name: str(place) for name, place in places.items()}

    def python(*arguments):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr

    return python


@pytest.mark.notebook
@pytest.mark.slow
def test_the_example_runs_and_is_published(python, tmp_path):
    shutil.copy(EXAMPLES / "balance_loss.py", tmp_path / "moelab" / "experiments")
    shutil.copy(EXAMPLES / "30_balance_loss.ipynb", tmp_path / "notebooks")
    python("-m", "moelab.cli", "run", "balance-loss", "--scale", "smoke", "-p", "seeds=2")
    (summary,) = (tmp_path / "home" / "results" / "balance-loss" / "smoke").glob("*/summary.json")
    published = json.loads(summary.read_text())
    assert len(published["runs"]) == 6 and published["title"].startswith(("weight 0 ends ", "weight 0 minus "))
    assert (summary.parent / "balance.svg").exists()
    assert "How much balance the gate needs" in (tmp_path / "home" / "pages" / "index.html").read_text()


# What the four changes of extend.md have in common: a small model, and what proves that the copy is what runs.
BEFORE = """
import math
from dataclasses import replace
from pathlib import Path
import torch
from torch.nn import functional as F
from moelab import kernels, simulate
from moelab.config import DecoderConfig, ExpertConfig, ModelConfig, ParallelConfig, RoutingConfig, from_json, to_json
from moelab.engine.checkpoint import hf
from moelab.inference import Generator, Sampling, set_mode
from moelab.models import build, routing

assert all(module.__file__.startswith({root!r}) for module in (kernels, routing, simulate))
sizes = dict(layers=2, hidden=16, heads=2, experts=(0, 4), top_k=2, vocab=32, context=16, init_std=0.2)
tokens, x = torch.arange(16)[None], torch.randn(9, 16)
def learn(config):
    model = build(config, 0)
    output = model(tokens, targets_BT=tokens)
    (output.loss + output.routing_loss()).backward()
    return model, float(output.routing_loss().detach())
"""

ROUTER_RULE = """
rule = RoutingConfig(scores="sqrt_softplus", drop_tokens=False, balance_rate=0.01)
router = learn(ModelConfig(**sizes, routing=rule))[0].blocks[1].ffn.router
assert router.weight.grad.abs().sum() > 0
scores, found = F.softplus(F.linear(x, router.weight)).sqrt(), router(x)
chosen = scores.topk(2).indices
assert torch.equal(found.expert_SK.long(), chosen)
weight = scores.gather(1, chosen)
torch.testing.assert_close(found.weight_SK, weight / weight.sum(1, keepdim=True))
"""

LOSS_TERM = """
rule = RoutingConfig(importance_loss=0.5, drop_tokens=False)
rules = (rule, replace(rule, importance_loss=0.0))
(model, loss), (plain, least) = (learn(ModelConfig(**sizes, routing=one)) for one in rules)
router, other = (made.blocks[1].ffn.router for made in (model, plain))
assert loss > least and not torch.equal(router.weight.grad, other.weight.grad)
sums_E, found = F.linear(x, router.weight).softmax(1).sum(0), router(x)
expected = 0.01 * found.aux_loss + 0.5 * sums_E.var(correction=0) / sums_E.mean() ** 2
torch.testing.assert_close(found.loss, expected)
try:
    RoutingConfig(importance_loss=-1.0)
except ValueError as error:
    assert "importance_loss must be 0 or more" in str(error)
else:
    raise AssertionError("a negative weight")
"""

ACTIVATION = """
sizes["routing"] = RoutingConfig(drop_tokens=False)
config, plain = ModelConfig(**sizes, decoder=DecoderConfig(feed_forward="relu2")), ModelConfig(**sizes)
assert from_json(ModelConfig, to_json(config)) == config
model, _ = learn(config)
dense, experts = model.blocks[0].ffn, model.blocks[1].ffn.experts
assert dense.up.weight.grad.any() and experts.up.grad.any()
torch.testing.assert_close(dense(x), dense.down(dense.up(x).relu() ** 2))
one = ((x @ experts.up[2] + experts.up_bias[2]).relu() ** 2) @ experts.down[2] + experts.down_bias[2]
torch.testing.assert_close(experts(x, torch.tensor([0, 0, 0, 9, 9], dtype=torch.int32)), one)
assert config.parameters() == sum(p.numel() for p in model.parameters()) == plain.parameters()
assert config.flops_per_token() == plain.flops_per_token()
for mode in ("optimised", "baseline"):
    Generator(set_mode(build(config, 0), mode)).generate([[1, 2]], Sampling(max_new_tokens=3, temperature=0))
"""

EXPERT_KIND = """
kind, rule = ExpertConfig(ffn=32, feed_forward="swiglu"), RoutingConfig(drop_tokens=False)
config = ModelConfig(**sizes, expert=kind, routing=rule)
assert from_json(ModelConfig, to_json(config)) == config
model, _ = learn(config)
assert config.parameters() == sum(p.numel() for p in model.parameters())
dense, experts = model.blocks[0].ffn, model.blocks[1].ffn.experts
assert dense.up.weight.shape == (64, 16) and experts.up.shape == (4, 16, 2, 32) and experts.up.grad.any()
torch.testing.assert_close(dense(x), dense.down(F.gelu(dense.up(x), approximate="tanh")))
gate, up = (x @ experts.up[2, :, i] + experts.up_bias[2, i] for i in (0, 1))
one = (F.silu(gate) * up) @ experts.down[2] + experts.down_bias[2]
torch.testing.assert_close(experts(x, torch.tensor([0, 0, 0, 9, 9], dtype=torch.int32)), one)
plain, more = replace(config, expert=ExpertConfig(ffn=32)), 16 * 32
assert config.flops_per_token() - plain.flops_per_token() == 3 * 2 * 2 * more  # K experts' third matrix
memory = [simulate.decode(c, ParallelConfig(data=2), "a100").memory_gib["experts"] * 2**30 for c in (config, plain)]
assert math.isclose(memory[0] - memory[1], 2 * 2 * (more + 32))  # two experts a GPU, fp16
made = (Generator(set_mode(build(config, 0), mode)) for mode in ("baseline", "optimised"))
found = [one.generate([[1, 2]], Sampling(max_new_tokens=5, temperature=0)) for one in made]
assert found[0] == found[1]
hf.export(build(config, 0), Path("exported"))
for ours, theirs in zip(build(config, 0).parameters(), hf.load(Path("exported")).parameters(), strict=True):
    assert torch.equal(ours, theirs)
rule = replace(rule, aux_choices="all")
modern = replace(config, decoder=DecoderConfig.modern(), experts=(4, 4), expert=ExpertConfig(), routing=rule)
assert hf.suitable_format(modern) == "mixtral"
assert hf.suitable_format(replace(modern, expert=replace(kind, ffn=0, feed_forward="gelu"))) == "moelab"
"""


CHANGES = [  # heading, what shows that it works, the files and the lines that the page names
    ("A new router rule", ROUTER_RULE, ["moelab/config/routing.py", "moelab/models/routing.py"], 3),
    ("A new loss term", LOSS_TERM, ["moelab/config/routing.py", "moelab/models/routing.py"], 2),
    ("A new activation", ACTIVATION, ["kernels/activations.py", "moelab/config/feed_forward.py"], 4),
    ("A new kind of expert", EXPERT_KIND, ["moelab/config/feed_forward.py"], 3),
]


@pytest.mark.slow
def test_the_changes_of_the_page_work(python, tmp_path):
    """Made to a copy: each as many lines and files as the page says, and models with them learn."""
    page, script = (EXAMPLES.parent / "extend.md").read_text(), ""
    for heading, proof, files, lines in CHANGES:
        section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        file, changed, count = "", [], 0
        for named, change in re.findall(r"In `([\w/]+\.py)`|```diff\n(.*?)```", section, re.S):
            if named:
                file = named
                continue
            kept = change.splitlines()
            before, after = ("".join(x[1:] + "\n" for x in kept if not x.startswith(other)) for other in "+-")
            text = (tmp_path / file).read_text()
            assert text.count(before) == 1, f"{file} is not as the page shows it"
            (tmp_path / file).write_text(text.replace(before, after))
            changed += [file] * (file not in changed)
            count += sum(x.startswith(("+", "-")) for x in kept)
        assert (changed, count) == (files, lines), heading
        script += BEFORE.format(root=str(tmp_path)) + proof
    python("-c", script)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings():
    pages = [ROOT / "README.md", ROOT / "LOG.md", *(ROOT / "docs").rglob("*.md"), ROOT / "slurm" / "README.md"]
    for page in pages:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("https://"):
                continue
            name, _, anchor = link.partition("#")
            target = page.parent / name.partition("?")[0] if name else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target.suffix == ".md":
                assert anchor in anchors(target), f"{page.name}: {link}"


def test_files_that_the_architecture_page_names_exist_and_the_index_has_every_page():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = {name for name in re.findall(r"`([\w./]+)`", text) if "/" in name}
    assert len(named) > 30
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "moelab" / name).exists() or name.startswith("."), name
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "README.md" or f"({name})" in index, name


def test_prose_keeps_to_120_characters():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in page.read_text().splitlines():
            assert len(line) <= 120 or line.startswith(("|", "![")), f"{page.name}: {line}"


def test_the_page_of_commands_has_every_command_and_no_other():
    def names(command, prefix: str) -> set[str]:
        subcommands = getattr(command, "commands", None)
        if subcommands is None:
            return {prefix}
        return {name for key, sub in subcommands.items() for name in names(sub, f"{prefix} {key}")}

    page = (ROOT / "docs" / "commands.md").read_text()
    sections = re.split(r"^### ", page, flags=re.M)[1:]
    found = {section.splitlines()[0] for section in sections}
    assert found == names(typer.main.get_command(app), "moelab") and len(found) == len(sections)
    for section in sections:
        name = section.splitlines()[0]
        code, said = re.fullmatch(r".+\n\n```\n(.*?)```\n\n(.+)", section, re.S).groups()
        assert f"{name.removeprefix('moelab')}" in code and len(said) > 60, name


def asked(text: str) -> list[list[str]]:
    """The words of the commands of a page that take an experiment with parameters, in blocks and in sentences."""
    lines = re.findall(r"^moelab .*$", text, re.M) + re.findall(r"`(moelab [^`]*)`", text)
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    return [words for words in commands if words[0] in ("run", "submit", "sweep", "prepare") and words[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "slurm/README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_experiments_and_parameters_of_commands_are_accepted(page, tmp_path, monkeypatch):
    """Dry runs, and for `prepare` what comes before any text is read."""
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    monkeypatch.setenv("MOELAB_PROFILE", "example")
    prepared = []

    def prepare(config, folder, progress):
        open_corpus(config, folder)
        prepared.append(config)
        return SimpleNamespace(train=SimpleNamespace(size=0), folder=folder)

    monkeypatch.setattr("moelab.data.preparation.prepare", prepare)
    for words in asked((ROOT / page).read_text()):
        unnamed = words[1].startswith("-") and words[1] != "--all"
        if unnamed or words[1] == "balance-loss" or "DIRECTORY" in str(words):
            continue  # no experiment of this checkout, or no model
        dry = [] if words[0] == "prepare" or "--dry-run" in words else ["--dry-run"]
        done = CliRunner().invoke(app, [*words, *dry])
        assert done.exit_code == 0, f"{page}: moelab {' '.join(words)}: {done.exception}"
    if page == "docs/commands.md":
        assert [config.corpus.partition("@")[0] for config in prepared] == ["hf:monology/pile-uncopyrighted", "mix15"]


def test_installing_is_a_target_of_the_makefile_as_the_pages_say():
    def commands(*target: str) -> str:
        command = ["make", "--dry-run", "VENV=nowhere", *target]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout

    assert "pip install" in commands("install") and "moelab run" not in commands("install")
    assert commands() == commands("reproduce") and "moelab run pr-moe --scale quick" in commands()
    assert "`make install` installs" in (ROOT / "docs" / "commands.md").read_text()
    assert "-e .[hf]" in (ROOT / "environment.yml").read_text(), "the cluster's text needs the package datasets"


@pytest.mark.parametrize("page", ["explore.md", "browse.md"])
def test_code_of_the_pages_runs(page, tmp_path, monkeypatch):
    """All of it but the trainings, which are asked for and not made."""
    monkeypatch.chdir(tmp_path)
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
        assert len({spec.id for spec in asked}) == 6 + 4 + 2 and len(prompts) == 3
    else:
        assert (tmp_path / "curve.svg").exists()


@pytest.mark.slow
def test_the_documentation_is_a_site_with_reference_and_search_that_asks_for_nothing_outside(tmp_path):
    (source := tmp_path / "source").mkdir()
    for name in ("README.md", "LOG.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, source)
    for name in ("docs", "slurm"):
        shutil.copytree(ROOT / name, source / name)
    (source / "results").symlink_to(ROOT / "results")
    command = [sys.executable, "-m", "sphinx", "-q", "-c", str(ROOT / "docs"), "-D", "moelab_api=moelab.plotting"]
    site = tmp_path / "html"
    done = subprocess.run([*command, str(source), str(site)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    page = (site / "api" / "moelab.plotting.html").read_text()
    assert "paper_points" in page and "hollow diamonds" in page
    for file in site.rglob("*.html"):
        asked = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.https?:[^>]*", file.read_text())
        assert asked == [], file
        for target in re.findall(r'<a [^>]*href="([^"#:?]+)[#?"]', file.read_text()):
            assert (file.parent / target).exists(), f"{file.name}: {target}"
    assert "reviewer" in (site / "searchindex.js").read_text()


def test_the_reference_has_all_modules(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    conf = importlib.import_module("conf")
    found = [module for package in conf.packages() for module in conf.modules(package)]
    wanted = {"moelab.config", "moelab.kernels.gating", "moelab.engine.exchange", "moelab.engine.checkpoint.hf"}
    assert {*wanted, "moelab.report.site.pages", "moelab.lab"} <= set(found) and len(found) == len(set(found))
