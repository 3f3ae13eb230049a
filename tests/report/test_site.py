"""The results pages: what they say, what they are made from, and that only what changed is written."""

import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import nbformat.v4 as nb
import pytest

from moelab import paper, paths
from moelab.design.verdicts import CANNOT_TELL, CANNOT_TEST, HOLDS
from moelab.plotting import layout, svg
from moelab.plotting.typography import typeset
from moelab.report import ledger, site
from moelab.report.site import claims, front, notebook, template
from moelab.report.site.results import read_results
from moelab.report.summary import FigureRow
from moelab.simulate.public import measurements
from tests.conftest import PICTURE
from tests.report.helpers import result


@pytest.fixture(scope="module")
def published(publish, tmp_path_factory):
    """Two experiments, two scales, a newer and an older result of the same scale."""
    root = tmp_path_factory.mktemp("site") / "results"
    reproduced = {"moe128-350m-beats-own-base": (-0.30, -0.31, -0.305), "moe128-350m-beats-1.3b": (0.1, 0.15, 0.2)}
    publish(root, "scaling", "cpu", "20260101-000000", claims=reproduced, finished="2026-01-01T00:00:00Z")
    publish(root, "pr-moe", "cpu", "20260102-000000", claims={"pr-moe-matches-moe128": (0.5, 0.5, 0.5)}, gain=0.1, finished="2026-01-02T00:00:00Z")  # fmt: skip
    publish(root, "pr-moe", "cpu", "20260103-000000", claims={"pr-moe-matches-moe128": (0.01, 0.011, 0.012)}, gain=0.1, finished="2026-01-03T00:00:00Z")  # fmt: skip
    publish(
        root, "pr-moe", "gpu", "20260101-000000", claims={"pr-moe-matches-moe128": (0.02,)}, gain=0.1, losses=(3.0,)
    )
    publish(root, "mine", "smoke", "20260101-000000")
    built = site.build(root)
    assert built.results == 5 and not built.unreadable
    return root


@pytest.fixture
def root(published, tmp_path):
    """A copy to change."""
    return shutil.copytree(published, tmp_path / "results")


