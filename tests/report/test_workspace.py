"""The pages of the workspace show one's own results beside the published ones, which stay as they are."""

import os

import pytest

from moelab import paths
from moelab.design import settings
from moelab.files import write_json
from moelab.report import ledger, site
from moelab.report.summary import SUMMARY, read_all
from moelab.runs import records
from moelab.runs.store import RunStore

CLAIMS = {"pr-moe-matches-moe128": (0.0, 0.01, 0.02)}
PUBLISHED, OWN = "pr-moe/cpu/20260101-000000", "scaling/smoke/20260102-000000"


def tree(folder):
    return {p.relative_to(folder): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def both(publish, result):
    """A published result with its pages, one of one's own, and a benchmark."""
    publish(paths.results(), claims=CLAIMS)
    site.update(publish=True)
    for folder in (".", "another-cpu"):
        (paths.results() / "benchmarks" / folder).mkdir(parents=True, exist_ok=True)
        (paths.results() / "benchmarks" / folder / "gate.provenance.json").write_text('{"commit": "aaa"}')
    publish(paths.own_results(), "scaling", "smoke", "20260102-000000")
    run = RunStore().run(settings.spec("350M", "smoke", 7, label="Mine"))
    write_json(run.path / "result.json", result(3.21))
    records.write([run], paths.own_results() / "runs")
    (paths.own_results() / "runs" / "broken.zip").write_bytes(b"no zip")


def test_pages_show_both_and_change_neither(both):
    page = paths.own_results() / OWN / "notebook.html"
    assert site.convert(page.with_suffix(".ipynb"))
    # A page that came with a colleague's result: it has a script, and the digest of the notebook beside it.
    page.write_text(page.read_text() + "<script src=x.js></script>")
    before = tree(paths.results()), tree(paths.own_results())
    built = site.update()
    assert built.results == 2 and not built.unreadable and built.index == paths.pages() / "index.html"
    start = built.index.with_name("figures.html").read_text()
    assert PUBLISHED in start and OWN in start and "gate.provenance.json" in start
    assert (paths.pages() / "benchmarks" / "another-cpu" / "gate.provenance.json").exists() and "(another-cpu)" in start
    assert "x.js" not in (paths.pages() / OWN / "notebook.html").read_text(), "pages are made here"
    (row,) = (line for line in (paths.pages() / "runs.html").read_text().splitlines() if "350m-twin-s7" in line)
    assert "Mine" in row and "3.2100" in row, "the numbers of a run that no result uses are its record's"
    assert "350m-twin-s7" not in (paths.results() / "runs.html").read_text()
    assert (tree(paths.results()), tree(paths.own_results())) == before
    assert OWN not in (paths.results() / "index.html").read_text(), "published pages show published results"
    assert site.update().written == 0


def test_what_changes_or_goes_in_the_results_does_so_on_the_pages(both):
    site.update()
    summary = paths.own_results() / OWN / SUMMARY
    summary.write_text(summary.read_text().replace("Loss falls", "Loss rises"))  # in place: the same file as the link's
    os.utime(summary, ns=(summary.stat().st_mtime_ns + 10**9,) * 2)
    assert "Loss rises" in site.update().index.read_text()
    for file in (folder := paths.own_results() / OWN).iterdir():
        file.unlink()
    folder.rmdir()
    for gone in (
        paths.results() / "benchmarks" / "gate.provenance.json",
        *(paths.own_results() / "runs").glob("350m*"),
    ):
        gone.unlink()
    built = site.update()
    assert built.results == 1 and OWN not in built.index.read_text() and not (paths.pages() / OWN).exists()
    assert [p.name for p in (paths.pages() / "benchmarks").iterdir()] == ["another-cpu"]
    assert "350m-twin-s7" not in (paths.pages() / "runs.html").read_text()


def test_runs_of_a_model_that_has_published_ones_are_shown_beside_them(both, result):
    (own,) = (paths.own_results() / "runs").glob("350m*")
    mine = RunStore().at(RunStore().ids()[0])
    other = RunStore().run(settings.spec("350M", "smoke", 8))
    write_json(other.path / "result.json", result(3.33))
    (pack,) = records.write([mine, other], paths.results() / "runs")
    assert pack.name == own.name
    for newer in (own, pack):  # whichever was packed later
        os.utime(newer, ns=(pack.stat().st_mtime_ns + 10**9,) * 2)
        site.update()
        rows = (paths.pages() / "runs.html").read_text()
        assert (rows.count(f"<code>{mine.spec.id}"), rows.count(f"<code>{other.spec.id}")) == (1, 1)
    own.unlink()
    site.update()
    assert not list((paths.pages() / "runs").glob("own-350m*")) and (paths.pages() / "runs" / pack.name).exists()


def test_files_are_copied_where_there_are_no_links(both, monkeypatch):
    def refused(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    assert site.update().results == 2
    assert not os.path.samefile(paths.pages() / OWN / SUMMARY, paths.own_results() / OWN / SUMMARY)
    assert not [p for p in paths.pages().rglob(".*")]


def test_claims_are_judged_from_both_and_a_copy_counts_once(both, publish):
    found = {path for path, _ in read_all(*paths.all_results())[0]}
    assert found == {PUBLISHED, OWN}
    publish(paths.own_results(), claims=CLAIMS)  # a copy of the published one
    assert len(read_all(*paths.all_results())[0]) == 2
    entries = {e.claim: e for e in ledger.ledger(*paths.all_results())}
    assert entries["pr-moe-matches-moe128"].deciding.result == PUBLISHED
