"""A publication empties the folder of its own draft and touches nothing else."""

import json
import re
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from moelab import paper, paths
from moelab.design.judging import judge
from moelab.experiments import EXPERIMENTS
from moelab.files import read_json, write_json
from moelab.plotting import figures
from moelab.report.publication import Publication, lines
from moelab.report.summary import SUMMARY
from moelab.runs.collection import Runs
from moelab.runs.store import RunStore

NO_NAMES = (("pr-moe", "../../../victim"), ("..", "runs"), ("", ""), ("/", "victim"), ("pr-moe", "."), (None, "cpu"))


@pytest.mark.parametrize("batch", [False, True])
def test_names_that_are_no_folder_of_the_drafts_are_refused(tmp_path, monkeypatch, batch):
    victims = [tmp_path / "victim" / "a", tmp_path / "home" / "runs" / "a", tmp_path / "home" / "drafts" / "b" / "a"]
    for file in victims:
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    if batch:
        monkeypatch.setenv("MOELAB_PUBLICATION", str(tmp_path / "given"))
    for experiment, scale in NO_NAMES:
        with pytest.raises(ValueError, match=r"(experiment|scale): expected the name of a file"):
            Publication.open(experiment, scale, {})
    assert all(file.is_file() for file in victims)


def test_parameters_that_no_summary_can_hold_are_refused_before_the_training():
    with pytest.raises(ValueError, match=r"^parameters of mine: Object of type ndarray is not JSON serializable$"):
        Publication.open("mine", "quick", {"rates": pd.Series([1.0]).to_numpy()})


def test_a_link_out_of_the_drafts_is_not_followed(tmp_path):
    (tmp_path / "victim" / "cpu").mkdir(parents=True)
    (file := tmp_path / "victim" / "cpu" / "a").write_text("mine")
    drafts = paths.home() / "drafts"
    drafts.mkdir(parents=True)
    (drafts / "pr-moe").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="is a link out of"):
        Publication.open("pr-moe", "cpu", {})
    assert file.is_file()


def test_figures_and_tables_stay_in_their_folder(tmp_path):
    publication = Publication.open("pr-moe", "cpu", {})
    (publication.path / "old").touch()
    publication = Publication.open("pr-moe", "cpu", {})
    assert list(publication.path.iterdir()) == [], "a draft begins empty"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="figure's name: expected"):
        publication.figure(plt.figure(), "../curves", title="Curves")
    with pytest.raises(ValueError, match="table's name: expected"):
        publication.table(pd.DataFrame(), "../final", title="Final")
    assert sorted(tmp_path.rglob("*")) == before
    plt.close("all")


def test_a_cell_that_is_executed_again_replaces_its_figure_and_rows_of_one_name_are_not_lost():
    publication, rows = Publication.open("pr-moe", "cpu", {}), pd.DataFrame({"loss": [1.0]})
    fig, _ = figures.panels()
    for title in ("Before", "After"):
        publication.figure(fig, "losses", title=title, data=rows)
        publication.table(rows, "losses", title=title)  # the same rows
    assert [row.title for row in (*publication.figures, *publication.tables)] == ["After"] * 2
    for add in (publication.table, lambda *a, **k: publication.figure(fig, a[1], data=a[0], **k)):
        with pytest.raises(ValueError, match=r"^losses.jsonl: a figure and a table with other rows have this name"):
            add(rows + 1, "losses", title="Other rows")
    plt.close(fig)
    assert (publication.path / "losses.jsonl").read_text() == '{"loss":1.0}\n'


def test_rows_keep_the_arms_that_an_index_names():
    table = pd.DataFrame({"loss": [1.5]}, index=pd.Index(["Dense"], name="arm"))
    assert lines(table) == '{"arm":"Dense","loss":1.5}\n' == lines(table.reset_index())


@pytest.mark.parametrize("own", ["", "A title of its own"])
def test_a_figure_gets_its_title_unless_it_has_one(own):
    fig, _ = figures.panels()
    if own:
        figures.title(fig, own)
    Publication.open("pr-moe", "cpu", {}).figure(fig, "curves", title="The finding")
    assert fig.get_suptitle() == (own or "The finding")
    plt.close(fig)


def test_a_run_that_stands_for_both_rates_counts_once(result):
    specs = [s for s in EXPERIMENTS["half-moe"].specs("full") if "First half" in s.label]
    assert len(specs) == 2 and specs[0].id == specs[1].id
    runs = [RunStore().run(spec) for spec in specs]
    publication = Publication.open("half-moe", "full", {})
    publication.finish(Runs(runs), title="Missing")
    summary = read_json(publication.path / SUMMARY)
    assert summary["missing"] == [specs[0].id]
    write_json(runs[0].path / "result.json", result(seconds=1.0))
    write_json(runs[0].path / "provenance.json", {})
    publication.finish(Runs(runs), title="There")
    summary = read_json(publication.path / SUMMARY)
    assert summary["training_seconds"] == 1 and [run["label"] for run in summary["runs"]] == [s.title for s in specs]
    written = (publication.path / SUMMARY).read_text().splitlines()
    assert sum(specs[0].id in line for line in written) == 2, "a line a run"


def test_a_conclusion_is_that_of_the_verdicts_which_are_published(capsys):
    publication = Publication.open("pr-moe", "cpu", {})
    publication.claims([judge(paper.claim("pr-moe-size"), [0.335], exact=True)])
    said = str(publication.conclude(title="The finding"))
    assert capsys.readouterr().out == f"draft written to {publication.path}\n"
    assert "**What was found.** The finding.\n" in said and "*holds*" in said
    assert read_json(publication.path / SUMMARY)["title"] == "The finding"


@pytest.mark.parametrize(("losses", "named"), [((5.0, 3.0, 3.04), False), ((5.0, 3.0, 3.3, 3.2), True), ((), False)])
def test_a_run_that_broke_down_is_named_and_counts(result, losses, named):
    run = RunStore().run(EXPERIMENTS["pr-moe"].specs("full")[0])
    write_json(run.path / "result.json", result())
    write_json(run.path / "provenance.json", {})
    rows = [{"step": i, "tokens": 50 * i, "loss": loss} for i, loss in enumerate(losses)]
    (run.path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    publication = Publication.open("pr-moe", "full", {})
    publication.finish(Runs([run, run]), title="There")
    summary = read_json(publication.path / SUMMARY)
    assert summary["broken_down"] == named * ["Dense, seed 0: 0.20 nats, lowest after 33% of its training"]
    assert len(summary["runs"]) == 2


def test_no_published_file_names_a_host():
    """Provenance of earlier versions named the host and the process that had trained a run."""
    root, named = Path(__file__).resolve().parents[2] / "results", []
    for file in (path for path in root.rglob("*") if path.suffix in (".json", ".jsonl", ".ipynb", ".js", ".zip")):
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as packed:
                texts = [packed.read(name) for name in packed.namelist() if name.endswith((".json", ".jsonl"))]
        else:
            texts = [file.read_bytes()]
        named += [file.relative_to(root)] if any(re.search(rb'"host(name)?":', text) for text in texts) else []
    assert not named