def elements(html: str) -> list[tuple[str, dict]]:
    """The elements of a page with their attributes."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(html)
    return found


def test_every_link_on_every_page_leads_to_a_file_and_an_id_inside(published):
    pages = {page: elements(page.read_text()) for page in published.rglob("*.html")}
    assert len(pages) == 8 + 2 * 5
    ids = {page: {values.get("id") for _, values in found} for page, found in pages.items()}
    sources = {m.source for m in measurements()}  # of the scoreboard
    for page, found in pages.items():
        links = [(tag, values[k]) for tag, values in found for k in ("href", "src", "srcset") if values.get(k)]
        assert len(links) > 5
        for tag, link in links:
            outside = link.startswith("https://arxiv.org/abs/") or link in sources
            if link.startswith("data:") or (outside and tag == "a"):
                continue
            assert not re.match(r"[a-z]+:|//", link), f"{page} asks for {link}"
            target, _, anchor = link.partition("#")
            path = (page.parent / target.partition("?")[0]).resolve() if target else page
            assert path.is_file() and path.is_relative_to(published), f"{page}: {link}"
            assert not anchor or anchor in ids[path], f"{page}: {link}"


def test_the_ledger_has_every_claim_in_the_papers_order_and_the_verdict_that_counts(published):
    found, _ = read_results(published)
    rows = claims.all_claims(found, ledger.entries((r.path, r.summary) for r in found))
    deciding = [row for row in rows if row.decides]
    assert [row.claim.id for row in deciding] == [claim.id for claim in paper.claims()]
    experiments = [chapter.about.name for chapter in front.chapters(found)]
    assert tuple(experiments[:13]) == paper.experiments() and experiments[-1] == "mine"
    by_id = {row.claim.id: row for row in deciding}
    matches = by_id["pr-moe-matches-moe128"]
    assert matches.verdict == CANNOT_TELL and matches.scale == "cpu", "one seed on a GPU judges nothing"
    assert matches.result.path == "pr-moe/cpu/20260103-000000", "the newest result of a scale counts"
    assert [row.verdict for row in rows if row.claim.id == "pr-moe-matches-moe128" and not row.decides] == [CANNOT_TELL]
    assert matches.link == "pr-moe/cpu/20260103-000000/index.html#curves"
    assert by_id["speedup-1t"].verdict == CANNOT_TEST and by_id["speedup-1t"].result is None
    assert (published / "claims.csv").read_text().count("\n") > len(paper.claims())
    page = (published / "claims.html").read_text()
    assert all(typeset(claim.statement).replace("'", "&#39;") in page for claim in paper.claims())


def test_unchanged_results_are_not_written_again(root):
    assert site.build(root).written == 0
    executed = root / "pr-moe" / "cpu" / "20260103-000000" / "notebook.ipynb"
    executed.write_text(executed.read_text().replace("Notebook of", "Executed notebook of"))
    assert site.build(root).written == 1
    assert "Executed notebook of pr-moe" in executed.with_suffix(".html").read_text()
    summary = executed.with_name("summary.json")
    summary.write_text(summary.read_text().replace("Loss falls", "Loss rises"))
    site.build(root)
    assert "Loss rises" in (root / "figures.html").read_text()
    changed = sorted(p.name for p in root.rglob("*.*") if p.stat().st_mtime >= summary.stat().st_mtime)
    expected = ["digest.csv", "figures.html", "index.html", "index.html", "notebook.html"]
    assert changed == [*expected, "summary.json"], "the start page's line, and no page of another result"


def test_a_result_with_a_link_elsewhere_is_named_and_left_out(root):
    """What else cannot be read: test_ledger.py."""
    name = "mine/smoke/20260101-000000/summary.json"
    linked = json.loads((root / name).read_text())
    linked["figures"][0]["data"] = "javascript:alert(1)"
    (root / name).write_text(json.dumps(linked))
    built = site.build(root)
    (line,) = built.unreadable
    assert built.results == 4 and line.startswith(name) and "expected the name of a file" in line
    page = (root / "index.html").read_text()
    assert name in page and 'href="javascript' not in page


def test_a_malformed_notebook_table_or_benchmark_is_named_and_the_rest_is_built(published, root):
    broken = root / "mine" / "smoke" / "20260101-000000"
    (broken / "notebook.ipynb").write_text('{"cells": [{"cell_type": "code"}], "nbformat": 4}')
    (broken / "final.jsonl").write_text('{"arm": "a"}\n[1]\n')
    (root / "benchmarks" / "another-cpu").mkdir(parents=True)
    for name, text in {
        "gate.provenance.json": '{"hardware": "fast"}',
        "layer.provenance.json": '{"commit": "abc"}',
        "layer.jsonl": '{"ratio": Infinity, "other": NaN}\n',
        "another-cpu/layer.provenance.json": '{"commit": "def"}',
        "another-cpu/layer.jsonl": json.dumps({"ratio": 1.5, "parts_ms": {"gate": 2.25}, "inputs": "text " * 9}),
    }.items():
        (root / "benchmarks" / name).write_text(text)
    built = site.build(root)
    named = {line.partition(": ")[0] for line in built.unreadable}
    folder = "mine/smoke/20260101-000000"
    assert named == {f"{folder}/notebook.ipynb", f"{folder}/final.jsonl", "benchmarks/gate.provenance.json"}
    assert built.results == 5
    index, page = (root / "figures.html").read_text(), (broken / "index.html").read_text()
    assert all(name in (root / "index.html").read_text() for name in named)
    assert 'href="notebook.html"' not in page and "Executed notebook of mine" not in index
    assert "One MoE layer" in index and "nan" in index, "the other benchmark is shown"
    assert "equal FLOPs (another-cpu)" in index and 'href="benchmarks/another-cpu/layer.jsonl"' in index
    assert "2.25" not in index and "text text" not in index, "lists and long texts stand in the data file"
    assert site.build(root).written == 0
    shutil.copy(published / folder / "notebook.ipynb", broken)
    site.build(root)
    assert 'href="notebook.html"' in (broken / "index.html").read_text()


@pytest.mark.parametrize("continued", [False, True])
def test_a_page_says_which_arms_were_trained_on_which_machine(root, continued):
    """A run that was continued elsewhere is of both machines, and of both commits."""
    folder = "pr-moe/cpu/20260103-000000"
    assert "not all trained on one kind of processor" not in (root / folder / "index.html").read_text()
    record = json.loads((file := root / folder / "summary.json").read_text())
    (run,) = (r for r in record["runs"] if r["label"] == "350M" and r["spec"]["train"]["seed"] == 1)
    there = {"step": 0, "commit": "b" * 40, "modified": False, "hardware": {"cpu": "Another", "cores": 8}}
    here, run["provenance"] = run["provenance"], dict(there)
    if continued:
        run["provenance"] = {**here, "sessions": [there, {"step": 40, **here}]}
    file.write_text(json.dumps(record))
    (found,) = (one for one in read_results(root)[0] if one.path == folder)
    on_test = f"350M ({'0 1 2' if continued else '0 2'}), 350M+MoE-128 (0 1 2)"
    assert found.machines == {"Test": on_test, "Another": "350M (1)"}
    assert found.mixed_seeds == [1] and found.commits[:2] == ("a" * 10, "b" * 10)
    site.build(root)
    page = (root / folder / "index.html").read_text()
    assert "The runs of seed 1 were not all trained on one kind of processor" in page
    assert f"<li>Test: {on_test}</li>" in page and "<li>Another: 350M (1)</li>" in page
    assert "<dd>Test and Another</dd>" in page


def test_no_results_and_those_of_this_checkout_build(tmp_path):
    built = site.build(tmp_path / "none")
    assert built.results == 0 and "No results yet" in built.index.with_name("figures.html").read_text()
    root = Path(__file__).resolve().parents[2] / "results"
    shutil.copytree(root, tmp_path / "results")
    built = site.build(tmp_path / "results")
    assert built.results >= 1 and not built.unreadable
    assert site.build(tmp_path / "results").written == 0


def test_what_a_notebook_says_stays_text(publish, tmp_path):
    folder = publish(tmp_path, parameters={"corpus": "<script>alert(1)</script>"}, finished="</script><b>")
    site.build(tmp_path)
    page = (folder / "index.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page, "as it was written"
    assert all("<b>" not in page.read_text() for page in tmp_path.glob("*.html"))


def test_a_notebook_page_has_its_outputs_and_no_library_from_outside(published):
    page = (published / "pr-moe" / "cpu" / "20260103-000000" / "notebook.html").read_text()
    assert "data:image/png;base64," in page and "a warning" in page and "a slider" in page and "2.95" in page
    assert "cdnjs" not in page and "require" not in page
    text = re.sub(r"<(style|script).*?</\1>", "", page, flags=re.S)
    assert "<math" in page and "<mi>log</mi>" in page and "$" not in text
    assert 'alt="Figure: Notebook of pr-moe"' in page and "<details" not in page


def test_a_published_figure_stands_on_the_notebooks_page_once_as_its_file(tmp_path):
    def cell(source, count):
        return nb.new_code_cell(source, outputs=count * [nb.new_output("display_data", data={"image/png": PICTURE})])

    for name in ("curves", "gaps", "missing"):
        if name != "missing":
            (tmp_path / f"{name}.svg").write_text('<svg width="360pt" height="90pt"></svg>')
    cells = [
        cell('publication.figure(b, "gaps")\npublication.figure(a, "curves")', 2),
        cell('publication.figure(a, "curves"); plt.figure()', 2),
        cell('publication.figure(c, "missing")', 1),
    ]
    (tmp_path / "notebook.ipynb").write_text(nbformat.writes(nb.new_notebook(cells=cells)))
    rows = [FigureRow(name, f"{name} <fall>") for name in ("curves", "gaps", "missing")]
    assert site.convert(tmp_path / "notebook.ipynb", rows)
    page = (tmp_path / "notebook.html").read_text()
    assert re.findall(r'src="(\w+)\.svg"', page) == ["gaps", "curves"] and page.count("data:image/png") == 3
    assert "<strong>gaps &lt;fall&gt;</strong>" in page and 'height="120"' in page


def test_a_notebooks_page_is_made_again_once_the_code_that_makes_it_has_changed(tmp_path, monkeypatch):
    (tmp_path / "notebook.ipynb").write_text(nbformat.writes(nb.new_notebook(cells=[nb.new_markdown_cell("# T")])))
    assert site.convert(tmp_path / "notebook.ipynb")
    assert not site.convert(tmp_path / "notebook.ipynb")
    (tmp_path / "sanitize.py").write_text("of another version")
    monkeypatch.setattr(notebook.sanitize, "__file__", str(tmp_path / "sanitize.py"))
    assert site.convert(tmp_path / "notebook.ipynb")


def test_long_code_and_tables_are_folded_and_a_formula_nobody_can_read_stays(tmp_path):
    def table(rows):
        html = f"<table><thead><tr><th>a</th></tr></thead>{'<tr><td>1</td></tr>' * rows}</table>"
        return nb.new_output("execute_result", data={"text/html": html})

    view = "application/vnd.jupyter.widget-view+json"
    widgets = [
        nb.new_output("display_data", data={view: {"model_id": "0"}, "text/plain": text})
        for text in ("Output()", "VBox(children=(IntSlider(value=1),))")
    ]
    cells = [
        nb.new_markdown_cell("$$\\ell_i = -\\sum_v p_v \\log q_v$$ and [another notebook](02_half_moe.ipynb)"),
        nb.new_code_cell("x = 1\n" * 20, outputs=widgets),
        nb.new_code_cell("y = 2", metadata={"jupyter": {"source_hidden": True}}),
        *(nb.new_code_cell("table", outputs=[table(rows)]) for rows in (4, 40)),
    ]
    (tmp_path / "notebook.ipynb").write_text(nbformat.writes(nb.new_notebook(cells=cells)))
    assert site.convert(tmp_path / "notebook.ipynb")
    page = (tmp_path / "notebook.html").read_text()
    assert 'display="block"' in page and "<summary>20 lines of code</summary>" in page
    assert 'href="../../../figures.html#half-moe">another notebook' in page
    assert "<summary>1 line of code</summary>" in page, "what JupyterLab hides"
    assert "<summary>Table of 40 rows</summary>" in page and page.count('<details class="table">') == 1
    assert "Controls to play with" in page and "VBox" not in page and "Output()" not in page
    assert notebook.mathml("\\left(x", "inline").startswith("<code>")


HOSTILE = [
    "<script>attack()</script>",
    "<img src='x' onerror='attack()'>",
    '<a href="javascript:attack()">text</a>',
    '<a href=" JaVaScRiPt:attack()">text</a>',
    '<a href="data:text/html,attack()">text</a>',
    '<iframe src="https://attack.example"></iframe>',
    '<iframe srcdoc="attack()"></iframe>',
    '<img src="https://attack.example/x.png">',
    '<img src="//attack.example/x.png">',
    '<svg onload="attack()"><script>attack()</script></svg>',
    "<style>@import url(https://attack.example)</style>",
    '<p style="background: url(https://attack.example)">text</p>',
    '<object data="attack"></object><embed src="attack">',
    '<form action="https://attack.example"><input name="attack"></form>',
    '<meta http-equiv="refresh" content="0;url=javascript:attack()">',
    '<base href="https://attack.example">',
    '<math href="javascript:attack()"><mtext><script>attack()</script></mtext></math>',
    '<noscript><p title="</noscript><img src=x onerror=attack()>">',
]


@pytest.mark.parametrize("where", ["markdown", "text/html", "text/markdown", "image/svg+xml", "raw cell", "tags"])
def test_what_a_notebook_brings_along_runs_nothing(tmp_path, where):
    cells = [nb.new_markdown_cell("# Title")]
    for text in HOSTILE:
        if where == "markdown":
            cells.append(nb.new_markdown_cell("Words\n\n" + text))
        elif where == "raw cell":
            cells.append(nb.new_raw_cell(text, metadata={"raw_mimetype": "text/html"}))
        elif where == "tags":
            cells.append(nb.new_code_cell("1", metadata={"tags": ['">' + text.replace(",", ";")]}))
        else:
            cells.append(nb.new_code_cell("1", outputs=[nb.new_output("display_data", data={where: text})]))
    (tmp_path / "notebook.ipynb").write_text(nbformat.writes(nb.new_notebook(cells=cells)))
    assert site.convert(tmp_path / "notebook.ipynb")
    page = (tmp_path / "notebook.html").read_text()
    body = page.partition('<div class="notebook">')[2].partition("</main>")[0]
    found = elements(body)
    active = "script style iframe object embed form input meta base svg noscript"
    assert found and not {tag for tag, _ in found} & set(active.split())
    for _, attributes in found:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "src", "style", "srcdoc", "action", "data"):
            value = attributes.get(name) or ""
            assert value.startswith("data:image/svg+xml;base64,") or "attack" not in value
    assert "default-src 'none'; script-src 'self'" in unescape(page.partition("<title>")[0])


def test_every_formula_of_the_notebooks_can_be_read():
    found = []
    for path in paths.notebooks().glob("*.ipynb"):
        texts = (cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
        found += re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", "\n\n".join(texts), re.S)
    assert len(found) > 8
    for one, other in found:
        assert notebook.mathml(one or other, "inline").startswith("<math"), one or other


def test_a_figure_is_one_file_whose_dark_colours_are_readable(published):
    folder = published / "pr-moe" / "cpu" / "20260103-000000"
    drawn = (folder / "curves.svg").read_text()
    assert {path.name for path in folder.glob("curves*")} == {"curves.svg", "curves.jsonl"}
    dark = dict(re.findall(r"--c([0-9a-f]{6}):(#[0-9a-f]{6})", drawn))
    assert dark["ffffff"] == svg.GROUND and dark["000000"] == svg.INK
    assert svg.dark_color("#E69F00") == "#E69F00", "a colour that can be read stays"
    used = set(re.findall(r"(fill|stroke): #([0-9a-f]{6})", drawn))
    assert {color for _, color in used} <= set(dark) and len(used) >= 3
    for what, color in used:
        rule = f'[style*="{what}: #{color}"]{{{what}:var(--c{color},#{color})!important}}'
        assert rule in drawn and re.search(f'<[^>]* style="[^"]*{what}: #{color}', drawn), "for programs without styles"
    # Whatever writes or draws, grid and frames of nothing apart, stands out from the ground.
    faint = {ink for ink in set(dark.values()) - {svg.GROUND} if svg.contrast(ink, svg.GROUND) < 4.5}
    assert len(faint) <= 1, faint  # the grid
    assert "Loss falls" not in drawn, "the page says it"
    (found,) = (one for one in read_results(published)[0] if one.folder == folder)
    picture = found.picture("curves")
    assert picture.file == "curves.svg" and picture.width == round(96 * layout.WIDTH) < picture.height * 3
    assert found.picture("missing").width == 0


def test_numbers_have_their_units():
    ids = ("moe128-350m-beats-own-base", "training-5x-cheaper", "1t-under-25ms")
    shown = [template.quantity(paper.claim(id).value, paper.claim(id)) for id in ids]
    assert shown == ["−0.307 nats/token", "5.31×", "25 ms"]
    order_ = paper.claim("pytorch-moe-slower-than-dense")
    assert template.quantity(12.6, order_) == "+12.6 ms" and template.quantity(None, order_) == "–"


def entry(claim: str, kind: str, verdict: str) -> ledger.Entry:
    about = paper.claim(claim)
    said = (claim, about.experiment, about.where, about.statement)
    return ledger.Entry(*said, "", "cpu", (), "", (), kind, verdict, verdict)


def test_the_tally_keeps_kinds_apart_and_trained_from_timed():
    found = claims.tally(
        [
            entry("moe128-350m-beats-own-base", "measured", HOLDS),
            entry("pr-moe-matches-moe128", "measured", "a verdict of tomorrow"),
            entry("kernels-6x", "measured", HOLDS),
            entry("pr-moe-size", "counted", HOLDS),
            entry("1t-under-25ms", "simulated", HOLDS),
            entry("speedup-1t", "open", CANNOT_TEST),
        ]
    )
    assert {item.claims for items in found.values() for item in items} == {1}
    assert {name: [item.key for item in items] for name, items in found.items()} == {
        "trained": ["trained: holds", "trained: a verdict of tomorrow"],
        "timed": ["timed: holds"],
        "counted": ["counted: holds"],
        "simulated": ["simulated: holds"],
        "open": [CANNOT_TEST],
    }


def test_the_page_counts_as_the_ledger_does_and_names_the_family(published):
    page = (published / "overview.html").read_text()
    every = ledger.ledger(published)
    counted = claims.tally(every)
    for kind, of in ledger.counts(every).items():
        groups = ("trained", "timed") if kind == "measured" else (kind,)
        total = sum(item.claims for name in groups for item in counted.get(name, []))
        assert total == sum(of.values()), "as many claims of a kind as the ledger counts"
    for items in counted.values():
        for item in items:
            assert f'aria-label="{item.claims} {item.key}"'.replace("'", "&#39;") in page
    start = (published / "index.html").read_text()
    assert str(ledger.family(every)).split(",")[0] in start.replace("\u00a0", " ")
    assert 'href="claims.html?verdict=trained%3A%20cannot%20tell%20yet"' in page
    assert "<option>trained: cannot tell yet</option>" in (published / "claims.html").read_text()


def test_runs_of_an_arm_that_were_trained_differently_are_not_averaged():
    def run(label, lr, seed, loss):
        spec = {"train": {"lr": lr, "min_lr": lr / 10, "seed": seed}}
        return {"id": f"{label[0]}{lr}{seed}", "label": label, "spec": spec, "result": {"validation_loss": loss}}

    runs = [run("A", 0.1, 0, 4.0), run("A", 0.1, 1, 5.0), run("A", 0.2, 0, 6.0), run("B", 0.1, 0, 3.0)]
    runs.append(run("B, shared rate", 0.1, 0, 3.0))  # the same run once more
    told = [(a["arm"], a["seeds"], a["validation_loss"]) for a in result(runs=runs).arms]
    assert told == [("A, lr 0.1", 2, 4.5), ("A, lr 0.2", 1, 6.0), ("B", 1, 3.0)]
    models = [{"layers": 2, "expert": {"ffn": 32}}, {"layers": 2, "expert": {"ffn": 64}}]
    runs = [run("C", 0.1, i, 3.0 + i) | {"spec": {"model": model}} for i, model in enumerate(models)]
    assert [a["arm"] for a in result(runs=runs).arms] == ["C, expert.ffn 32", "C, expert.ffn 64"], "a sweep's"


@pytest.mark.parametrize(
    ("title", "head", "rest"),
    [
        ("A ends 0.1 nats below B", "A ends 0.1 nats below B", ""),
        (
            "A ends 0.1 nats below B (95 % interval -0.2 to 0.0, 3 seeds); A ends level with C",
            "A ends 0.1 nats below B",
            "95 % interval -0.2 to 0.0, 3 seeds; A ends level with C",
        ),
        (
            "Loss at the end of the curves: dense 3.9, MoE-32 3.7, MoE-128 3.6 nats per token",
            "Loss at the end of the curves",
            "dense 3.9, MoE-32 3.7, MoE-128 3.6 nats per token",
        ),
        (
            "350M base: KD minus alone, -0.2 nats at 70% of the training, -0.1 at its end",
            "350M base: KD minus alone, -0.2 nats at 70% of the training, -0.1 at its end",
            "",
        ),
        (
            "A is 2.3 times faster than B (paper: 2.4; read off a plot) and cheaper than C",
            "A is 2.3 times faster than B (paper: 2.4; read off a plot) and cheaper than C",
            "",
        ),
    ],
)
def test_a_finding_is_parted_into_a_heading_and_its_detail(title, head, rest):
    assert template.parted(title) == (head, rest)
