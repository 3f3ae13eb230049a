"""`results/index.html`: one static page over all published results, for file:// and for `moelab browse`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moelab.files import read_json, write_text
from moelab.workbench.experiments import EXPERIMENTS
from moelab.workbench.progress import duration
from moelab.workbench.provenance import describe
from moelab.workbench.results import SUMMARY


def build(results: Path) -> Path:
    """Write `index.html` over every result below `results`; returns its path. The newest result of a scale comes first."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("moelab.workbench", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["duration"] = duration
    environment.filters["hardware"] = lambda record: describe(record) if record else "unknown hardware"
    environment.filters["number"] = _number
    page = environment.get_template("index.html").render(groups=_groups(results))
    index = results / "index.html"
    write_text(index, page)
    return index


def _commit(record: dict[str, Any]) -> str:
    return (record.get("commit") or "none")[:10] + (" with changes" if record.get("modified") else "")


def _number(value: float | None, unit: str = "") -> str:
    """Differences carry their sign, ratios none; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.3f}" if unit == "x" else f"{value:+.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _groups(results: Path) -> list[dict[str, Any]]:
    """Per experiment, in the paper's order: its description and its results, newest first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in results.glob(f"*/*/*/{SUMMARY}"):
        summary = read_json(file)
        summary["path"] = file.parent.relative_to(results).as_posix()
        summary["training_commits"] = sorted({_commit(run["provenance"]) for run in summary["runs"]})
        summary["notebook_html"] = (file.parent / "notebook.html").exists()
        found.setdefault(summary["experiment"], []).append(summary)
    order = [name for name in EXPERIMENTS if name in found] + sorted(set(found) - set(EXPERIMENTS))
    return [
        {
            "name": name,
            "about": EXPERIMENTS.get(name),
            "results": sorted(found[name], key=lambda s: (s["scale"] != "smoke", s["finished"]), reverse=True),
        }
        for name in order
    ]
