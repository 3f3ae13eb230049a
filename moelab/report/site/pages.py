"""Write the pages."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

import moelab
from moelab import paper
from moelab.design.verdicts import STYLES
from moelab.files import write_bytes
from moelab.plotting.axis import mark
from moelab.report.ledger import entries, family, scale_rank
from moelab.report.site import digest, downloads, front, hero, notebook, plot, sentences, simulator, template
from moelab.report.site.charts import charts
from moelab.report.site.claims import ClaimRow, all_claims, claims_of, sign, tally
from moelab.report.site.glossary import TERMS
from moelab.report.site.questions import ANSWERS, answers, share_reached
from moelab.report.site.results import Picture, Result, read_benchmarks, read_results, strongest
from moelab.report.site.server import FRAMING
from moelab.report.summary import unreadable_line

TABLE_ROWS = 40
"""Rows of a data table on a page; the file linked below the table has them all."""

ASSETS = ("site.css", "site.js", "curves.js", "explorer.js", "uplot.min.js", "uplot.min.css", "uplot.LICENSE.txt")
"""What all pages share: our style and scripts, and uPlot (MIT licence), which draws the interactive charts."""


@dataclass(frozen=True)
class Built:
    """What a build did.

    Attributes:
        index: the start page.
        results: number of results found.
        written: files that were new or had changed.
        unreadable: a line for each file that could not be read.
    """

    index: Path
    results: int
    written: int
    unreadable: Sequence[str]


def build(root: Path) -> Built:
    """Write the pages of all results below `root`; files that would stay the same are left as they are.

    A result that cannot be read is left out, and a notebook or table that cannot be read is missing on its result's
    page; the start page names them.
    """
    results, unreadable = read_results(root)
    ledger = entries((result.path, result.summary) for result in results)
    claims = all_claims(results, ledger)
    written = sum(_write_result(result, root, unreadable, claims) for result in results)
    benchmarks, unreadable_benchmarks = read_benchmarks(root)
    unreadable += unreadable_benchmarks
    for name in ASSETS:
        written += _write_if_changed(root / "assets" / name, template.asset(name))
    chapters, counted = front.chapters(results), tally(ledger)
    counts = downloads.claims_csv(ledger, claims)
    written += _write_if_changed(root / downloads.CLAIMS, counts)
    used = {result.scale for result in results} | {row.scale for row in claims if row.result}
    grid = simulator.explorer(results)
    about = {
        "up": "",
        "chapters": chapters,
        "claims": claims,
        "family": family(ledger),
        "verdicts": dict.fromkeys([*(i.key for of in counted.values() for i in of), *(row.key for row in claims)]),
        "scales": sorted(used, key=lambda scale: (scale_rank(scale), scale)),
        "results": results,
        "sizes": front.sizes(results),
        "runs": downloads.packed_runs(root, results),
        "unreadable": unreadable,
        **_VIEW,
    }
    start, tables = _start(root, results, claims, chapters)
    written += tables
    start |= {
        "explorer": simulator.EXPLORER if grid else "",
        "score": sentences.score(csv.DictReader(io.StringIO(counts))) if claims else "",
    }
    tested = [(chapter, plot.axes(of_it)) for chapter, of_it in front.by_chapter(claims, chapters)]
    pages: dict[str, dict[str, Any]] = {
        "index.html": start,
        "overview.html": {"forest": front.forest(claims, counted)},
        "claims.html": {"groups": tested},
        "figures.html": {"benchmarks": benchmarks, "verdicts_of": _verdicts(claims)},
        "runs.html": {},
        "compare.html": {"policy": FRAMING},
        simulator.SCOREBOARD: simulator.scoreboard(),
        **({simulator.EXPLORER: grid} if grid else {}),
        "about.html": {"terms": TERMS, "version": moelab.__version__},
    }
    for name, own in pages.items():
        if name == "about.html":  # the start page and what it loads are written by now
            loaded = (root / file for file in ("index.html", "assets/site.css", "assets/site.js", hero.FILE))
            own["kilobytes"] = sum(file.stat().st_size for file in loaded if file.exists()) / 1000
        written += _write_if_changed(root / name, template.render(name, **about, **own))
    return Built(root / "index.html", len(results), written, unreadable)


def _start(
    root: Path, results: Sequence[Result], claims: Sequence[ClaimRow], chapters: Sequence[front.Chapter]
) -> tuple[dict[str, Any], int]:
    """Write the start page's figure and tables; return what the page shows, and how many files were written."""
    shown, drawn = hero.write(results, root, claims)
    written = int(drawn)
    rows, found = digest.digest(chapters, claims), answers(results, claims)
    cost = sentences.costs(strongest(results, "scaling"), strongest(results, "throughput"))
    tables = {digest.FILE: [vars(row) for row in rows], ANSWERS: [answer.row() for answer in found]}
    for name, table in {**tables, sentences.COSTS: cost}.items():
        written += _write_if_changed(root / name, digest.to_csv(table))
    return {
        "hero": shown,
        "hero_caption": hero.caption(shown) if shown else "",
        "hero_picture": Picture.of(root / hero.FILE),
        "answers": found,
        "shares": _shares([r for r in results if r is shown or any(r.path in answer.link for answer in found)]),
        "digest": rows,
        "hours": digest.hours(results),
    }, written


