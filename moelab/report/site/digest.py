"""One row an experiment: question, outcome, effect, cost of the effect, seeds, hours, link; as rows and CSV."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moelab.experiments import distillation
from moelab.lazy import pd
from moelab.report.site.charts import models_of
from moelab.report.site.claims import ClaimRow
from moelab.report.site.front import Chapter
from moelab.report.site.results import Result
from moelab.report.site.template import quantity
from moelab.report.summary import RunRow
from moelab.runs.spec import RunSpec

FILE = "digest.csv"
_PREFERRED = {
    "scaling": "moe128-350m-beats-own-base",
    "pr-moe": "pr-moe-matches-moe128",
    "distillation": "staged-kd-matches-teacher-350m",
    "inference-large": "1t-under-25ms",
    "moe-vs-dense-inference": "faster-than-6.7b",
}
"""Experiment -> the claim that its row quotes; of others the first with a value."""


@dataclass(frozen=True)
class Row:
    """An experiment in a line.

    Attributes:
        experiment, title, reference, question, outcome: what was asked and found.
        effect: our value with its interval, and whose it is; empty where no claim has one.
        verdict: on that claim, after adjustment for the number of tests; empty without one.
        flops, time: training FLOPs, with a teacher's forward passes, and seconds of the claim's left runs over those of
            its right ones, median over seeds; None where nothing was trained. Runs are those at each arm's own rate;
            times are of runs of one seed on one kind of processor.
        seeds, hours, scale, link: of the result.
    """

    experiment: str
    title: str
    reference: str
    question: str
    outcome: str
    effect: str
    verdict: str
    flops: float | None
    time: float | None
    seeds: int
    hours: float
    scale: str
    link: str


def digest(chapters: Sequence[Chapter], rows: Sequence[ClaimRow]) -> list[Row]:
    """Return a row for every experiment that has a result, in the order of the paper: the strongest scale of each."""
    found = []
    for chapter in chapters:
        about, result = chapter.about, next(iter(chapter.results), None)
        if result is None:
            continue
        claims = [r for r in rows if r.result is result and r.ours is not None]
        claim = next((r for r in claims if r.claim.id == _PREFERRED.get(about.name)), next(iter(claims), None))
        flops, time = _ratios(result, claim) if claim else (None, None)
        effect = ""
        if claim:
            effect = quantity(claim.ours, claim.claim)
            effect += f" ({claim.interval})" if claim.samples and claim.interval != "–" else ""
            effect += f", {claim.claim.left}" + (f" against {claim.claim.right}" if claim.claim.right else "")
        seconds = result.summary.training_seconds or result.computing_seconds
        found.append(
            Row(
                about.name,
                about.title,
                about.paper,
                about.question,
                result.title,
                effect,
                claim.verdict if claim else "",
                flops,
                time,
                len(result.summary.seeds),
                round(seconds / 3600, 2),
                result.scale,
                f"{result.path}/index.html",
            )
        )
    return found


def _own_seconds(run: RunRow) -> float:
    start, tokens = run.spec.get("start") or {}, run.result.get("tokens", 0)
    before = start.get("tokens", 0) / tokens if tokens else 0.0
    return run.result.get("seconds", 0.0) * (1 - before)


def hours(results: Sequence[Result]) -> float:
    """Return the hours of training and computing behind results; a run that several of them use counts once.

    Of a run that branches off another one, the share of its tokens after the start counts. A notebook's time counts
    where it trained nothing: else it may hold the waiting for its runs.
    """
    trained = {run.id: _own_seconds(run) for result in results for run in result.summary.runs}
    computed = [r.summary.notebook_seconds or 0 for r in results if not r.summary.training_seconds]
    return (sum(trained.values()) + sum(computed)) / 3600


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of equal keys as CSV."""
    return pd.DataFrame(rows).to_csv(index=False, lineterminator="\n") if rows else ""


def _ratios(result: Result, row: ClaimRow) -> tuple[float | None, float | None]:
    """Return FLOPs and time of the claim's left runs over its right ones, by seed."""
    # Students differ in how they are distilled, not in their model. Of other arms of one model (at a shared rate, on
    # another text) the first is the one that the claim is about.
    arms = {name: arm for base in distillation.TEACHERS for arm, name in distillation.names(base).items()}
    arms |= {model: arm for arm, model in reversed(models_of(result).items())}
    pair = [arms.get(name) for name in (row.claim.left, row.claim.right)]
    runs: dict[tuple[str | None, int], list[RunRow]] = {}
    for run in result.summary.runs:
        runs.setdefault((run.label, run.seed), []).append(run)
    flops, time = [], []
    for seed in {seed for _, seed in runs}:
        both = [run for arm in pair for run in runs.get((arm, seed), [])]
        if [run.label for run in both] != pair:
            continue
        with contextlib.suppress(ValueError):  # a spec of another version
            left, right = (RunSpec.from_json(run.spec).total_cost for run in both)
            flops.append(left / right)
        same = len({processor for run in both for processor in result.processors(run)}) == 1
        seconds = [run.result.get("seconds", 0.0) for run in both]
        if same and all(seconds):
            time.append(seconds[0] / seconds[1])
    return (statistics.median(flops) if flops else None), (statistics.median(time) if time else None)
