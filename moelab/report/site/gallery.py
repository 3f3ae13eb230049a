"""The chapters of the gallery: one per experiment, in the order of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moelab import paper
from moelab.experiments import EXPERIMENTS, Experiment
from moelab.report.site.claims import ClaimRow
from moelab.report.site.results import Result, described, weakness


@dataclass(frozen=True)
class Chapter:
    """One experiment of the gallery.

    Attributes:
        about: the experiment.
        results: the newest of each scale and base, the strongest evidence first.
    """

    about: Experiment
    results: Sequence[Result]


def chapters(results: Sequence[Result]) -> list[Chapter]:
    """Return a chapter for every experiment, with or without a result, in the order of the paper's claims.

    Args:
        results: the newest first.
    """
    newest: dict[str, dict[tuple[str, str], Result]] = {}
    for result in sorted(results, key=weakness):
        newest.setdefault(result.experiment, {}).setdefault((result.scale, result.summary.other_base), result)
    names = dict.fromkeys([*paper.experiments(), *EXPERIMENTS, *newest])
    return [Chapter(described(name), list(newest.get(name, {}).values())) for name in names]


def by_chapter(rows: Sequence[ClaimRow], chapters: Sequence[Chapter]) -> list[tuple[Chapter, list[ClaimRow]]]:
    """Return the claims that a result supports, grouped by experiment in the order of `chapters`."""
    groups: dict[str, list[ClaimRow]] = {}
    for row in rows:
        if row.result:
            groups.setdefault(row.experiment, []).append(row)
    return [(chapter, groups[chapter.about.name]) for chapter in chapters if chapter.about.name in groups]
