"""The chapters of the gallery: one per experiment, in the order of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moelab import paper
from moelab.experiments import EXPERIMENTS
from moelab.report.site.claims import ClaimRow
from moelab.report.site.order import position
from moelab.report.site.results import Result, weakness


@dataclass(frozen=True)
class Chapter:
    """One experiment of the gallery.

    Attributes:
        name, title, reference, question, answer: the experiment's, as far as they are known.
        command: the command that runs it, empty for an experiment that this version does not have.
        results: scale -> newest result, the strongest evidence first.
    """

    name: str
    title: str
    reference: str
    question: str
    answer: str
    command: str
    results: Mapping[str, Result]


def chapters(results: Sequence[Result]) -> list[Chapter]:
    """Return a chapter for every experiment, with or without a result, in the order of the paper.

    Args:
        results: the newest first.
    """
    newest: dict[str, dict[str, Result]] = {}
    for result in sorted(results, key=weakness):
        newest.setdefault(result.experiment, {}).setdefault(result.scale, result)
    found = [_chapter(name, newest.get(name, {})) for name in dict.fromkeys([*EXPERIMENTS, *newest])]
    return sorted(found, key=lambda c: position(c.reference))


def _chapter(name: str, by_scale: Mapping[str, Result]) -> Chapter:
    if about := EXPERIMENTS.get(name):
        described = (about.title, about.paper, about.question, about.paper_answer, f"moelab run {name}")
    else:
        described = (name, ", ".join(c.where for c in paper.claims() if c.experiment == name), "", "", "")
    return Chapter(name, *described, by_scale)


def by_chapter(rows: Sequence[ClaimRow], chapters: Sequence[Chapter]) -> list[tuple[Chapter, list[ClaimRow]]]:
    """Return the claims that a result supports, grouped by experiment in the order of `chapters`."""
    groups: dict[str, list[ClaimRow]] = {}
    for row in rows:
        if row.result:
            groups.setdefault(row.experiment, []).append(row)
    return [(chapter, groups[chapter.name]) for chapter in chapters if chapter.name in groups]