def _verdicts(claims: Sequence[ClaimRow]) -> dict[str, str]:
    """Return the verdicts that a result or an experiment says, by its path or name, separated by ``|``."""
    found: dict[str, dict[str, None]] = {}
    for row in claims:
        for name in (row.result.path, row.experiment) if row.result else (row.experiment,):
            found.setdefault(name, {})[row.key] = None
    return {name: "|".join(keys) for name, keys in found.items()}


def _shares(results: Iterable[Result]) -> str:
    """Say which shares of the paper's training the runs behind results reach: ``16 %``, ``16 to 100 %`` or nothing."""
    found = sorted({min(round(100 * share), 100) for r in results if (share := share_reached(r))})
    return " to ".join(dict.fromkeys(map(str, (found[0], found[-1])))) + "\xa0%" if found else ""


def _write_if_changed(path: Path, content: str | bytes) -> bool:
    data = content.encode() if isinstance(content, str) else content
    if path.is_file() and path.read_bytes() == data:
        return False
    write_bytes(path, data)
    return True


def _write_result(result: Result, root: Path, unreadable: list[str], claims: Sequence[ClaimRow]) -> int:
    """Write the notebook and the page of a result where they have changed; return how many were written."""
    written = 0
    if result.has("notebook.ipynb"):
        executed = result.folder / "notebook.ipynb"
        result.names.add("notebook.html")
        try:
            written += notebook.convert(executed, result.summary.figures)
        except Exception as error:  # nbformat and nbconvert raise exceptions of many kinds for a malformed notebook
            unreadable.append(unreadable_line(executed, root, error))
            result.names.discard("notebook.html")
    decided = {row.claim.id: row for row in claims if row.decides and row.result is result}
    rows = [
        replace(row, verdict=(last := decided.get(row.claim.id, row)).verdict, alone=last.alone)
        for row in claims_of(result)
    ]
    tables: dict[str, list[dict[str, Any]]] = {}
    for table in result.summary.tables:
        try:
            tables[table.name] = result.rows(table.data)
        except (ValueError, OSError, RecursionError) as error:
            tables[table.name] = []
            unreadable.append(unreadable_line(result.folder / table.data, root, error))
    up = "../" * (result.path.count("/") + 1)
    html = template.render(
        "result.html",
        up=up,
        result=result,
        claims=rows,
        axes=plot.axes(rows),
        tables=tables,
        charts=charts(result),
        **_VIEW,
    )
    return written + _write_if_changed(result.folder / "index.html", html)


_VIEW = {
    "sign": sign,
    "statement": lambda id: paper.claim(id).statement,
    "styles": STYLES,
    "row_plot": plot.row_plot,
    "mark_of": lambda style, y: Markup(mark(style, y)),
    "command": front.command,
    "table_rows": TABLE_ROWS,
}
