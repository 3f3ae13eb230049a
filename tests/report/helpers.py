"""Make up results in small: what `Publication` leaves, and what the pages read of it."""

from dataclasses import asdict
from pathlib import Path

from moelab.files import write_json
from moelab.report.site.results import Result
from moelab.report.summary import SUMMARY, parse

FIGURES = ({"name": "curves"}, {"name": "gaps", "claims": ["moe128-beats-moe32"]})


def publish(results, experiment, scale, date, verdicts, figures=FIGURES, **parameters):
    about = {"experiment": experiment, "scale": scale, "title": "A title", "finished": date, "parameters": parameters}
    found = {"claims": [asdict(v) for v in verdicts], "figures": list(figures)}
    write_json(results / experiment / scale / date / SUMMARY, {**about, **found})


def result(folder=Path("nowhere"), experiment="pr-moe", scale="cpu", **others) -> Result:
    about = {"experiment": experiment, "scale": scale, "title": "t", "finished": "2026"}
    return Result(folder, f"{experiment}/{scale}/1", parse(about | others))
