"""Writing the site."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.files import write_text
from moelab.plotting import svg
from moelab.report.site import notebook, template
from moelab.report.site.collect import (
    Line,
    Result,
    benchmarks,
    chapters,
    grouped,
    judged,
    ledger,
    results,
    scale_rank,
    sign,
    tally,
)
from moelab.report.site.plot import interval_plot

TABLE_ROWS = 40
"""Rows of a data table on a page; the file beside has them all."""


@dataclass(frozen=True)
class Built:
    """What a build did.

    Attributes:
        index: the start page.
        results: publications found.
        written: files that were new or had changed.
        converted: notebooks among them.
        unreadable: a line for each publication that was left out.
    """

    index: Path
    results: int
    written: int
    converted: int
    unreadable: Sequence[str]


def build(root: Path) -> Built:
    """Write the pages of all results below `root`. What is already there and made from the same files is left alone.

    A publication that cannot be read is left out, and the start page says so.
    """
    found, unreadable = results(root)
    converted = _convert([r.folder / "notebook.ipynb" for r in found if r.has("notebook.ipynb")])
    written = converted + sum(_darken(result) + _write_result(result) for result in found)
    for name in ("site.css", "site.js"):
        written += _write_if_changed(root / "assets" / name, template.asset(name))
    lines = ledger(found)
    parts = chapters(found)
    used = {result.scale for result in found} | {line.scale for line in lines if line.result}
    scales = sorted(used, key=lambda scale: (scale_rank(scale), scale))
    page = template.render(
        "index.html",
        up="",
        chapters=parts,
        benchmarks=benchmarks(root),
        lines=lines,
        groups=grouped(lines, parts),
        tally=tally(Counter(line.verdict for line in lines if line.best)),
        scales=scales,
        results=found,
        unreadable=unreadable,
        **_VIEW,
    )
    written += _write_if_changed(root / "index.html", page)
    written += _write_if_changed(root / "compare.html", template.render("compare.html", up="", results=found))
    return Built(root / "index.html", len(found), written, converted, unreadable)


def _write_if_changed(path: Path, text: str) -> bool:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write_text(path, text)
    return True


def _convert(notebooks: Sequence[Path]) -> int:
    """Convert the notebooks whose pages are not current, in parallel where there are many; returns how many there were."""
    todo = [path for path in notebooks if not notebook.is_current(path)]
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
    if len(todo) < 8 or workers < 2:
        for path in todo:
            notebook.convert(path)
    else:
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(notebook.convert, todo, chunksize=4))
    return len(todo)


def _darken(result: Result) -> int:
    """Dark variants of the figures that were published without one; returns how many."""
    todo = [
        f["name"] for f in result.figures if result.has(f"{f['name']}.svg") and not result.has(f"{f['name']}-dark.svg")
    ]
    for name in todo:
        text = (result.folder / f"{name}.svg").read_text(encoding="utf-8")
        write_text(result.folder / f"{name}-dark.svg", svg.dark(text))
        result.names.add(f"{name}-dark.svg")
    return len(todo)


def _write_result(result: Result) -> int:
    """The page and the comparison data of one result; returns how many files were written."""
    about = result.about
    described = [about.title, about.paper, about.question, about.paper_answer] if about else []
    lines = judged(result)
    tables = {t["name"]: result.rows(t["data"]) for t in result.tables}
    shown = sorted(name for name in result.names if not name.endswith((".html", ".js")))
    parts = json.dumps([result.path, result.summary, described, shown, tables]), repr([line.claim for line in lines])
    mark = template.mark(*parts, names=("result.html", "base.html", "macros.html"))
    page, data = result.folder / "index.html", result.folder / "data.js"
    if template.is_current(page, mark) and data.exists():
        return 0
    up = "../" * (result.path.count("/") + 1)
    html = template.render("result.html", mark=mark, up=up, result=result, lines=lines, tables=tables, **_VIEW)
    write_text(data, f"moelab.add({json.dumps(_compared(result, lines, tables))});\n")
    write_text(page, html)
    return 2


def _compared(result: Result, lines: Sequence[Line], tables: Mapping[str, list]) -> dict[str, Any]:
    """What compare.html shows of a result."""
    return {
        "path": result.path,
        "title": result.title,
        "facts": {
            "experiment": result.experiment,
            "scale": result.scale,
            "finished": result.date,
            "seeds": result.seeds,
            "hardware": result.hardware,
            "cost": result.cost,
            "commits": ", ".join(dict.fromkeys(result.commits)),
            **{f"parameter {k}": json.dumps(v) for k, v in result.summary.get("parameters", {}).items()},
        },
        "claims": [
            {
                "id": line.claim.id,
                "statement": line.claim.statement,
                "paper": line.paper,
                "ours": template.quantity(line.ours, line.claim),
                "interval": interval(line),
                "verdict": line.verdict,
            }
            for line in lines
        ],
        "arms": result.arms,
        "figures": [{"name": f["name"], "title": f["title"], **result.image(f["name"])} for f in result.figures],
        "tables": {t["name"]: {"title": t["title"], "rows": tables[t["name"]][:TABLE_ROWS]} for t in result.tables},
    }


def interval(line: Line) -> str:
    """The interval as text: ``exact`` for arithmetic, a dash where there is none."""
    if line.low is None or line.high is None:
        return "–"
    if line.samples == 0:
        return "exact"
    return f"{template.number(line.low, line.claim)} to {template.number(line.high, line.claim)}"


_VIEW = {"sign": sign, "plot": interval_plot, "interval": interval, "judged": judged, "table_rows": TABLE_ROWS}
